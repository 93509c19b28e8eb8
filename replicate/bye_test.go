package replicate

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/journal"
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

// shelf is a node that has the blocks that are asked for.
type shelf struct{ Node }

func (shelf) Geometry() Geometry { return Geometry{Size: 1 << 20} }
func (shelf) ReadBlocks(int64, []byte, []BlockInfo) (journal.LSN, error) {
	return 0, nil
}

// TestBurstOfRequests: of the requests in a long backlog no more are answered than
// may wait to be sent; what one stage holds may be too much.
func TestBurstOfRequests(t *testing.T) {
	c := &backlog{arrived: bytes.Repeat(Message{Type: TypeRequest}.Encode(), 16384)}
	s := &session{conn: c, stage: make([]byte, stageSize)}
	const atMost = maxQueued + stageSize/headerSize*(headerSize+blockInfoSize+BlockSize)
	if _, err := (&Pair{node: shelf{}}).takeAnswers(s); err != nil || len(s.ctl) > atMost || len(s.ctl) < maxQueued {
		t.Fatalf("%v: %d bytes of answers are queued, %d at most", err, len(s.ctl), atMost)
	}
	if err := s.flush(); err != errDeaf {
		t.Errorf("the session goes on: %v", err)
	}
}

// TestLookAfterARequest: an idle primary that was asked for a block looks more often for
// as long as a heartbeat takes: the peer asks for more once it is there.
func TestLookAfterARequest(t *testing.T) {
	p, s := &Pair{node: shelf{}, heartbeat: time.Second}, &session{}
	p.sendBlock(s, 7)
	soon := time.Duration(0)
	for {
		next := p.nextLook(s)
		if next == p.heartbeat {
			break
		}
		soon += next
	}
	if soon != p.heartbeat {
		t.Errorf("it looks more often for %v", soon)
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

// deprived is a node that hears why a block does not come.
type deprived struct {
	Node
	why error
}

func (n *deprived) Repaired(_ int64, _ []byte, _ BlockInfo, _ journal.LSN, err error) { n.why = err }

// TestWhyABlockIsMissing: what the peer says of it is shown as any text of a peer's.
func TestWhyABlockIsMissing(t *testing.T) {
	n := &deprived{Node: shelf{}}
	text := append([]byte("not whole either\x1b[2J\x80"), bytes.Repeat([]byte("x"), 100<<10)...)
	if err := (&Pair{node: n}).takeRepair(&message{typ: msgBlockMissing}, text); err != nil {
		t.Fatal(err)
	}
	if got := n.why.Error(); !strings.HasPrefix(got, "the peer cannot help: not whole either?[2J?xx") || len(got) > 2<<10+50 {
		t.Errorf("%d bytes: %.80q", len(got), got)
	}
}
