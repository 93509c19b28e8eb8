package replicate

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// The connection slot: at most one session, dialled or accepted, and between
// sessions the work that changes the role.

// dialTime is the longest that a dial waits: a wrong key, which is only seen by
// there being no answer, is to be reported within seconds.
const dialTime = 2 * time.Second

// accept reads the first message of each connection that comes in, so that
// nothing but a peer that speaks the protocol can end a session.
func (p *Pair) accept() {
	slots := make(chan struct{}, 4)
	var refused, failed refusals
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := p.ln.Accept()
		if err != nil {
			if p.ctx.Err() != nil {
				return
			}
			if before, due := failed.add(p.now(), err.Error()); due {
				p.log.Warn("accept", zap.Error(err), zap.Int("unlogged", before))
			}
			wait(p.ctx, p.cfg.Timeout/10) // no descriptor is left: it will not be there at once
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			s := newSession(p, conn)
			ctx, cancel := context.WithTimeoutCause(p.ctx, p.cfg.Timeout, errSilent)
			defer cancel()
			s.ctx = ctx
			stop := context.AfterFunc(p.ctx, conn.Wake)
			defer stop()
			lane, err := s.readFirst()
			if lane {
				return
			}
			if err != nil {
				if before, due := refused.add(p.now(), err.Error()); due {
					p.log.Warn("connection refused", zap.Stringer("from", conn.RemoteAddr()), zap.Error(err), zap.Int("unlogged", before))
				}
				p.noteRefusal(err)
				conn.Close()
				return
			}
			select {
			case p.offers <- s:
			case <-p.ctx.Done():
				conn.Close()
			}
		})
	}
}

// refusals lets one refused connection a second be logged, and one a minute for the
// same reason: over plain, whoever has the peer's address could fill the log.
type refusals struct {
	mu    sync.Mutex
	last  string        // the reason that was logged last, without figures; "": none was
	at    time.Duration // when
	quiet int           // how many were not logged since
}

func (r *refusals) add(now time.Duration, reason string) (quiet int, due bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	reason = withoutFigures(reason)
	pause := time.Second
	if reason == r.last {
		pause = time.Minute
	}
	if r.last != "" && now < r.at+pause {
		r.quiet++
		return 0, false
	}
	quiet, r.quiet = r.quiet, 0
	r.last, r.at = reason, now
	return quiet, true
}

const askingAgain = "a frame does not match its checksum, asking for it again"

// warnOfFrame logs a frame that was damaged on its way, one a minute: over plain a
// bad wire could fill the log, and the counters have them all.
func (p *Pair) warnOfFrame(what string, lsn uint64) {
	if before, due := p.frames.add(p.now(), what); due {
		p.log.Warn(what, zap.Uint64("lsn", lsn), zap.Int("unlogged", before))
	}
}

// call is work for the run goroutine, between sessions.
type call struct {
	f    func() error
	done chan error
}

// between runs f while no session runs, and none is accepted.
func (p *Pair) between(ctx context.Context, f func() error) error {
	c := &call{f: f, done: make(chan error, 1)}
	select {
	case p.calls <- c:
		return <-c.done
	case <-ctx.Done():
		return ctx.Err()
	case <-p.ctx.Done():
		return errors.New("the node is being closed")
	}
}

// run owns the connection slot.
func (p *Pair) run() {
	var backoff time.Duration
	again := 0 // sessions in a row that ended to decide again
	for p.ctx.Err() == nil {
		start := p.now()
		s, err := p.connect(backoff)
		if next := p.longer(backoff); err != nil && p.now()-start < next+p.headStart() {
			backoff = next // it failed at once: refused, unreachable
		}
		for s != nil {
			var next *session
			var err error
			began := p.now()
			next, err = p.supervise(s)
			if p.now()-began > p.cfg.Timeout {
				backoff, again = 0, 0 // it worked
			}
			if !errors.Is(err, errAgain) {
				again = 0
			} else {
				again++
			}
			switch {
			case next != nil:
			case errors.Is(err, errAgain) && again <= mostAgain:
				backoff = 0
			case p.Phase() == PhaseRefused:
				backoff = p.cfg.Timeout
			default:
				backoff = p.longer(backoff)
			}
			s = next
		}
	}
}

