package journal

import (
	"bytes"
	"runtime"
	"sync"
	"testing"

	"github.com/nvmmirror/nvmmirror/internal/parts"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// flushes remembers which lines were flushed, and how often was fenced.
type flushes struct {
	heapMemory
	mu     sync.Mutex
	lines  map[int64]int
	fences int

	paged  bool
	stored map[int64]bool // lines, since they were flushed
}

func (m *flushes) Class() pmem.Class {
	if m.paged {
		return pmem.Paged
	}
	return m.heapMemory.Class()
}

func (m *flushes) Write(off int64, p []byte) {
	m.heapMemory.Write(off, p)
	m.mu.Lock()
	defer m.mu.Unlock()
	for at := off &^ (Align - 1); m.paged && at < off+int64(len(p)); at += Align {
		m.stored[at] = true
	}
}

func (m *flushes) Flush(off, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for at := off &^ (Align - 1); at < off+n; at += Align {
		m.lines[at]++
		if m.paged && !m.stored[at] {
			m.lines[at] = -1 // for the kernel there may be nothing to write
		}
	}
}

func (m *flushes) Fence() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fences++
	return nil
}

// TestTrustInParts: several goroutines flush the log between them, each line of
// it once and nothing else, and each fences what it has flushed; also where the
// log goes around the ring's end.
func TestTrustInParts(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(3))
	const size, segment = 16 << 20, 256 << 10
	m := &flushes{heapMemory: heapMemory{make([]byte, size)}, lines: map[int64]int{}}
	l := NewLog(m, 0, size, 0)
	l.Reset(0, 0)
	l.SetEpoch(testEpoch)
	var from LSN
	for l.End() < size+4<<20 {
		if l.End() < size-9<<20 {
			from = l.End()
		}
		if _, err := appendTo(l, 0, []Write{{0, make([]byte, segment-100)}}); err != nil {
			t.Fatal(err)
		}
	}
	to := l.End()
	if got := parts.Of(int64(to - from)); got != 3 {
		t.Fatalf("%d parts", got)
	}
	clear(m.lines)
	m.fences = 0
	if err := l.Trust(from, to); err != nil {
		t.Fatal(err)
	}
	for at := from; at < to; at += Align {
		if p := int64(l.ring.pos(at)); m.lines[p] != 1 {
			t.Fatalf("the line of LSN %d was flushed %d times", at, m.lines[p])
		}
	}
	if len(m.lines) != int(to-from)/Align || m.fences != 3 {
		t.Errorf("%d lines flushed of %d, %d fences", len(m.lines), (to-from)/Align, m.fences)
	}
}

// TestTrustStoresPagedLogAgain: on an ordinary file a page whose writing failed
// counts as clean, and syncing it would do nothing.
func TestTrustStoresPagedLogAgain(t *testing.T) {
	m := &flushes{heapMemory: heapMemory{make([]byte, 64<<10)}, lines: map[int64]int{}, stored: map[int64]bool{}}
	l := NewLog(m, 0, 64<<10, 0)
	l.Reset(0, 0)
	l.SetEpoch(testEpoch)
	for range 3 {
		if _, err := appendTo(l, 0, []Write{{0, make([]byte, 1000)}}); err != nil {
			t.Fatal(err)
		}
	}
	clear(m.lines)
	before := bytes.Clone(m.b)
	m.paged = true
	if err := l.Trust(0, l.End()); err != nil {
		t.Fatal(err)
	}
	for at := int64(0); at < int64(l.End()); at += Align {
		if m.lines[at] != 1 {
			t.Fatalf("the line at %d was not stored and then flushed", at)
		}
	}
	if !bytes.Equal(m.b, before) {
		t.Error("the log has changed")
	}
}
