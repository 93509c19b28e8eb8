package replicate_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// quiet is settle that throws away what was sent.
func (p *pipe) quiet(session uint64) {
	p.settle(session)
	p.mu.Lock()
	p.out = nil
	p.mu.Unlock()
	notify(p.wake)
}

// settle waits until the node has sent something and then nothing more. It says
// meanwhile that the peer is there.
func (p *pipe) settle(session uint64) {
	last := 0
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		p.send(replicate.Message{Type: replicate.TypeHeartbeat, Session: session}.Encode())
		p.mu.Lock()
		n := len(p.out)
		p.mu.Unlock()
		if n > 0 && n-last <= 4*replicate.HeaderSize { // heartbeats go on
			break
		}
		last = n
	}
}

// inSync makes the test a follower in sync. Where the machine is too busy for
// the node's timeout, it tries again.
func (v *victim) inSync() (p *pipe, session uint64) {
	v.t.Helper()
	for range 20 {
		p := v.connect(16 << 20)
		session, _, ok := asFollower(p)
		if !ok {
			continue
		}
		p.quiet(session)
		p.send(replicate.Message{Type: replicate.TypeFollowed, Session: session}.Encode())
		p.send(replicate.Message{Type: replicate.TypeAck, Session: session, A: uint64(v.Status().Committed)}.Encode())
		if _, ok := p.await(replicate.TypeJoin); !ok {
			continue
		}
		p.send(replicate.Message{Type: replicate.TypeJoined, Session: session}.Encode())
		for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if v.Status().Peer == "in-sync" {
				return p, session
			}
		}
	}
	v.t.Fatalf("not in sync: %+v", v.Status())
	return nil, 0
}