// mostAgain is how many sessions in a row may end to decide again before the next
// dial waits: what two sound nodes have to settle takes a few.
const mostAgain = 8

// longer is the delay before the next dial after one that failed.
func (p *Pair) longer(backoff time.Duration) time.Duration {
	return min(2*backoff+p.cfg.Timeout/50, p.cfg.Timeout)
}

// connect waits for a connection: dialled after delay, or accepted. It is nil
// where none came about: the dial failed, or other work was done meanwhile.
func (p *Pair) connect(delay time.Duration) (*session, error) {
	ctx, cancel := context.WithCancel(p.ctx)
	defer cancel()
	type result struct {
		conn transport.Conn
		err  error
	}
	dialed := make(chan result, 1)
	if p.cfg.Transport != nil {
		delay += p.headStart()
		p.wg.Go(func() {
			if !wait(ctx, delay) {
				dialed <- result{nil, ctx.Err()}
				return
			}
			ctx, cancel := context.WithTimeout(ctx, min(p.cfg.Timeout, dialTime))
			defer cancel()
			conn, err := p.cfg.Transport.Dial(ctx, p.cfg.Listen.Addr(), p.cfg.Peer)
			dialed <- result{conn, err}
		})
	}
	abandon := func() {
		cancel()
		if p.cfg.Transport != nil {
			if r := <-dialed; r.conn != nil {
				r.conn.Close()
			}
		}
	}
	var alone <-chan time.Time
	if d, ok := p.untilAlone(); ok {
		t := time.NewTimer(d)
		defer t.Stop()
		alone = t.C
	}
	select {
	case s := <-p.offers:
		abandon()
		return s, nil
	case r := <-dialed:
		if r.err != nil {
			p.counters.DialFailures.Add(1)
			p.notePeerLost(r.err)
			return nil, r.err
		}
		s := newSession(p, r.conn)
		s.dialed = true
		return s, nil
	case c := <-p.calls:
		abandon()
		c.done <- c.f()
	case <-alone:
		abandon()
		if err := p.goWithout("peer lost"); err != nil {
			p.log.Error("going alone failed", zap.Error(err))
		}
	case <-p.kick:
		abandon()
		p.failRepairs()
	case <-p.ctx.Done():
		abandon()
	}
	return nil, nil
}

func wait(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// firstToDial reports whether this end dials at once, where both find each other
// gone at the same time.
func (p *Pair) firstToDial() bool { return p.before(p.node.State().Peer) }

// headStart is how much longer this end waits than the other before it dials.
func (p *Pair) headStart() time.Duration {
	if p.firstToDial() {
		return 0
	}
	return min(p.cfg.Timeout, dialTime) / 10
}

// wins reports whether this end's own connection wins over one that the peer has
// made at the same time.
func (p *Pair) wins(o *session) bool { return p.before(o.peer.Node) }

// before orders the two ends in the same way on both: by their node ids. Where the
// peer's is not known yet, their addresses do, unless they are translated on the way.
func (p *Pair) before(peer uint64) bool {
	if mine := p.node.State().Node; peer != 0 && peer != mine {
		return mine < peer
	}
	return p.cfg.Listen.Compare(p.cfg.Peer) < 0
}

// supervise runs a session to its end. A connection that the peer makes
// meanwhile replaces it, and is returned: the peer dials only where it has no
// session. The exception is a connection of ours that may just be on its way.
func (p *Pair) supervise(s *session) (next *session, err error) {
	ctx, cancel := context.WithCancelCause(p.ctx)
	defer cancel(nil)
	s.ctx, s.stop = ctx, cancel
	p.current.Store(s)
	defer p.current.Store(nil)
	stop := context.AfterFunc(ctx, s.conn.Wake)
	defer stop()
	if p.sessions++; p.sessions > 1 {
		p.counters.Reconnects.Add(1)
	}
	done, began := make(chan error, 1), p.now()
	p.wg.Go(func() { done <- p.session(s) })
	var work *call
	for {
		select {
		case err = <-done:
			s.conn.Close()
			if s.joined || s.established.Load() && p.now()-began > p.cfg.Timeout {
				p.told = nil // it worked: why it ended is news
			}
			p.ended(s, err)
			if work != nil {
				work.done <- work.f()
				err = errAgain
			}
			return next, err
		case o := <-p.offers:
			if !s.established.Load() && s.dialed && p.wins(o) || next != nil || work != nil {
				o.conn.Close()
				continue
			}
			next = o
			cancel(nil)
		case c := <-p.calls:
			if work != nil {
				c.done <- errors.New("another change of this node's role is under way")
				continue
			}
			work = c
			cancel(nil)
		}
	}
}

// ended notes why a session ended.
func (p *Pair) ended(s *session, err error) {
	p.mu.Lock()
	refused := p.phase == PhaseRefused
	if !refused {
		p.phase = PhaseLost
		if err != nil && !errors.Is(err, errAgain) && !errors.Is(err, context.Canceled) {
			p.reason = err.Error()
			if why, ok := p.refusedFor(s, err); ok {
				p.reason = why
			}
		}
	}
	p.mu.Unlock()
	p.unpin()
	p.failRepairs()
	if s.joined { // who has not joined protects nothing
		p.lost = s.heard
	}
	if err != nil && !errors.Is(err, errAgain) && !errors.Is(err, context.Canceled) && p.tell(err.Error()) {
		p.log.Warn("session ended", zap.Stringer("peer", s.conn.RemoteAddr()), zap.Error(err))
	}
	p.sessionEnded.Store(int64(p.now()))
}

func (p *Pair) unpin() { p.pin.Store(math.MaxUint64) }

// poke makes the goroutine in charge look at what is wanted.
func (p *Pair) poke() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
	p.Wake()
}

