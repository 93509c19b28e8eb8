package nvmmirror

import (
	"context"
	"encoding/binary"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// heapMemory is memory on the heap that remembers what stores did to it: a
// region is changed, recovered, compared and put back thousands of times.
type heapMemory struct {
	b    []byte
	undo []store // what stores replaced, oldest first; kept while keepUndo
	log  []store // what was stored; kept while keepLog

	keepUndo, keepLog bool
}

// store is one primitive's effect.
type store struct {
	off  int64
	data []byte
}

var _ pmem.Memory = (*heapMemory)(nil)

func newHeapMemory(b []byte) *heapMemory { return &heapMemory{b: b} }

func (m *heapMemory) put(off int64, p []byte) {
	if m.keepUndo {
		m.undo = append(m.undo, store{off, slices.Clone(m.b[off : off+int64(len(p))])})
	}
	if m.keepLog {
		m.log = append(m.log, store{off, slices.Clone(p)})
	}
	copy(m.b[off:], p)
}

// restore takes back all stores since keepUndo was set.
func (m *heapMemory) restore() {
	for _, s := range slices.Backward(m.undo) {
		copy(m.b[s.off:], s.data)
	}
	m.undo = m.undo[:0]
}

func (m *heapMemory) Bytes() []byte     { return m.b }
func (m *heapMemory) Class() pmem.Class { return pmem.Emulated }
func (m *heapMemory) Store64(off int64, v uint64) {
	m.put(off, binary.LittleEndian.AppendUint64(nil, v))
}
func (m *heapMemory) Write(off int64, p []byte)  { m.put(off, p) }
func (m *heapMemory) Copy(off int64, p []byte)   { m.put(off, p) }
func (m *heapMemory) Zero(off, n int64)          { m.put(off, make([]byte, n)) }
func (m *heapMemory) Window(off, n int64) []byte { return m.b[off : off+n : off+n] }
func (m *heapMemory) Flush(int64, int64)         {}
func (m *heapMemory) Fence() error               { return nil }

const (
	smallSize    = 256 << 10
	smallJournal = MinJournal
)

// newImage is a blank region on the heap.
func newImage(t testing.TB, size, journalSize int64) *heapMemory {
	t.Helper()
	m := layout(size, journalSize)
	mem := newHeapMemory(make([]byte, m.Data.end()))
	if err := format(mem, m); err != nil {
		t.Fatal(err)
	}
	return mem
}

// openQuiet opens a standalone volume whose checkpoints are the test's to
// call.
func openQuiet(t testing.TB, mem pmem.Memory) *Volume {
	t.Helper()
	v, err := tryOpenQuiet(mem)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.pair.Close)
	return v
}

// tryOpenQuiet is what Open does, but for the file and the checkpointer.
func tryOpenQuiet(mem pmem.Memory) (*Volume, error) {
	o, err := Options{}.withDefaults()
	if err != nil {
		return nil, err
	}
	v, err := openMemory("heap", mem, o)
	if err != nil {
		return nil, err
	}
	return v, v.takeUp()
}

var nopLogger = zap.NewNop()

// transaction is a transaction of the model.
type transaction []store

func randomTransaction(rng *rand.Rand, size int64, maxWrites, maxBytes int) transaction {
	var tx transaction
	for range 1 + rng.IntN(maxWrites) {
		n := 1 + rng.IntN(maxBytes)
		if rng.IntN(3) == 0 {
			n = 1 + rng.IntN(64)
		}
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(rng.Uint32() | 1) // never 0: a lost write shows
		}
		tx = append(tx, store{rng.Int64N(size - int64(n) + 1), p})
	}
	return tx
}

func (tx transaction) applyTo(model []byte) {
	for _, w := range tx {
		copy(model[w.off:], w.data)
	}
}

func (tx transaction) commit(v *Volume) (LSN, error) {
	t := v.Begin()
	for _, w := range tx {
		if err := t.Write(w.off, w.data); err != nil {
			t.Discard()
			return 0, err
		}
	}
	return t.Commit(context.Background())
}

// blockContent is the volume's data, and the blocks that a read would report
// as damaged.
func blockContent(v *Volume) (data []byte, bad map[int64]bool) {
	bad = map[int64]bool{}
	for b := range v.meta.Size / blockSize {
		if e, ok := v.table.get(b); !ok || crc32c.Sum(v.block(b)) != e.crc {
			bad[b] = true
		}
	}
	off := v.meta.Data.Off
	return v.mem.Bytes()[off : off+v.meta.Size], bad
}

// checkImage is Check of a region on the heap.
func checkImage(mem []byte) (*CheckReport, error) {
	s := &subject{view: newHeapMemory(mem), mem: mem, ins: Inspection{Path: "heap", Class: pmem.Emulated.String(), Length: int64(len(mem))}}
	return s.check(false, nil, nil)
}

// writeRegion puts an image into a file on tmpfs.
func writeRegion(t testing.TB, image []byte) string {
	t.Helper()
	path := shm(t) + "/region"
	if err := os.WriteFile(path, image, fs.FileMode(0o600)); err != nil {
		t.Fatal(err)
	}
	return path
}

// openMemory recovers the region in mem.
func openMemory(path string, mem pmem.Memory, o Options) (*Volume, error) {
	v, err := newVolume(path, mem, o)
	if err == nil {
		err = v.recover()
	}
	if err != nil {
		return nil, err
	}
	return v, nil
}
