package replicate

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// receiver is the receiving end of the log.
//
// Invariants:
//   - It owns the log. Bytes are placed only at next and behind it, within
//     the ring's room above the checkpoint.
//   - An acknowledgement carries the log's End: all below it was verified in
//     the ring, flushed and fenced before the acknowledgement was queued.
//   - Log is applied after it was acknowledged, in order.
type receiver struct {
	p     *Pair
	s     *session
	log   *journal.Log
	apply bool
	full  bool        // blocks of a full copy come first
	until journal.LSN // stop here, unless 0

	// The log is announced or placed up to next, behind nextChain; verified up
	// to end, behind chain; durable up to the log's own End.
	next      journal.LSN
	nextChain uint32
	end       journal.LSN
	chain     uint32
	// order is what lies between end and next, in LSN order. It is empty
	// unless a segment comes by the lanes.
	order []arrival

	// A long segment that arrives in frames.
	seg     journal.Header
	segNext journal.LSN // where its next piece goes; 0: none under way
	segCRC  uint32      // of the body so far

	length    int    // of the last segment that was its own frame: the next is likely as long
	body      []byte // of a message; no one keeps it
	history   journal.History
	skipping  bool  // a checksum failed: ignore everything until log from end on
	nextBlock int64 // to come in a full copy, which has all of them in order
	have      parts // from before: what has not changed since is left out
	copyEnd   journal.LSN
	ended     bool // the source has sent all blocks; they hold the log up to copyEnd
	ackDue    bool
	ckpt      journal.LSN // the checkpoint that was acknowledged last
	hint      journal.LSN // acknowledged by all, as the primary said last
}

func (r *receiver) run() (err error) {
	defer func() {
		// A page of the mapping is gone; the kernel says so by EFAULT where it
		// was to receive into it.
		if fault := new(pmem.FaultError); errors.As(err, &fault) || errors.Is(err, unix.EFAULT) {
			r.p.node.Fail(err)
		}
	}()
	defer pmem.Recover(r.p.node.Memory(), pmem.Arm(), &err)
	s := r.s
	r.end, r.chain = r.log.End(), r.log.Chain()
	r.next, r.nextChain = r.end, r.chain
	r.history = r.p.node.State().History
	r.ackDue = true
	s.answers = true
	defer func() { s.answers = false }()
	slept := r.next
	for {
		if s.ctx.Err() != nil { // also where there is always something to read
			return context.Cause(s.ctx)
		}
		if err := r.consume(); err != nil {
			return err
		}
		if r.until != 0 && r.log.End() >= r.until {
			s.housekeep(r.p.now())
			return nil
		}
		n, err := s.receive()
		if err != nil {
			return err
		}
		if n > 0 {
			continue
		}
		if c := r.p.node.Checkpoint(); c != r.ckpt {
			r.ackDue = true
			continue
		}
		r.p.sendRepairRequests(s)
		poll, long := r.p.cfg.BusyPoll, len(r.order) > 0
		if long || r.next == slept {
			poll = 0 // the lanes take longer, and want the processor; heartbeats come alone
		} else {
			r.log.Warm(r.next, r.length) // the primary is at work on what comes there
		}
		slept = r.next
		n, err = s.readUnless(&s.lanes.news, poll, long, s.room())
		if err != nil {
			return err
		}
		s.w += n
	}
}

// arrival is a segment between end and next.
type arrival struct {
	h     journal.Header
	lanes *incoming // brings it; nil: it is placed and verified
}

// arrived takes a segment that is placed and verified.
func (r *receiver) arrived(h *journal.Header) {
	r.next, r.nextChain = h.End(), h.CRC
	if len(r.order) > 0 {
		r.order = append(r.order, arrival{h: *h})
		return
	}
	r.passed(h)
}

// passed moves the verified end behind a segment.
func (r *receiver) passed(h *journal.Header) {
	r.end, r.chain = h.End(), h.CRC
	if !h.Pad {
		r.hint = h.Acked
	}
}

