// Package faultwire is a wire that lies: two network namespaces whose only
// connection passes through this process, which damages it on purpose.
//
//	 namespace A                                               namespace B
//	+-----------+      +------+    AtoB: one goroutine    +------+      +-----------+
//	| sockets   |----->| TUN  |===> faults, capture ====>| TUN  |----->| sockets   |
//	|           |<-----| dev  |<=== faults, capture <====| dev  |<-----|           |
//	+-----------+      +------+    BtoA: one goroutine    +------+      +-----------+
//
// The devices are TUN without a virtio header: the kernel computes every
// checksum before a packet leaves a namespace and verifies it when the packet
// enters the other. On veth a packet stays CHECKSUM_PARTIAL, is never
// verified, and a damaged one would prove nothing.
//
// What holds, and what the tests of the rest of the project lean on:
//
//   - A packet suffers at most one fault, delay apart. A fault is counted when
//     its packet has been handed to the receiving kernel (or, for a loss, when
//     it is lost). TUN hands over synchronously: once [Direction.SetPlan] has
//     returned, every packet damaged before is counted in [Stats] and in the
//     receiving namespace's counters alike.
//   - Swap and Add change bytes of TCP payload and keep the sum that TCP's
//     checksum is made of. Flip changes exactly one bit, which that checksum
//     always finds. None touches a TCP option, unless Rule.Any says so.
//   - Where the kernel finds damage: on a plain connection in Tcp.InCsumErrors
//     (Flip, a Truncate with the right length) or nowhere (Swap, Add); on a signed
//     one in TcpExt.TCPMD5Failure, because Linux checks the signature first, but
//     for segments of at most 76 bytes, whose checksum it checks before. A
//     Truncate that the IP header contradicts is IpExt.InTruncatedPkts on both.
//   - Choices come from the seed: the same packets in the same order suffer
//     the same faults. The kernel's packets (retransmissions, acknowledgements)
//     depend on timing, so a seed repeats the choices and not the run.
//   - Nothing has a name outside this process: namespaces and devices live on
//     file descriptors and go with them, after a kill -9 too.
//
// Creating a wire needs CAP_SYS_ADMIN (a network namespace), CAP_NET_ADMIN and
// /dev/net/tun; without them [New] returns an error that is [ErrNotPermitted].
package faultwire
