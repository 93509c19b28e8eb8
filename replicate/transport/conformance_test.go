package transport

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A place is where a conformance run listens and from where it dials.
type place struct {
	name          string
	listen, local netip.Addr
	peer          netip.Addr // both the dialed and the accepted address
}

var places = []place{
	{"IPv4", loop4, loop4, loop4},
	{"IPv6", loop6, loop6, loop6},
	{"dual-stack", netip.IPv6Unspecified(), loop4, loop4},
}

// conformance is what every transport of this package promises its users.
// make returns the transport of either end, as the peer has the same address.
// A message read costs at most allocs allocations, everything else none.
func conformance(t *testing.T, allocs float64, make func(t testing.TB, peer netip.Addr) Transport) {
	for _, p := range places {
		t.Run(p.name, func(t *testing.T) {
			if p.peer.Is6() || p.listen.Is6() {
				needIPv6(t)
			}
			tr := make(t, p.peer)
			l := listen(t, tr, p.listen)
			pair := func(t *testing.T) (Conn, Conn) { return mustPair(t, tr, p.local, p.peer, l) }

			t.Run("echo", func(t *testing.T) { conformEcho(t, p, pair) })
			t.Run("nothing yet", func(t *testing.T) { conformNothingYet(t, pair) })
			t.Run("stream both ways", func(t *testing.T) { conformStream(t, pair) })
			t.Run("wake", func(t *testing.T) { conformWake(t, pair) })
			t.Run("close", func(t *testing.T) { conformClose(t, pair) })
			t.Run("close races", func(t *testing.T) { conformCloseRaces(t, pair) })
			t.Run("peer closes", func(t *testing.T) { conformPeerCloses(t, pair) })
			t.Run("peer resets", func(t *testing.T) { conformPeerResets(t, p, pair) })
			t.Run("silent connection", func(t *testing.T) { conformSilent(t, tr, p, l) })
			t.Run("no allocation", func(t *testing.T) { conformAllocs(t, pair, allocs) })
			t.Run("listener closes", func(t *testing.T) { conformListenerCloses(t, tr, p) })
			t.Run("dial ends with its context", func(t *testing.T) { conformDialContext(t, tr, p) })
		})
	}
}

func TestMD5SigConformance(t *testing.T) {
	conformance(t, 0, func(t testing.TB, peer netip.Addr) Transport { return newMD5(t, peer, testKey) })
}

func TestPlainConformance(t *testing.T) {
	conformance(t, 0, func(t testing.TB, peer netip.Addr) Transport { return newPlain(t, peer) })
}

// Per record, crypto/tls allocates the reader that fetches it; under the race
// detector also what sync.Pool drops.
func TestTLSConformance(t *testing.T) {
	allocs := 1.0
	if raceEnabled {
		allocs = 3
	}
	conformance(t, allocs, func(t testing.TB, peer netip.Addr) Transport { return newTLS(t, peer) })
}

func needIPv6(t *testing.T) {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skipf("needs IPv6 on loopback: %v", err)
	}
	_ = l.Close()
}

type pairFunc func(*testing.T) (dialed, accepted Conn)

func conformEcho(t *testing.T, p place, pair pairFunc) {
	a, b := pair(t)
	if a.RemoteAddr().Addr() != p.peer || b.RemoteAddr().Addr() != p.peer {
		t.Errorf("remote addresses %v and %v, want %v", a.RemoteAddr(), b.RemoteAddr(), p.peer)
	}
	got := make([]byte, 5)
	for _, ends := range [][2]Conn{{a, b}, {b, a}} {
		if err := writeAll(ends[0], []byte("hello")); err != nil {
			t.Fatal(err)
		}
		if err := readFull(ends[1], got); err != nil || string(got) != "hello" {
			t.Fatalf("read %q, %v", got, err)
		}
	}
}

