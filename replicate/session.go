package replicate

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// session is one connection from handshake to end.
//
// One goroutine at a time owns it: the pair's session goroutine, or, while a
// primary is in sync, the holder of the committer's role. All fields but the
// atomics are the owner's.
type session struct {
	p    *Pair
	conn transport.Conn
	ctx  context.Context // ended: the session is to stop
	id   uint64
	peer Side
	stop context.CancelCauseFunc // ends it

	nonce  uint64 // the peer's half of the id
	policy policy // the peer's
	many   int    // lanes that both ends want
	lanes  lanes

	dialed      bool        // by this end
	established atomic.Bool // the peer has answered: it knows of this session

	// Receiving: bytes [r, w) of stage arrived and were not consumed.
	stage []byte
	r, w  int

	// Sending: pending is on its way, ctl follows, then the log from sent on.
	pending  [][]byte
	bufs     [2][]byte // backing of pending
	ctl      []byte    // messages to send
	ctlOut   []byte    // messages in pending
	frame    [headerSize]byte
	sent     journal.LSN     // log is in pending up to here
	segStart journal.LSN     // of a long segment, while segEnd is set
	segEnd   journal.LSN     // sent lies inside a long segment that ends here
	reread   journal.LSN     // sums of log below are taken anew: it was asked for again
	acked    journal.LSN     // the peer has persisted up to here
	peerCkpt journal.LSN     // the peer's checkpoint
	sendEnd  journal.LSN     // do not send from here on
	past     journal.History // of the log that was there when the session began, up to pastEnd
	pastEnd  journal.LSN

	heard   time.Duration // when something arrived, as far as was looked
	active  bool          // something arrived since
	beat    time.Duration // when the last heartbeat left, or the answer to one
	answers bool          // this end follows: it acknowledges the peer's heartbeats
	echo    uint64        // the peer's latest heartbeat clock, to echo
	joined  bool          // it came into sync
	copied  bool          // the peer said that its full copy is whole
	due     atomic.Bool   // housekeeping is due
	helping atomic.Int32  // so many looks are to come soon: the peer asks for blocks
	failure atomic.Pointer[error]
	failed  chan struct{}
	once    sync.Once
}

const (
	stageSize = 16 << 10
	// maxQueued bounds what waits for a peer that does not read, in bytes.
	maxQueued = 4 << 20
)

// errDeaf: the peer makes this node answer, and does not take the answers.
var errDeaf = errors.New("the peer does not read what it asks for")

func newSession(p *Pair, conn transport.Conn) *session {
	s := &session{p: p, conn: conn, stage: make([]byte, stageSize), heard: p.now(), failed: make(chan struct{})}
	s.lanes.s, s.lanes.changed.L = s, &s.lanes.mu
	return s
}

// fail ends the session with its first error.
func (s *session) fail(err error) {
	s.once.Do(func() {
		s.failure.Store(&err)
		close(s.failed)
		s.conn.Wake()
	})
}

// errSilent: the peer has not been heard of for the timeout.
var errSilent = errors.New("nothing heard from the peer for the timeout")

// ErrClosedByPeer: the peer ended the session, with its reason.
type ErrClosedByPeer struct{ Reason string }

func (e *ErrClosedByPeer) Error() string { return "the peer ended the session: " + e.Reason }

// tryRead reads what has arrived into p.
func (s *session) tryRead(p []byte) (n int, err error) {
	n, err = s.conn.TryRead(p)
	s.active = s.active || n > 0
	if err == io.EOF {
		err = errClosed
	}
	return n, err
}

var errClosed = errors.New("the peer closed the connection")

// room is the free part of the stage. It is not empty unless a whole stage is
// waiting to be consumed.
func (s *session) room() []byte {
	if s.r == s.w {
		s.r, s.w = 0, 0
	} else if s.w == len(s.stage) {
		s.w = copy(s.stage, s.stage[s.r:s.w])
		s.r = 0
	}
	return s.stage[s.w:]
}

// receive reads what has arrived into the stage.
func (s *session) receive() (n int, err error) {
	p := s.room()
	if len(p) == 0 {
		return 0, nil
	}
	n, err = s.tryRead(p)
	s.w += n
	return n, err
}

// read waits until something arrives in p: it polls for a bounded time, then
// sleeps. Meanwhile it sends what is queued and does the housekeeping.
func (s *session) read(p []byte) (n int, err error) {
	return s.readUnless(nil, s.p.cfg.BusyPoll, false, p)
}

// readUnless is read that returns without a byte once stop is set, or somebody
// ended its wait: the caller looks around. long: it waits for long segments.
func (s *session) readUnless(stop *atomic.Bool, poll time.Duration, long bool, p []byte) (n int, err error) {
	for {
		start := time.Now() // no system call, unlike the pair's clock
		for {
			if n, err := s.tryRead(p); n > 0 || err != nil || stop != nil && stop.Load() {
				return n, err
			}
			if poll <= 0 || time.Since(start) >= poll {
				break
			}
		}
		now := s.p.now()
		if err := s.housekeep(now); err != nil {
			return 0, err
		}
		if err := s.wait(long, s.rest(now)); err != nil {
			return 0, err
		}
		if stop != nil {
			return s.tryRead(p)
		}
	}
}

// wait waits for the connection, in the way that suits long segments or in the
// quickest one.
func (s *session) wait(long bool, d time.Duration) error {
	if long {
		return s.conn.Park(len(s.pending) > 0, d)
	}
	return s.conn.Wait(len(s.pending) > 0, d)
}

