package transport

import (
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// conformCloseRaces closes under the hands of a reader, a writer and a waker,
// while others open sockets that get the freed numbers at once. Nobody's bytes
// may go astray.
func conformCloseRaces(t *testing.T, pair pairFunc) {
	stop := make(chan struct{})
	var strangers sync.WaitGroup
	strangers.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := stranger(); err != nil {
				t.Error(err)
				return
			}
		}
	})
	rounds := 150
	if testing.Short() || raceEnabled {
		rounds = 30
	}
	for range rounds {
		a, b := pair(t)
		var users sync.WaitGroup
		use := func(f func() error) {
			users.Go(func() {
				for {
					runtime.Gosched() // let the others in: more races, not longer turns
					if err := f(); errors.Is(err, net.ErrClosed) {
						return
					} else if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
						t.Errorf("in a race with Close: %v", err)
						return
					}
				}
			})
		}
		buf, out := make([]byte, 4096), [][]byte{make([]byte, 100), make([]byte, 4000)}
		use(func() error { _, err := a.TryRead(buf); return err })
		use(func() error { _, err := a.TryWrite(out); return err })
		use(func() error { return a.Wait(false, patience) })
		use(func() error { a.Wake(); return a.Wait(true, 0) })
		if err := readFull(b, make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
		var closers sync.WaitGroup
		for range 2 {
			closers.Go(func() { _ = a.Close() })
		}
		closers.Wait()
		users.Wait()
		_ = b.Close()
	}
	close(stop)
	strangers.Wait()
}

// stranger opens a pair of sockets, which get the lowest free numbers, and
// checks that what goes in comes out and nothing else.
func stranger() error {
	s, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(s[0]); _ = unix.Close(s[1]) }()
	buf := make([]byte, 64)
	for i, word := range []string{"one", "other"} {
		if _, err := unix.Write(s[i], []byte(word)); err != nil {
			return err
		}
		n, err := unix.Read(s[1-i], buf)
		if err != nil || string(buf[:n]) != word {
			return errors.New("a closed connection's user touched a stranger's socket: it holds " + string(buf[:max(n, 0)]))
		}
	}
	return nil
}