func conformNothingYet(t *testing.T, pair pairFunc) {
	a, _ := pair(t)
	if n, err := a.TryRead(make([]byte, 8)); n != 0 || err != nil {
		t.Errorf("TryRead of nothing: %d, %v", n, err)
	}
	if n, err := a.TryRead(nil); n != 0 || err != nil {
		t.Errorf("TryRead into nothing: %d, %v", n, err)
	}
	if n, err := a.TryWrite([][]byte{nil, {}}); n != 0 || err != nil {
		t.Errorf("TryWrite of nothing: %d, %v", n, err)
	}
	for _, d := range []time.Duration{-1, 0, 5 * time.Millisecond} {
		start := time.Now()
		if err := a.Wait(false, d); err != nil {
			t.Errorf("Wait %v: %v", d, err)
		}
		if slept := time.Since(start); slept < d || slept > patience/2 {
			t.Errorf("Wait %v took %v", d, slept)
		}
	}
	start := time.Now()
	if err := a.Wait(true, patience); err != nil || time.Since(start) > patience/2 {
		t.Errorf("Wait for an empty buffer to be writable: %v after %v", err, time.Since(start))
	}
}

// conformStream has one goroutine at each end that reads and writes, and more
// under way than the buffers hold, so that writes are cut short everywhere.
func conformStream(t *testing.T, pair pairFunc) {
	const size = 12<<20 + 7
	a, b := pair(t)
	fill := func(seed uint64) []byte {
		p := make([]byte, size)
		rng := rand.NewPCG(seed, 0)
		for i := 0; i+8 <= len(p); i += 8 {
			v := rng.Uint64()
			for j := range 8 {
				p[i+j] = byte(v >> (8 * j))
			}
		}
		return p
	}
	fromA, fromB := fill(1), fill(2)
	partial := 0
	duplex := func(c Conn, out, want []byte, seed uint64) error {
		rng := rand.New(rand.NewPCG(seed, 1))
		in := make([]byte, len(want))
		sent, got := 0, 0
		for sent < len(out) || got < len(in) {
			// Up to 100 buffers of uneven sizes, some empty: more than
			// one call takes.
			var bufs [][]byte
			end := sent
			for range rng.IntN(100) {
				n := min(rng.IntN(4)*rng.IntN(16<<10), len(out)-end)
				bufs = append(bufs, out[end:end+n])
				end += n
			}
			w, err := c.TryWrite(bufs)
			if err != nil {
				return err
			}
			if seed == 1 && 0 < w && w < end-sent {
				partial++
			}
			sent += w
			r, err := c.TryRead(in[got:min(len(in), got+rng.IntN(128<<10)+1)])
			if err != nil {
				return err
			}
			got += r
			if w == 0 && r == 0 {
				if err := c.Wait(sent < len(out), patience); err != nil {
					return err
				}
			}
		}
		if !bytes.Equal(in, want) {
			return errors.New("the bytes read are not those written")
		}
		return nil
	}
	// Who has finished stays with the connection until the other has too: its
	// last bytes may be on their way yet (see Conn).
	var finished atomic.Int32
	errs := make(chan error, 2)
	run := func(c, other Conn, out, want []byte, seed uint64) {
		err := duplex(c, out, want, seed)
		finished.Add(1)
		for other.Wake(); err == nil && finished.Load() < 2; {
			err = c.Wait(false, patience)
		}
		errs <- err
	}
	go run(a, b, fromA, fromB, 1)
	go run(b, a, fromB, fromA, 2)
	for range 2 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if partial == 0 {
		t.Error("no write was cut short: the test shows less than it should")
	}
}

func conformWake(t *testing.T, pair pairFunc) {
	// A connection each: a Wake of the chase may end a wait of later.
	a, _ := pair(t)
	t.Run("Wait", func(t *testing.T) { conformWakeOf(t, a, a.Wait) })
	b, _ := pair(t)
	t.Run("Park", func(t *testing.T) { conformWakeOf(t, b, b.Park) })
}

