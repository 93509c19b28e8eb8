package replicate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// follow takes the source's log, and acknowledges it, until the session ends.
func (p *Pair) follow(s *session, v Verdict) error {
	_, body, err := s.readMessage(msgFollow)
	if err != nil {
		return err
	}
	var f follow
	if err := unmarshal(msgFollow, body, &f); err != nil {
		return err
	}
	// A former primary's committers end here.
	if err := p.node.Committer().Acquire(s.ctx); err != nil {
		return err
	}
	if err := p.checkFollow(&f, v, s); err != nil {
		p.node.Committer().Release()
		return err
	}
	p.node.Committer().Close(p.notPrimary(), fmt.Errorf("the peer went on as primary"))
	p.required.Store(false)
	p.serving.Store(false)
	p.readied.Do(func() { close(p.ready) })
	p.node.Committer().Release()

	adopt := func(st *State) {
		st.Lineage = f.Lineage
		st.History = f.History
		st.Role = Secondary
		st.Alone = f.Alone
		st.Lease = time.Duration(f.LeaseNS)
		st.Peer = s.peer.Node
		if s.peer.Title || f.Full {
			st.Title = false
		}
	}
	log := p.node.Log()
	switch {
	case f.Full:
		p.setPhase(phaseResync, v.Why)
		r := Resync{Fork: f.From, Base: f.Base, Chain: f.Chain, Epoch: f.History.Last().Epoch}
		if err := p.node.StartCopy(r, adopt); err != nil {
			return err
		}
	default:
		p.setPhase(phaseCatchUp, "")
		if err := p.node.Update(func(st *State) error { adopt(st); return nil }); err != nil {
			return err
		}
		if drop := log.End() - f.From; drop > 0 {
			p.log.Warn("dropping log that was never acknowledged", zap.Uint64("from", uint64(f.From)), zap.Uint64("bytes", uint64(drop)))
			if err := p.node.Truncate(f.From, f.Chain); err != nil {
				return err
			}
		}
	}
	s.send(message{typ: msgFollowed, a: uint64(log.End())}, nil)
	p.role.Store(uint32(Secondary))
	return (&receiver{p: p, s: s, log: log, apply: true, full: f.Full}).run()
}

func (p *Pair) checkFollow(f *follow, v Verdict, s *session) error {
	st := p.node.State()
	log := p.node.Log()
	size := journal.LSN(log.Ring().Size())
	switch {
	case f.Lineage == UUID{} || !st.Blank() && f.Lineage != st.Lineage:
		return &WireError{fmt.Sprintf("told to follow lineage %v", f.Lineage)}
	case f.History.Validate() != nil || len(f.History) == 0:
		return &WireError{"told to follow without a valid epoch history"}
	case f.From%journal.Align != 0 || f.Base%journal.Align != 0 || f.LeaseNS < 0 || f.LeaseNS > int64(time.Hour):
		return &WireError{fmt.Sprintf("told to follow from LSN %d, base %d, lease %d ns", f.From, f.Base, f.LeaseNS)}
	case f.From < f.Base || f.Full && f.From-f.Base > 1<<62:
		return &WireError{fmt.Sprintf("told to follow from LSN %d in a ring that starts at %d", f.From, f.Base)}
	case f.Full:
		return nil
	case f.From != v.From || f.From > log.End() || log.End()-f.From > size || f.Base != log.Ring().Base:
		return &WireError{fmt.Sprintf("told to follow from LSN %d, ring base %d; the decision was %d, base %d here", f.From, f.Base, v.From, log.Ring().Base)}
	}
	if p.node.Applied() > f.From {
		return fmt.Errorf("the data here holds the log up to LSN %d, beyond the fork at %d; replace this region to rejoin", p.node.Applied(), f.From)
	}
	if chain, ok := p.chainAt(f.From); !ok || chain != f.Chain {
		return fmt.Errorf("the peer's log before LSN %d is not the one that is here", f.From)
	}
	return nil
}

