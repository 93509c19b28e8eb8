package nvmmirror

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/internal/loopback"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// over makes the transport of one end of a pair in this process. The two ends of
// a test share keys: of TLS, end 0 and end 1 each have their own.
type over func(t testing.TB, end int, timeout time.Duration) transport.Transport

var tlsKeys = sync.OnceValue(func() (k [3]*transport.TLSKey) {
	for i := range k {
		var err error
		if k[i], err = transport.NewTLSKey(); err != nil {
			panic(err)
		}
	}
	return k
})

// overTLS is TLS where each end has the key of its number and takes that of
// the other, but for the pins that are given.
func overTLS(pins ...*transport.Pin) over {
	return func(t testing.TB, end int, timeout time.Duration) transport.Transport {
		t.Helper()
		pin := tlsKeys()[1-end].Pin()
		if end < len(pins) && pins[end] != nil {
			pin = *pins[end]
		}
		tr, err := transport.NewTLS(loopback.Addr, tlsKeys()[end], pin, transport.Options{UserTimeout: timeout})
		if err != nil {
			t.Fatal(err)
		}
		return tr
	}
}

func overMD5Sig(t testing.TB, _ int, timeout time.Duration) transport.Transport {
	needMD5Sig(t)
	return newTransport(t, false, "a key of both", timeout)
}

func overPlain(t testing.TB, _ int, timeout time.Duration) transport.Transport {
	return newTransport(t, true, "", timeout)
}

var everyTransport = []struct {
	name string
	over over
}{
	{transport.NameMD5Sig, overMD5Sig},
	{transport.NameTLS, overTLS()},
	{transport.NamePlain, overPlain},
}

// pairOver is two blank nodes over transports of their own. The faults of
// their wire lie between transport and node.
func pairOver(t *testing.T, c testConfig, ends [2]over) (a, b *testNode) {
	t.Helper()
	c.plain = true // no need for a kernel that signs
	a, b = newPair(t, c)
	a.close()
	b.close()
	for i, n := range []*testNode{a, b} {
		tr := ends[i](t, i, n.opt.Peer.Timeout)
		if n.wire != nil {
			n.wire.Transport = tr
		} else {
			n.opt.Peer.Transport = tr
		}
	}
	a.open()
	b.open()
	return a, b
}

// A pair's life over each transport: commits of all sizes, the primary killed
// under load, failover, rejoin.
func TestTransports(t *testing.T) {
	t.Parallel()
	for _, c := range everyTransport {
		t.Run(c.name, func(t *testing.T) {
			a, b := pairOver(t, testConfig{quiet: true}, [2]over{c.over, c.over})
			a.promote(false)
			a.inSync()
			for _, n := range []*testNode{a, b} {
				if s := n.Status(); s.Transport != c.name {
					t.Errorf("%s: status shows the transport %q", n.name, s.Transport)
				}
			}
			fill(t, a, 21, 40, 300_000) // segments that are one frame, and more
			var mu sync.Mutex
			primary := a.Volume
			l := startLoad(t, 4, func() *Volume {
				mu.Lock()
				defer mu.Unlock()
				return primary
			})
			to := func(v *Volume) {
				mu.Lock()
				defer mu.Unlock()
				primary = v
			}
			l.more(200)
			to(nil)
			a.crash()
			b.peerIs("lost")
			b.promote(false)
			to(b.Volume)
			l.more(0)
			a.open()
			a.inSync()
			l.more(200)
			l.end()
			l.check(b)
			identical(t, b, a)
			if c := a.Status().Counters; c.CRCFailures+c.BadBlocks != 0 {
				t.Errorf("%+v", c)
			}
		})
	}
}

// Where the ends do not fit together, status says so on both, within seconds,
// and names what to do.
func TestTransportMismatch(t *testing.T) {
	t.Parallel()
	needMD5Sig(t)
	stranger := tlsKeys()[2].Pin()
	for _, c := range []struct {
		name   string
		ends   [2]over
		says   [2][]string // any of each
		kernel bool        // needs one that signs
	}{
		{"a pins another key", [2]over{overTLS(&stranger), overTLS(&stranger)},
			[2][]string{{"another key than the one pinned here", "tls_peer"}, {"the peer refused this node's key", "tls_peer"}}, false},
		{"both pin another key", [2]over{overTLS(&stranger, &stranger), overTLS(&stranger, &stranger)},
			[2][]string{{"another key than the one pinned here", "tls_peer"}, {"another key than the one pinned here", "tls_peer"}}, false},
		{"tls and plain", [2]over{overTLS(), overPlain},
			[2][]string{{"same transport on both nodes"}, {"the peer speaks TLS", "same transport on both nodes"}}, false},
		{"tls and md5sig", [2]over{overTLS(), overMD5Sig},
			[2][]string{{"TCPMD5", "same transport"}, {"TCPMD5NotFound", "same transport"}}, true},
		{"plain and md5sig", [2]over{overPlain, overMD5Sig},
			[2][]string{{"TCPMD5", "same transport"}, {"TCPMD5NotFound", "same transport"}}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := pairOver(t, testConfig{quiet: true, bare: true, timeout: time.Second}, c.ends)
			start := time.Now()
			for i, n := range []*testNode{a, b} {
				s := n.until(fmt.Sprintf("saying %q", c.says[i]), func(s Status) bool {
					return s.Peer == "lost" && !slices.ContainsFunc(c.says[i], func(w string) bool { return !strings.Contains(s.Reason, w) })
				})
				t.Logf("%s after %.1f s: %s", n.name, time.Since(start).Seconds(), s.Reason)
			}
			if d := time.Since(start); d > 8*time.Second {
				t.Errorf("said after %v", d)
			}
		})
	}
}