// collect moves the verified end over what has come by the lanes.
func (r *receiver) collect() error {
	// News can be old: a lane tells of a segment that the news before it led
	// to. Left standing, it would keep the receiver from ever waiting.
	if !r.s.lanes.news.Load() {
		return nil
	}
	r.s.lanes.news.Store(false)
	for _, lost := range r.s.lanes.damaged() {
		r.s.send(message{typ: msgResend, a: uint64(lost.lsn), b: uint64(lost.segment), c: 1}, nil)
	}
	n := 0
	for ; n < len(r.order); n++ {
		a := &r.order[n]
		if a.lanes != nil {
			if !r.s.lanes.isWhole(a.lanes) {
				break
			}
			if err := r.judge(a); err != nil {
				return err
			}
			r.s.lanes.reuse(a.lanes)
		}
		r.passed(&a.h)
	}
	r.order = slices.Delete(r.order, 0, n)
	return nil
}

// judge verifies a segment that has come by the lanes.
func (r *receiver) judge(a *arrival) error {
	var h journal.Header
	switch err := r.log.Ring().Header(a.h.LSN, &h); {
	case err != nil:
		return &WireError{err.Error()}
	case h != a.h:
		return &WireError{fmt.Sprintf("the segment at LSN %d is not the one that was announced", a.h.LSN)}
	case a.lanes.bodySum() != h.BodyCRC:
		return &WireError{fmt.Sprintf("the segment at LSN %d does not match its checksum, though its pieces do", a.h.LSN)}
	}
	return r.inRange(&h, r.log.Ring().Raw(h.LSN, int(h.Length))[headerSize:])
}

// spread takes the announcement of a segment that comes by the lanes.
func (r *receiver) spread(m *message, body []byte) error {
	var h journal.Header
	if err := journal.DecodeHeader(body, &h); err != nil {
		return &WireError{err.Error()}
	}
	if r.skipping && h.LSN != r.next || h.LSN < r.next || r.segNext != 0 {
		return nil
	}
	r.skipping = false
	if err := r.admit(&h); err != nil {
		return err
	}
	if h.WireLength() <= MaxFrame {
		return &WireError{fmt.Sprintf("segment of %d bytes in pieces", h.Length)}
	}
	r.order = append(r.order, arrival{h, r.s.lanes.announce(&h)})
	r.next, r.nextChain = h.End(), h.CRC
	return nil
}

// consume takes all that is whole in the stage, makes it durable, answers,
// then applies.
func (r *receiver) consume() error {
	s := r.s
	if err := r.collect(); err != nil {
		return err
	}
	for s.w-s.r >= headerSize {
		p := s.stage[s.r:s.w]
		var err error
		if binary.LittleEndian.Uint32(p) == journal.Magic {
			err = r.segment(p)
		} else {
			err = r.message()
		}
		if err != nil {
			return err
		}
	}
	if err := r.p.node.Failed(); err != nil {
		return err // it answers for nothing any more
	}
	if r.end > r.log.End() {
		if err := r.log.Fence(r.end, r.chain); err != nil {
			r.p.node.Fail(err)
			return err
		}
		r.ackDue = true
	}
	if hint := uint64(min(r.hint, r.log.End())); hint > r.p.peerAcked.Load() {
		r.p.peerAcked.Store(hint)
	}
	if r.ackDue {
		r.ackDue = false
		r.ckpt = r.p.node.Checkpoint()
		s.send(message{typ: msgAck, a: uint64(r.log.End()), b: uint64(min(r.ckpt, r.log.End())), c: s.echo, d: r.history.Last().Epoch.Counter}, nil)
		if s.echo != 0 {
			s.beat = r.p.now()
			r.p.lastAnswer.Store(int64(s.beat))
		}
		s.echo = 0
		if err := s.flush(); err != nil {
			return err
		}
	}
	if r.apply && r.log.End() > r.p.node.Applied() {
		if err := r.p.node.Apply(r.log.End()); err != nil {
			return err
		}
	}
	if r.ended && r.log.End() >= r.copyEnd {
		return r.finishCopy()
	}
	return nil
}

