// Package sim is persistent memory that can lose power: the primitives of
// package pmem on a modelled memory.
//
// # Model
//
// Per 64-byte line, what is not yet durable:
//
//   - cached stores, in order, each of at most 8 aligned bytes. The cache may
//     write the line back at any moment, so power failure keeps any prefix of
//     them. A flush marks those so far; the next fence makes the marked ones
//     durable.
//   - non-temporal stores: they leave by buffers that keep no order, so power
//     failure keeps any subset, until a fence makes all of them durable. What
//     was cached of their line before leaves the cache with them.
//
// The model follows the x86 rules as PMDK's pmreorder and Intel's manual state
// them (SDM volume 1, chapter 10.4.6.2; CLWB in volume 2A). It is stricter than
// hardware with a cache line's stores in one respect, and that on purpose: a
// prefix may end between any two stores.
//
// A killed process loses nothing that is visible, and makes nothing durable:
// the memory just goes on, with whatever was not durable still at risk.
package sim

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/pmem"
)

// Kind is what an operation does.
type Kind uint8

const (
	Store Kind = iota // one cached or non-temporal store of at most 8 bytes
	Flush
	Fence
)

func (k Kind) String() string { return [...]string{"store", "flush", "fence"}[k] }

// Op is one operation on the memory, as a hook sees it before it is done.
type Op struct {
	Kind Kind
	N    int    // of all operations so far
	Site string // file:line of the code that issued a flush or a fence
}

// store is one store in a line.
type store struct {
	off, n uint8
	data   [8]byte
}

// line is what is not durable of a line.
type line struct {
	base    [pmem.LineSize]byte // durable
	cached  []store
	flushed int // so many of them are flushed
	nt      []store
	by      string // who flushed last, or stored past the cache
}

// Memory implements pmem.Memory. Its methods are safe for concurrent use.
type Memory struct {
	mu      sync.Mutex
	visible []byte
	lines   map[int64]*line
	windows []window
	ops     int
	hook    func(Op)
	mutant  func(Op) bool
	apart   bool
	nt      int // Copy uses non-temporal stores from so many bytes on, where lines are stored in part
}

type window struct {
	off    int64
	shadow []byte
}

// New is zeroed, durable memory.
func New(size int64) (*Memory, error) {
	mem, err := mapping(size)
	if err != nil {
		return nil, err
	}
	clear(mem)
	return &Memory{visible: mem, lines: map[int64]*line{}, nt: 256}, nil
}

// Close frees the memory: another may get it. No slice of it may be used any
// more.
func (m *Memory) Close() error {
	spare.Lock()
	defer spare.Unlock()
	if len(spare.maps) < cap(spare.maps) {
		spare.maps = append(spare.maps, m.visible)
		m.visible = nil
		return nil
	}
	return unix.Munmap(m.visible)
}

// spare keeps mappings for the next memory of their size: in a virtual machine
// fresh pages cost more than the bytes that are copied to them.
var spare = struct {
	sync.Mutex
	maps [][]byte
}{maps: make([][]byte, 0, 8)}

// mapping is memory with any content.
func mapping(size int64) ([]byte, error) {
	spare.Lock()
	defer spare.Unlock()
	for i, mem := range spare.maps {
		if int64(len(mem)) == size {
			spare.maps = slices.Delete(spare.maps, i, i+1)
			return mem, nil
		}
	}
	mem, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("sim: %d bytes: %w", size, err)
	}
	return mem, nil
}

// OnOp calls f before each operation, with the memory locked: f may take
// images, not operate.
func (m *Memory) OnOp(f func(Op)) { m.mu.Lock(); m.hook = f; m.mu.Unlock() }

// Mutate drops the flushes and fences for which f is true: the code under
// test then behaves as if it did not issue them.
func (m *Memory) Mutate(f func(Op) bool) { m.mu.Lock(); m.mutant = f; m.mu.Unlock() }

// TellApart gives each goroutine a processor of its own: a fence makes durable
// only what its goroutine flushed last, or stored past the cache. It takes some
// microseconds an operation.
func (m *Memory) TellApart() { m.mu.Lock(); m.apart = true; m.mu.Unlock() }

// Ops is how many operations there were.
func (m *Memory) Ops() int { m.mu.Lock(); defer m.mu.Unlock(); return m.ops }

// op announces an operation; dropped says that a mutant leaves it out.
func (m *Memory) op(k Kind) (dropped bool) {
	if m.hook == nil && m.mutant == nil {
		m.ops++
		return false
	}
	o := Op{Kind: k, N: m.ops}
	if k != Store {
		o.Site = site()
	}
	m.ops++
	if m.hook != nil {
		m.hook(o)
	}
	return k != Store && m.mutant != nil && m.mutant(o)
}

// caller names the goroutine, where they are told apart.
func (m *Memory) caller() string {
	if !m.apart {
		return ""
	}
	var buf [32]byte // "goroutine 17 [running]:"
	name, _, _ := strings.Cut(string(buf[:runtime.Stack(buf[:], false)]), " [")
	return name
}