// A follower asks for log again from where no segment can start, in the last
// bytes of the ring: that ends the session, not the process.
func TestResendFromNowhere(t *testing.T) {
	v := newVictim(t, nvmmirror.Alone)
	if err := v.Promote(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	block := make([]byte, 16<<10)
	for v.Status().Committed < ringSize-(24<<10) {
		if _, err := v.WriteAt(block, 0); err != nil {
			t.Fatal(err)
		}
	}
	p, session := v.inSync()
	wrote := make(chan error)
	go func() {
		_, err := v.WriteAt(make([]byte, 64<<10), 0)
		wrote <- err
	}()
	time.Sleep(20 * time.Millisecond) // it waits for the acknowledgement
	p.send(replicate.Message{Type: replicate.TypeResend, Session: session, A: ringSize - 1}.Encode())
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	v.survives(true)
}

// A follower may begin with its checkpoint far behind its log: its ring has no
// more room than above that, until it says that the checkpoint has moved.
func TestFollowerWhoseCheckpointIsBehind(t *testing.T) {
	v := newVictim(t, nvmmirror.Alone)
	if err := v.Promote(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	const piece, room = 16 << 10, 256 << 10
	write := func(n int, beat func()) {
		for range n / piece {
			if _, err := v.WriteAt(make([]byte, piece), 0); err != nil {
				t.Fatal(err)
			}
			beat()
		}
	}
	write(ringSize+2*room, func() {}) // the ring does not reach back: a full copy
	// Where the machine is too busy for the node's timeout, it tries again.
	for range 20 {
		p := v.connect(16 << 20)
		session, _, ok := handshake(p, enemy())
		if !ok {
			continue
		}
		m, ok := p.await(replicate.TypeFollow)
		if !ok {
			continue
		}
		var f replicate.FollowBody
		if err := json.Unmarshal(m.Body, &f); err != nil {
			t.Fatal(err)
		}
		from := uint64(f.From)
		limit := from + room
		followed := replicate.Message{Type: replicate.TypeFollowed, Session: session, A: from, B: limit - ringSize}.Encode()
		p.send(followed)
		write(2*room, func() { p.send(replicate.Message{Type: replicate.TypeHeartbeat, Session: session}.Encode()) })
		p.send(followed) // the copy is whole: not earlier, the join that follows stops the writers
		full, ok := p.logUpTo(session, from, limit-2*piece)
		if !ok {
			continue
		}
		if full > limit || full < limit-2*piece {
			t.Fatalf("log up to LSN %d, room up to %d", full, limit)
		}
		p.send(replicate.Message{Type: replicate.TypeAck, Session: session, A: full, B: from}.Encode())
		if end, ok := p.logUpTo(session, full, from+2*room); !ok {
			continue
		} else if end < from+2*room {
			t.Fatalf("log up to LSN %d, though the ring has room up to %d", end, from+ringSize)
		}
		p.hangUp()
		v.survives(true)
		return
	}
	t.Fatal("no session held")
}

// logUpTo is logEnd, until the log reaches an LSN at least: a busy machine may be
// long about it.
func (p *pipe) logUpTo(session, lsn, least uint64) (end uint64, ok bool) {
	end, ok = p.logEnd(session, lsn)
	for deadline := time.Now().Add(10 * time.Second); ok && end < least && time.Now().Before(deadline); {
		end, ok = p.logEnd(session, end)
	}
	return end, ok
}

// logEnd takes all that the node sends until it sends nothing more, and is
// where the log in it ends, which begins at lsn.
func (p *pipe) logEnd(session, lsn uint64) (end uint64, ok bool) {
	p.settle(session)
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.out) > 0 {
		var h journal.Header
		if journal.DecodeHeader(p.out, &h) != nil {
			_, n, whole := replicate.DecodeMessage(p.out)
			if !whole {
				return lsn, false
			}
			p.out = p.out[n:]
			continue
		}
		if uint64(h.LSN) != lsn {
			return lsn, false
		}
		lsn = uint64(h.End())
		p.out = p.out[h.WireLength():]
	}
	return lsn, !p.closed
}

// A follower that acknowledges, or asks for again, what lies inside a segment
// talks nonsense. That is no damage of the primary's log, which goes on.
func TestAnswersInsideSegments(t *testing.T) {
	for name, answer := range map[string]func(at uint64) replicate.Message{
		"ack":    func(at uint64) replicate.Message { return replicate.Message{Type: replicate.TypeAck, A: at + 64} },
		"resend": func(at uint64) replicate.Message { return replicate.Message{Type: replicate.TypeResend, A: at + 64} },
		"piece": func(at uint64) replicate.Message {
			return replicate.Message{Type: replicate.TypeResend, A: at + 64, B: at + 64, C: 1}
		},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVictim(t, nvmmirror.Alone)
			if err := v.Promote(context.Background(), true); err != nil {
				t.Fatal(err)
			}
			if _, err := v.WriteAt(make([]byte, 16<<10), 0); err != nil {
				t.Fatal(err)
			}
			p, session := v.inSync()
			m := answer(uint64(v.Status().Committed))
			m.Session = session
			wrote := make(chan error)
			go func() {
				_, err := v.WriteAt(make([]byte, 8<<10), 0)
				wrote <- err
			}()
			time.Sleep(20 * time.Millisecond) // it waits for the acknowledgement
			p.send(m.Encode())
			if err := <-wrote; err != nil {
				t.Error(err)
			}
			v.survives(true)
		})
	}
}

// endless is a connection whose far end, once it is on, always has sent more,
// and takes everything.
type endless struct {
	*pipe
	on    atomic.Bool
	flood []byte
	next  int
}

func (e *endless) TryRead(b []byte) (int, error) {
	n, err := e.pipe.TryRead(b)
	if n > 0 || err != nil || !e.on.Load() {
		return n, err
	}
	n = copy(b, e.flood[e.next:])
	e.next = (e.next + n) % len(e.flood)
	return n, nil
}

func (e *endless) TryWrite(bufs [][]byte) (n int, err error) {
	if !e.on.Load() {
		return e.pipe.TryWrite(bufs)
	}
	for _, b := range bufs {
		n += len(b)
	}
	return n, nil
}

