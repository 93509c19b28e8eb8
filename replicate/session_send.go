package replicate

import (
	"encoding/json"
	"fmt"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// What a session sends: messages, and the log.

// send queues a message.
func (s *session) send(m message, body []byte) {
	m.session = s.id
	m.length = uint32(len(body))
	m.bodyCRC = 0
	if len(body) > 0 {
		m.bodyCRC = crc32c.Sum(body)
	}
	n := len(s.ctl)
	s.ctl = append(s.ctl, zeroHeader[:]...)
	m.encode(s.ctl[n:])
	s.ctl = append(s.ctl, body...)
}

var zeroHeader [headerSize]byte

// sendJSON queues a message with a JSON body.
func (s *session) sendJSON(typ messageType, v any) {
	s.send(message{typ: typ}, marshal(v))
}

func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("replicate: " + err.Error()) // plain structs always marshal
	}
	return b
}

// flush sends queued messages, not log, as far as it goes without blocking.
func (s *session) flush() error {
	if len(s.ctl) > maxQueued {
		return errDeaf
	}
	for len(s.pending) > 0 || s.stageControl() {
		if ok, err := s.write(); !ok {
			return err
		}
	}
	return nil
}

// stageControl moves queued messages to pending.
func (s *session) stageControl() bool {
	if len(s.ctl) == 0 {
		return false
	}
	s.ctl, s.ctlOut = s.ctlOut[:0], s.ctl
	s.bufs[0] = s.ctlOut
	s.pending = s.bufs[:1]
	return true
}

// write sends some of pending. ok is false where no more fits for now.
func (s *session) write() (ok bool, err error) {
	n, err := s.conn.TryWrite(s.pending)
	if err != nil || n == 0 {
		return false, err
	}
	s.pending = consumed(s.pending, n)
	return true, nil
}

// consumed is bufs without their first n bytes.
func consumed(bufs [][]byte, n int) [][]byte {
	for n > 0 && len(bufs) > 0 {
		k := min(n, len(bufs[0]))
		bufs[0] = bufs[0][k:]
		n -= k
		if len(bufs[0]) == 0 {
			bufs = bufs[1:]
		}
	}
	return bufs
}

// pump sends messages and the log up to end, as far as it goes without
// blocking.
func (s *session) pump(end journal.LSN) (moved bool, err error) {
	end = min(end, s.sendEnd)
	if len(s.ctl) > maxQueued {
		return false, errDeaf
	}
	for {
		if len(s.pending) == 0 && !s.stageControl() {
			if s.sent >= end {
				return moved, nil
			}
			from := s.sent
			if err := s.stageLog(end); err != nil {
				return moved, err
			}
			if len(s.pending) == 0 { // only padding that is not sent, or no room there
				if s.sent == from {
					return moved, nil
				}
				continue
			}
		}
		ok, err := s.write()
		if !ok {
			return moved, err
		}
		moved = true
	}
}

