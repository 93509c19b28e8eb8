package transport

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// short is how long a dial waits that is meant not to succeed. Its first SYN
// is dropped at once; the kernel sends the next after a second.
const short = 100 * time.Millisecond

// TestStrangers dials a signed listener in every wrong way. None connects,
// each raises the counter that tells them apart, and the peer still connects.
func TestStrangers(t *testing.T) {
	md5 := func(peer netip.Addr, key []byte) func(testing.TB) Transport {
		return func(t testing.TB) Transport { return newMD5(t, peer, key) }
	}
	plain := func(peer netip.Addr) func(testing.TB) Transport {
		return func(t testing.TB) Transport { return newPlain(t, peer) }
	}
	failure := func(c Counters) uint64 { return c.MD5Failure }
	notFound := func(c Counters) uint64 { return c.MD5NotFound }
	for _, p := range places {
		// Dialed from an address that the listener does not know. ::1 is
		// the only address of IPv6 loopback, so there it expects another.
		unlisted, expected := other4, p.peer
		if p.peer.Is6() {
			unlisted, expected = p.peer, netip.MustParseAddr("fd00::1")
		}
		for _, c := range []struct {
			name     string
			expected netip.Addr // the listener's peer
			from     netip.Addr
			dialer   func(testing.TB) Transport
			rises    func(Counters) uint64
			says     string
		}{
			{"wrong key", p.peer, p.local, md5(p.peer, otherKey), failure, "TCPMD5Failure"},
			{"no key", p.peer, p.local, plain(p.peer), notFound, "TCPMD5NotFound"},
			{"unlisted address, right key", expected, unlisted, md5(p.peer, testKey), failure, "TCPMD5Failure"},
			{"unlisted address, other key", expected, unlisted, md5(p.peer, otherKey), failure, "TCPMD5Failure"},
			{"unlisted address, no key", expected, unlisted, plain(p.peer), notFound, "TCPMD5NotFound"},
		} {
			t.Run(p.name+"/"+c.name, func(t *testing.T) {
				if p.peer.Is6() || p.listen.Is6() {
					needIPv6(t)
				}
				l := listen(t, newMD5(t, c.expected, testKey), p.listen)
				before := mustCounters(t)
				conn, err := dial(c.dialer(t), c.from, p.peer, l, short)
				if err == nil {
					_ = conn.Close()
					t.Fatal("connected")
				}
				rose := mustCounters(t).Sub(before)
				if c.rises(rose) == 0 {
					t.Errorf("the counter did not rise: %+v", rose)
				}
				if d := rose.Diagnose(); !strings.Contains(d, c.says) {
					t.Errorf("diagnosis %q does not name %s", d, c.says)
				}
				var de *DialError
				if !errors.As(err, &de) || !de.Timeout() || !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("%v is not the DialError of a timeout", err)
				}
				if c.expected == p.peer {
					mustPair(t, newMD5(t, p.peer, testKey), p.local, p.peer, l)
				}
			})
		}
	}
}

// TestDualStackStranger: a listener on [::] for an IPv4 peer hears IPv6 too.
func TestDualStackStranger(t *testing.T) {
	needIPv6(t)
	l := listen(t, newMD5(t, loop4, testKey), netip.IPv6Unspecified())
	for name, tr := range map[string]Transport{"no key": newPlain(t, loop6), "right key": newMD5(t, loop6, testKey)} {
		before := mustCounters(t)
		if c, err := dial(tr, loop6, loop6, l, short); err == nil {
			_ = c.Close()
			t.Errorf("%s: connected over IPv6", name)
		}
		if mustCounters(t).Sub(before).Diagnose() == "" {
			t.Errorf("%s: no counter rose", name)
		}
	}
}

