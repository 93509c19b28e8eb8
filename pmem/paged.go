package pmem

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// maxSpans bounds the list of dirty ranges: adding is linear in it, and every
// span is a system call of the next fence.
const maxSpans = 64

// pageSize is the unit of msync.
var pageSize = int64(os.Getpagesize())

// span is [from, to), page-aligned offsets.
type span struct{ from, to int64 }

// dirty is what was flushed in a paged region since the last fence.
//
// A fence takes the list and syncs it with syncing held. A fence that comes
// meanwhile waits for syncing, so it also covers ranges of its caller that the
// first one took; then it finds a short list or none.
type dirty struct {
	mu sync.Mutex // leaf; protects the list
	// spans[:n] are disjoint, not adjacent, and in ascending order.
	spans [maxSpans]span
	n     int

	syncing sync.Mutex // taken before mu; protects what follows
	taken   [maxSpans]span
	err     error // the first failure: every later fence returns it

	msync func([]byte, int) error
}

func newDirty() *dirty { return &dirty{msync: unix.Msync} }

// add records [off, off+n).
func (d *dirty) add(off, n int64) {
	if n == 0 {
		return
	}
	s := span{off &^ (pageSize - 1), (off + n + pageSize - 1) &^ (pageSize - 1)}
	d.mu.Lock()
	d.insert(s)
	d.mu.Unlock()
}

// insert merges s into the list; d.mu is held.
func (d *dirty) insert(s span) {
	// [i, j) are the spans that s overlaps or touches.
	i := 0
	for i < d.n && d.spans[i].to < s.from {
		i++
	}
	j := i
	for j < d.n && d.spans[j].from <= s.to {
		j++
	}
	if i < j {
		d.spans[i] = span{min(s.from, d.spans[i].from), max(s.to, d.spans[j-1].to)}
		d.n = i + 1 + copy(d.spans[i+1:], d.spans[j:d.n])
		return
	}
	if d.n == maxSpans {
		i = d.mergeNearest(i)
		// The merged pair may have swallowed the gap that s lies in.
		if i > 0 && d.spans[i-1].to >= s.from {
			return
		}
	}
	copy(d.spans[i+1:], d.spans[i:d.n])
	d.spans[i] = s
	d.n++
}

// mergeNearest joins the two neighbours with the smallest gap between them,
// which syncs the clean pages in between once more, and returns where the
// span that was to be inserted at i goes now.
func (d *dirty) mergeNearest(i int) int {
	best := 1
	for k := 2; k < d.n; k++ {
		if d.spans[k].from-d.spans[k-1].to < d.spans[best].from-d.spans[best-1].to {
			best = k
		}
	}
	d.spans[best-1].to = d.spans[best].to
	copy(d.spans[best:], d.spans[best+1:d.n])
	d.n--
	if i >= best {
		// At i == best it lay between the two.
		return max(i-1, best)
	}
	return i
}

// sync makes every range added before the call durable.
func (d *dirty) sync(mem []byte, path string) error {
	d.syncing.Lock()
	defer d.syncing.Unlock()
	if d.err != nil {
		return d.err
	}
	d.mu.Lock()
	n := d.n
	copy(d.taken[:n], d.spans[:n])
	d.n = 0
	d.mu.Unlock()
	for _, s := range d.taken[:n] {
		s.to = min(s.to, int64(len(mem)))
		for {
			err := d.msync(mem[s.from:s.to], unix.MS_SYNC)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				d.err = &PersistenceError{Path: path, Offset: s.from, Length: s.to - s.from, Err: err}
				return d.err
			}
			break
		}
	}
	return nil
}

// Redirty stores once more what a range holds, so that a Flush of it means
// something where an earlier one has failed: on class paged the kernel counts a
// page as clean whose write-back failed, and an msync would not write it. Of other
// classes there is nothing to do.
func Redirty(m Memory, off, n int64) {
	if m.Class() != Paged {
		return
	}
	buf := make([]byte, min(n, 64<<10))
	for n > 0 {
		k := copy(buf, m.Bytes()[off:off+min(n, int64(len(buf)))])
		m.Write(off, buf[:k])
		off += int64(k)
		n -= int64(k)
	}
}
