package transport

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Two machines, as far as TCP can tell:
//
//	namespace near            namespace far
//	198.51.100.1  near ---- far  198.51.100.2
//	2001:db8::1                  2001:db8::2
type twoHosts struct {
	near, far netns.NsHandle
	home      netns.NsHandle
}

var (
	near4, far4 = netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("198.51.100.2")
	near6, far6 = netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
)

// newTwoHosts locks the test to its thread, which stays in namespace near.
func newTwoHosts(t *testing.T) *twoHosts {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make network namespaces: run as root")
	}
	runtime.LockOSThread()
	h := &twoHosts{near: netns.None(), far: netns.None()}
	var err error
	if h.home, err = netns.Get(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// A thread that cannot return stays locked: it ends with the test.
		if err := netns.Set(h.home); err != nil {
			t.Error(err)
			return
		}
		for _, ns := range []*netns.NsHandle{&h.near, &h.far, &h.home} {
			if ns.IsOpen() {
				_ = ns.Close()
			}
		}
		runtime.UnlockOSThread()
	})
	if h.far, err = netns.New(); errors.Is(err, unix.EPERM) {
		t.Skipf("needs CAP_SYS_ADMIN to make network namespaces: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	if h.near, err = netns.New(); err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "near"}, PeerName: "far", PeerNamespace: netlink.NsFd(h.far)}))
	up := func(link string, addrs ...string) {
		t.Helper()
		l, err := netlink.LinkByName(link)
		must(err)
		for _, a := range addrs {
			addr, err := netlink.ParseAddr(a)
			must(err)
			addr.Flags = unix.IFA_F_NODAD // usable at once
			must(netlink.AddrAdd(l, addr))
		}
		must(netlink.LinkSetUp(l))
	}
	up("near", "198.51.100.1/24", "2001:db8::1/64")
	h.inFar(t, func() { up("far", "198.51.100.2/24", "2001:db8::2/64") })
	return h
}

// inFar runs f in the other namespace. Sockets belong to the namespace in
// which they were made, whoever uses them.
func (h *twoHosts) inFar(t *testing.T, f func()) {
	t.Helper()
	if err := netns.Set(h.far); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := netns.Set(h.near); err != nil {
			t.Fatal(err)
		}
	}()
	f()
}

// warm makes a connection and drops it. The first packets over a new link may
// be lost, and a connection whose SYN was has a retransmission timer of 3 s
// for a while: not the one under test.
func (h *twoHosts) warm(t *testing.T, near, far netip.Addr) {
	t.Helper()
	var l Listener
	h.inFar(t, func() { l = listen(t, newPlain(t, near), far) })
	mustPair(t, newPlain(t, far), near, far, l)
}

// hostsPair connects near to far. Each end has the other's address as peer.
func hostsPair(t *testing.T, h *twoHosts, near, far netip.Addr, opt Options) (dialed, accepted Conn) {
	t.Helper()
	needMD5(t)
	h.warm(t, near, far)
	dialer, err := NewMD5Sig(far, testKey, opt)
	if err != nil {
		t.Fatal(err)
	}
	acceptor, err := NewMD5Sig(near, testKey, opt)
	if err != nil {
		t.Fatal(err)
	}
	var l Listener
	h.inFar(t, func() { l = listen(t, acceptor, far) })
	return mustPair(t, dialer, near, far, l)
}