func mustCounters(t testing.TB) Counters {
	t.Helper()
	c, err := ReadCounters()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestKeyHereOnly: the listener has no key. Its kernel drops what is signed.
func TestKeyHereOnly(t *testing.T) {
	tr := newMD5(t, loop4, testKey)
	l := listen(t, newPlain(t, loop4), loop4)
	before := mustCounters(t)
	if c, err := dial(tr, loop4, loop4, l, short); err == nil {
		_ = c.Close()
		t.Fatal("a signed connection to an unsigned listener")
	} else if !strings.Contains(err.Error(), "TCPMD5Unexpected") {
		t.Errorf("%v does not name the counter", err)
	}
	if rose := mustCounters(t).Sub(before); rose.MD5Unexpected == 0 {
		t.Errorf("TCPMD5Unexpected did not rise: %+v", rose)
	}
}

// TestRejected: without signatures the address check after accept remains.
func TestRejected(t *testing.T) {
	tr := newPlain(t, loop4)
	l := listen(t, tr, loop4)
	stranger, err := dial(tr, other4, loop4, l, patience)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stranger.Close() }()
	_, accepted := mustPair(t, tr, loop4, loop4, l)
	if got := accepted.RemoteAddr().Addr(); got != loop4 {
		t.Errorf("accepted %v", got)
	}
	if err := readFull(stranger, make([]byte, 1)); err != io.EOF {
		t.Errorf("the stranger reads %v, want io.EOF", err)
	}
	if n := tr.rejected.Load(); n != 1 {
		t.Errorf("%d connections rejected, want 1", n)
	}
	// Nobody else can tell: the stranger may be the peer, and this node's
	// address of it wrong.
	if d := tr.Diagnose(); !strings.Contains(d, other4.String()) || !strings.Contains(d, loop4.String()) {
		t.Errorf("it says %q, and not who was refused for whom", d)
	}
}

