package transport

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tlsEnds are transports whose ends have a key each and pin the other's.
func tlsEnds(t testing.TB) (a, b *TLS) {
	t.Helper()
	var k [2]*TLSKey
	for i := range k {
		var err error
		if k[i], err = NewTLSKey(); err != nil {
			t.Fatal(err)
		}
	}
	var ends [2]*TLS
	for i := range ends {
		var err error
		if ends[i], err = NewTLS(loop4, k[i], k[1-i].Pin(), Options{}); err != nil {
			t.Fatal(err)
		}
	}
	return ends[0], ends[1]
}

func TestTLSOwnKeysPinned(t *testing.T) {
	a, b := tlsEnds(t)
	l := listen(t, a, loop4)
	x, y := mustPair(t, b, loop4, loop4, l)
	if err := writeAll(x, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if err := readFull(y, got); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	if s := x.(*tlsConn).tls.ConnectionState(); s.Version != tls.VersionTLS13 || s.DidResume || len(s.PeerCertificates) != 1 {
		t.Errorf("version %x, resumed %v", s.Version, s.DidResume)
	}
	own, peer := a.Pins()
	if o, p := b.Pins(); own != p || peer != o {
		t.Errorf("pins %v %v and %v %v", own, peer, o, p)
	}
}

// TestTLSRefused: each wrong end is told apart, at both ends, and the right
// one still connects.
func TestTLSRefused(t *testing.T) {
	a, b := tlsEnds(t)
	_, stranger := tlsEnds(t)
	dialsA := func(cfg func(*tls.Config)) *TLS {
		c := b.cfg.Clone()
		cfg(c)
		return &TLS{endpoint: b.endpoint, cfg: c}
	}
	for _, c := range []struct {
		name             string
		dialer           *TLS
		dialed, accepted string // what each end says
	}{
		{"the dialer pins another key", stranger, "another key than the one pinned", "refused this node's key"},
		{"the listener pins another key", dialsA(func(c *tls.Config) { c.Certificates = stranger.cfg.Certificates }), "the peer refused this node's key", "another key than the one pinned"},
		{"no certificate", dialsA(func(c *tls.Config) { c.Certificates = nil }), "certificate required", "didn't provide a certificate"},
		{"TLS 1.2", dialsA(func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }), "no TLS 1.3", "no TLS 1.3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := listen(t, a, loop4)
			conn, err := dial(c.dialer, loop4, loop4, l, patience)
			if err == nil {
				_ = conn.Close()
				t.Fatal("connected")
			}
			var de *DialError
			if !errors.As(err, &de) || de.Timeout() || !strings.Contains(err.Error(), c.dialed) {
				t.Errorf("the dialer says: %v", err)
			}
			for start := time.Now(); !strings.Contains(a.Diagnose(), c.accepted); time.Sleep(time.Millisecond) {
				if time.Since(start) > patience {
					t.Fatalf("the listener says: %q", a.Diagnose())
				}
			}
			mustPair(t, b, loop4, loop4, l)
		})
	}
	var ce *ConfigError
	own, err := NewTLSKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewTLS(loop4, own, own.Pin(), Options{}); !errors.As(err, &ce) {
		t.Errorf("the node's own key as the peer's: %v", err)
	}
}