// site is the first caller outside this package, and outside of what else only
// passes an operation on.
func site() string {
	var pcs [12]uintptr
	n := runtime.Callers(3, pcs[:])
	frames := runtime.CallersFrames(pcs[:n])
	for {
		f, more := frames.Next()
		passes := func(method string) bool { return strings.Contains(f.Function, method) }
		if !more || !passes("/pmem/sim.(*Memory).") && !passes(".(*simMedia).") && !passes("/journal.(*Log).Flush") {
			return fmt.Sprintf("%s:%d", trim(f.File), f.Line)
		}
	}
}

// trim keeps the last two elements of a path.
func trim(path string) string {
	slashes := 0
	for i := len(path) - 1; i >= 0; i-- {
		if path[i] == '/' {
			if slashes++; slashes == 2 {
				return path[i+1:]
			}
		}
	}
	return path
}

func (m *Memory) Bytes() []byte     { return m.visible }
func (m *Memory) Class() pmem.Class { return pmem.Cacheline }

func (m *Memory) Store64(off int64, v uint64) {
	if off%8 != 0 {
		panic(fmt.Sprintf("sim: Store64 at %d", off))
	}
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.put(off, b[:], false)
}

func (m *Memory) Write(off int64, p []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.put(off, p, false)
}

func (m *Memory) Copy(off int64, p []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.copy(off, p)
}

// copy does what pmem's copy does: full lines of a long copy, and a short one
// of nothing but full lines, by non-temporal stores, the rest cached and flushed.
func (m *Memory) copy(off int64, p []byte) {
	if len(p) < m.nt && (off|int64(len(p)))&(pmem.LineSize-1) != 0 {
		m.put(off, p, false)
		m.flush(off, int64(len(p)))
		return
	}
	if k := int(-off & (pmem.LineSize - 1)); k > 0 {
		m.put(off, p[:k], false)
		m.flush(off, int64(k))
		off, p = off+int64(k), p[k:]
	}
	full := len(p) &^ (pmem.LineSize - 1)
	m.put(off, p[:full], true)
	if rest := p[full:]; len(rest) > 0 {
		m.put(off+int64(full), rest, false)
		m.flush(off+int64(full), int64(len(rest)))
	}
}

func (m *Memory) Zero(off, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.copy(off, make([]byte, n))
}

func (m *Memory) Window(off, n int64) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	w := m.visible[off : off+n : off+n]
	m.windows = append(m.windows, window{off, slices.Clone(w)})
	return w
}

func (m *Memory) Flush(off, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.adopt(off, n)
	m.flush(off, n)
}

// adopt turns what was written into windows over [off, off+n) into stores.
func (m *Memory) adopt(off, n int64) {
	m.windows = slices.DeleteFunc(m.windows, func(w window) bool {
		end := w.off + int64(len(w.shadow))
		if end <= off || w.off >= off+n {
			return false
		}
		now := slices.Clone(m.visible[w.off:end])
		copy(m.visible[w.off:end], w.shadow)
		m.put(w.off, now, false)
		return true
	})
}

func (m *Memory) flush(off, n int64) {
	if m.op(Flush) {
		return
	}
	by := m.caller()
	for l := off / pmem.LineSize; l*pmem.LineSize < off+n; l++ {
		if ln := m.lines[l]; ln != nil {
			ln.flushed, ln.by = len(ln.cached), by
		}
	}
}

func (m *Memory) Fence() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.op(Fence) {
		return nil
	}
	by := m.caller()
	for n, l := range m.lines {
		if l.by != by {
			continue
		}
		for _, s := range l.nt {
			copy(l.base[s.off:], s.data[:s.n])
		}
		for _, s := range l.cached[:l.flushed] {
			copy(l.base[s.off:], s.data[:s.n])
		}
		l.nt = l.nt[:0]
		l.cached = slices.Delete(l.cached, 0, l.flushed)
		l.flushed = 0
		if len(l.cached) == 0 {
			delete(m.lines, n)
		}
	}
	return nil
}

// put stores p in pieces of at most 8 aligned bytes.
func (m *Memory) put(off int64, p []byte, nt bool) {
	if off < 0 || off+int64(len(p)) > int64(len(m.visible)) {
		panic(fmt.Sprintf("sim: store of %d bytes at %d of %d", len(p), off, len(m.visible)))
	}
	var by string
	if nt {
		by = m.caller()
	}
	for len(p) > 0 {
		k := min(len(p), int(8-off%8))
		m.op(Store)
		n := off / pmem.LineSize
		l := m.lines[n]
		if l == nil {
			l = &line{}
			copy(l.base[:], m.visible[n*pmem.LineSize:])
			m.lines[n] = l
		}
		s := store{off: uint8(off % pmem.LineSize), n: uint8(k)}
		copy(s.data[:], p[:k])
		if nt {
			// A non-temporal store evicts the line: what was cached of it
			// never comes after this store.
			l.nt = append(append(l.nt, l.cached...), s)
			l.cached, l.flushed, l.by = l.cached[:0], 0, by
		} else {
			l.cached = append(l.cached, s)
		}
		copy(m.visible[off:], p[:k])
		off, p = off+int64(k), p[k:]
	}
}

