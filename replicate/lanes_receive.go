package replicate

import (
	"fmt"
	"slices"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// The receiving end of the lanes.

// incoming is an announced segment.
type incoming struct {
	h       journal.Header
	claimed []bool
	sums    []uint32 // of the pieces, the segment's header excluded
	left    int      // pieces that are not there yet
}

// lost is a piece that arrived damaged.
type lost struct{ lsn, segment journal.LSN }

// announce takes a segment in that will come by the lanes. It was admitted.
func (l *lanes) announce(h *journal.Header) *incoming {
	n := (int(h.Length) + MaxFrame - 1) / MaxFrame
	l.mu.Lock()
	defer l.mu.Unlock()
	var in *incoming
	if k := len(l.spare); k > 0 {
		in, l.spare = l.spare[k-1], l.spare[:k-1]
	} else {
		in = new(incoming)
	}
	*in = incoming{h: *h, claimed: slices.Grow(in.claimed[:0], n)[:n], sums: slices.Grow(in.sums[:0], n)[:n], left: n}
	clear(in.claimed)
	l.coming = append(l.coming, in)
	l.changed.Broadcast()
	return in
}

// reuse takes a segment back that was whole and is judged: no lane holds it,
// since each piece was claimed once and has come.
func (l *lanes) reuse(in *incoming) {
	l.mu.Lock()
	l.spare = append(l.spare, in)
	l.mu.Unlock()
}

// isWhole reports whether all pieces of a segment are there and durable, and
// then forgets it.
func (l *lanes) isWhole(in *incoming) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if in.left > 0 {
		return false
	}
	l.coming = slices.DeleteFunc(l.coming, func(c *incoming) bool { return c == in })
	l.done = max(l.done, in.h.End())
	return true
}

// claim waits until the segment of a piece is announced. in is nil where the
// piece is there already, or another lane brings it.
func (l *lanes) claim(lsn journal.LSN, n int) (in *incoming, i int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		if l.ended {
			return nil, 0, errLanesEnded
		}
		if lsn < l.done {
			return nil, 0, nil
		}
		for _, in := range l.coming {
			if lsn < in.h.LSN || lsn >= in.h.End() {
				continue
			}
			at := lsn - in.h.LSN
			if at%MaxFrame != 0 || n != int(min(in.h.End()-lsn, MaxFrame)) {
				return nil, 0, &WireError{fmt.Sprintf("piece of %d bytes at LSN %d of a segment of %d at %d", n, lsn, in.h.Length, in.h.LSN)}
			}
			i := int(at / MaxFrame)
			if in.claimed[i] {
				return nil, 0, nil
			}
			in.claimed[i] = true
			return in, i, nil
		}
		l.changed.Wait()
	}
}

// receive is a lane of the receiver.
func (l *lanes) receive(c *lane) (err error) {
	p := l.s.p
	mem, log := p.node.Memory(), p.node.Log()
	defer pmem.Recover(mem, pmem.Arm(), &err)
	var header [headerSize]byte
	var sink []byte
	for {
		if err := l.readFull(c, header[:]); err != nil {
			return err
		}
		var m message
		if err := m.decode(header[:]); err != nil {
			return err
		}
		if m.typ != msgFrame || m.session != l.s.id || m.length == 0 || m.length > MaxFrame {
			return &WireError{fmt.Sprintf("message type %d of session %x with %d bytes among pieces of session %x", m.typ, m.session, m.length, l.s.id)}
		}
		lsn, n := journal.LSN(m.a), int(m.length)
		in, i, err := l.claim(lsn, n)
		if err != nil {
			return err
		}
		if in == nil {
			if sink == nil {
				sink = make([]byte, MaxFrame)
			}
			if err := l.readFull(c, sink[:n]); err != nil {
				return err
			}
			continue
		}
		if err := l.readFull(c, log.Window(lsn, n)); err != nil {
			return err
		}
		log.Flush(lsn, n)
		sum, whole := pieceSums(log.Ring().Raw(lsn, n), i == 0) // while lines are on their way to memory
		// Flushes are ordered by a fence of the same processor.
		if err := mem.Fence(); err != nil {
			return fmt.Errorf("journal: piece at LSN %d: %w", lsn, err)
		}
		if whole != m.bodyCRC {
			p.counters.CRCFailures.Add(1)
			p.warnOfFrame(askingAgain, uint64(lsn))
		}
		l.mu.Lock()
		if whole == m.bodyCRC {
			in.sums[i] = sum
			in.left--
		} else {
			in.claimed[i] = false
			l.again = append(l.again, lost{lsn, in.h.LSN})
		}
		tell := in.left == 0 || len(l.again) > 0
		l.mu.Unlock()
		if tell {
			l.news.Store(true)
			l.s.conn.Wake()
		}
	}
}

// pieceSums are the checksums of a piece's part of the segment's body, and of
// the whole piece.
func pieceSums(data []byte, first bool) (body, whole uint32) {
	if !first {
		body = crc32c.Sum(data)
		return body, body
	}
	body = crc32c.Sum(data[journal.HeaderSize:])
	return body, crc32c.Combine(crc32c.Sum(data[:journal.HeaderSize]), body, int64(len(data)-journal.HeaderSize))
}

func (l *lanes) readFull(c *lane, p []byte) error {
	n := copy(p, c.early)
	c.early, p = c.early[n:], p[n:]
	for len(p) > 0 {
		n, err := c.conn.TryRead(p)
		if err != nil {
			return err
		}
		if n == 0 {
			if err := l.wait(c, false); err != nil {
				return err
			}
		}
		p = p[n:]
	}
	return nil
}

// damaged are the pieces to ask for again.
func (l *lanes) damaged() (again []lost) {
	l.mu.Lock()
	defer l.mu.Unlock()
	again, l.again = l.again, nil
	return again
}

// bodySum is the checksum of the body of a segment that is whole.
func (in *incoming) bodySum() (crc uint32) {
	for i, sum := range in.sums {
		n := min(int64(in.h.Length)-int64(i)*MaxFrame, MaxFrame)
		if i == 0 {
			n -= journal.HeaderSize
		}
		crc = crc32c.Combine(crc, sum, n)
	}
	return crc
}