// TestUserTimeout cuts the wire under a connection with bytes on the way.
func TestUserTimeout(t *testing.T) {
	const timeout = 500 * time.Millisecond
	for _, p := range []struct {
		name      string
		near, far netip.Addr
	}{{"IPv4", near4, far4}, {"IPv6", near6, far6}} {
		t.Run(p.name, func(t *testing.T) {
			h := newTwoHosts(t)
			a, b := hostsPair(t, h, p.near, p.far, Options{UserTimeout: timeout})
			if err := writeAll(a, []byte("x")); err != nil {
				t.Fatal(err)
			}
			if err := readFull(b, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			h.inFar(t, func() {
				l, err := netlink.LinkByName("far")
				if err == nil {
					err = netlink.LinkSetDown(l)
				}
				if err != nil {
					t.Fatal(err)
				}
			})
			start := time.Now()
			if err := writeAll(a, []byte("into the void")); err != nil {
				t.Fatal(err)
			}
			err := readFull(a, make([]byte, 1))
			var ce *ConnError
			if !errors.As(err, &ce) || !ce.Timeout() {
				t.Fatalf("%v is not the ConnError of a timeout", err)
			}
			// The kernel looks when it retransmits, at growing intervals.
			if d := time.Since(start); d < timeout || d > 10*timeout {
				t.Errorf("failed after %v, want about %v", d, timeout)
			}
		})
	}
}

// TestWhoseCounter: namespaces have counters of their own, so it shows which
// end learns what. The dialing end learns nothing from a wrong key, and
// nothing tells it apart from a peer that does not listen.
func TestWhoseCounter(t *testing.T) {
	needMD5(t)
	for _, c := range []struct {
		name   string
		listen bool
		key    []byte
		far    Counters
	}{
		{"wrong key", true, otherKey, Counters{MD5Failure: 1}},
		{"nobody listens", false, testKey, Counters{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newTwoHosts(t)
			h.warm(t, near4, far4)
			port := uint16(7447)
			var before Counters
			h.inFar(t, func() { before = mustCounters(t) })
			if c.listen {
				h.inFar(t, func() { port = listen(t, newMD5(t, near4, testKey), far4).Addr().Port() })
			}
			ctx, cancel := context.WithTimeout(t.Context(), short)
			defer cancel()
			conn, err := newMD5(t, far4, c.key).Dial(ctx, near4, netip.AddrPortFrom(far4, port))
			if err == nil {
				_ = conn.Close()
				t.Fatal("connected")
			}
			var de *DialError
			if !errors.As(err, &de) || !de.Timeout() || de.Rose != (Counters{}) || !strings.Contains(err.Error(), "no answer") {
				t.Errorf("the dialing end says: %v", err)
			}
			h.inFar(t, func() {
				if d := cmp.Diff(c.far, mustCounters(t).Sub(before)); d != "" {
					t.Errorf("counters of the listening end: %s", d)
				}
			})
		})
	}
}

// TestHalfOpen leaves a connection half open, by losing every answer to its
// SYN, and expects Accept to deliver the next one all the same.
func TestHalfOpen(t *testing.T) {
	needMD5(t)
	h := newTwoHosts(t)
	h.warm(t, near4, far4)
	var l Listener
	h.inFar(t, func() { l = listen(t, newMD5(t, near4, testKey), far4) })
	tr := newMD5(t, far4, testKey)
	// Frames to an Ethernet address that nobody has are lost.
	var lost netlink.Neigh
	h.inFar(t, func() {
		link, err := netlink.LinkByName("far")
		if err != nil {
			t.Fatal(err)
		}
		lost = netlink.Neigh{
			LinkIndex: link.Attrs().Index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT,
			IP: near4.AsSlice(), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 0x99},
		}
		if err := netlink.NeighSet(&lost); err != nil {
			t.Fatal(err)
		}
	})
	if c, err := dial(tr, near4, far4, l, short); err == nil {
		_ = c.Close()
		t.Fatal("connected without an answer")
	}
	h.inFar(t, func() {
		const synRecv = " 03 " // state, the fourth column
		table, err := os.ReadFile("/proc/thread-self/net/tcp")
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(table), synRecv) {
			t.Fatalf("no half-open connection:\n%s", table)
		}
		if err := netlink.NeighDel(&lost); err != nil {
			t.Fatal(err)
		}
	})
	a, b := mustPair(t, tr, near4, far4, l)
	if err := writeAll(a, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := readFull(b, make([]byte, 1)); err != nil {
		t.Error(err)
	}
}
