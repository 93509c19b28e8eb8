package transport

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		runChild()
		return
	}
	goleak.VerifyTestMain(m)
}

// patience bounds what is expected to happen at once.
const patience = 10 * time.Second

var (
	loop4  = netip.MustParseAddr("127.0.0.1")
	other4 = netip.MustParseAddr("127.0.0.2")
	loop6  = netip.MustParseAddr("::1")

	testKey  = []byte("uW2kD0m1-the-key-of-both-ends")
	otherKey = []byte("uW2kD0m1-some-other-key")
)

// needMD5 skips where the kernel cannot sign, such as under qemu-user.
func needMD5(t testing.TB) {
	t.Helper()
	var u *UnsupportedError
	if err := Probe(); errors.As(err, &u) {
		t.Skipf("needs TCP_MD5SIG: %v", u)
	} else if err != nil {
		t.Fatal(err)
	}
}

func newMD5(t testing.TB, peer netip.Addr, key []byte) *MD5Sig {
	t.Helper()
	needMD5(t)
	tr, err := NewMD5Sig(peer, key, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func newPlain(t testing.TB, peer netip.Addr) *Plain {
	t.Helper()
	tr, err := NewPlain(peer, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// tlsKey is that of both ends; as a pin must not be a node's own, tests of
// one transport for both ends go around NewTLS.
var tlsKey = sync.OnceValues(NewTLSKey)

func newTLS(t testing.TB, peer netip.Addr) *TLS {
	t.Helper()
	key, err := tlsKey()
	if err != nil {
		t.Fatal(err)
	}
	tr, err := tlsOfBoth(peer, key)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func tlsOfBoth(peer netip.Addr, key *TLSKey) (*TLS, error) {
	tr, err := NewTLS(peer, key, Pin{}, Options{})
	if err != nil {
		return nil, err
	}
	tr.cfg = key.Config(key.Pin())
	return tr, nil
}

// socketOf is the socket below a connection.
func socketOf(c Conn) *tcpConn {
	if t, ok := c.(*tlsConn); ok {
		return t.wire.tcp
	}
	return c.(*tcpConn)
}

// listen listens on a port of the kernel's choice until the test's end.
func listen(t testing.TB, tr Transport, addr netip.Addr) Listener {
	t.Helper()
	l, err := tr.Listen(netip.AddrPortFrom(addr, 0))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// dial connects from local to the port of l at addr.
func dial(tr Transport, local, addr netip.Addr, l Listener, d time.Duration) (Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	return tr.Dial(ctx, local, netip.AddrPortFrom(addr, l.Addr().Port()))
}

// mustPair returns both ends of a new connection, closed at the test's end.
func mustPair(t testing.TB, tr Transport, local, addr netip.Addr, l Listener) (dialed, accepted Conn) {
	t.Helper()
	dialed, err := dial(tr, local, addr, l, patience)
	if err != nil {
		t.Fatal(err)
	}
	accepted, err = l.Accept()
	if err != nil {
		_ = dialed.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = dialed.Close()
		_ = accepted.Close()
	})
	return dialed, accepted
}

// writeAll and readFull wait as a simple user would.
func writeAll(c Conn, p []byte) error {
	for len(p) > 0 {
		n, err := c.TryWrite([][]byte{p})
		if err != nil {
			return err
		}
		if p = p[n:]; n == 0 {
			if err := c.Wait(true, patience); err != nil {
				return err
			}
		}
	}
	return nil
}

func readFull(c Conn, p []byte) error {
	for len(p) > 0 {
		n, err := c.TryRead(p)
		if err != nil {
			return err
		}
		if p = p[n:]; n == 0 {
			if err := c.Wait(false, patience); err != nil {
				return err
			}
		}
	}
	return nil
}
