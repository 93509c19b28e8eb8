package replicate

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// lanes are connections beside a session's own that carry the pieces of long
// segments, each with a goroutine at both ends, so that hashing and copying
// run beside the commit path and on several cores. The session's connection
// carries everything else, in order: a long segment stands there as a Spread
// message with its header, which the receiver judges before a piece of it is
// taken.
//
// Invariants:
//   - Only a session in sync uses them. A receiver that dies may hold segments
//     behind one whose pieces are missing: no harm, since what those say to be
//     acknowledged it has acknowledged itself. Catching up stays in order.
//   - A piece is received only into a segment that was announced and admitted,
//     and only once: what comes twice is thrown away.
//   - The receiving lane makes a piece durable before it says that the piece
//     is there. The segment counts once all pieces are, and its checksum is
//     that of the admitted header.
//   - The ring keeps what is queued here: it is not acknowledged.
//   - A piece with a bad checksum is asked for again. Any other failure of a
//     lane ends the session. No lane outlives its session.
type lanes struct {
	s    *session
	up   atomic.Int32 // lanes that work
	news atomic.Bool  // since the owner last looked a segment has become whole, or a piece was damaged

	mu      sync.Mutex
	changed sync.Cond // announced, done or ended
	role    laneRole
	done    journal.LSN // no piece below is wanted
	queue   []piece     // to send, in LSN order
	coming  []*incoming // announced, in LSN order
	spare   []*incoming // for the next ones
	again   []lost      // pieces to ask for again
	conns   []*lane
	ended   bool
	wg      sync.WaitGroup
}

// lane is one of them. Its goroutine is its only reader and writer.
type lane struct {
	conn  transport.Conn
	early []byte // arrived behind the answer to a Lane message
	probe [1]byte
}

type laneRole uint8

const (
	laneIdle laneRole = iota // not known yet
	laneSends
	laneReceives
)

// MaxLanes bounds the lanes of a session.
const MaxLanes = 16

// spreadFrom is the length above which a segment travels by the lanes, in
// bytes. Shorter ones are sooner there without waking anybody.
const spreadFrom = 256 << 10

// piece is a part of a long segment that is to be sent.
type piece struct {
	lsn   journal.LSN
	n     int
	first bool // with the segment's header
	fresh bool // Append's checksum may be used
}

var errLanesEnded = errors.New("the session has ended")

// laneError is the failure of a lane, which ends the session.
type laneError struct{ err error }

func (e *laneError) Error() string { return "connection for long segments: " + e.err.Error() }
func (e *laneError) Unwrap() error { return e.err }

// open starts the lanes in a role, and dials n of them where this end dialled
// the session.
func (l *lanes) open(role laneRole, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return
	}
	l.role = role
	for _, c := range l.conns {
		l.start(c)
	}
	if l.s.dialed && n > 0 {
		l.wg.Go(func() { l.dial(n) })
	}
}

// dial opens n lanes, one after the other. Fewer will do.
func (l *lanes) dial(n int) {
	p := l.s.p
	for range n {
		ctx, cancel := context.WithTimeout(l.s.ctx, min(p.cfg.Timeout, dialTime))
		err := l.dialOne(ctx)
		cancel()
		if err != nil {
			if l.s.ctx.Err() == nil && !errors.Is(err, errLanesEnded) {
				p.log.Warn("a connection for long segments does not come about; going on with those that are there", zap.Int32("there", l.up.Load()), zap.Error(err))
			}
			return
		}
	}
}

func (l *lanes) dialOne(ctx context.Context) error {
	p := l.s.p
	conn, err := p.cfg.Transport.Dial(ctx, p.cfg.Listen.Addr(), p.cfg.Peer)
	if err != nil {
		return err
	}
	first := newSession(p, conn)
	first.ctx, first.id = ctx, l.s.id
	first.beat = math.MaxInt64 / 2 // no heartbeats here
	stop := context.AfterFunc(ctx, conn.Wake)
	defer stop()
	first.send(message{typ: msgLane}, nil)
	if err = first.flush(); err == nil {
		_, _, err = first.readMessage(msgLane)
	}
	if err == nil {
		err = l.attach(&lane{conn: conn, early: first.stage[first.r:first.w]})
	}
	if err != nil {
		conn.Close()
	}
	return err
}

// acceptLane takes a connection whose first message asks to be a lane.
func (p *Pair) acceptLane(first *session, m message) error {
	s := p.current.Load()
	if s == nil || !s.established.Load() || s.id != m.session {
		return &WireError{fmt.Sprintf("a connection for session %x, which does not run here", m.session)}
	}
	first.id = s.id
	first.send(message{typ: msgLane}, nil)
	if err := first.flush(); err != nil {
		return err
	}
	return s.lanes.attach(&lane{conn: first.conn, early: first.stage[first.r:first.w]})
}

// attach adds a connection.
func (l *lanes) attach(c *lane) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return errLanesEnded
	}
	if len(l.conns) == MaxLanes {
		return &WireError{fmt.Sprintf("more than %d connections for one session", MaxLanes)}
	}
	l.conns = append(l.conns, c)
	if l.role != laneIdle {
		l.start(c)
	}
	return nil
}

// start runs a lane. l.mu is held.
func (l *lanes) start(c *lane) {
	run := l.send
	if l.role == laneReceives {
		run = l.receive
	}
	l.wg.Go(func() {
		err := run(c)
		if !errors.Is(err, errLanesEnded) && !errors.Is(err, net.ErrClosed) {
			l.s.stop(&laneError{err})
		}
	})
	l.up.Add(1)
}

