package steptrace

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror"
)

// commit is a transaction in a trace.
type commit struct {
	mark             // of its beginning
	begin, end   int // places of its marks in the trace; end -1: it was lost with the process
	lsn, segment int // transactions with one LSN share a segment; segments count from 1
	traced       bool
	shared       bool // it ran beside others
}

// model is what the volume holds after each segment.
type model struct {
	commits []commit
	states  [][]byte // states[0] is zeros
	created int      // place of markCreated
}

// newModel reads the marks of a trace. survived: the transaction that the
// child was killed in was whole when the process was gone. It counts as
// acknowledged once it was recovered.
func newModel(tr *trace, survived bool) (*model, error) {
	m := &model{}
	at := map[uint64]int{}
	killed := -1
	last := 0
	traced := false
	for i, o := range tr.ops {
		if o.kind != opMark {
			continue
		}
		switch o.mark.kind {
		case markOn, markOff:
			traced = o.mark.kind == markOn
		case markCreated:
			m.created = i
		case markBegin:
			at[o.mark.a] = len(m.commits)
			m.commits = append(m.commits, commit{mark: o.mark, begin: i, end: -1, traced: traced, shared: o.mark.b >= kindCommitter})
		case markEnd:
			c := &m.commits[at[o.mark.a]]
			c.end, c.lsn = i, int(o.mark.b)
			last = max(last, c.lsn)
		case markOpened:
			if killed = at[uint64(len(m.commits)-1)]; survived {
				m.commits[killed].lsn = last + 1
				m.commits[killed].end = i
			}
		}
	}
	var inOrder []*commit
	for i := range m.commits {
		if m.commits[i].end >= 0 {
			inOrder = append(inOrder, &m.commits[i])
		} else if i != killed {
			return nil, fmt.Errorf("transaction %d did not return", m.commits[i].a)
		}
	}
	slices.SortStableFunc(inOrder, func(a, b *commit) int { return cmp.Compare(a.lsn, b.lsn) })
	state := make([]byte, volumeSize)
	m.states = [][]byte{state}
	for i, c := range inOrder {
		if i == 0 || c.lsn != inOrder[i-1].lsn {
			state = bytes.Clone(state)
			m.states = append(m.states, state)
		}
		c.segment = len(m.states) - 1
		for _, w := range transaction(c.a, c.b) {
			copy(state[w.off:], w.data)
		}
	}
	return m, nil
}

// bounds: before op i the segments up to acked were acknowledged, and those
// up to begun may have been written.
func (m *model) bounds(i int) (acked, begun int) {
	for _, c := range m.commits {
		if c.end >= 0 && c.begin < i {
			begun = max(begun, c.segment)
		}
		if c.end >= 0 && c.end < i {
			acked = max(acked, c.segment)
		}
	}
	return acked, begun
}

// judge recovers a region that power failure left before op i.
func (m *model) judge(r *recoverer, i int, image []byte) error {
	content, err := r.recover(image)
	if err != nil {
		if i <= m.created {
			return nil // no region yet
		}
		return fmt.Errorf("recovery: %w", err)
	}
	acked, begun := m.bounds(i)
	for k := begun; k >= acked; k-- {
		if bytes.Equal(content, m.states[k]) {
			return nil
		}
	}
	for k := range m.states {
		if bytes.Equal(content, m.states[k]) {
			return fmt.Errorf("%d segments were acknowledged, %d recovered", acked, k)
		}
	}
	return fmt.Errorf("what was recovered is the content after no segment; %d were acknowledged", acked)
}

// recoverer opens images with the real code.
type recoverer struct {
	path string
	mem  []byte
	buf  []byte
	live []bool // by page: the others are zeros in each image of the trace
}

const pageSize = 4 << 10

func newRecoverer(dir string, tr *trace) (*recoverer, error) {
	r := &recoverer{path: filepath.Join(dir, "image"), buf: make([]byte, volumeSize), live: make([]bool, tr.size/pageSize)}
	for _, o := range tr.ops {
		switch o.kind {
		case opStore, opNT:
			for at := o.off; at < o.off+int64(len(o.data)); at = (at/pageSize + 1) * pageSize {
				r.live[at/pageSize] = true
			}
		case opReset:
			for i := range r.live {
				r.live[i] = r.live[i] || !isZero(o.data[i*pageSize:][:pageSize])
			}
		}
	}
	f, err := os.Create(r.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(tr.size); err != nil {
		return nil, err
	}
	r.mem, err = unix.Mmap(int(f.Fd()), 0, int(tr.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return r, err
}

func isZero(p []byte) bool { return len(bytes.TrimLeft(p, "\x00")) == 0 }

// close checks that recovery has not made live what is not restored.
func (r *recoverer) close() error {
	defer unix.Munmap(r.mem)
	for i, live := range r.live {
		if p := r.mem[i*pageSize:][:pageSize]; !live && !isZero(p) {
			return fmt.Errorf("recovery wrote to page %d, which the trace never touches", i)
		}
	}
	return nil
}

func (r *recoverer) recover(image []byte) ([]byte, error) {
	for i, live := range r.live {
		if live {
			copy(r.mem[i*pageSize:], image[i*pageSize:][:pageSize])
		}
	}
	v, err := nvmmirror.Open(r.path, nvmmirror.Options{})
	if err != nil {
		return nil, err
	}
	_, err = v.ReadAt(r.buf, 0)
	if notPrimary := new(nvmmirror.ErrNotPrimary); errors.As(err, &notPrimary) { // it had been demoted
		if err = v.Promote(context.Background(), true); err == nil {
			_, err = v.ReadAt(r.buf, 0)
		}
	}
	if e := v.Close(); err == nil {
		err = e
	}
	return r.buf, err
}
