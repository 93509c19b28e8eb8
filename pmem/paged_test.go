package pmem

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pagedDir is a directory on an ordinary filesystem.
func pagedDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	if magic := uint32(fs.Type); magic == unix.TMPFS_MAGIC || magic == unix.RAMFS_MAGIC {
		t.Skipf("the temporary directory %s is on tmpfs; set TMPDIR to a directory on a disk to test class paged", dir)
	}
	return dir
}

func pagedRegion(t testing.TB, size int64) *Region {
	t.Helper()
	r, err := Create(filepath.Join(pagedDir(t), "region"), size, Options{Accept: Paged})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	if r.Class() != Paged {
		t.Skipf("the temporary directory is of class %s, not paged", r.Class())
	}
	return r
}

// The list of dirty spans covers every page that was added, stays sorted and
// disjoint, and never grows past its bound.
func TestDirtySpans(t *testing.T) {
	rng := seeded(t)
	for round := range 200 {
		const pages = 1000
		d := newDirty()
		var want [pages]bool
		for range 1 + rng.IntN(300) {
			from := rng.IntN(pages)
			n := 1 + rng.IntN(min(pages-from, 1+rng.IntN(10)))
			// Not page-aligned: any byte of a page dirties it.
			off := int64(from)*pageSize + rng.Int64N(pageSize)
			d.add(off, int64(n)*pageSize-off%pageSize)
			for i := from; i < from+n; i++ {
				want[i] = true
			}
		}
		if d.n < 1 || d.n > maxSpans {
			t.Fatalf("round %d: %d spans", round, d.n)
		}
		last := int64(-1)
		var got [pages]bool
		for _, s := range d.spans[:d.n] {
			if s.from <= last || s.to <= s.from || s.from%pageSize != 0 || s.to%pageSize != 0 {
				t.Fatalf("round %d: span %v after %d", round, s, last)
			}
			last = s.to
			for p := s.from / pageSize; p < s.to/pageSize; p++ {
				got[p] = true
			}
		}
		for p := range want {
			if want[p] && !got[p] {
				t.Fatalf("round %d: page %d is not covered", round, p)
			}
		}
	}
}

func TestPagedFenceSyncsWhatWasFlushed(t *testing.T) {
	r := pagedRegion(t, 64*pageSize)
	var synced []span
	base := r.mem
	r.paged.msync = func(b []byte, flags int) error {
		if flags != unix.MS_SYNC {
			t.Errorf("msync flags %#x", flags)
		}
		from := int64(cap(base) - cap(b))
		synced = append(synced, span{from, from + int64(len(b))})
		return unix.Msync(b, flags)
	}
	r.Copy(10, []byte("one"))
	r.Store64(3*pageSize, 7)
	r.Flush(3*pageSize, 8)
	r.Zero(4*pageSize, pageSize)
	r.Copy(63*pageSize-1, []byte{1, 2})
	r.Flush(20*pageSize, 0)
	if err := r.Fence(); err != nil {
		t.Fatal(err)
	}
	want := []span{{0, pageSize}, {3 * pageSize, 5 * pageSize}, {62 * pageSize, 64 * pageSize}}
	if len(synced) != len(want) {
		t.Fatalf("synced %v, want %v", synced, want)
	}
	for i := range want {
		if synced[i] != want[i] {
			t.Fatalf("synced %v, want %v", synced, want)
		}
	}
	synced = nil
	if err := r.Fence(); err != nil || len(synced) != 0 {
		t.Fatalf("a second fence: %v, synced %v", err, synced)
	}
	if err := r.Publish(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(r.Path())
	if err != nil || !bytes.Equal(got, r.Bytes()) {
		t.Fatalf("the file differs from the mapping (%v)", err)
	}
}

func TestFailedSyncIsFinal(t *testing.T) {
	r := pagedRegion(t, 8*pageSize)
	calls := 0
	r.paged.msync = func([]byte, int) error {
		calls++
		if calls == 2 {
			return unix.EIO
		}
		return nil
	}
	r.Copy(0, []byte{1})
	r.Copy(4*pageSize, []byte{1})
	err := r.Fence()
	var pe *PersistenceError
	if !errors.Is(err, ErrPersistence) || !errors.Is(err, unix.EIO) || !errors.As(err, &pe) || pe.Offset != 4*pageSize || pe.Path != r.Path() {
		t.Fatalf("fence: %v", err)
	}
	r.Copy(0, []byte{2})
	if again := r.Fence(); again != err || calls != 2 {
		t.Fatalf("fence after a failure: %v, %d calls of msync", again, calls)
	}
}

// A fence covers what its goroutine flushed, even where another goroutine's
// fence took the range and is still syncing it.
func TestPagedFenceConcurrent(t *testing.T) {
	const goroutines, rounds = 8, 50
	r := pagedRegion(t, goroutines*4*pageSize)
	var mu sync.Mutex
	durable := make([]byte, r.Size())
	r.paged.msync = func(b []byte, _ int) error {
		from := cap(r.mem) - cap(b)
		// Durable only when the call is over.
		image := bytes.Clone(b)
		mu.Lock()
		defer mu.Unlock()
		copy(durable[from:], image)
		return nil
	}
	seed := seeded(t).Uint64()
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(g)))
			for i := range rounds {
				off := int64(g)*4*pageSize + rng.Int64N(4*pageSize-16)&^7
				v := byte(i + 1)
				r.Copy(off, []byte{v, v, v})
				if err := r.Fence(); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				ok := durable[off] == v && durable[off+1] == v && durable[off+2] == v
				mu.Unlock()
				if !ok {
					t.Errorf("goroutine %d: fence returned before its store at %d was synced", g, off)
					return
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkPagedFence(b *testing.B) {
	r := pagedRegion(b, 16<<20)
	p := make([]byte, 64)
	b.ReportAllocs()
	off := int64(0)
	for b.Loop() {
		r.Copy(off, p)
		if err := r.Fence(); err != nil {
			b.Fatal(err)
		}
		off = (off + 4096) % r.Size()
	}
}

// TestRedirty: a page that the kernel counts as clean is written by the next
// fence all the same.
func TestRedirty(t *testing.T) {
	r := pagedRegion(t, 1<<20)
	dirtyPages := func() (n int) {
		maps, err := os.ReadFile("/proc/self/smaps")
		if err != nil {
			t.Skip(err)
		}
		_, of, found := strings.Cut(string(maps), fmt.Sprintf("\n%x-", unsafe.Pointer(&r.mem[0])))
		if !found {
			t.Fatal("the mapping is not listed")
		}
		for line := range strings.Lines(of) {
			var kind string
			var kib int
			if _, err := fmt.Sscanf(line, "%s %d kB", &kind, &kib); err == nil && (kind == "Shared_Dirty:" || kind == "Private_Dirty:") {
				n += kib / 4
			}
			if kind == "VmFlags:" {
				break
			}
		}
		return n
	}
	r.Write(0, bytes.Repeat([]byte{5}, 64<<10))
	r.Flush(0, 64<<10)
	if err := r.Fence(); err != nil {
		t.Fatal(err)
	}
	if n := dirtyPages(); n != 0 {
		t.Skipf("%d pages are dirty after an msync here: nothing can be seen", n)
	}
	want := bytes.Clone(r.Bytes())
	Redirty(r, 4<<10, 32<<10)
	if n := dirtyPages(); n != 8 {
		t.Errorf("%d pages are dirty, not 8", n)
	}
	if !bytes.Equal(r.Bytes(), want) {
		t.Error("the content has changed")
	}
}
