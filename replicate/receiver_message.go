package replicate

import (
	"fmt"
	"slices"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
)

// message takes a message. The piece of log in a frame goes straight to its
// place; every other body is read, and checked, first.
func (r *receiver) message() error {
	s := r.s
	var m message
	if err := m.decode(s.stage[s.r:s.w]); err != nil {
		return err
	}
	if m.session != s.id {
		return &WireError{fmt.Sprintf("message of session %x in session %x", m.session, s.id)}
	}
	s.r += headerSize
	if m.typ == msgFrame {
		return r.frame(&m)
	}
	r.body = slices.Grow(r.body[:0], int(m.length))[:m.length]
	body := r.body
	if err := s.readFull(body); err != nil {
		return err
	}
	if err := s.checkBody(&m, body); err != nil {
		return err
	}
	switch m.typ {
	case msgSpread:
		return r.spread(&m, body)
	case msgBlocks:
		return r.blocks(&m, body)
	case msgSame:
		return r.same(&m)
	case msgJoin:
		return r.join(body)
	case msgHeartbeat:
		s.echo = m.a
		r.hint = journal.LSN(m.b)
		r.ackDue = true
		return nil
	case msgBlocksDone:
		if !r.full {
			return &WireError{"the end of a full copy that was not begun"}
		}
		if total := r.p.node.Geometry().Size / BlockSize; r.nextBlock != total {
			return &WireError{fmt.Sprintf("the end of a full copy at block %d of %d", r.nextBlock, total)}
		}
		r.copyEnd, r.ended = journal.LSN(m.a), true
		return nil
	case msgBlockRequest:
		r.p.sendBlock(s, m.a)
		return s.flush()
	case msgBlockMissing:
		return r.p.takeRepair(&m, body)
	case msgBye:
		return &ErrClosedByPeer{printable(body)}
	}
	return &WireError{fmt.Sprintf("message type %d from a primary", m.typ)}
}

// frame takes a piece of a long segment. Its header has been consumed.
func (r *receiver) frame(m *message) error {
	lsn, n := journal.LSN(m.a), int(m.length)
	next := r.segNext
	if next == 0 {
		next = r.next
	}
	if r.skipping && lsn != r.next || lsn < next {
		return r.skip(n)
	}
	r.skipping = false
	ring := r.log.Ring()
	switch {
	case lsn != next:
		return &WireError{fmt.Sprintf("frame at LSN %d, %d is next", lsn, next)}
	case lsn+journal.LSN(n) > r.p.node.Checkpoint()+r.log.Size() || n > ring.Contiguous(lsn):
		return &WireError{fmt.Sprintf("frame of %d bytes at LSN %d: no room", n, lsn)}
	case r.segNext == 0 && n <= headerSize, r.segNext != 0 && lsn+journal.LSN(n) > r.seg.End():
		return &WireError{fmt.Sprintf("frame of %d bytes at LSN %d does not fit its segment", n, lsn)}
	}
	if err := r.s.readFull(r.log.Window(lsn, n)); err != nil {
		return err
	}
	r.log.Flush(lsn, n)
	piece := ring.Raw(lsn, n)
	sum, whole := pieceSums(piece, r.segNext == 0)
	body := n
	if r.segNext == 0 {
		body -= headerSize
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
	r.segCRC = crc32c.Combine(r.segCRC, sum, int64(body))
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
	r.arrived(&r.seg)
	return nil
}

// blocks takes blocks of a full copy, or the answer to a repair request.
func (r *receiver) blocks(m *message, body []byte) error {
	if !r.full {
		return r.p.takeRepair(m, body)
	}
	n := int(m.length) / (blockInfoSize + BlockSize)
	total := uint64(r.p.node.Geometry().Size / BlockSize)
	if n == 0 || n > blocksPerMessage || uint64(n) != m.b || n*(blockInfoSize+BlockSize) != int(m.length) || m.a >= total || uint64(n) > total-m.a {
		return &WireError{fmt.Sprintf("%d blocks from %d on in %d bytes", m.b, m.a, m.length)}
	}
	if int64(m.a) != r.nextBlock { // what is left out would be zeros, with checksums that match
		return &WireError{fmt.Sprintf("block %d of a full copy where %d comes next", m.a, r.nextBlock)}
	}
	info := make([]BlockInfo, n)
	data := body[n*blockInfoSize:]
	for i := range info {
		info[i] = getBlockInfo(body[i*blockInfoSize:])
		if crc32c.Sum(data[i*BlockSize:][:BlockSize]) != info[i].CRC {
			return &WireError{fmt.Sprintf("block %d does not match the checksum beside it", int(m.a)+i)}
		}
	}
	if err := r.p.node.CopyBlocks(int64(m.a), data, info); err != nil {
		return err
	}
	r.nextBlock += int64(n)
	r.p.copied.Store(r.nextBlock * BlockSize)
	return nil
}

// finishCopy ends a full copy: the log has been applied as far as the blocks
// hold it.
func (r *receiver) finishCopy() error {
	if err := r.p.node.FinishCopy(); err != nil {
		return err
	}
	r.full, r.ended = false, false
	r.p.setPhase(PhaseCatchUp, "")
	r.p.log.Info("full copy done", zap.Uint64("lsn", uint64(r.end)))
	r.s.send(message{typ: msgFollowed, a: uint64(r.end), b: uint64(r.p.node.Checkpoint())}, nil)
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
	case r.full || r.next != r.log.End() || len(j.History) == 0 || last.Start > r.end || !last.PeerIn:
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
		st.Acked = max(st.Acked, r.end) // from now on this node answers for it
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
	r.s.joined = true
	r.p.setPhase(PhaseInSync, "")
	r.p.log.Info("in sync", zap.Uint64("lsn", uint64(r.end)), zap.Stringer("epoch", last.Epoch), zap.Bool("title", r.p.node.State().Title))
	r.p.lastAnswer.Store(int64(r.p.now()))
	r.s.send(message{typ: msgJoined}, nil)
	return r.s.flush()
}
