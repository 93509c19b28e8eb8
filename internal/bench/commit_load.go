package bench

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"
	"unsafe"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/nvmmirror/nvmmirror"
)

// load is the committers. Each has slots of its own, which it overwrites in
// turn.
type load struct {
	v     *nvmmirror.Volume
	size  int64
	slots int64 // of each committer
	of    []committer
	took  time.Duration // by all commits, warm-up and the last ones included

	mu   sync.Mutex
	hist *hdrhistogram.Histogram
}

// committer hands what it took to the load's histogram by the batch: one of its
// own would be in no cache when it is written to, and with 256 committers that
// was a tenth of what the primary did.
type committer struct {
	p      []byte
	n      int64 // commits so far
	base   int64 // n when it was told to forget
	recent []time.Duration
	err    error
}

const batch = 64

func newLoad(v *nvmmirror.Volume, o CommitOptions) *load {
	l := &load{v: v, size: int64(o.Size), slots: o.RegionSize / (int64(o.Size) * int64(o.Committers)), of: make([]committer, o.Committers), hist: newHistogram()}
	for c := range l.of {
		l.of[c].recent = make([]time.Duration, 0, batch)
		l.of[c].p = bytes.Repeat([]byte{byte(c + 1)}, o.Size)
	}
	return l
}

// forget makes what has been done so far warm-up.
func (l *load) forget() {
	for c := range l.of {
		l.of[c].base = l.of[c].n
	}
	l.hist.Reset()
	l.took = 0
}

// commits counts all since forget, recorded or not.
func (l *load) commits() (n int64) {
	for c := range l.of {
		n += l.of[c].n - l.of[c].base
	}
	return n
}

// ownBytes is what histogram and buffers take where all of them is touched.
func (l *load) ownBytes() int64 {
	return int64(l.hist.ByteSize()) + int64(len(l.of))*(l.size+batch*int64(unsafe.Sizeof(time.Duration(0))))
}

// record takes what a committer has measured into the histogram.
func (l *load) record(m *committer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range m.recent {
		record(l.hist, d)
	}
	m.recent = m.recent[:0]
}

// offset is where committer c writes its n-th.
func (l *load) offset(c int, n int64) int64 {
	return (n%l.slots*int64(len(l.of)) + int64(c)) * l.size
}

// fill makes the n-th content, different from those before.
func (m *committer) fill(n int64) {
	var count [8]byte
	binary.LittleEndian.PutUint64(count[:], uint64(n))
	copy(m.p, count[:])
}

// run commits for d. What begins in the first tenth is not recorded, but counts for
// the rate, as all of a floor's stream does: a commit takes a long part of a short
// run where many long ones are outstanding. Who interrupts it
// closes the volume: a commit that waits for its context as well takes longer.
func (l *load) run(ctx context.Context, d time.Duration) error {
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		l.v.Close()
	})
	var wg sync.WaitGroup
	start := time.Now()
	for c := range l.of {
		wg.Go(func() { l.of[c].err = l.commit(c, start, d) })
	}
	wg.Wait()
	if !stop() {
		<-closed
		return ctx.Err()
	}
	l.took += time.Since(start)
	var errs []error
	for c := range l.of {
		errs = append(errs, l.of[c].err)
	}
	return errors.Join(errs...)
}

func (l *load) commit(c int, start time.Time, d time.Duration) error {
	m := &l.of[c]
	defer l.record(m)
	for recorded := false; ; {
		m.fill(m.n)
		off := l.offset(c, m.n)
		begin := time.Since(start)
		if begin > d && recorded {
			return nil
		}
		tx := l.v.Begin()
		if err := tx.Write(off, m.p); err != nil {
			tx.Discard()
			return err
		}
		if _, err := tx.Commit(context.Background()); err != nil {
			return err
		}
		if begin >= d/10 {
			m.recent = append(m.recent, time.Since(start)-begin)
			if recorded = true; len(m.recent) == batch {
				l.record(m)
			}
		}
		m.n++
	}
}

// readBack compares each committer's last transaction with what is there.
func (l *load) readBack() error {
	got := make([]byte, l.size)
	for c := range l.of {
		m := &l.of[c]
		if m.n == 0 {
			return fmt.Errorf("committer %d has not committed", c)
		}
		m.fill(m.n - 1)
		off := l.offset(c, m.n-1)
		if _, err := l.v.ReadAt(got, off); err != nil {
			return err
		}
		if !bytes.Equal(got, m.p) {
			return fmt.Errorf("the last transaction of committer %d, at offset %d, is not there", c, off)
		}
	}
	return nil
}
