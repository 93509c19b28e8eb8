package replicate

import (
	"bytes"
	"errors"
	"testing"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// backlog is a connection on which bytes have arrived.
type backlog struct {
	transport.Conn
	arrived []byte
}

func (c *backlog) TryRead(p []byte) (n int, err error) {
	n = copy(p, c.arrived)
	c.arrived = c.arrived[n:]
	return n, nil
}

// TestBacklogIsTakenInAtOnce: what a follower has sent is taken in by one look,
// also where it is several stages long: the lease may hang on the last of it.
func TestBacklogIsTakenInAtOnce(t *testing.T) {
	c := &backlog{arrived: bytes.Repeat(Message{Type: TypeHeartbeat}.Encode(), 5*stageSize/headerSize)}
	s := &session{conn: c, stage: make([]byte, stageSize)}
	taken, err := (&Pair{}).takeAnswers(s)
	if left := len(c.arrived) + s.w - s.r; err != nil || !taken || left > 0 {
		t.Fatalf("%v, %v: %d bytes are left", taken, err, left)
	}
}

// talker is a connection on which the same message arrives without end.
type talker struct {
	transport.Conn
	message []byte
}

func (c *talker) TryRead(p []byte) (n int, err error) {
	for len(p)-n >= len(c.message) {
		n += copy(p[n:], c.message)
	}
	return n, nil
}

// TestLastWordOfASession: the peer's bye is the reason of a session's end where
// a committer has met it and where it has arrived only; a peer that talks on does
// not keep that end waiting.
func TestLastWordOfASession(t *testing.T) {
	says := func(typ messageType) *session {
		m := Message{Type: uint16(typ)}
		if typ == msgBye {
			m.Body = []byte("stopping")
		}
		return &session{conn: &talker{message: m.Encode()}, stage: make([]byte, stageSize)}
	}
	wantStopping := func(s *session) {
		t.Helper()
		var closed *ErrClosedByPeer
		if err := s.lastWord(); !errors.As(err, &closed) || closed.Reason != "stopping" {
			t.Errorf("%v", err)
		}
	}
	wantStopping(says(msgBye))

	met := says(msgHeartbeat)
	var err error = &ErrClosedByPeer{"stopping"}
	met.failure.Store(&err)
	wantStopping(met)

	if err := says(msgHeartbeat).lastWord(); err != nil {
		t.Errorf("%v", err)
	}
}
