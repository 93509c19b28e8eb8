package nvmmirror

import (
	"bytes"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
)

func TestTableEntries(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	m := layout(smallSize, smallJournal)
	tab := table{mem, m.Table}
	rapid.Check(t, func(t *rapid.T) {
		b := rapid.Int64Range(0, smallSize/blockSize-1).Draw(t, "block")
		e := entry{LSN(rapid.Uint64().Draw(t, "lsn")), rapid.Uint32().Draw(t, "crc"), rapid.Bool().Draw(t, "unverified"), rapid.Bool().Draw(t, "damaged")}
		tab.set(b, e)
		if got, ok := tab.get(b); !ok || got != e {
			t.Fatalf("%+v, %v", got, ok)
		}
		off := m.Table.Off + b*tableEntry
		p := mem.b[off : off+tableEntry]
		if _, ok := decodeEntry(p, b+1); ok {
			t.Fatal("the entry is good for another block")
		}
		at, bit := rapid.IntRange(0, tableEntry-1).Draw(t, "byte"), rapid.IntRange(0, 7).Draw(t, "bit")
		p[at] ^= 1 << bit
		if _, ok := tab.get(b); ok {
			t.Fatalf("a flip in byte %d is not noticed", at)
		}
		p[at] ^= 1 << bit
	})
}

func TestNewestEntry(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	m := layout(smallSize, smallJournal)
	tab := table{mem, m.Table}
	const blocks = smallSize / blockSize
	if n := newestEntry(mem.b[m.Table.Off:], blocks); n != 0 {
		t.Fatal(n)
	}
	tab.set(3, entry{640, 1, true, false})
	tab.set(blocks-1, entry{128, 1, false, false})
	if n := newestEntry(mem.b[m.Table.Off:], blocks); n != 640 {
		t.Fatal(n)
	}
	mem.b[m.Table.Off+4*tableEntry+5] = 1 // a damaged entry says nothing
	if n := newestEntry(mem.b[m.Table.Off:], blocks); n != 640 {
		t.Fatal(n)
	}
}

// TestCarriedChecksum: whatever is written, each block's entry holds the
// checksum of the block, though it was never taken from the medium.
func TestCarriedChecksum(t *testing.T) {
	const seed = 11
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	mem := newImage(t, smallSize, smallJournal)
	v := openQuiet(t, mem)
	model := make([]byte, smallSize)
	for i := range 400 {
		tx := randomTransaction(rng, smallSize, 5, 9000)
		if _, err := tx.commit(v); err != nil {
			t.Fatal(err)
		}
		tx.applyTo(model)
		if i%20 == 0 {
			if err := v.checkpoint(false); err != nil {
				t.Fatal(err)
			}
		}
	}
	data, bad := blockContent(v)
	if len(bad) > 0 || !bytes.Equal(data, model) {
		t.Fatalf("%d blocks do not match their entries", len(bad))
	}
}

// TestFlipIsNotBlessed: a bit flips in a block, then its neighbours change.
// The entry must go on not to match, also over checkpoints, until the block is
// rewritten as a whole.
func TestFlipIsNotBlessed(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	v := openQuiet(t, mem)
	write := func(off int64, n int) {
		t.Helper()
		if _, err := (transaction{{off, bytes.Repeat([]byte{0x5a}, n)}}).commit(v); err != nil {
			t.Fatal(err)
		}
	}
	write(0, 3*blockSize)
	mem.b[v.meta.Data.Off+blockSize+2000] ^= 8
	for i := range 5 {
		write(blockSize+int64(i)*100, 50)
		if err := v.checkpoint(false); err != nil {
			t.Fatal(err)
		}
		if e, ok := v.table.get(1); !ok || e.crc == crc32c.Sum(v.block(1)) {
			t.Fatal("the entry matches the damaged block")
		}
		if _, err := v.ReadAt(make([]byte, 10), blockSize); err == nil {
			t.Fatal("the damaged block is served")
		}
	}
	if v.bad.n.Load() != 1 {
		t.Errorf("%d damaged blocks are known", v.bad.n.Load())
	}
	write(blockSize, blockSize)
	if _, err := v.ReadAt(make([]byte, 10), blockSize); err != nil || v.bad.n.Load() != 0 {
		t.Errorf("after it was rewritten: %v, %d damaged blocks", err, v.bad.n.Load())
	}
}

// TestMarksSome: each marked block has its turn, and none is named twice.
func TestMarksSome(t *testing.T) {
	m := &marks{blockSet: newBlockSet(300)}
	for _, b := range []int64{3, 64, 65, 130, 299, 65} {
		m.add(b)
	}
	m.remove(64)
	m.remove(7)
	if m.n.Load() != 4 || !slices.Equal(slices.Collect(m.all()), []int64{3, 65, 130, 299}) {
		t.Fatalf("%d: %v", m.n.Load(), slices.Collect(m.all()))
	}
	for from, want := range map[int64][]int64{0: {3, 65, 130, 299}, 130: {130, 299, 3, 65}, 299: {299, 3, 65, 130}, 300: {3, 65, 130, 299}} {
		if got := m.some(9, from); !slices.Equal(got, want) {
			t.Errorf("from %d: %v, not %v", from, got, want)
		}
	}
	seen := map[int64]bool{}
	for from, k := int64(0), 0; k < 8; k++ {
		some := m.some(1, from)
		seen[some[0]] = true
		from = some[0] + 1
	}
	if len(seen) != 4 {
		t.Errorf("asked one by one, only %v had their turn", seen)
	}
	if m.reset(); m.n.Load() != 0 || m.has(3) || m.some(9, 0) != nil {
		t.Error("marks are left")
	}
}

// TestEmptySetStaysUntouched: a set is emptied where it holds something. A volume of
// 16 TiB has sets of half a gigabyte, of which most is never stored to.
func TestEmptySetStaysUntouched(t *testing.T) {
	const page = 64 << 10
	mem, err := unix.Mmap(-1, 0, 3*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	for _, untouched := range [][]byte{mem[:page], mem[2*page:]} {
		if err := unix.Mprotect(untouched, unix.PROT_READ); err != nil {
			t.Fatal(err)
		}
	}
	s := blockSet(unsafe.Slice((*uint64)(unsafe.Pointer(&mem[0])), len(mem)/8))
	for _, b := range []int64{page * 8, page*8 + 63, page*16 - 1} {
		s.add(b)
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	s.empty() // a store elsewhere faults
	for b := range s.all() {
		t.Errorf("block %d is left", b)
	}
}
