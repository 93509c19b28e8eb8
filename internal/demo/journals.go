package demo

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// tail is what the dead node's log has behind the fork.
type tail struct{ bytes nvmmirror.LSN }

func (t tail) dropped(rule string) string {
	if t.bytes == 0 {
		return "no tail to drop (" + rule + ")"
	}
	return fmt.Sprintf("its tail of %s dropped (%s)", bytesOf(t.bytes), rule)
}

// journals compares the dead node's ring with the survivor's, of which
// nothing is written meanwhile.
func (d *demo) journals(ctx context.Context) (string, error) {
	b, err := d.b.admin.Status(ctx)
	if err != nil {
		return "", err
	}
	var rings [2]ring
	for i, n := range []*daemon{d.a, d.b} {
		r, err := openRegion(n.region)
		if err != nil {
			return "", err
		}
		rings[i], err = r.ring()
		r.Close()
		if err != nil {
			return "", err
		}
	}
	dead, alive := rings[0], rings[1]
	alive.end = b.Committed
	if d.fork, err = forkOf(dead.history, alive.history); err != nil {
		return "", err
	}
	switch {
	case d.fork < d.acked:
		return "", fmt.Errorf("b's own log begins at LSN %v, but a had acknowledged up to %v", d.fork, d.acked)
	case dead.end < d.fork:
		return "", fmt.Errorf("a's log ends at LSN %v, b took over %v: the secondary held what the primary lacks", dead.end, d.fork)
	}
	from := d.firstCommon(max(dead.end, alive.end))
	segments, transactions, err := equalLogs(dead, alive, from, d.fork)
	if err != nil {
		return "", err
	}
	if _, _, err := dead.walk(d.fork, dead.end); err != nil {
		return "", fmt.Errorf("a's tail: %w", err)
	}
	d.tail = tail{dead.end - d.fork}
	return fmt.Sprintf("equal from LSN %v to the fork at %v, %d transactions in %d segments; beyond it a has %s, none acknowledged, b %s",
		from, d.fork, transactions, segments, bytesOf(d.tail.bytes), bytesOf(alive.end-d.fork)), nil
}

// firstCommon is where a segment starts that both rings still hold. Above its
// end a node may have begun to write as much as a segment with padding before
// it, each at most a quarter of the ring.
func (d *demo) firstCommon(end nvmmirror.LSN) nvmmirror.LSN {
	const reach = journalSize / 2
	if end < d.begin+reach {
		return d.begin
	}
	// An acknowledged LSN is the byte behind a segment.
	first := d.fork
	for id := range d.load.record {
		if at := d.load.record[id].lsn; at+reach >= end && at < first && at > 0 {
			first = at
		}
	}
	return first
}

// forkOf is where the survivor's history goes on behind the dead node's.
func forkOf(dead, alive journal.History) (nvmmirror.LSN, error) {
	if n := len(dead); len(alive) > n && slices.Equal(dead, alive[:n]) {
		return alive[n].Start, nil
	}
	return 0, fmt.Errorf("the survivor's epochs do not go on behind the dead node's: %v, %v", alive, dead)
}

// ring is a private copy of a region's journal.
type ring struct {
	journal.Ring
	history journal.History
	end     nvmmirror.LSN // of the log, where the region is closed
}

func (r *region) ring() (out ring, err error) {
	defer pmem.Recover(r, pmem.Arm(), &err)
	out.Ring = journal.Ring{Bytes: bytes.Clone(r.area(r.info.Journal, r.info.Journal.Length)), Base: r.info.RingBase}
	out.history = r.info.History
	if o := r.info.Recovery; o != nil {
		out.end = o.End
		if o.Refused != "" {
			err = fmt.Errorf("%s: %s", r.Path(), o.Refused)
		}
	}
	return out, err
}

// holds reports whether the journal of a region in use holds a segment at an
// LSN.
func (r *region) holds(at nvmmirror.LSN) (ok bool, err error) {
	defer pmem.Recover(r, pmem.Arm(), &err)
	var h journal.Header
	live := journal.Ring{Bytes: r.area(r.info.Journal, r.info.Journal.Length), Base: r.info.RingBase}
	_, e := live.Segment(at, &h)
	return e == nil, nil
}

// walk verifies the segments from one LSN to another, and that they are a
// chain.
func (r ring) walk(from, to nvmmirror.LSN) (segments, transactions int, err error) {
	var h journal.Header
	var chain uint32
	for at := from; at < to; at = h.End() {
		if _, err := r.Segment(at, &h); err != nil {
			return 0, 0, err
		}
		if e, ok := r.history.At(at); !ok || e.Epoch != h.Epoch || at > from && h.Prev != chain || h.End() > to {
			return 0, 0, fmt.Errorf("the segment at LSN %v, %d bytes in epoch %v, does not belong into the log to LSN %v", at, h.Length, h.Epoch, to)
		}
		chain = h.CRC
		segments++
		transactions += int(h.Count)
	}
	return segments, transactions, nil
}

// equalLogs compares two rings byte for byte, and verifies what they hold.
func equalLogs(a, b ring, from, to nvmmirror.LSN) (segments, transactions int, err error) {
	if from >= to {
		return 0, 0, fmt.Errorf("there is nothing to compare from LSN %v to %v", from, to)
	}
	if segments, transactions, err = a.walk(from, to); err != nil {
		return 0, 0, fmt.Errorf("a's journal: %w", err)
	}
	if _, _, err = b.walk(from, to); err != nil {
		return 0, 0, fmt.Errorf("b's journal: %w", err)
	}
	for at := from; at < to; at += journal.Align {
		if !bytes.Equal(a.Raw(at, journal.Align), b.Raw(at, journal.Align)) {
			return 0, 0, fmt.Errorf("the journals differ at LSN %v", at)
		}
	}
	return segments, transactions, nil
}
