package replicate

import (
	"errors"
	"testing"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

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
