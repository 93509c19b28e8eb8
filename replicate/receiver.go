package replicate

import (
	"encoding/binary"
	"errors"
	"fmt"

	"go.uber.org/zap"

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

	// The log is placed up to next and verified up to end, behind chain;
	// durable up to the log's own End.
	end   journal.LSN
	chain uint32

	// A long segment that arrives in frames.
	seg     journal.Header
	segNext journal.LSN // where its next piece goes; 0: none under way
	segCRC  uint32      // of the body so far

	history  journal.History
	skipping bool // a checksum failed: ignore everything until log from end on
	copyEnd  journal.LSN
	ended    bool // the source has sent all blocks; they hold the log up to copyEnd
	ackDue   bool
	ckpt     journal.LSN // the checkpoint that was acknowledged last
	hint     journal.LSN // acknowledged by all, as the primary said last
}

func (r *receiver) run() (err error) {
	defer pmem.Recover(r.p.node.Memory(), pmem.Arm(), &err)
	s := r.s
	r.end, r.chain = r.log.End(), r.log.Chain()
	r.history = r.p.node.State().History
	r.ackDue = true
	for {
		if err := r.consume(); err != nil {
			return err
		}
		if r.until != 0 && r.log.End() >= r.until {
			s.housekeep(boottime())
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
		n, err = s.read(s.room())
		if err != nil {
			return err
		}
		s.w += n
	}
}

// consume takes all that is whole in the stage, makes it durable, answers,
// then applies.
func (r *receiver) consume() error {
	s := r.s
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
	if r.end > r.log.End() {
		if err := r.log.Fence(r.end, r.chain); err != nil {
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
			r.p.lastAnswer.Store(int64(boottime()))
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
	if r.skipping && h.LSN != r.end || h.LSN < r.end || r.segNext != 0 {
		return r.skip(n)
	}
	r.skipping = false
	if err := r.admit(&h); err != nil {
		return err
	}
	if h.Pad {
		r.s.r += headerSize
		r.log.PlacePad(h)
		r.end, r.chain = h.End(), h.CRC
		return nil
	}
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
	r.end, r.chain = h.End(), h.CRC
	r.hint = h.Acked
	return nil
}

// admit judges the header of the segment that comes next. A wrong one ends
// the session.
func (r *receiver) admit(h *journal.Header) error {
	e, ok := r.history.At(h.LSN)
	ring := r.log.Ring()
	switch {
	case h.LSN != r.end:
		return &WireError{fmt.Sprintf("segment at LSN %d, the log ends at %d", h.LSN, r.end)}
	case !ok || e.Epoch != h.Epoch:
		return &WireError{fmt.Sprintf("segment of epoch %v at LSN %d, the history says %v", h.Epoch, h.LSN, e.Epoch)}
	case h.Prev != r.chain:
		return &WireError{fmt.Sprintf("segment at LSN %d is not chained to the log", h.LSN)}
	case h.End() > r.p.node.Checkpoint()+journal.LSN(ring.Size()):
		return &WireError{fmt.Sprintf("segment up to LSN %d where the ring has room up to %d", h.End(), r.p.node.Checkpoint()+journal.LSN(ring.Size()))}
	case h.Acked > h.LSN:
		return &WireError{fmt.Sprintf("segment at LSN %d says that %d was acknowledged", h.LSN, h.Acked)}
	case !h.Pad && int(h.Length) > journal.MaxSegment(int64(ring.Size())), !ring.Fits(h):
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

// askAgain asks for the log from the verified end on.
func (r *receiver) askAgain(lsn journal.LSN) error {
	r.p.counters.CRCFailures.Add(1)
	r.p.log.Warn("a frame does not match its checksum, asking for it again", zap.Uint64("lsn", uint64(lsn)))
	r.skipping = true
	r.segNext = 0
	r.s.send(message{typ: msgResend, a: uint64(r.end)}, nil)
	return r.s.flush()
}