func conformWakeOf(t *testing.T, a Conn, wait func(write bool, d time.Duration) error) {
	quick := func(what string) {
		t.Helper()
		start := time.Now()
		if err := wait(false, patience); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if d := time.Since(start); d > patience/2 {
			t.Fatalf("%s: slept %v", what, d)
		}
	}
	a.Wake()
	quick("a Wake that came before")
	a.Wake()
	a.Wake()
	quick("two Wakes")
	// Two Wakes are one: the next wait sleeps.
	const nap = 5 * time.Millisecond
	start := time.Now()
	if err := wait(false, nap); err != nil || time.Since(start) < nap {
		t.Errorf("a wait after the woken one: %v after %v", err, time.Since(start))
	}
	// Waker and waiter chase each other: a lost Wake would end in a Wait of
	// its full length.
	const rounds = 5000
	var posted atomic.Int64
	seen := make(chan struct{})
	go func() {
		for range rounds {
			posted.Add(1)
			a.Wake()
			<-seen
		}
	}()
	for i := range int64(rounds) {
		for posted.Load() <= i {
			quick("chase")
		}
		seen <- struct{}{}
	}
}

func conformClose(t *testing.T, pair pairFunc) {
	a, _ := pair(t)
	// Both waiters are woken by Close, whichever comes first.
	errs := make(chan error, 2)
	for _, wait := range []func(bool, time.Duration) error{a.Wait, a.Park} {
		go func() {
			for {
				if err := wait(false, patience); err != nil {
					errs <- err
					return
				}
			}
		}()
	}
	for socketOf(a).fd.waiters.Load() < 2 {
		if err := a.Wait(false, time.Microsecond); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		select {
		case err := <-errs:
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("Wait during Close: %v", err)
			}
		case <-time.After(patience / 2):
			t.Fatal("Close did not wake a waiter")
		}
	}
	if _, err := a.TryRead(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("TryRead after Close: %v", err)
	}
	if _, err := a.TryWrite([][]byte{{1}}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("TryWrite after Close: %v", err)
	}
	if err := a.Wait(true, patience); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Wait after Close: %v", err)
	}
	if err := a.Park(true, patience); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Park after Close: %v", err)
	}
	if err := a.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second Close: %v", err)
	}
	a.Wake() // harmless
}

func conformPeerCloses(t *testing.T, pair pairFunc) {
	a, b := pair(t)
	if err := writeAll(b, []byte("last")); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if err := readFull(a, got); err != nil || string(got) != "last" {
		t.Fatalf("before the end: %q, %v", got, err)
	}
	for range 2 {
		if err := readFull(a, got); err != io.EOF {
			t.Errorf("at the end: %v, want io.EOF", err)
		}
	}
}

// conformPeerResets disconnects one end, which makes the kernel send a reset
// instead of an end of file, as it does for a process that was killed with
// bytes unread.
func conformPeerResets(t *testing.T, p place, pair pairFunc) {
	a, b := pair(t)
	unspec := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	if _, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(socketOf(b).fd.sock), uintptr(unsafe.Pointer(&unspec)), unsafe.Sizeof(unspec)); errno != 0 {
		t.Fatal(errno)
	}
	err := readFull(a, make([]byte, 1))
	var ce *ConnError
	if !errors.As(err, &ce) || !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("after a reset: %v, want a ConnError of ECONNRESET", err)
	}
	if ce.Peer.Addr() != p.peer || ce.Local.Addr() != p.local || ce.Op != "read" || ce.Timeout() {
		t.Errorf("the error names the wrong connection: %+v", ce)
	}
	// It stays failed, and for the same reason.
	if _, err := a.TryRead(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("TryRead after a reset: %v", err)
	}
	if _, err := a.TryWrite([][]byte{{1}}); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("TryWrite after a reset: %v", err)
	}
}

