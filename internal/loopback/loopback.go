// Package loopback gives tests addresses that stay theirs while nobody listens
// there: a node that is down must find its port free when it comes back. One
// that the kernel chose is anybody's meanwhile, as the near end of a
// connection for instance.
package loopback

import (
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
)

// Addr is this process's own address on the loopback interface.
var Addr = netip.AddrFrom4([4]byte{127, 1 + byte(os.Getpid()>>14), byte(os.Getpid() >> 7), 1 + byte(os.Getpid())&127})

// The kernel takes ports of outgoing connections from 32768 on.
const firstPort, lastPort = 10000, 32767

var next atomic.Int32

// AddrPort is a port at Addr that was not given to anybody before, and free.
func AddrPort(t testing.TB) netip.AddrPort {
	t.Helper()
	for p := firstPort + int(next.Add(1)) - 1; p <= lastPort; p = firstPort + int(next.Add(1)) - 1 {
		a := netip.AddrPortFrom(Addr, uint16(p))
		if l, err := net.Listen("tcp4", a.String()); err == nil {
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			return a
		}
	}
	t.Fatalf("no port is left at %s", Addr)
	panic("unreachable")
}
