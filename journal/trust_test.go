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
	if err := l.Trust(&Scan{From: from, End: to}); err != nil {
		t.Fatal(err)
	}
	for at := from; at < to; at += Align {
		if p := int64(l.ring.Position(at)); m.lines[p] != 1 {
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
	if err := l.Trust(&Scan{End: l.End()}); err != nil {
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

// zeroFirst is memory of class paged that notes whether the padding was zero
// before anything was stored again.
type zeroFirst struct {
	flushes
	zeroed, early bool
}

func (m *zeroFirst) Zero(off, n int64) {
	m.heapMemory.Zero(off, n)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.zeroed = true
}

func (m *zeroFirst) Write(off int64, p []byte) {
	m.mu.Lock()
	m.early = m.early || !m.zeroed
	m.mu.Unlock()
	m.flushes.Write(off, p)
}

// TestTrustZerosBeforeItStores: on an ordinary file all of the log is read and
// stored again, by several goroutines: what was behind a padding's header before its
// zeros must not come back.
func TestTrustZerosBeforeItStores(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	const size, segment = 16 << 20, 3 << 20
	m := &zeroFirst{flushes: flushes{heapMemory: heapMemory{make([]byte, size)}, lines: map[int64]int{}, stored: map[int64]bool{}}}
	l := NewLog(m, 0, size, 0)
	l.Reset(0, 0)
	l.SetEpoch(testEpoch)
	for range 6 {
		if _, err := appendTo(l, 0, []Write{{0, make([]byte, segment-HeaderSize-RecordHeaderSize)}}); err != nil {
			t.Fatal(err)
		}
	}
	var h Header
	if err := l.Ring().Header(5*segment, &h); err != nil || !h.Pad {
		t.Fatalf("%+v, %v", h, err)
	}
	pad := m.b[5*segment+HeaderSize:]
	pad[len(pad)/2] = 9 // a kill came before the zeros
	if err := l.Ring().Header(segment, &h); err != nil {
		t.Fatal(err)
	}
	scan, err := ScanFrom(l.Ring(), testHistory(0), testEpoch.Node, segment, h.Prev, l.End(), nil)
	if err != nil || scan.End != l.End() {
		t.Fatalf("%+v, %v", scan, err)
	}
	m.paged, m.zeroed, m.early = true, false, false
	if err := l.Trust(&scan); err != nil {
		t.Fatal(err)
	}
	if m.early || !bytes.Equal(pad, make([]byte, len(pad))) {
		t.Errorf("stored before it was zero: %v; %d behind the header", m.early, pad[len(pad)/2])
	}
}

// TestExtendMakesDurable: what Extend takes in was visible, and perhaps never durable.
func TestExtendMakesDurable(t *testing.T) {
	m := &flushes{heapMemory: heapMemory{make([]byte, 64<<10)}, lines: map[int64]int{}}
	l := NewLog(m, 0, 64<<10, 0)
	l.Reset(0, 0)
	l.SetEpoch(testEpoch)
	var from LSN
	var chain uint32
	for i := range 3 {
		if _, err := appendTo(l, 0, []Write{{0, make([]byte, 1000)}}); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			from, chain = l.End(), l.Chain()
		}
	}
	to := l.End()
	l.Reset(from, chain)
	clear(m.lines)
	m.fences = 0
	if err := l.Extend(History{{Epoch: testEpoch, PeerIn: true}}); err != nil || l.End() != to {
		t.Fatalf("%v, the log ends at %d of %d", err, l.End(), to)
	}
	for at := int64(from); at < int64(to); at += Align {
		if m.lines[at] == 0 {
			t.Fatalf("the line at %d was not flushed", at)
		}
	}
	if m.fences == 0 {
		t.Error("not fenced")
	}
}
