package replicate

import (
	"encoding/json"
	"time"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
)

// What a hostile peer in package replicate_test needs of the wire.

const (
	HeaderSize     = headerSize
	TypeHello      = uint16(msgHello)
	TypeChain      = uint16(msgChain)
	TypeVerdict    = uint16(msgVerdict)
	TypeFollow     = uint16(msgFollow)
	TypeFollowed   = uint16(msgFollowed)
	TypeJoin       = uint16(msgJoin)
	TypeJoined     = uint16(msgJoined)
	TypeAck        = uint16(msgAck)
	TypeRequest    = uint16(msgBlockRequest)
	TypeHeartbeat  = uint16(msgHeartbeat)
	TypeResend     = uint16(msgResend)
	TypeLane       = uint16(msgLane)
	TypeSpread     = uint16(msgSpread)
	TypeFrame      = uint16(msgFrame)
	TypeBlocks     = uint16(msgBlocks)
	TypeBlocksDone = uint16(msgBlocksDone)
	TypeMissing    = uint16(msgBlockMissing)
	TypeBye        = uint16(msgBye)
	TypeLast       = uint16(msgSame)
)

type (
	HelloBody  = hello
	FollowBody = follow
	JoinBody   = join
	Message    struct {
		Type       uint16
		Session    uint64
		A, B, C, D uint64
		Body       []byte
	}
)

// Encode is the message as it goes over the wire.
func (m Message) Encode() []byte {
	b := make([]byte, headerSize, headerSize+len(m.Body))
	w := message{typ: messageType(m.Type), session: m.Session, a: m.A, b: m.B, c: m.C, d: m.D, length: uint32(len(m.Body))}
	if len(m.Body) > 0 {
		w.bodyCRC = crc32c.Sum(m.Body)
	}
	w.encode(b)
	return append(b, m.Body...)
}

// DecodeMessage takes a message off the front of b; ok is false where it is
// not whole.
func DecodeMessage(b []byte) (m Message, n int, ok bool) {
	var w message
	if len(b) < headerSize || w.decode(b) != nil || len(b) < headerSize+int(w.length) {
		return m, 0, false
	}
	n = headerSize + int(w.length)
	return Message{uint16(w.typ), w.session, w.a, w.b, w.c, w.d, b[headerSize:n]}, n, true
}

func VerdictBody(v Verdict) []byte {
	b, _ := json.Marshal(verdict{v.Rule, v.From})
	return b
}

// CommonOf is what both sides of a handshake agree on.
func CommonOf(a, b Side) journal.LSN { return Common(a, b) }

// NewsStay reports whether a receiver for which nothing is on its way keeps
// news of its lanes.
func NewsStay() bool {
	r := &receiver{s: &session{}}
	r.s.lanes.news.Store(true)
	r.collect()
	return r.s.lanes.news.Load()
}

// QueuedAfter is how many pieces are queued when a segment of 16 was sent, and
// sent again n times.
func QueuedAfter(n int) int {
	var l lanes
	h := journal.Header{LSN: 64, Length: 16 * MaxFrame}
	l.push(&h, true)
	for range n {
		l.push(&h, false)
	}
	return len(l.queue)
}

// QueuedAfterResends is how many pieces of seg, the log's first segment, are queued
// when its second one was asked for again n times.
func QueuedAfterResends(seg []byte, n int) (int, error) {
	ring := make([]byte, 4*len(seg))
	copy(ring, seg)
	node := &primary{log: journal.NewLog(heap{b: ring}, 0, int64(len(ring)), 0)}
	s := newSession(New(node, Config{Timeout: time.Second}), nil)
	s.sent = journal.LSN(len(seg))
	for range n {
		if err := s.lanes.resend(MaxFrame, 0); err != nil {
			return 0, err
		}
	}
	return len(s.lanes.queue), nil
}

// LostLog is lostLog.
func LostLog(mine, theirs Side) journal.LSN { return lostLog(mine, theirs) }