// segment takes a segment that is its own frame.
func (r *receiver) segment(p []byte) error {
	var h journal.Header
	if err := journal.DecodeHeader(p, &h); err != nil {
		return &WireError{err.Error()}
	}
	if h.WireLength() > MaxFrame {
		return &WireError{fmt.Sprintf("segment of %d bytes outside a frame", h.Length)}
	}
	n := int(h.WireLength())
	if r.skipping && h.LSN != r.next || h.LSN < r.next || r.segNext != 0 {
		return r.skip(n)
	}
	r.skipping = false
	if err := r.admit(&h); err != nil {
		return err
	}
	if h.Pad {
		r.s.r += headerSize
		r.log.PlacePad(&h)
		r.arrived(&h)
		return nil
	}
	r.length = n
	// What has been staged is copied, the rest is received into its place.
	staged := min(n, len(p))
	r.log.Place(h.LSN, p[:staged])
	r.s.r += staged
	if rest := n - staged; rest > 0 {
		at := h.LSN + journal.LSN(staged)
		if err := r.s.readFull(r.log.Window(at, rest)); err != nil {
			return err
		}
		r.log.Flush(at, rest)
	}
	body := r.log.Ring().Raw(h.LSN, n)[headerSize:]
	if crc32c.Sum(body) != h.BodyCRC {
		return r.askAgain(h.LSN)
	}
	if err := r.inRange(&h, body); err != nil {
		return err
	}
	r.arrived(&h)
	return nil
}

// admit judges the header of the segment that comes next. A wrong one ends
// the session.
func (r *receiver) admit(h *journal.Header) error {
	e, ok := r.history.At(h.LSN)
	ring := r.log.Ring()
	switch {
	case h.LSN != r.next:
		return &WireError{fmt.Sprintf("segment at LSN %d, the log ends at %d", h.LSN, r.next)}
	case !ok || e.Epoch != h.Epoch:
		return &WireError{fmt.Sprintf("segment of epoch %v at LSN %d, the history says %v", h.Epoch, h.LSN, e.Epoch)}
	case h.Prev != r.nextChain:
		return &WireError{fmt.Sprintf("segment at LSN %d is not chained to the log", h.LSN)}
	case h.End() > r.p.node.Checkpoint()+r.log.Size():
		return &WireError{fmt.Sprintf("segment up to LSN %d where the ring has room up to %d", h.End(), r.p.node.Checkpoint()+r.log.Size())}
	case h.Acked > h.LSN:
		return &WireError{fmt.Sprintf("segment at LSN %d says that %d was acknowledged", h.LSN, h.Acked)}
	case !ring.Fits(h):
		return &WireError{fmt.Sprintf("segment of %d bytes at LSN %d", h.Length, h.LSN)}
	}
	return nil
}

// inRange checks that the records can be applied here: a log that cannot be
// applied would keep the region from opening. A segment that fails is wiped,
// since recovery would find it valid where it lies.
func (r *receiver) inRange(h *journal.Header, body []byte) (err error) {
	defer func() {
		if err != nil {
			r.log.Place(h.LSN, zeroHeader[:])
			err = errors.Join(&WireError{fmt.Sprintf("segment at LSN %d: %v", h.LSN, err)}, r.p.node.Memory().Fence())
		}
	}()
	size := r.p.node.Geometry().Size
	for records := journal.NewRecords(body); ; {
		rec, ok, err := records.Next()
		if !ok {
			return err
		}
		if rec.Off > size || int64(len(rec.Data)) > size-rec.Off {
			return fmt.Errorf("%d bytes at offset %d of %d", len(rec.Data), rec.Off, size)
		}
	}
}

// skip ignores n bytes that are on their way.
func (r *receiver) skip(n int) error {
	var sink [4096]byte
	for n > 0 {
		k := min(n, len(sink))
		if err := r.s.readFull(sink[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// askAgain asks for the log once more from where it is not placed yet.
func (r *receiver) askAgain(lsn journal.LSN) error {
	r.p.counters.CRCFailures.Add(1)
	r.p.warnOfFrame(askingAgain, uint64(lsn))
	r.skipping = true
	r.segNext = 0
	r.s.send(message{typ: msgResend, a: uint64(r.next)}, nil)
	return r.s.flush()
}