func (p *Pair) setPhase(ph Phase, reason string) {
	p.mu.Lock()
	p.phase, p.reason = ph, reason
	p.mu.Unlock()
}

// refusal is why a connection was refused for what its first bytes were.
type refusal struct {
	reason string // "": none was
	at     time.Duration
}

// noteRefusal notes why a connection that the peer made was refused.
func (p *Pair) noteRefusal(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.phase == PhaseLost {
		p.reason = err.Error()
	}
	var version *VersionError
	var wire *WireError
	if errors.As(err, &version) || errors.As(err, &wire) {
		p.said = refusal{err.Error(), p.now()}
	}
}

// refusedFor is the better reason for the end of a session in which the peer has
// said nothing: each of two nodes that do not understand each other closes the
// other's connections, and only its own refusals know why. p.mu is held.
func (p *Pair) refusedFor(s *session, err error) (why string, ok bool) {
	var conn *transport.ConnError
	silent := !s.established.Load() && (errors.Is(err, errClosed) || errors.As(err, &conn))
	return p.said.reason, silent && p.said.reason != "" && p.now()-p.said.at < max(15*time.Second, 3*p.cfg.Timeout)
}

// notePeerLost says why no connection comes about. The log has each reason once
// until a session has worked: which counters rise, and by how much, differs from one
// attempt to the next.
func (p *Pair) notePeerLost(err error) {
	reason := fmt.Sprintf("cannot reach the peer: %v", err)
	var dial *transport.DialError
	told := errors.As(err, &dial) && dial.Rose.Diagnose() != ""
	if p.cfg.Diagnose != nil && !told {
		if d := p.cfg.Diagnose(); d != "" {
			reason += "; " + d
		}
	}
	p.mu.Lock()
	if p.phase == PhaseLost || p.phase == PhaseRefused {
		p.phase, p.reason = PhaseLost, reason
	}
	p.mu.Unlock()
	if p.tell(reason) {
		p.log.Warn("peer lost", zap.String("reason", reason))
	}
}

// tell reports whether the log does not have a reason yet, figures aside, since a
// session has worked.
func (p *Pair) tell(reason string) bool { return p.news(withoutFigures(reason)) }

// news is tell of what differs also by its figures.
func (p *Pair) news(what string) bool {
	if slices.Contains(p.told, what) {
		return false
	}
	if len(p.told) == 16 { // whatever a peer makes up
		p.told = nil
	}
	p.told = append(p.told, what)
	return true
}

// withoutFigures is what stays the same while counters in a reason grow.
func withoutFigures(s string) string {
	return strings.Map(func(r rune) rune {
		if '0' <= r && r <= '9' {
			return -1
		}
		return r
	}, s)
}