// fetch takes the log that a restarted primary lacks. Nothing of it is
// applied: the next handshake decides.
func (p *Pair) fetch(s *session, v Verdict) error {
	if err := p.node.Committer().Acquire(s.ctx); err != nil {
		return err
	}
	defer p.node.Committer().Release()
	p.setPhase(phaseCatchUp, "taking log from the peer")
	r := &receiver{p: p, s: s, log: p.node.Log(), until: s.peer.End}
	if err := r.run(); err != nil {
		return err
	}
	p.log.Info("took the log that the peer holds", zap.Uint64("from", uint64(v.From)), zap.Uint64("to", uint64(s.peer.End)))
	return errAgain
}

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

func (r *receiver) message() error {
	s := r.s
	var m message
	if err := m.decode(s.stage[s.r:s.w]); err != nil {
		return err
	}
	if m.session != s.id {
		return &WireError{fmt.Sprintf("message of session %x in session %x", m.session, s.id)}
	}
	switch m.typ {
	case msgFrame:
		s.r += headerSize
		return r.frame(&m)
	case msgBlocks:
		s.r += headerSize
		return r.blocks(&m)
	case msgJoin: // its history can be longer than the stage
		s.r += headerSize
		body := make([]byte, m.length)
		if err := s.readFull(body); err != nil {
			return err
		}
		if err := s.checkBody(&m, body); err != nil {
			return err
		}
		return r.join(body)
	}
	s.r += headerSize
	var body []byte
	if m.length > 0 {
		body = make([]byte, m.length)
		if err := s.readFull(body); err != nil {
			return err
		}
		if err := s.checkBody(&m, body); err != nil {
			return err
		}
	}
	switch m.typ {
	case msgHeartbeat:
		s.echo = m.a
		r.hint = journal.LSN(m.b)
		r.ackDue = true
		return nil
	case msgBlocksDone:
		if !r.full {
			return &WireError{"the end of a full copy that was not begun"}
		}
		r.copyEnd, r.ended = journal.LSN(m.a), true
		return nil
	case msgBlockRequest:
		r.p.sendBlock(s, uint32(m.a))
		return s.flush()
	case msgBlockMissing:
		return r.p.takeRepair(&m, body)
	case msgBye:
		return &ErrClosedByPeer{string(body)}
	}
	return &WireError{fmt.Sprintf("message type %d from a primary", m.typ)}
}

// frame takes a piece of a long segment. Its header has been consumed.
func (r *receiver) frame(m *message) error {
	lsn, n := journal.LSN(m.a), int(m.length)
	next := r.segNext
	if next == 0 {
		next = r.end
	}
	if r.skipping && lsn != r.end || lsn < next {
		return r.skip(n)
	}
	r.skipping = false
	ring := r.log.Ring()
	switch {
	case lsn != next:
		return &WireError{fmt.Sprintf("frame at LSN %d, %d is next", lsn, next)}
	case lsn+journal.LSN(n) > r.p.node.Checkpoint()+journal.LSN(ring.Size()) || n > ring.Contiguous(lsn):
		return &WireError{fmt.Sprintf("frame of %d bytes at LSN %d: no room", n, lsn)}
	case r.segNext == 0 && n <= headerSize, r.segNext != 0 && lsn+journal.LSN(n) > r.seg.End():
		return &WireError{fmt.Sprintf("frame of %d bytes at LSN %d does not fit its segment", n, lsn)}
	}
	if err := r.s.readFull(r.log.Window(lsn, n)); err != nil {
		return err
	}
	r.log.Flush(lsn, n)
	piece := ring.Raw(lsn, n)
	var head uint32
	body := piece
	if r.segNext == 0 {
		head, body = crc32c.Sum(piece[:headerSize]), piece[headerSize:]
	}
	sum := crc32c.Sum(body)
	whole := sum
	if r.segNext == 0 {
		whole = crc32c.Combine(head, sum, int64(len(body)))
	}
	if whole != m.bodyCRC {
		return r.askAgain(lsn)
	}
	if r.segNext == 0 {
		if err := journal.DecodeHeader(piece, &r.seg); err != nil {
			return &WireError{err.Error()}
		}
		if err := r.admit(&r.seg); err != nil {
			return err
		}
		if r.seg.Pad || int(r.seg.Length) < n {
			return &WireError{fmt.Sprintf("frame of %d bytes starts a segment of %d", n, r.seg.Length)}
		}
		r.segCRC = 0
	}
	r.segCRC = crc32c.Combine(r.segCRC, sum, int64(len(body)))
	r.segNext = lsn + journal.LSN(n)
	if r.segNext < r.seg.End() {
		return nil
	}
	r.segNext = 0
	if r.segCRC != r.seg.BodyCRC {
		return r.askAgain(r.seg.LSN)
	}
	if err := r.inRange(&r.seg, ring.Raw(r.seg.LSN, int(r.seg.Length))[headerSize:]); err != nil {
		return err
	}
	r.end, r.chain = r.seg.End(), r.seg.CRC
	r.hint = r.seg.Acked
	return nil
}