// A node that has another address of the peer than the one that the peer sends
// from closes its connections: its status says so, as nobody else can.
func TestTransportOtherAddress(t *testing.T) {
	needMD5Sig(t) // what a bare pair begins with
	t.Parallel()
	other := loopback.Addr.As4() // of this process as well
	other[0], other[1] = 127, other[1]+100
	from := netip.AddrFrom4(other)
	for _, c := range everyTransport[1:] { // the kernel drops what is not signed for its address
		t.Run(c.name, func(t *testing.T) {
			a, b := pairOver(t, testConfig{quiet: true, bare: true}, [2]over{c.over, c.over})
			b.close()
			port := netip.MustParseAddrPort(b.opt.Peer.Listen).Port()
			b.opt.Peer.Listen = netip.AddrPortFrom(from, port).String()
			b.open()
			s := a.until("naming the address that it refuses", func(s Status) bool { return strings.Contains(s.Reason, from.String()) })
			t.Log(s.Reason)
		})
	}
}

// On a plain wire any message can arrive damaged. In a header or in a body,
// of each type that a pair in motion sends: the session ends and begins anew,
// and both nodes hold the same. That of a segment is in TestCorruptedFrame.
func TestTransportPlainMessages(t *testing.T) {
	t.Parallel()
	const (
		magic                                          = "NVMW"
		header                                         = 64
		hello, chain, verdict, follow, followed, join_ = 1, 2, 3, 4, 5, 6
		joined, heartbeat, ack                         = 7, 8, 9
	)
	a, b := pairOver(t, testConfig{quiet: true}, [2]over{overPlain, overPlain})
	a.promote(false)
	a.inSync()
	fill(t, a, 22, 20, 20_000)
	// Which end sends it to which: the primary leads.
	inHeader := []int{8, 17, 33, 50, 63} // session, a, c, length, checksum
	for i, c := range []struct {
		typ  uint16
		from *testNode
		body bool // it has one
	}{
		{hello, a, true}, {hello, b, true}, {chain, a, false}, {chain, b, false}, {verdict, a, true}, {verdict, b, true},
		{follow, a, true}, {followed, b, false}, {join_, a, true}, {joined, b, false}, {heartbeat, a, false}, {ack, b, false}, // which answers a heartbeat
	} {
		for _, at := range []int{inHeader[i%len(inHeader)], header} {
			if at == header && !c.body {
				continue
			}
			before := a.Status().Counters.Reconnects
			c.from.wire.setCorrupt(func(out []byte) int {
				for i := 0; i+header <= len(out); {
					if string(out[i:i+4]) != magic {
						return -1
					}
					n := header + int(binary.LittleEndian.Uint32(out[i+48:]))
					if binary.LittleEndian.Uint16(out[i+6:]) == c.typ && i+at < len(out) {
						out[i+at] ^= 1
						return i + at
					}
					i += n
				}
				return -1
			})
			if c.typ <= joined { // sent where a session begins
				other := map[*testNode]*testNode{a: b, b: a}[c.from]
				other.close()
				other.open()
			}
			what := fmt.Sprintf("type %d, byte %d", c.typ, at)
			c.from.until("corrupting a message of "+what, func(Status) bool {
				_, _, left := c.from.wire.faults()
				if left != nil && c.typ == ack && a.Status().Serving {
					commit(t, a, 0, []byte(what))
				}
				return left == nil
			})
			if c.typ > joined {
				a.until("in a new session after "+what, func(s Status) bool { return s.Counters.Reconnects > before })
			}
			a.inSync()
			b.inSync()
			commit(t, a, 4096, []byte(what))
		}
	}
	identical(t, a, b)
	if c := b.Status().Counters; c.BadBlocks != 0 || c.Refused != 0 {
		t.Errorf("%+v", c)
	}
}