// A peer that never stops sending cannot keep the node from ending the
// session, as closing it and promoting it do.
func TestPeerThatNeverStops(t *testing.T) {
	v := newVictim(t, nvmmirror.Alone)
	e := &endless{pipe: newPipe(1 << 20)}
	v.stage.offered <- e
	session, ok := asSource(e.pipe)
	if !ok {
		t.Fatal("handshake")
	}
	e.flood = bytes.Repeat(replicate.Message{Type: replicate.TypeHeartbeat, Session: session, A: 1}.Encode(), 1000)
	e.on.Store(true)
	notify(e.wake)
	time.Sleep(50 * time.Millisecond)
	closed := make(chan error)
	go func() { closed <- v.Close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("the node does not close")
		e.on.Store(false)
		e.hangUp()
		<-closed
	}
	v.Volume = nil
}

// News of the lanes that came with what the news before told of does not stay:
// the receiver would look for it again and again, and do nothing else.
func TestOldNewsOfLanes(t *testing.T) {
	if replicate.NewsStay() {
		t.Error("news stay where no segment is on its way: the receiver spins")
	}
}

// What is queued for the lanes stays bounded where the peer asks for it again
// and again and takes nothing.
func TestLanesAskedAgain(t *testing.T) {
	if n := replicate.QueuedAfter(100); n > 20 {
		t.Errorf("%d pieces of a segment of 16 are queued", n)
	}
	seg, _ := segment(0, 0, make([]byte, 4*replicate.MaxFrame))
	if n, err := replicate.QueuedAfterResends(seg, 100); n != 1 || err != nil {
		t.Errorf("%d pieces are queued where one is asked for again and again: %v", n, err)
	}
}

// brokenStage is a transport that can accept nothing: no descriptor is left.
type brokenStage struct {
	*stage
	accepts atomic.Int64
}

func (s *brokenStage) Listen(netip.AddrPort) (transport.Listener, error) { return s, nil }
func (s *brokenStage) Accept() (transport.Conn, error) {
	s.accepts.Add(1)
	select {
	case <-s.done:
		return nil, net.ErrClosed
	default:
		return nil, errors.New("too many open files")
	}
}

// A listener that fails is not asked again without a pause.
func TestAcceptPausesAfterFailure(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "nvmmirror-test-")
	if err != nil {
		t.Skip("needs /dev/shm: ", err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "r")
	err = nvmmirror.Create(path, nvmmirror.CreateOptions{Size: volumeSize, JournalSize: ringSize, Accept: pmem.Emulated})
	if err != nil {
		t.Fatal(err)
	}
	s := &brokenStage{stage: newStage()}
	v, err := nvmmirror.Open(path, nvmmirror.Options{Peer: &nvmmirror.Peer{
		Listen: "127.0.0.1:1", Address: "127.0.0.1:2", Timeout: 100 * time.Millisecond, Transport: s,
	}})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	if n := s.accepts.Load(); n > 100 {
		t.Errorf("asked %d times within 200 ms", n)
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
}

// A peer tells of a block that there is not: that ends the session, not the process.
func TestMissingBlockThatIsNone(t *testing.T) {
	for _, block := range []uint64{1 << 40, 1 << 63, 1<<64 - 1} {
		v := newVictim(t, nvmmirror.Alone)
		if err := v.Promote(context.Background(), true); err != nil {
			t.Fatal(err)
		}
		p := v.connect(1 << 20)
		session, _, ok := asFollower(p)
		if !ok {
			t.Fatal("it does not lead")
		}
		said := bytes.Repeat([]byte{1}, 16) // what its table says of the block
		p.send(replicate.Message{Type: replicate.TypeMissing, Session: session, A: block, B: 1, C: 64, Body: said}.Encode())
		if m, ok := p.await(replicate.TypeBye); !ok || !bytes.Contains(m.Body, []byte("nonsense")) {
			t.Errorf("block %d: %q", block, m.Body)
		}
		v.survives(true)
	}
}