// end stops and joins all lanes.
func (l *lanes) end() {
	l.mu.Lock()
	l.ended = true
	for _, c := range l.conns {
		c.conn.Close()
	}
	l.changed.Broadcast()
	l.mu.Unlock()
	l.s.stop(errLanesEnded) // a dial
	l.wg.Wait()
}

// wait waits for a lane's connection.
func (l *lanes) wait(c *lane, write bool) error {
	if l.s.ctx.Err() != nil {
		return errLanesEnded
	}
	return c.conn.Park(write, l.s.p.cfg.Timeout)
}

// unqueue takes the pieces from an LSN on back that are still queued: they are
// to be sent again, and a peer that asks for that without end must not make
// the queue grow. l.mu is held.
func (l *lanes) unqueue(from, to journal.LSN) {
	l.queue = slices.DeleteFunc(l.queue, func(q piece) bool { return q.lsn >= from && q.lsn < to })
}

// push queues a long segment. The caller owns the session.
func (l *lanes) push(h *journal.Header, fresh bool) {
	l.mu.Lock()
	if !fresh {
		l.unqueue(h.LSN, h.End())
	}
	for lsn := h.LSN; lsn < h.End(); lsn += MaxFrame {
		l.queue = append(l.queue, piece{lsn, int(min(h.End()-lsn, MaxFrame)), lsn == h.LSN, fresh})
	}
	for _, c := range l.conns {
		c.conn.Wake()
	}
	l.mu.Unlock()
}

// take waits for a piece to send.
func (l *lanes) take(c *lane) (piece, error) {
	for {
		l.mu.Lock()
		switch {
		case l.ended:
			l.mu.Unlock()
			return piece{}, errLanesEnded
		case len(l.queue) > 0:
			next := l.queue[0]
			l.queue = slices.Delete(l.queue, 0, 1)
			l.mu.Unlock()
			return next, nil
		}
		l.mu.Unlock()
		if err := l.watch(c, false); err != nil {
			return piece{}, err
		}
	}
}

// watch waits for a piece, or for room to write. It looks whether the
// connection is at its end: one that dies with the last piece still on its way
// is noticed here or never, and one that is readable for that keeps no wait
// asleep.
func (l *lanes) watch(c *lane, write bool) error {
	switch n, err := c.conn.TryRead(c.probe[:]); {
	case err != nil:
		return err
	case n > 0:
		return &WireError{"a receiver sends on a connection for long segments"}
	}
	return l.wait(c, write)
}

// send is a lane of the source.
func (l *lanes) send(c *lane) (err error) {
	p := l.s.p
	defer pmem.Recover(p.node.Memory(), pmem.Arm(), &err)
	log := p.node.Log()
	var header [headerSize]byte
	var both [2][]byte
	for {
		next, err := l.take(c)
		if err != nil {
			return err
		}
		data := log.Ring().Raw(next.lsn, next.n)
		m := message{typ: msgFrame, session: l.s.id, a: uint64(next.lsn), length: uint32(next.n)}
		m.bodyCRC = pieceSum(log, next, data)
		m.encode(header[:])
		both = [2][]byte{header[:], data}
		for bufs := both[:]; len(bufs) > 0; {
			n, err := c.conn.TryWrite(bufs)
			if err != nil {
				return err
			}
			if n == 0 {
				if err := l.watch(c, true); err != nil {
					return err
				}
			}
			bufs = consumed(bufs, n)
			runtime.Gosched() // the write held a processor, perhaps the only one
		}
	}
}

// pieceSum is the checksum of a piece of log. Where Append took it, the piece
// is not read again, and what has changed in memory since is found by the
// peer.
func pieceSum(log *journal.Log, p piece, data []byte) uint32 {
	sum, ok := log.PieceSum(p.lsn)
	if !ok || !p.fresh {
		return crc32c.Sum(data)
	}
	if p.first {
		return crc32c.Combine(crc32c.Sum(data[:journal.HeaderSize]), sum, int64(len(data)-journal.HeaderSize))
	}
	return sum
}

// resend queues the piece at lsn of a segment once more. Its own copy is
// checked first: a flip here must not be sent twice.
func (l *lanes) resend(lsn, segment journal.LSN) (err error) {
	s := l.s
	defer pmem.Recover(s.p.node.Memory(), pmem.Arm(), &err)
	var h journal.Header
	if segment < s.acked || segment >= s.sent || segment%journal.Align != 0 || s.within(segment) {
		return &WireError{fmt.Sprintf("resend of a piece of the segment at LSN %d, with %d acknowledged and %d sent", segment, s.acked, s.sent)}
	}
	if _, err := s.p.node.Log().Ring().Segment(segment, &h); err != nil {
		return &OwnCopyError{segment, err}
	}
	if lsn < h.LSN || lsn >= h.End() || (lsn-h.LSN)%MaxFrame != 0 {
		return &WireError{fmt.Sprintf("resend of a piece at LSN %d of the segment at %d", lsn, segment)}
	}
	s.p.counters.Resends.Add(1)
	l.mu.Lock()
	l.unqueue(lsn, lsn+1)
	l.queue = append(l.queue, piece{lsn, int(min(h.End()-lsn, MaxFrame)), lsn == h.LSN, false})
	for _, c := range l.conns {
		c.conn.Wake()
	}
	l.mu.Unlock()
	return nil
}
