package nvmmirror

import (
	"bytes"
	"slices"
	"testing"
)

// A flip in a block's entry and one in its data are found, in either order. Log changes
// a part of it, and the process is killed before the next checkpoint: redo does not take
// the checksum anew.
func TestKnownDamageOfEntryAndBlock(t *testing.T) {
	for _, later := range []bool{false, true} { // is the data damaged once the entry is known to be?
		for at := range int64(tableEntry) {
			mem := newImage(t, smallSize, smallJournal)
			v := openQuiet(t, mem)
			if _, err := v.WriteAt(bytes.Repeat([]byte("a"), blockSize), 0); err != nil {
				t.Fatal(err)
			}
			if err := v.checkpoint(false); err != nil {
				t.Fatal(err)
			}
			flip := func() { mem.b[v.data.Off+2000] ^= 1 }
			p := make([]byte, 1)
			mem.b[v.table.area.Off+at] ^= 0x10
			if !later {
				flip()
			}
			if _, err := v.ReadAt(p, 2000); !isCorrupt(err) {
				t.Fatalf("not found: %v", err)
			}
			if later {
				flip()
			}
			for range 2 {
				if _, err := v.WriteAt([]byte("beside it"), 0); err != nil {
					t.Fatal(err)
				}
				if err := v.checkpoint(false); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := v.WriteAt([]byte("and after"), 0); err != nil {
				t.Fatal(err)
			}
			w := openQuiet(t, newHeapMemory(slices.Clone(mem.b))) // killed here
			if _, err := w.ReadAt(p, 2000); !isCorrupt(err) {
				t.Errorf("byte %d, later %v: %q was served: %v", at, later, p, err)
			}
			if _, err := w.WriteAt(bytes.Repeat([]byte("b"), blockSize), 0); err != nil {
				t.Fatal(err)
			}
			if _, err := w.ReadAt(p, 2000); err != nil || p[0] != 'b' || w.bad.n.Load() != 0 {
				t.Errorf("written anew: %q, %v, %d damaged", p, err, w.bad.n.Load())
			}
		}
	}
}

// A flip in a block's entry alone: what is left of it vouches for the block. A change
// replaces the entry, and nothing is lost.
func TestFlipInAnEntryAlone(t *testing.T) {
	for bit := range tableEntry * 8 {
		mem := newImage(t, smallSize, smallJournal)
		v := openQuiet(t, mem)
		want := bytes.Repeat([]byte("a"), blockSize)
		if _, err := v.WriteAt(want, 0); err != nil {
			t.Fatal(err)
		}
		if err := v.checkpoint(false); err != nil {
			t.Fatal(err)
		}
		mem.b[v.table.area.Off+int64(bit/8)] ^= 1 << (bit % 8)
		p := make([]byte, blockSize)
		if _, err := v.ReadAt(p, 0); !isCorrupt(err) {
			t.Fatalf("bit %d: not found: %v", bit, err)
		}
		if err := v.checkpoint(false); err != nil {
			t.Fatal(err)
		}
		if e, ok := v.table.get(0); ok {
			t.Errorf("bit %d: the entry became %+v", bit, e)
		}
		copy(want, "beside it")
		if _, err := v.WriteAt(want[:9], 0); err != nil {
			t.Fatal(err)
		}
		for _, n := range []*Volume{v, openQuiet(t, newHeapMemory(slices.Clone(mem.b)))} {
			if _, err := n.ReadAt(p, 0); err != nil || !bytes.Equal(p, want) || n.bad.n.Load() != 0 || !n.unverified.has(0) {
				t.Errorf("bit %d: %v, or not what was written, or %d damaged", bit, err, n.bad.n.Load())
			}
		}
	}
}
