package journal

import (
	"bytes"
	"context"
	"errors"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// truncated is memory that cannot be read: a mapped file that was cut off.
func truncated(t *testing.T) []byte {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("qemu-user does not say which address faulted")
	}
	f, err := os.CreateTemp(t.TempDir(), "source")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 64 << 10
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	p, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(p) })
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestUnreadableBuffer: a transaction whose memory cannot be read gets an error;
// those that were to be written with it, in whoever's goroutine, are written, and the
// log goes on as if it had not been there.
func TestUnreadableBuffer(t *testing.T) {
	bad := truncated(t)
	const size = 256 * Align
	log := newTestLog(t, size, 0)
	sink := newFakeSink(log, 1)
	c := openCommitter(t, log, sink, 0)
	commit := func(off int64, p []byte) error {
		r := NewRequest()
		r.Add(off, p)
		_, err := c.Commit(context.Background(), r)
		return err
	}
	queued := func() int {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.queue)
	}
	for round := range 2 * size / Align / 8 { // over the ring's end, with and without padding
		if err := c.Acquire(context.Background()); err != nil {
			t.Fatal(err)
		}
		fill := bytes.Repeat([]byte{byte(round)}, 100+round%7*40)
		var errs [5]error
		var callers sync.WaitGroup
		for i := range errs {
			p := fill
			if i == 1 || i == 3 {
				p = bad[:1+round%5*500]
			}
			callers.Go(func() { errs[i] = commit(int64(i), p) })
			for deadline := time.Now().Add(time.Minute); queued() <= i; runtime.Gosched() {
				if time.Now().After(deadline) {
					t.Fatal("not queued")
				}
			}
		}
		c.Release()
		callers.Wait()
		for i, err := range errs {
			if i == 1 || i == 3 {
				if !errors.Is(err, ErrUnreadable) {
					t.Fatalf("memory that cannot be read: %v", err)
				}
			} else if err != nil || !bytes.Equal(sink.content[int64(i)], fill) {
				t.Fatalf("beside memory that cannot be read: %v", err)
			}
		}
	}
	if err := commit(9, bad); !errors.Is(err, ErrTooLarge) && !errors.Is(err, ErrUnreadable) {
		t.Fatal(err)
	}
	if p := sink.problem.Load(); p != nil {
		t.Error(*p)
	}
	if sink.content[1] != nil || sink.content[3] != nil {
		t.Error("a part of what could not be read was written")
	}
	if c.Waiting() != 0 || queued() != 0 || c.pending.Load() != 0 {
		t.Errorf("%d wait, %d are queued with %d bytes", c.Waiting(), queued(), c.pending.Load())
	}
}
