// Package chaos holds suites that run pairs of real daemons, as processes
// in the two network namespaces of a wire that lies (package faultwire), and
// speak to them as every client does, through their admin sockets.
//
//   - TestWire…: a pair under write load over every fault of the wire. Nothing
//     wrong is applied, nothing acknowledged is lost, the kernel's and the
//     pair's counters account for each damaged packet.
//   - TestChaos…: nodes are killed and stopped, the link is cut both ways or
//     one way, file systems fill up, the survivor is promoted, while clients
//     write and read. What they saw must be linearizable, with one acknowledger
//     at a time.
//   - TestFull…, TestHole…: what a full file system can and cannot do to a node.
//
// They need what faultwire needs, and skip without it. `make test-root` runs
// them at full length; without NVMMIRROR_TEST_ROOT they are short.
package chaos