// tryMessage takes one whole message out of the stage. ok is false if it has
// not arrived yet. The body is valid until the next receive.
func (s *session) tryMessage(m *message) (body []byte, ok bool, err error) {
	p := s.stage[s.r:s.w]
	if len(p) < headerSize {
		return nil, false, nil
	}
	if err := m.decode(p); err != nil {
		return nil, false, err
	}
	total := headerSize + int(m.length)
	if total > len(s.stage) {
		return nil, false, &WireError{fmt.Sprintf("message of type %d with %d bytes here", m.typ, m.length)}
	}
	if len(p) < total {
		return nil, false, nil
	}
	s.r += total
	return p[headerSize:total], true, s.checkBody(m, p[headerSize:total])
}

func (s *session) checkBody(m *message, body []byte) error {
	if m.length != 0 && crc32c.Sum(body) != m.bodyCRC {
		s.p.counters.CRCFailures.Add(1)
		return &WireError{fmt.Sprintf("bad checksum of the body of message type %d", m.typ)}
	}
	if s.id != 0 && m.session != s.id {
		return &WireError{fmt.Sprintf("message of session %x in session %x", m.session, s.id)}
	}
	return nil
}

// readMessage waits for one message of a type, and for nothing else than
// heartbeats and acknowledgements before it. A Bye is an error with its reason.
func (s *session) readMessage(want messageType) (m message, body []byte, err error) {
	for {
		m, body, err = s.readAny()
		if err != nil {
			return m, nil, err
		}
		switch m.typ {
		case want:
			return m, body, nil
		case msgHeartbeat, msgAck:
		case msgBye:
			return m, nil, &ErrClosedByPeer{printable(body)}
		default:
			return m, nil, &WireError{fmt.Sprintf("message type %d where %d was due", m.typ, want)}
		}
	}
}

// fill waits until n bytes are staged.
func (s *session) fill(n int) error {
	for s.w-s.r < n {
		got, err := s.read(s.room())
		if err != nil {
			return err
		}
		s.w += got
	}
	return nil
}

// readFull waits until p is full.
func (s *session) readFull(p []byte) error {
	n := copy(p, s.stage[s.r:s.w])
	s.r += n
	for n < len(p) {
		got, err := s.read(p[n:])
		if err != nil {
			return err
		}
		n += got
	}
	return nil
}

// housekeep keeps the session alive, and ends it where the peer is silent.
func (s *session) housekeep(now time.Duration) error {
	s.due.Store(false)
	if s.active {
		s.heard, s.active = now, false
	}
	if s.ctx.Err() != nil {
		return context.Cause(s.ctx)
	}
	if now-s.heard > s.p.cfg.Timeout {
		return fmt.Errorf("%w (%v)", errSilent, s.p.cfg.Timeout)
	}
	if s.id != 0 && s.beatDue(now) {
		s.beat = now
		s.send(message{typ: msgHeartbeat, a: uint64(now), b: uint64(s.p.ackedHint())}, nil)
	}
	return s.flush()
}

// beatDue reports whether a heartbeat should leave. An eighth early is on time:
// whoever looks once a heartbeat must not miss it by a hair. Who
// answers the other's heartbeats sends one only where none has come for two:
// those behind much that is on its way come late.
func (s *session) beatDue(now time.Duration) bool {
	return now-s.beat >= s.beatEvery()-s.p.heartbeat/8
}

func (s *session) beatEvery() time.Duration {
	if s.answers {
		return 2 * s.p.heartbeat
	}
	return s.p.heartbeat
}

// rest is how long an owner with nothing to do may sleep: until a heartbeat is
// due, or the peer has been silent for too long.
func (s *session) rest(now time.Duration) time.Duration {
	if s.id == 0 {
		return s.p.heartbeat / 2
	}
	return max(min(s.beat+s.beatEvery(), s.heard+s.p.cfg.Timeout+1)-now, s.p.heartbeat/8)
}

// bye tells the peer why the session ends, as far as that goes at once.
func (s *session) bye(reason string) {
	s.send(message{typ: msgBye}, []byte(reason))
	s.flush()
}

// lastWord is the peer's bye, where a committer has met it or it is in what has
// arrived. Where the owner was inside a frame there is nothing to be read.
func (s *session) lastWord() error {
	var closed *ErrClosedByPeer
	if err := s.failure.Load(); err != nil && errors.As(*err, &closed) {
		return closed
	}
	var m message
	for stages := 16; stages > 0; { // a peer can talk without end
		body, ok, err := s.tryMessage(&m)
		switch {
		case err != nil:
			return nil
		case ok && m.typ == msgBye:
			return &ErrClosedByPeer{printable(body)}
		case ok:
			continue
		}
		if n, err := s.receive(); n == 0 || err != nil {
			return nil
		}
		stages--
	}
	return nil
}

func putBlockInfo(b []byte, i BlockInfo) []byte {
	binary.LittleEndian.PutUint64(b, uint64(i.LSN))
	binary.LittleEndian.PutUint32(b[8:], i.CRC)
	var flags uint32
	if i.Unverified {
		flags = blockUnverified
	}
	binary.LittleEndian.PutUint32(b[12:], flags)
	return b
}

func getBlockInfo(b []byte) BlockInfo {
	return BlockInfo{
		LSN:        journal.LSN(binary.LittleEndian.Uint64(b)),
		CRC:        binary.LittleEndian.Uint32(b[8:]),
		Unverified: binary.LittleEndian.Uint32(b[12:])&blockUnverified != 0,
	}
}

const (
	blockInfoSize   = 16
	blockUnverified = 1
)
