package nvmmirror

import (
	"slices"
	"sync"

	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/pmem/sim"
)

// simMedia is what a node's process sees of its persistent memory: the crash
// simulator's, and a point at which the process dies. From there on its stores
// go nowhere, however far its goroutines still run.
type simMedia struct {
	*sim.Memory
	life *simLife
	ops  int
	at   int           // dies at this operation; 0: does not
	keep func(int) int // of n bytes that are being stored then

	mu   sync.Mutex // guards wins
	wins []simWindow
}

// simWindow is a range that the kernel is to fill. What it puts there becomes a
// store with the flush; until then nobody may look at it.
type simWindow struct {
	off int64
	buf []byte
}

var _ pmem.Memory = (*simMedia)(nil)

// dying counts an operation, and reports whether the process is dead.
func (m *simMedia) dying(store func()) bool {
	m.life.net.mu.Lock()
	dead := m.life.dead
	m.ops++
	now := !dead && m.ops == m.at
	if now {
		m.life.dead = true
	}
	m.life.net.mu.Unlock()
	if now {
		if store != nil {
			store()
		}
	}
	return dead || now
}

// forget ends the windows over a range: something else is stored there.
func (m *simMedia) forget(off, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wins = slices.DeleteFunc(m.wins, func(w simWindow) bool {
		return w.off < off+n && off < w.off+int64(len(w.buf))
	})
}

func (m *simMedia) Store64(off int64, v uint64) {
	if !m.dying(nil) {
		m.Memory.Store64(off, v)
	}
}

func (m *simMedia) Write(off int64, p []byte) {
	if !m.dying(func() { m.Memory.Write(off, p[:m.keep(len(p))]) }) {
		m.forget(off, int64(len(p)))
		m.Memory.Write(off, p)
	}
}

func (m *simMedia) Copy(off int64, p []byte) {
	// A part of it is done, and its flush, if any, has no fence behind it.
	if !m.dying(func() { m.Memory.Raw(off, p[:m.keep(len(p))], true) }) {
		m.forget(off, int64(len(p)))
		m.Memory.Copy(off, p)
	}
}

func (m *simMedia) Zero(off, n int64) {
	if !m.dying(nil) {
		m.forget(off, n)
		m.Memory.Zero(off, n)
	}
}

func (m *simMedia) Window(off, n int64) []byte {
	buf := make([]byte, n)
	if !m.dying(nil) {
		m.forget(off, n)
		m.mu.Lock()
		m.wins = append(m.wins, simWindow{off, buf})
		m.mu.Unlock()
	}
	return buf
}

func (m *simMedia) Flush(off, n int64) {
	if m.dying(func() { m.land(off, n) }) {
		return
	}
	m.land(off, n)
	m.Memory.Flush(off, n)
}

// land makes stores of what the kernel put into the windows over a range.
func (m *simMedia) land(off, n int64) {
	m.mu.Lock()
	wins := slices.Clone(m.wins)
	m.mu.Unlock()
	for _, w := range wins {
		if w.off < off+n && off < w.off+int64(len(w.buf)) {
			m.Memory.Write(w.off, w.buf)
		}
	}
	m.forget(off, n)
}

func (m *simMedia) Fence() error {
	if m.dying(nil) {
		return nil
	}
	return m.Memory.Fence()
}
