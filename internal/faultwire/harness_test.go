package faultwire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// testTimeout bounds every wait; nothing that works comes near it.
const testTimeout = 30 * time.Second

func TestMain(m *testing.M) {
	if role := os.Getenv(childRole); role != "" {
		os.Exit(runChild(role))
	}
	goleak.VerifyTestMain(m)
}

// needWire makes a wire that ends with the test, or skips where it may not.
func needWire(t testing.TB, cfg Config) *Wire {
	t.Helper()
	if _, bench := t.(*testing.B); !bench {
		cfg.Logf = t.Logf // a benchmark is called many times and its seed is fixed
	}
	w, err := New(cfg)
	if errors.Is(err, ErrNotPermitted) {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, d := range []*Direction{w.AtoB, w.BtoA} {
			if err := d.Err(); err != nil {
				t.Errorf("%v ended by itself: %v", d, err)
			}
			if s := d.Stats(); s.Refused != 0 {
				t.Errorf("%v: the receiver's device refused %d packets", d, s.Refused)
			}
		}
		if err := w.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return w
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	t.Cleanup(cancel)
	return ctx
}

// needPair makes a connection from A to B.
func needPair(t testing.TB, w *Wire, ipv6, signed bool) (from, to *net.TCPConn) {
	t.Helper()
	if ipv6 && !w.A.Addr6.IsValid() {
		t.Skip("skipped: this kernel has IPv6 off")
	}
	from, to, err := connect(testContext(t), w, ipv6, signed)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(from.Close(), to.Close()) })
	deadline := time.Now().Add(testTimeout)
	if err := errors.Join(from.SetDeadline(deadline), to.SetDeadline(deadline)); err != nil {
		t.Fatal(err)
	}
	return from, to
}

// carry sends blocks from one end to the other and returns the wrong ones.
func carry(t testing.TB, from, to net.Conn, seed uint64, total int64) (wrong int64) {
	t.Helper()
	sent := make(chan error, 1)
	go func() { sent <- sendBlocks(from, seed, total) }()
	_, wrong, err := receiveBlocks(to, seed, total)
	if err != nil {
		// The sender waits for an answer that now never comes.
		err = errors.Join(err, from.SetDeadline(time.Unix(1, 0)))
	}
	if err := errors.Join(err, <-sent); err != nil {
		t.Fatal(err)
	}
	return wrong
}

// exchange sends one message over and checks that it arrives as it is.
func exchange(t testing.TB, from, to net.Conn, message string) {
	t.Helper()
	if err := say(from, to, message); err != nil {
		t.Fatal(err)
	}
}

func say(from, to net.Conn, message string) error {
	if _, err := from.Write([]byte(message)); err != nil {
		return err
	}
	return expect(to, message)
}

func expect(to net.Conn, message string) error {
	b := make([]byte, len(message))
	for n := 0; n < len(b); {
		k, err := to.Read(b[n:])
		if err != nil {
			return fmt.Errorf("waiting for %q: %w", message, err)
		}
		n += k
	}
	if string(b) != message {
		return fmt.Errorf("got %q, want %q", b, message)
	}
	return nil
}

func addrPort(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }

func counters(t testing.TB, h *Host) Counters {
	t.Helper()
	c, err := h.Counters()
	if err != nil {
		t.Fatal(err)
	}
	return c
}