// TestTLSOtherTransports: an end that does not speak TLS is named as such.
func TestTLSOtherTransports(t *testing.T) {
	a, b := tlsEnds(t)
	plain := newPlain(t, loop4)

	l := listen(t, a, loop4)
	conn, err := dial(plain, loop4, loop4, l, patience)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := writeAll(conn, []byte("NVMW this is no record of TLS")); err != nil {
		t.Fatal(err)
	}
	if err := readFull(conn, make([]byte, 1)); err == nil {
		t.Error("the listener answers")
	}
	for start := time.Now(); !strings.Contains(a.Diagnose(), "does not speak TLS"); time.Sleep(time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("the listener says: %q", a.Diagnose())
		}
	}

	pl := listen(t, plain, loop4)
	ended := make(chan error, 1)
	go func() {
		c, err := pl.Accept()
		if err == nil {
			_ = writeAll(c, []byte("NVMW this is no record of TLS"))
			_ = readFull(c, make([]byte, 1))
			_ = c.Close()
		}
		ended <- err
	}()
	if _, err := dial(b, loop4, loop4, pl, patience); err == nil || !strings.Contains(err.Error(), "does not speak TLS") {
		t.Errorf("dial of a plain listener: %v", err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	// One that is silent costs the dial's time, and says what may be wrong.
	_, err = dial(b, loop4, loop4, pl, short)
	var de *DialError
	if !errors.As(err, &de) || !de.Timeout() || !strings.Contains(err.Error(), "no answer in time") {
		t.Errorf("dial of a silent listener: %v", err)
	}
}

// TestTLSTrickle: connections that send nothing, or a byte at a time, neither
// keep the peer out nor stay.
func TestTLSTrickle(t *testing.T) {
	a, b := tlsEnds(t)
	l := listen(t, a, loop4)
	plain := newPlain(t, loop4)
	var slow []Conn
	hello := clientHello(t, b)
	for i := range 3 * maxHandshakes {
		c, err := dial(plain, loop4, loop4, l, patience)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		slow = append(slow, c)
		if err := writeAll(c, hello[:i*len(hello)/(3*maxHandshakes)]); err != nil {
			t.Fatal(err)
		}
	}
	start := time.Now()
	mustPair(t, b, loop4, loop4, l)
	if d := time.Since(start); d > handshakeTime/2 {
		t.Errorf("the peer was let in after %v", d)
	}
	for i, c := range slow {
		// The limit of time is on the whole: a byte now and then does not help.
		for {
			if _, err := c.TryWrite([][]byte{{hello[0]}}); err != nil {
				break
			}
			if _, err := c.TryRead(make([]byte, 64)); err != nil {
				break
			}
			if d := time.Since(start); d > handshakeTime+patience {
				t.Fatalf("connection %d is still there after %v", i, d)
			}
			if err := c.Wait(false, 10*time.Millisecond); err != nil {
				t.Fatal(err)
			}
		}
	}
	// A close waits for no handshake.
	if _, err := dial(plain, loop4, loop4, l, patience); err != nil {
		t.Fatal(err)
	}
	start = time.Now()
	if err := l.Close(); err != nil || time.Since(start) > handshakeTime/2 {
		t.Errorf("close: %v after %v", err, time.Since(start))
	}
}

// clientHello is the first flight of a dial.
func clientHello(t testing.TB, tr *TLS) []byte {
	t.Helper()
	near, far := net.Pipe()
	go func() {
		_ = tls.Client(near, tr.cfg).Handshake() // ends with the pipe
	}()
	p := make([]byte, 16<<10)
	n, err := far.Read(p)
	_ = far.Close()
	if err != nil {
		t.Fatal(err)
	}
	return p[:n]
}

// TestTLSWaitWithBytes: what was decrypted, or has arrived whole, is not slept
// upon, whatever pieces it is read in.
func TestTLSWaitWithBytes(t *testing.T) {
	a, b := tlsEnds(t)
	x, y := mustPair(t, b, loop4, loop4, listen(t, a, loop4))
	const records, size = 5, 1000
	for range records {
		if err := writeAll(x, bytes.Repeat([]byte{7}, size)); err != nil {
			t.Fatal(err)
		}
	}
	start := time.Now()
	for got := 0; got < records*size; {
		if err := y.Wait(false, patience); err != nil {
			t.Fatal(err)
		}
		n, err := y.TryRead(make([]byte, 7))
		if err != nil {
			t.Fatal(err)
		}
		got += n
	}
	if d := time.Since(start); d > patience/2 {
		t.Errorf("slept upon bytes that were there: %v", d)
	}
	// And with nothing there it sleeps.
	const nap = 5 * time.Millisecond
	start = time.Now()
	if err := y.Wait(false, nap); err != nil || time.Since(start) < nap {
		t.Errorf("Wait for nothing: %v after %v", err, time.Since(start))
	}
}

// TestTLSUnsent: ciphertext that the socket did not take is sent by whoever
// waits for bytes to read, and bounded.
func TestTLSUnsent(t *testing.T) {
	a, b := tlsEnds(t)
	x, y := mustPair(t, b, loop4, loop4, listen(t, a, loop4))
	frame := bytes.Repeat([]byte("0123456789abcdef"), 4<<10)
	total := 0
	for {
		n, err := x.TryWrite([][]byte{frame})
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
		total += n
	}
	w := x.(*tlsConn).wire
	if !w.unsent.Load() || len(w.out) > tlsMaxUnsent {
		t.Fatalf("%d bytes wait, want some and at most %d", len(w.out), tlsMaxUnsent)
	}
	read := make(chan error, 1)
	go func() { read <- readFull(y, make([]byte, total)) }()
	for start := time.Now(); w.unsent.Load(); {
		if err := x.Wait(false, patience); err != nil {
			t.Fatal(err)
		}
		if time.Since(start) > patience {
			t.Fatal("it is not sent")
		}
	}
	if err := <-read; err != nil {
		t.Error(err)
	}
}

// TestTLSDamage: a record that was changed on the way is not delivered, ends
// the connection, and is named at both ends. One that is cut short is no end
// of file.
func TestTLSDamage(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(w *tlsWire)
		says   string
	}{
		{"body", func(w *tlsWire) { w.out[len(w.out)-1] ^= 1 }, "damaged on the way"},
		{"type", func(w *tlsWire) { w.out[0] = 22 }, "damaged on the way"},
		{"version", func(w *tlsWire) { w.out[1] ^= 1 }, "damaged on the way"},
		{"length", func(w *tlsWire) { w.out[3] = 0xff }, "damaged on the way"},
		{"cut", func(w *tlsWire) { w.out = w.out[:len(w.out)-1] }, "closed the connection within a record"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := tlsEnds(t)
			x, y := mustPair(t, b, loop4, loop4, listen(t, a, loop4))
			if err := writeAll(x, []byte("good")); err != nil {
				t.Fatal(err)
			}
			tx := x.(*tlsConn)
			if _, err := tx.tls.Write([]byte("secret")); err != nil {
				t.Fatal(err)
			}
			c.damage(tx.wire)
			if err := tx.wire.flush(); err != nil {
				t.Fatal(err)
			}
			if c.name == "cut" {
				_ = x.Close()
			}
			got := make([]byte, 4)
			if err := readFull(y, got); err != nil || string(got) != "good" {
				t.Fatalf("%q, %v", got, err)
			}
			err := readFull(y, got)
			var ce *ConnError
			if !errors.As(err, &ce) || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("%v", err)
			}
			if again := readFull(y, got); again == nil || again == io.EOF {
				t.Errorf("then: %v", again)
			}
			if c.name == "cut" {
				return
			}
			if err := readFull(x, got); !errors.As(err, &ce) || !strings.Contains(err.Error(), "remote error") {
				t.Errorf("the other end hears: %v", err)
			}
		})
	}
}

