package nvmmirror

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/nvmmirror/nvmmirror/pmem"
)

func benchVolume(b testing.TB) *Volume {
	b.Helper()
	path := filepath.Join(shm(b), "r")
	if err := Create(path, CreateOptions{Size: 16 << 20, JournalSize: 32 << 20, Accept: pmem.Emulated}); err != nil {
		b.Fatal(err)
	}
	v, err := Open(path, Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { v.Close() })
	return v
}

// emulated is the memory of a blank region on tmpfs.
func emulated(b testing.TB, size, journalSize int64) *pmem.Region {
	b.Helper()
	m := layout(size, journalSize)
	mem, err := pmem.Create(filepath.Join(shm(b), "r"), m.Data.end(), pmem.Options{Accept: pmem.Emulated})
	if err == nil {
		b.Cleanup(func() { mem.Close() })
		err = format(mem, m)
	}
	if err != nil {
		b.Fatal(err)
	}
	return mem
}

// BenchmarkCommitAlone is Begin, Write and Commit of a standalone volume on
// emulated memory: durable and visible.
func BenchmarkCommitAlone(b *testing.B) {
	for _, n := range []int{64, 512, 4 << 10, 64 << 10, 1 << 20} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			v := benchVolume(b)
			p := bytes.Repeat([]byte{1}, n)
			ctx := context.Background()
			b.SetBytes(int64(n))
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				tx := v.Begin()
				if err := tx.Write(off, p); err != nil {
					b.Fatal(err)
				}
				if _, err := tx.Commit(ctx); err != nil {
					b.Fatal(err)
				}
				if off += int64(n); off+int64(n) > v.Size() {
					off = 0
				}
			}
		})
	}
}

// BenchmarkRecovery opens a region that was killed with its ring three
// quarters full: all of it is scanned and applied.
func BenchmarkRecovery(b *testing.B) {
	for _, n := range []int{64, 4 << 10, 64 << 10} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			mem := emulated(b, 16<<20, 32<<20)
			v := openQuiet(b, mem)
			p := bytes.Repeat([]byte{1}, n)
			for i := int64(0); v.journal.End() < 24<<20; i++ {
				if _, err := (transaction{{i * int64(n) % (16<<20 - int64(n)), p}}).commit(v); err != nil {
					b.Fatal(err)
				}
			}
			b.SetBytes(int64(v.journal.End()))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := openMemory("tmpfs", mem, Options{Logger: nopLogger}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkOpenClean opens a region that was closed cleanly, all of its blocks
// written and its ring full of old log. Prefaulting, which is the mapping's, is
// not in it.
func BenchmarkOpenClean(b *testing.B) {
	for _, size := range []int64{64 << 20, 1 << 30} {
		b.Run(fmt.Sprintf("%dMiB", size>>20), func(b *testing.B) {
			mem := emulated(b, size, DefaultJournal)
			v, err := openMemory("tmpfs", mem, Options{Logger: nopLogger})
			if err == nil {
				err = v.takeUp()
			}
			if err != nil {
				b.Fatal(err)
			}
			p := make([]byte, 1<<20)
			for off := int64(0); off < size; off += int64(len(p)) {
				if _, err := (transaction{{off, p}}).commit(v); err != nil {
					b.Fatal(err)
				}
				if v.checkpointDue() { // nobody does it in the background here
					if err := v.checkpoint(false); err != nil {
						b.Fatal(err)
					}
				}
			}
			if err := v.Close(); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := openMemory("tmpfs", mem, Options{Logger: nopLogger}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkCheck verifies a region; its figure is bytes of the volume.
func BenchmarkCheck(b *testing.B) {
	mem := newImage(b, 16<<20, MinJournal)
	b.SetBytes(16 << 20)
	b.ReportAllocs()
	for b.Loop() {
		if r, err := checkImage(mem.b); err != nil || r.Damaged {
			b.Fatal(err)
		}
	}
}

// TestCommitAllocatesNothing: Begin, Write and Commit of a standalone volume.
func TestCommitAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	v := benchVolume(t)
	ctx := context.Background()
	for _, n := range []int{1, 64, 4096, 100_000} {
		p := bytes.Repeat([]byte{1}, n)
		allocs := testing.AllocsPerRun(1000, func() {
			tx := v.Begin()
			for i := range int64(4) {
				if err := tx.Write(i*200_000, p); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := tx.Commit(ctx); err != nil {
				t.Fatal(err)
			}
		})
		if allocs != 0 {
			t.Errorf("%d bytes: %v allocations for one commit", n, allocs)
		}
	}
}

// TestMirroredCommitAllocatesNothing counts what both nodes of a pair allocate,
// which are in this process; the longest transactions travel by lanes. What is
// allowed is for checkpoints, one in a quarter of the ring, and for what both
// nodes do now and then.
func TestMirroredCommitAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	a, b := pairInSync(t, testConfig{quiet: true, bare: true, size: 8 << 20, journal: 256 << 20})
	for _, n := range []*testNode{a, b} {
		n.until("with a lane", func(s Status) bool { return s.Lanes == 1 })
	}
	for _, n := range []int{1, 64, 4096, 100_000, 1 << 20} {
		p := bytes.Repeat([]byte{1}, n)
		do := func(commits int) {
			for range commits {
				tx := a.Begin()
				if err := tx.Write(0, p); err != nil {
					t.Fatal(err)
				}
				if _, err := tx.Commit(context.Background()); err != nil {
					t.Fatal(err)
				}
			}
		}
		checkpoints := func() uint64 { return a.Status().Counters.Checkpoints + b.Status().Counters.Checkpoints }
		do(10)
		var before, after runtime.MemStats
		some := checkpoints()
		runtime.ReadMemStats(&before)
		const commits = 200
		do(commits)
		runtime.ReadMemStats(&after)
		allowed := 60 + 15*(checkpoints()-some)
		t.Logf("%d bytes: %d allocations for %d commits and %d checkpoints", n, after.Mallocs-before.Mallocs, commits, checkpoints()-some)
		if got := after.Mallocs - before.Mallocs; got > allowed {
			t.Errorf("%d bytes: %d allocations for %d commits, both nodes together, more than %d", n, got, commits, allowed)
		}
	}
	identical(t, a, b)
}
