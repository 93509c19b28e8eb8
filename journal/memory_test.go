package journal

import (
	"encoding/binary"
	"testing"

	"github.com/nvmmirror/nvmmirror/pmem"
)

// heapMemory is memory on the heap, which the race detector sees.
type heapMemory struct{ b []byte }

var _ pmem.Memory = (*heapMemory)(nil)

func (m *heapMemory) Bytes() []byte               { return m.b }
func (m *heapMemory) Class() pmem.Class           { return pmem.Emulated }
func (m *heapMemory) Store64(off int64, v uint64) { binary.LittleEndian.PutUint64(m.b[off:], v) }
func (m *heapMemory) Write(off int64, p []byte)   { copy(m.b[off:], p) }
func (m *heapMemory) Copy(off int64, p []byte)    { copy(m.b[off:], p) }
func (m *heapMemory) Zero(off, n int64)           { clear(m.b[off : off+n]) }
func (m *heapMemory) Window(off, n int64) []byte  { return m.b[off : off+n : off+n] }
func (m *heapMemory) Flush(int64, int64)          {}
func (m *heapMemory) Fence() error                { return nil }

var testEpoch = Epoch{Counter: 3, Node: 77}

func testHistory(start LSN) History { return History{{Epoch: testEpoch, Start: start}} }

// newTestLog is an empty log in a ring of size bytes that starts at base.
func newTestLog(t testing.TB, size int64, base LSN) *Log {
	t.Helper()
	l := NewLog(&heapMemory{make([]byte, size+128)}, 64, size, base)
	l.Reset(base, 0)
	l.SetEpoch(testEpoch)
	return l
}

func requestOf(writes []Write) *Request {
	r := NewRequest()
	for _, w := range writes {
		r.Add(w.Off, w.Data)
	}
	return r
}

// appendTo appends one segment.
func appendTo(l *Log, acked LSN, transactions ...[]Write) (LSN, error) {
	var reqs []*Request
	size := 0
	for _, tx := range transactions {
		r := requestOf(tx)
		defer r.Free()
		reqs = append(reqs, r)
		size += r.Size()
	}
	return l.Append(reqs, size, acked)
}