// TestTLSBadMemory: where faults are panics, the panic goes to the caller and
// the connection is closed: bytes of the call may be on their way.
func TestTLSBadMemory(t *testing.T) {
	bad, err := unix.Mmap(-1, 0, 2*unix.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(bad) }()
	if err := unix.Mprotect(bad, unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	a, b := tlsEnds(t)
	l := listen(t, a, loop4)
	faults := func(f func()) (addr uintptr) {
		defer func() {
			if e, ok := recover().(interface{ Addr() uintptr }); ok {
				addr = e.Addr()
			}
		}()
		f()
		return 0
	}
	x, y := mustPair(t, b, loop4, loop4, l)
	if faults(func() { _, _ = x.TryWrite([][]byte{bad}) }) == 0 {
		t.Error("no fault in TryWrite")
	}
	if _, err := x.TryWrite([][]byte{{1}}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("then: %v", err)
	}
	if err := readFull(y, make([]byte, 1)); err != io.EOF {
		t.Errorf("the other end: %v", err)
	}
	x, y = mustPair(t, b, loop4, loop4, l)
	if err := writeAll(x, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := y.Wait(false, patience); err != nil {
		t.Fatal(err)
	}
	if faults(func() { _, _ = y.TryRead(bad) }) == 0 {
		t.Error("no fault in TryRead")
	}
	if _, err := y.TryRead(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("then: %v", err)
	}
}

// FuzzTLSHandshake gives the listener any bytes for a handshake, and then the
// peer, who is let in.
func FuzzTLSHandshake(f *testing.F) {
	a, b := tlsEnds(f)
	hello := clientHello(f, b)
	f.Add([]byte{}, false)
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), true)
	f.Add([]byte{22, 3, 1, 0xff, 0xff, 1}, true)
	f.Add([]byte{23, 3, 3, 0, 1, 0}, true)
	f.Add([]byte{0x80, 46, 1, 3, 1}, true)
	f.Add(hello, true)
	f.Add(append(bytes.Clone(hello), 20, 3, 3, 0, 1, 1, 23, 3, 3, 0, 17, 0), true)
	for i := 0; i < len(hello); i += 97 {
		p := bytes.Clone(hello)
		p[i] ^= 0x55
		f.Add(p, true)
	}
	l, err := a.Listen(netip.AddrPortFrom(loop4, 0))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = l.Close() })
	plain := newPlain(f, loop4)
	f.Fuzz(func(t *testing.T, p []byte, close bool) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		at := netip.AddrPortFrom(loop4, l.Addr().Port())
		c, err := plain.Dial(ctx, loop4, at)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		if err := writeAll(c, p); err != nil && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
			t.Fatal(err)
		}
		if close {
			_ = c.Close()
		}
		x, y := mustPair(t, b, loop4, loop4, l)
		if err := writeAll(x, []byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := readFull(y, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	})
}