func conformSilent(t *testing.T, tr Transport, p place, l Listener) {
	silent, err := dial(tr, p.local, p.peer, l, patience)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	gone, err := dial(tr, p.local, p.peer, l, patience)
	if err != nil {
		t.Fatal(err)
	}
	_ = gone.Close()
	talker, err := dial(tr, p.local, p.peer, l, patience)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = talker.Close() }()
	if err := writeAll(talker, []byte("x")); err != nil {
		t.Fatal(err)
	}
	// Those who shake hands may overtake each other.
	var all []Conn
	for range 3 {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		all = append(all, c)
	}
	for start := time.Now(); time.Since(start) < patience; {
		for _, c := range all {
			switch n, err := c.TryRead(make([]byte, 1)); {
			case n == 1:
				return
			case err != nil && err != io.EOF:
				t.Fatal(err)
			}
		}
		if err := all[0].Wait(false, time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	t.Error("the one who talks is not heard")
}

func conformAllocs(t *testing.T, pair pairFunc, message float64) {
	a, b := pair(t)
	msg, buf := make([]byte, 64), make([]byte, 64)
	one, two := [][]byte{msg}, [][]byte{msg[:10], msg[10:]}
	check := func(what string, most float64, f func() error) {
		t.Helper()
		n := testing.AllocsPerRun(100, func() {
			if err := f(); err != nil {
				t.Fatal(err)
			}
		})
		if n > most {
			t.Errorf("%s allocates %v times, want at most %v", what, n, most)
		}
	}
	check("TryRead of nothing", 0, func() error { _, err := a.TryRead(buf); return err })
	check("Wait for nothing", 0, func() error { return a.Wait(false, 0) })
	check("Wake and Wait", 0, func() error { a.Wake(); return a.Wait(false, patience) })
	check("Park for nothing", 0, func() error { return a.Park(false, time.Microsecond) })
	for _, wait := range []func(bool, time.Duration) error{b.Wait, b.Park} {
		for _, bufs := range [][][]byte{one, two} {
			// Each buffer may be a message of its own.
			check("write, wait, read", message*float64(len(bufs)), func() error {
				if _, err := a.TryWrite(bufs); err != nil {
					return err
				}
				if err := wait(false, patience); err != nil {
					return err
				}
				return readFull(b, buf)
			})
		}
	}
}

func conformListenerCloses(t *testing.T, tr Transport, p place) {
	l, err := tr.Listen(netip.AddrPortFrom(p.listen, 0))
	if err != nil {
		t.Fatal(err)
	}
	a, b := mustPair(t, tr, p.local, p.peer, l)
	done := make(chan error)
	go func() {
		_, err := l.Accept()
		done <- err
	}()
	forked := forkListener(t, l)
	defer unix.Close(forked)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept on a closed listener: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	// Accepted connections live on, and the port is free again.
	if err := writeAll(a, []byte("x")); err != nil {
		t.Error(err)
	}
	if err := readFull(b, make([]byte, 1)); err != nil {
		t.Error(err)
	}
	again, err := tr.Listen(l.Addr())
	if err != nil {
		t.Fatalf("the port is not free: %v", err)
	}
	_ = again.Close()
}

// forkListener opens the listener's socket once more, as a child has it open
// between fork and exec.
func forkListener(t *testing.T, l Listener) (fd int) {
	if tl, ok := l.(*tlsListener); ok {
		l = tl.inner
	}
	raw, err := l.(*listener).tcp.SyscallConn()
	if err == nil {
		var failed error
		err = raw.Control(func(own uintptr) { fd, failed = unix.Dup(int(own)) })
		if err == nil {
			err = failed
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func conformDialContext(t *testing.T, tr Transport, p place) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := tr.Dial(ctx, p.local, netip.AddrPortFrom(p.peer, 1))
	var de *DialError
	if !errors.As(err, &de) {
		t.Fatalf("dial under a cancelled context: %v, want a DialError", err)
	}
	_, err = tr.Dial(context.Background(), p.local, netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), 1))
	var ce *ConfigError
	if !errors.As(err, &ce) {
		t.Errorf("dial of a stranger: %v, want a ConfigError", err)
	}
}
