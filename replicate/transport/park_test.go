package transport

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// socketpair is a descriptor and the other end of its socket.
func socketpair(t *testing.T) (d *descriptor, far int) {
	t.Helper()
	s, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	if d, err = newDescriptor(s[0]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = d.close()
		_ = unix.Close(s[1])
	})
	return d, s[1]
}

// TestPark: a wait that has gone on for long parks, and ends by all that ends
// one that sleeps.
func TestPark(t *testing.T) {
	d, far := socketpair(t)
	in := make([]byte, 8)
	for name, c := range map[string]struct {
		write bool
		end   func()
		after func()
	}{
		"data": {false, func() { _, _ = unix.Write(far, []byte("x")) }, func() { _, _ = unix.Read(d.sock, in) }},
		"wake": {false, d.wake, func() {}},
		"room": {true, func() {
			for {
				if _, err := unix.Read(far, make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}, func() {}},
	} {
		t.Run(name, func(t *testing.T) {
			for range 100 {
				events := int16(unix.POLLIN)
				if c.write {
					events |= unix.POLLOUT
					for {
						if _, err := unix.Write(d.sock, make([]byte, 64<<10)); err != nil {
							break
						}
					}
				}
				d.quiet.Store(true)
				done := make(chan error, 1)
				go func() { done <- d.wait(events, int64(patience), false) }()
				for !d.parked.Load() {
					if len(done) > 0 {
						t.Fatalf("returned before it parked: %v", <-done)
					}
					runtime.Gosched()
				}
				begin := time.Now()
				c.end()
				if err := <-done; err != nil {
					t.Fatal(err)
				}
				if took := time.Since(begin); took > patience/2 {
					t.Fatalf("returned after %v", took)
				}
				c.after()
				// What did not end the wait must not ring in Go's poller now.
				_, _ = unix.Write(far, []byte("x"))
				d.signal()
				n, err := unix.EpollWait(d.lot.fd, make([]unix.EpollEvent, 2), 0)
				_, _ = unix.Read(d.sock, in)
				_, _ = unix.Read(d.event, in)
				if n != 0 || err != nil {
					t.Fatalf("nobody is parked, and the poller hears %d members (%v)", n, err)
				}
				if c.write { // filled again, and nothing else to read
					continue
				}
				// Nothing is left of it.
				d.quiet.Store(true)
				begin = time.Now()
				if err := d.wait(unix.POLLIN, int64(5*time.Millisecond), false); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(begin); took < 5*time.Millisecond {
					t.Fatalf("a wait for nothing returned after %v", took)
				}
			}
		})
	}
	if d.lot == nil {
		t.Fatal("nobody has parked")
	}
}

// TestQuiet: the first wait that outlasts its time in the thread makes the next
// one park at once, and one that ends soon makes the next one sleep.
func TestQuiet(t *testing.T) {
	d, far := socketpair(t)
	if err := d.wait(unix.POLLIN, 3*parkAfter, false); err != nil || !d.quiet.Load() || d.lot == nil {
		t.Fatalf("%v; quiet %v, parked %v", err, d.quiet.Load(), d.lot != nil)
	}
	if _, err := unix.Write(far, []byte("x")); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); d.quiet.Load(); { // a busy machine may need several
		if err := d.wait(unix.POLLIN, int64(patience), false); err != nil {
			t.Fatal(err)
		}
		if time.Since(start) > patience {
			t.Fatal("still quiet")
		}
	}
}

// TestCloseEndsAllWaits: one of two that wait is parked, the other sleeps.
func TestCloseEndsAllWaits(t *testing.T) {
	for range 20 {
		d, _ := socketpair(t)
		d.quiet.Store(true)
		done := make(chan error)
		for range 2 {
			d.acquire()
			go func() {
				done <- d.wait(unix.POLLIN, int64(patience), false)
				d.release()
			}()
		}
		for d.waiters.Load() < 2 || !d.parked.Load() {
			runtime.Gosched()
		}
		begin := time.Now()
		if err := d.close(); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(begin); took > patience/2 {
			t.Fatalf("returned after %v", took)
		}
	}
}