// Raw is one store instruction that a trace of a running program shows. nt:
// it is a non-temporal one.
func (m *Memory) Raw(off int64, p []byte, nt bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.put(off, p, nt)
}

// Load makes p, as long as the memory, its durable content.
func (m *Memory) Load(p []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(m.visible, p)
	clear(m.lines)
}

// Killed is a process kill in place: the thread that flushed is gone, and its
// fence never comes.
func (m *Memory) Killed() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.lines {
		l.flushed = 0
	}
}

// Choices is in how many ways power failure can leave the memory now, at most
// limit.
func (m *Memory) Choices(limit int) int {
	n := 1
	for _, l := range m.lines {
		if n *= l.choices(); n >= limit || n <= 0 {
			return limit
		}
	}
	return n
}

// choices is in how many ways the line can be left. Non-temporal stores beyond
// 16 count as if they were 16.
func (l *line) choices() int { return (len(l.cached) + 1) << min(len(l.nt), 16) }

// resolve is the line with the choice c of choices.
func (l *line) resolve(c int) [pmem.LineSize]byte {
	b := l.base
	for i, s := range l.nt {
		if c>>min(i, 15)&1 == 1 {
			copy(b[s.off:], s.data[:s.n])
		}
	}
	for _, s := range l.cached[:c>>min(len(l.nt), 16)] {
		copy(b[s.off:], s.data[:s.n])
	}
	return b
}

// Lasts reports whether power failure leaves n bytes at off as they are visible
// now. The caller holds the memory still.
func (m *Memory) Lasts(off, n int64) bool {
	for k := off / pmem.LineSize; k*pmem.LineSize < off+n; k++ {
		l := m.lines[k]
		if l == nil {
			continue
		}
		from, to := max(off-k*pmem.LineSize, 0), min(off+n-k*pmem.LineSize, pmem.LineSize)
		if !bytes.Equal(l.base[from:to], m.visible[k*pmem.LineSize:][from:to]) {
			return false
		}
	}
	return true
}

// Images calls f with what power failure can leave now: all of them where
// there are at most limit, else limit of them drawn from rng, the one that
// keeps nothing and the one that keeps everything among them. The image is
// f's until it returns. The caller holds the memory still: it is a hook, or
// nothing else uses it.
func (m *Memory) Images(limit int, rng *rand.Rand, f func(*Memory)) {
	keys := make([]int64, 0, len(m.lines))
	for n := range m.lines {
		keys = append(keys, n)
	}
	slices.Sort(keys)
	total := m.Choices(limit + 1)
	choice := make([]int, len(keys))
	for i := range min(total, limit) {
		rest := i
		for k, n := range keys {
			c := m.lines[n].choices()
			switch {
			case total <= limit:
				choice[k], rest = rest%c, rest/c
			case i == 0:
				choice[k] = 0
			case i == 1:
				choice[k] = c - 1
			case i%3 == 2: // few lines differ from one of the extremes: the likely ones to matter
				choice[k] = (c - 1) * (i / 3 % 2)
				if rng.IntN(len(keys)) < 2 {
					choice[k] = rng.IntN(c)
				}
			default:
				choice[k] = rng.IntN(c)
			}
		}
		img := m.image()
		for k, n := range keys {
			b := m.lines[n].resolve(choice[k])
			copy(img.visible[n*pmem.LineSize:], b[:])
		}
		f(img)
		img.Close()
	}
}

// image is a copy of what is visible, all of it durable, with the same mutant.
func (m *Memory) image() *Memory {
	mem, err := mapping(int64(len(m.visible)))
	if err != nil {
		panic(err)
	}
	copy(mem, m.visible)
	return &Memory{visible: mem, lines: map[int64]*line{}, nt: m.nt, mutant: m.mutant}
}

// Kill is a process kill: an image in which everything is visible, and what
// was not durable still is not. The caller holds the memory still.
func (m *Memory) Kill(f func(*Memory)) {
	img := m.image()
	for n, l := range m.lines {
		c := *l
		c.cached, c.nt = slices.Clone(l.cached), slices.Clone(l.nt)
		c.flushed = 0 // the flushing thread is gone, its fence never comes
		img.lines[n] = &c
	}
	f(img)
	img.Close()
}

// Crash is power failure in place: one way of it, drawn from rng. The hook is
// removed.
func (m *Memory) Crash(rng *rand.Rand) {
	m.mu.Lock()
	defer m.mu.Unlock()
	keys := make([]int64, 0, len(m.lines))
	for n := range m.lines {
		keys = append(keys, n)
	}
	slices.Sort(keys)
	mode := rng.IntN(3)
	for _, n := range keys {
		l := m.lines[n]
		c := rng.IntN(l.choices())
		if mode < 2 && rng.IntN(len(keys)) >= 2 {
			c = (l.choices() - 1) * mode
		}
		b := l.resolve(c)
		copy(m.visible[n*pmem.LineSize:], b[:])
	}
	clear(m.lines)
	m.windows = nil
	m.hook = nil
}
