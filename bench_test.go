package nvmmirror

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
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
			mem := newImage(b, 16<<20, 32<<20)
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
				if _, err := openMemory("heap", mem, Options{Logger: nopLogger}); err != nil {
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
