package faultwire

import (
	"bytes"
	"errors"
	"net"
	"strings"
	"syscall"
	"testing"
)

// wrongDigest is a signature that no key made.
var wrongDigest = bytes.Repeat([]byte{0x5a}, 16)

// capturing makes a wire that captures and a connection on which something
// was said each way.
func capturing(t *testing.T, ipv6, signed bool) (w *Wire, from, to *net.TCPConn) {
	t.Helper()
	w = needWire(t, Config{})
	w.AtoB.Capture(256)
	w.BtoA.Capture(256)
	from, to = needPair(t, w, ipv6, signed)
	exchange(t, from, to, "hello")
	exchange(t, to, from, "hello yourself")
	return w, from, to
}

// forgeFrom injects what build makes in the name of from.
func forgeFrom(t *testing.T, w *Wire, from *net.TCPConn, build func(Segment) []byte) {
	t.Helper()
	if err := w.AtoB.Forge(addrPort(from.LocalAddr()), addrPort(from.RemoteAddr()), build); err != nil {
		t.Fatal(err)
	}
}

// A reset with the right sequence number ends a plain connection and no signed
// one, whether it is unsigned or wrongly signed.
func TestForgedReset(t *testing.T) {
	eachTransport(t, func(t *testing.T, ipv6, signed bool) {
		w, from, to := capturing(t, ipv6, signed)
		before := counters(t, w.B)
		forgeFrom(t, w, from, func(s Segment) []byte { return ForgeRST(s, nil) })
		if !signed {
			if err := expect(to, "nothing more"); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("a plain connection after a reset: %v", err)
			}
			return
		}
		forgeFrom(t, w, from, func(s Segment) []byte { return ForgeRST(s, wrongDigest) })
		after := counters(t, w.B)
		if n, f := after.Rise(before, MD5NotFound), after.Rise(before, MD5Failure); n != 1 || f != 1 {
			t.Errorf("%d unsigned and %d wrongly signed were counted, want 1 and 1", n, f)
		}
		exchange(t, from, to, "still here")
		exchange(t, to, from, "here too")
	})
}

// Data with the right sequence number is taken from anyone by a plain
// connection, and by a signed one from nobody without the key.
func TestForgedData(t *testing.T) {
	eachTransport(t, func(t *testing.T, ipv6, signed bool) {
		w, from, to := capturing(t, ipv6, signed)
		before := counters(t, w.B)
		const lie = "pay the stranger"
		if !signed {
			forgeFrom(t, w, from, func(s Segment) []byte { return ForgeData(s, []byte(lie), nil) })
			if err := expect(to, lie); err != nil {
				t.Errorf("a plain connection: %v", err)
			}
			return
		}
		forgeFrom(t, w, from, func(s Segment) []byte { return ForgeData(s, []byte(lie), wrongDigest) })
		forgeFrom(t, w, from, func(s Segment) []byte { return ForgeData(s, []byte(lie), nil) })
		after := counters(t, w.B)
		if n, f := after.Rise(before, MD5NotFound), after.Rise(before, MD5Failure); n != 1 || f != 1 {
			t.Errorf("%d unsigned and %d wrongly signed were counted, want 1 and 1", n, f)
		}
		exchange(t, from, to, "the truth")
	})
}

// Packets of a connection, sent again while it lives, are signed rightly and
// still do nothing: their sequence numbers are past.
func TestReplayIntoTheConnection(t *testing.T) {
	eachTransport(t, func(t *testing.T, ipv6, signed bool) {
		w, from, to := capturing(t, ipv6, signed)
		carry(t, from, to, 1, 64*BlockSize)
		before := counters(t, w.B)
		recorded := w.AtoB.Captured()
		if len(recorded) < 10 {
			t.Fatalf("only %d packets recorded", len(recorded))
		}
		for _, s := range recorded {
			if err := w.AtoB.Inject(s.Raw); err != nil {
				t.Fatal(err)
			}
		}
		if s := w.AtoB.Stats(); s.Injected != uint64(len(recorded)) {
			t.Errorf("%d injected, %d counted", len(recorded), s.Injected)
		}
		after := counters(t, w.B)
		if n := after.Rise(before, MD5Failure); n != 0 {
			t.Errorf("%d replayed signatures failed", n)
		}
		exchange(t, from, to, "nothing but this")
		exchange(t, from, to, "and this")
	})
}

// A recorded connection played to a listener that is still there is not
// accepted: its acknowledgements answer another handshake.
func TestReplayToTheListener(t *testing.T) {
	w := needWire(t, Config{})
	ctx := testContext(t)
	key := newKey()
	lc := &net.ListenConfig{Control: socketControl(w.A.Addr, key)}
	lc.SetMultipathTCP(false)
	l, err := w.B.Listen(ctx, lc, "tcp4", w.B.Addr.String()+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	d := &net.Dialer{Control: socketControl(w.B.Addr, key)}
	d.SetMultipathTCP(false)
	connection := func() (net.Conn, net.Conn) {
		t.Helper()
		from, err := w.A.Dial(ctx, d, "tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		to, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if from.LocalAddr().String() != to.RemoteAddr().String() {
			t.Errorf("accepted %v, dialled from %v", to.RemoteAddr(), from.LocalAddr())
		}
		return from, to
	}
	w.AtoB.Capture(64)
	from, to := connection()
	exchange(t, from, to, "the first time")
	recorded := w.AtoB.Captured()
	if recorded[0].Flags&flagSYN == 0 {
		t.Fatal("the record does not begin with the handshake")
	}
	// The reader closes last and leaves nothing at the listener's end.
	if err := from.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := to.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Fatalf("read %d, %v after the end", n, err)
	}
	if err := to.Close(); err != nil {
		t.Fatal(err)
	}
	for _, s := range recorded {
		if err := w.AtoB.Inject(s.Raw); err != nil {
			t.Fatal(err)
		}
	}
	// Had the replay been accepted, it would be first in the queue.
	from, to = connection()
	exchange(t, from, to, "the second time")
	if err := errors.Join(from.Close(), to.Close()); err != nil {
		t.Error(err)
	}
}

func TestInjectSaysWhatTheKernelRefused(t *testing.T) {
	w := needWire(t, Config{})
	err := w.AtoB.Inject(make([]byte, 40)) // of no IP version
	if !errors.Is(err, syscall.EINVAL) || !strings.Contains(err.Error(), "A to B") {
		t.Errorf("got %v", err)
	}
	if s := w.AtoB.Stats(); s.Injected != 0 {
		t.Errorf("%+v", s)
	}
}