// stageLog moves the next piece of log to pending: a run of short segments,
// or one frame of a long one. It stays within what the peer's ring takes.
func (s *session) stageLog(end journal.LSN) (err error) {
	defer pmem.Recover(s.p.node.Memory(), pmem.Arm(), &err)
	ring := s.p.node.Log().Ring()
	if s.segEnd != 0 {
		s.stageFrame(ring)
		return nil
	}
	start := s.sent
	var h journal.Header
	for s.sent < end {
		if err := ring.Header(s.sent, &h); err != nil {
			return &OwnCopyError{s.sent, err}
		}
		if s.sent < s.pastEnd { // a full copy leaves below its start what was dropped since
			if e, ok := s.past.At(s.sent); !ok || e.Epoch != h.Epoch {
				return &OwnCopyError{s.sent, fmt.Errorf("a segment of epoch %v, the history says %v", h.Epoch, e.Epoch)}
			}
		}
		if h.End() > s.sendEnd {
			break // the peer's ring has room for a part of it
		}
		if h.WireLength() > MaxFrame {
			switch {
			case s.sent != start:
			case h.WireLength() > spreadFrom && s.lanes.up.Load() > 0 && s.p.insync.Load() == s:
				s.stageSpread(ring, &h)
				return nil
			default:
				s.segStart, s.segEnd = h.LSN, h.End()
				s.stageFrame(ring)
				return nil
			}
			break
		}
		if n := int(s.sent-start) + int(h.WireLength()); s.sent > start && (n > MaxFrame || n > ring.Contiguous(start)) {
			break
		}
		s.sent = h.End()
		if h.Pad { // its header ends the run; the rest is not sent
			s.bufs[0] = ring.Raw(start, int(h.LSN-start)+headerSize)
			s.pending = s.bufs[:1]
			return nil
		}
	}
	if s.sent == start {
		return nil
	}
	s.bufs[0] = ring.Raw(start, int(s.sent-start))
	s.pending = s.bufs[:1]
	return nil
}

// stageFrame stages the next frame of the long segment that sent lies in.
func (s *session) stageFrame(ring journal.Ring) {
	n := min(int(s.segEnd-s.sent), MaxFrame)
	data := ring.Raw(s.sent, n)
	sum := pieceSum(s.p.node.Log(), piece{s.sent, n, s.sent == s.segStart, s.sent >= s.reread}, data)
	m := message{typ: msgFrame, session: s.id, a: uint64(s.sent), length: uint32(n), bodyCRC: sum}
	m.encode(s.frame[:])
	s.bufs[0], s.bufs[1] = s.frame[:], data
	s.pending = s.bufs[:2]
	s.sent += journal.LSN(n)
	if s.sent == s.segEnd {
		s.segEnd = 0
	}
}

// stageSpread stages the announcement of a long segment, whose pieces go to
// the lanes.
func (s *session) stageSpread(ring journal.Ring, h *journal.Header) {
	head := ring.Raw(h.LSN, journal.HeaderSize)
	m := message{typ: msgSpread, session: s.id, a: uint64(h.LSN), length: journal.HeaderSize, bodyCRC: crc32c.Sum(head)}
	m.encode(s.frame[:])
	s.bufs[0], s.bufs[1] = s.frame[:], head
	s.pending = s.bufs[:2]
	s.lanes.push(h, h.LSN >= s.reread)
	s.sent = h.End()
}

// rewind goes back to lsn: the peer asks for the log again from there. Its
// own copy is checked first: a flip here must not be sent twice.
func (s *session) rewind(lsn journal.LSN) (err error) {
	defer pmem.Recover(s.p.node.Memory(), pmem.Arm(), &err)
	if lsn < s.acked || lsn >= s.sent && s.segEnd == 0 || lsn%journal.Align != 0 || s.within(lsn) {
		return &WireError{fmt.Sprintf("resend from LSN %d, with %d acknowledged and %d sent", lsn, s.acked, s.sent)}
	}
	var h journal.Header
	if _, err := s.p.node.Log().Ring().Segment(lsn, &h); err != nil {
		return &OwnCopyError{lsn, err}
	}
	s.p.counters.Resends.Add(1)
	s.reread = max(s.reread, s.sent)
	s.sent, s.segEnd = lsn, 0
	return nil
}

// within reports whether lsn, not below acked, lies inside a segment: the
// peer's word for it would else pass for damage of this node's log. What is
// really damaged on the way tells nothing.
func (s *session) within(lsn journal.LSN) (yes bool) {
	var err error
	defer pmem.Recover(s.p.node.Memory(), pmem.Arm(), &err)
	ring := s.p.node.Log().Ring()
	at := s.acked
	for at < lsn {
		var h journal.Header
		if ring.Header(at, &h) != nil {
			return false
		}
		at = h.End()
	}
	return at != lsn
}