// TestSigned proves that an established connection is signed: a socket of the
// same addresses without a key would not be heard. The kernel has no way to
// ask, so the accepted end's key is replaced, and silence follows.
func TestSigned(t *testing.T) {
	tr := newMD5(t, loop4, testKey)
	l := listen(t, tr, loop4)
	a, b := mustPair(t, tr, loop4, loop4, l)
	if err := setMD5Key(b.(*tcpConn).fd.sock, false, loop4, -1, otherKey); err != nil {
		t.Fatal(err)
	}
	before := mustCounters(t)
	if err := writeAll(a, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if rose := mustCounters(t).Sub(before); rose.MD5Failure == 0 {
		t.Errorf("TCPMD5Failure did not rise: %+v", rose)
	}
	if n, err := b.TryRead(make([]byte, 1)); n != 0 || err != nil {
		t.Errorf("read %d, %v over mismatched keys", n, err)
	}
	// With the right key again, the kernel's retransmission gets through.
	if err := setMD5Key(b.(*tcpConn).fd.sock, false, loop4, -1, testKey); err != nil {
		t.Fatal(err)
	}
	if err := readFull(b, make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

func TestSocketOptions(t *testing.T) {
	needMD5(t)
	tr, err := NewMD5Sig(loop4, testKey, Options{UserTimeout: 1234 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	l := listen(t, tr, loop4)
	a, b := mustPair(t, tr, loop4, loop4, l)
	for end, c := range map[string]Conn{"dialed": a, "accepted": b} {
		fd := c.(*tcpConn).fd.sock
		for _, o := range []struct {
			name       string
			level, opt int
			want       int
		}{
			{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
			{"TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 1234},
			{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepIdle},
			{"SO_PROTOCOL", unix.SOL_SOCKET, unix.SO_PROTOCOL, unix.IPPROTO_TCP}, // not MPTCP
		} {
			if got, err := unix.GetsockoptInt(fd, o.level, o.opt); err != nil || got != o.want {
				t.Errorf("%s end: %s is %d, %v, want %d", end, o.name, got, err, o.want)
			}
		}
		if cc, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION); err != nil || cc != "cubic" && cc != "reno" {
			t.Errorf("%s end: congestion control %q, %v", end, cc, err)
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%s end: descriptor flags %#x, %v, want FD_CLOEXEC", end, flags, err)
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
			t.Errorf("%s end: status flags %#x, %v, want O_NONBLOCK", end, flags, err)
		}
	}
}

// A connection on which nothing is sent, and of which somebody on the way no longer
// lets anything through, fails by itself.
func TestSilentConnectionIsCut(t *testing.T) {
	tr, err := NewPlain(loop4, Options{UserTimeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	l := listen(t, tr, loop4)
	a, b := mustPair(t, tr, loop4, loop4, l)
	nothing := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
	for _, c := range []Conn{a, b} {
		fd := c.(*tcpConn).fd.sock
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &nothing[0]}); err != nil {
			t.Fatal(err)
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 1); err != nil { // the test has not so long
			t.Fatal(err)
		}
	}
	for _, c := range []Conn{a, b} {
		deadline := time.Now().Add(3 * patience)
		for {
			_, err := c.TryRead(make([]byte, 1))
			if e := (*ConnError)(nil); errors.As(err, &e) && e.Timeout() {
				break
			}
			if err != nil || time.Now().After(deadline) {
				t.Fatalf("it ends with %v", err)
			}
			if err := c.Wait(false, time.Second); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestRefusedConfigurations(t *testing.T) {
	needMD5(t)
	var ce *ConfigError
	for _, key := range [][]byte{nil, {}, make([]byte, MaxKeyLen+1)} {
		if _, err := NewMD5Sig(loop4, key, Options{}); !errors.As(err, &ce) {
			t.Errorf("key of %d bytes: %v, want a ConfigError", len(key), err)
		}
	}
	for _, peer := range []netip.Addr{{}, netip.IPv4Unspecified(), netip.IPv6Unspecified(), netip.MustParseAddr("::ffff:0.0.0.0"), netip.MustParseAddr("224.0.0.1")} {
		if _, err := NewMD5Sig(peer, testKey, Options{}); !errors.As(err, &ce) {
			t.Errorf("peer %v: %v, want a ConfigError", peer, err)
		}
	}
	tr := newMD5(t, loop4, testKey)
	for _, local := range []netip.AddrPort{{}, netip.AddrPortFrom(loop6, 0)} {
		if l, err := tr.Listen(local); !errors.As(err, &ce) {
			t.Errorf("listen on %v for an IPv4 peer: %v, %v, want a ConfigError", local, l, err)
		}
	}
	if c, err := tr.Dial(t.Context(), loop6, netip.AddrPortFrom(loop4, 1)); !errors.As(err, &ce) {
		t.Errorf("dial of IPv4 from IPv6: %v, %v, want a ConfigError", c, err)
	}
	// The longest key and the mapped form of the peer are fine.
	long, err := NewMD5Sig(netip.MustParseAddr("::ffff:127.0.0.1"), []byte(strings.Repeat("k", MaxKeyLen)), Options{})
	if err != nil {
		t.Fatal(err)
	}
	l := listen(t, long, netip.MustParseAddr("::ffff:127.0.0.1"))
	mustPair(t, long, netip.MustParseAddr("::ffff:127.0.0.1"), netip.MustParseAddr("::ffff:127.0.0.1"), l)
}

func TestSetupErrors(t *testing.T) {
	tr := newPlain(t, loop4)
	l := listen(t, tr, loop4)
	var se *SetupError
	if _, err := tr.Listen(l.Addr()); !errors.As(err, &se) || !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a port in use: %v", err)
	}
	if _, err := tr.Listen(netip.MustParseAddrPort("192.0.2.1:0")); !errors.As(err, &se) || !errors.Is(err, unix.EADDRNOTAVAIL) || !strings.Contains(err.Error(), "interface is up") {
		t.Errorf("an address of nobody here: %v", err)
	}
	// Nobody listens: refused, which is not a timeout.
	port := l.Addr()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	var de *DialError
	if _, err := tr.Dial(t.Context(), loop4, port); !errors.As(err, &de) || !errors.Is(err, unix.ECONNREFUSED) || de.Timeout() {
		t.Errorf("a closed port: %v", err)
	}
}

// TestUnsupported: the answers of kernels that this test cannot boot.
func TestUnsupported(t *testing.T) {
	for _, c := range []struct {
		errno unix.Errno
		fips  bool
		says  string
	}{
		{unix.ENOPROTOOPT, false, "CONFIG_TCP_MD5SIG"},
		{unix.ENOMEM, true, "fips"},
		{unix.ENOMEM, false, "optmem_max"},
		{unix.EOPNOTSUPP, false, "fips"},
		{unix.EINVAL, false, "qemu-user"},
		{unix.EPERM, false, "seccomp"},
	} {
		err := error(unsupported(c.errno, c.fips))
		if !errors.Is(err, c.errno) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v (FIPS %v): %q does not say %q", c.errno, c.fips, err, c.says)
		}
	}
}
