// Command peers measures what else makes a small write safe twice, and this
// project's mirrored commit beside it, in turns in the same run, and prints one
// table of ratios. Each peer has one client with one write of 64 bytes
// outstanding, everything on tmpfs on this machine:
//
//   - Redis: SET and WAIT 1 in one request, two servers, both with an
//     append-only file that is synced at each write;
//   - PostgreSQL: a prepared INSERT, synchronous_commit=on, one synchronous
//     standby;
//   - etcd: a put, one member;
//   - libpmem and libpmemlog, by hack/pmembench: no mirror, the memory alone;
//   - DRBD protocol C between two emulated NVDIMMs, in a guest, 4 KiB writes,
//     with a pair in the same guest.
//
// A peer counts only where it is proved to do what is claimed: by its own
// counters, and by what its second copy holds at the end. What is missing on
// this machine is skipped, and the output says so.
//
// This is a module of its own: its clients are no dependency of the mirror.
package main