// blocks takes blocks of a full copy, or the answer to a repair request.
func (r *receiver) blocks(m *message) error {
	body := make([]byte, m.length)
	if err := r.s.readFull(body); err != nil {
		return err
	}
	if err := r.s.checkBody(m, body); err != nil {
		return err
	}
	if !r.full {
		return r.p.takeRepair(m, body)
	}
	n := int(m.length) / (blockInfoSize + BlockSize)
	total := uint64(r.p.node.Geometry().Size / BlockSize)
	if n == 0 || n > blocksPerMessage || uint64(n) != m.b || n*(blockInfoSize+BlockSize) != int(m.length) || m.a >= total || uint64(n) > total-m.a {
		return &WireError{fmt.Sprintf("%d blocks from %d on in %d bytes", m.b, m.a, m.length)}
	}
	info := make([]BlockInfo, n)
	data := body[n*blockInfoSize:]
	for i := range info {
		info[i] = getBlockInfo(body[i*blockInfoSize:])
		if crc32c.Sum(data[i*BlockSize:][:BlockSize]) != info[i].CRC {
			return &WireError{fmt.Sprintf("block %d does not match the checksum beside it", int(m.a)+i)}
		}
	}
	if err := r.p.node.CopyBlocks(uint32(m.a), data, info); err != nil {
		return err
	}
	r.p.copied.Store(int64(m.a+uint64(n)) * BlockSize)
	return nil
}

// finishCopy ends a full copy: the log has been applied as far as the blocks
// hold it.
func (r *receiver) finishCopy() error {
	if err := r.p.node.FinishCopy(); err != nil {
		return err
	}
	r.full, r.ended = false, false
	r.p.setPhase(phaseCatchUp, "")
	r.p.log.Info("full copy done", zap.Uint64("lsn", uint64(r.end)))
	r.s.send(message{typ: msgFollowed, a: uint64(r.end)}, nil)
	return r.s.flush()
}

// join takes an epoch history, the policy and perhaps the title.
func (r *receiver) join(body []byte) error {
	var j join
	if err := unmarshal(msgJoin, body, &j); err != nil {
		return err
	}
	if err := j.History.Validate(); err != nil {
		return &WireError{err.Error()}
	}
	last := j.History.Last()
	switch {
	case r.full || r.end != r.log.End() || len(j.History) == 0 || last.Start > r.end || !last.PeerIn:
		return &WireError{fmt.Sprintf("asked to join at LSN %d with epoch %v from %d on", r.end, last.Epoch, last.Start)}
	case j.Title != titleKeep && j.Title != titleTake && j.Title != titleRelease:
		return &WireError{fmt.Sprintf("title %q", j.Title)}
	}
	err := r.p.node.Update(func(st *State) error {
		if c := st.History.Last().Epoch.Counter; last.Epoch.Counter < c {
			return &WireError{fmt.Sprintf("epoch %v after %d", last.Epoch, c)}
		}
		st.History = j.History
		st.Alone = j.Alone
		switch j.Title {
		case titleTake:
			st.Title = true
		case titleRelease:
			st.Title = false
		}
		return nil
	})
	if err != nil {
		return err
	}
	r.history = j.History
	r.p.setPhase(phaseInSync, "")
	r.p.log.Info("in sync", zap.Uint64("lsn", uint64(r.end)), zap.Stringer("epoch", last.Epoch), zap.Bool("title", r.p.node.State().Title))
	r.p.lastAnswer.Store(int64(boottime()))
	r.s.send(message{typ: msgJoined}, nil)
	return r.s.flush()
}
