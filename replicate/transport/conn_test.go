package transport

import (
	"errors"
	"io"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestBadMemory: buffers are parts of a mapped region, and a mapping can lose
// its pages. That fails the call, not the connection, and loses no byte.
func TestBadMemory(t *testing.T) {
	bad, err := unix.Mmap(-1, 0, 2*unix.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(bad) }()
	if err := unix.Mprotect(bad, unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	tr := newPlain(t, loop4)
	a, b := mustPair(t, tr, loop4, loop4, listen(t, tr, loop4))
	var ce *ConnError
	if n, err := a.TryWrite([][]byte{bad}); n != 0 || !errors.As(err, &ce) || !errors.Is(err, unix.EFAULT) || !strings.Contains(err.Error(), "mapped region") {
		t.Errorf("TryWrite from bad memory: %d, %v", n, err)
	}
	if err := writeAll(a, []byte("good")); err != nil {
		t.Fatal(err)
	}
	if err := b.Wait(false, patience); err != nil {
		t.Fatal(err)
	}
	if n, err := b.TryRead(bad); n != 0 || !errors.Is(err, unix.EFAULT) {
		t.Errorf("TryRead into bad memory: %d, %v", n, err)
	}
	got := make([]byte, 4)
	if err := readFull(b, got); err != nil || string(got) != "good" {
		t.Errorf("afterwards: %q, %v", got, err)
	}
}

// TestWriteAfterEnd: a writer learns of the peer's end from the kernel only
// after a first write was answered by a reset.
func TestWriteAfterEnd(t *testing.T) {
	tr := newPlain(t, loop4)
	a, b := mustPair(t, tr, loop4, loop4, listen(t, tr, loop4))
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := readFull(a, make([]byte, 1)); err != io.EOF {
		t.Fatalf("%v, want io.EOF", err)
	}
	err := writeAll(a, []byte("x"))
	for start := time.Now(); err == nil && time.Since(start) < patience; {
		err = writeAll(a, []byte("x"))
	}
	var ce *ConnError
	if !errors.As(err, &ce) || !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) || !strings.Contains(err.Error(), "reconnect") {
		t.Errorf("%v is not the ConnError of a closed peer", err)
	}
}

// TestDescriptorLifetime closes a descriptor under many short uses and counts:
// no use begins after the close, and the numbers are freed once.
func TestDescriptorLifetime(t *testing.T) {
	for range 200 {
		s, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		d, err := newDescriptor(s[0])
		if err != nil {
			t.Fatal(err)
		}
		var uses atomic.Int64
		var users sync.WaitGroup
		for range 4 {
			users.Go(func() {
				for d.acquire() {
					uses.Add(1)
					if _, err := unix.FcntlInt(uintptr(d.sock), unix.F_GETFD, 0); err != nil {
						t.Errorf("in use, and yet: %v", err)
					}
					d.release()
				}
			})
		}
		for uses.Load() < 20 {
			d.wake()
			if err := d.wait(0, 0, false); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.close(); err != nil {
			t.Fatal(err)
		}
		users.Wait()
		if d.state.Load() != descriptorClosed {
			t.Fatalf("state %#x after everybody left", d.state.Load())
		}
		// The other end sees that the last descriptor is gone.
		if n, err := unix.Read(s[1], make([]byte, 1)); n != 0 || err != nil {
			t.Errorf("the other end reads %d, %v, want the end", n, err)
		}
		_ = unix.Close(s[1])
	}
}

func TestErrorsNameEverything(t *testing.T) {
	peer := netip.MustParseAddrPort("192.0.2.7:7447")
	for _, c := range []struct {
		err  error
		says []string
	}{
		{&ConnError{"md5sig", "write", peer, peer, unix.ETIMEDOUT}, []string{"write", "192.0.2.7:7447", "user timeout", "check the link"}},
		{&ConnError{"md5sig", "read", peer, peer, unix.EHOSTUNREACH}, []string{"no route to host", "check the link"}},
		{&DialError{"md5sig", near4, peer, Counters{MD5NotFound: 2}, unix.ETIMEDOUT}, []string{"TCPMD5NotFound rose by 2"}},
		{&DialError{"md5sig", near4, peer, Counters{}, unix.ETIMEDOUT}, []string{"no answer", "key files are equal"}},
		{&DialError{"plain", near4, peer, Counters{}, unix.ETIMEDOUT}, []string{"no answer"}},
		{&SetupError{"md5sig", "accept on", peer, unix.EMFILE}, []string{"open files"}},
		{&SetupError{"md5sig", "listen on", peer, unix.EACCES}, []string{"CAP_NET_BIND_SERVICE"}},
		{&ConfigError{"md5sig", "no peer address", "set it"}, []string{"md5sig", "no peer address; set it"}},
	} {
		for _, s := range append(c.says, "transport ") {
			if !strings.Contains(c.err.Error(), s) {
				t.Errorf("%q does not say %q", c.err, s)
			}
		}
	}
}
