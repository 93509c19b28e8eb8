package replicate

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/journal"
)

// RefusedError: a change of role could lose data, or would break a rule of the
// title. An operator can force it where that is said.
type RefusedError struct{ Why string }

func (e *RefusedError) Error() string { return "refused: " + e.Why }

// nextEpoch is above every epoch that this node has seen, by up to 2²⁴, at random: were
// an older copy of its region to go on, and to name its log as this node named its own,
// the handshake would take two logs for one.
func (p *Pair) nextEpoch(st *State) journal.Epoch {
	var b [4]byte
	rand.Read(b[:]) // never fails: crypto/rand
	step := binary.LittleEndian.Uint32(b[:])>>8 + 1
	return journal.Epoch{Counter: st.History.Last().Epoch.Counter + uint64(step), Node: st.Node}
}

// mint begins an epoch at the log's end. The caller has the role.
func (p *Pair) mint(peerIn bool, more func(*State)) error {
	end := p.node.Log().End()
	begin := func(st *State) error {
		st.History = st.History.Append(journal.Entry{Epoch: p.nextEpoch(st), Start: end, PeerIn: peerIn, Async: p.cfg.Async})
		more(st)
		return nil
	}
	var err error
	if p.node.Damaged() {
		// Only by force. The log goes on further behind, but the epoch begins here:
		// what another node holds from here on is a fork, which the handshake
		// refuses where that node knows that it was acknowledged.
		p.log.Error("giving up damaged log", zap.Uint64("from", uint64(end)))
		if err = p.node.Apply(end); err == nil { // what was taken from the peer since
			err = p.node.AcceptLoss(begin)
		}
	} else {
		err = p.node.Update(begin)
	}
	if err != nil {
		return err
	}
	last := p.node.State().History.Last()
	p.node.Log().SetEpoch(last.Epoch)
	p.change(func(m *mode) { m.required = last.BothIn() })
	p.fresh = false
	p.looking.Store(false)
	return nil
}

// serve opens the committer, with all that is acknowledged visible. The caller
// has the role.
func (p *Pair) serve() error {
	acked := p.node.Log().End()
	if p.Required() {
		acked = min(acked, p.ackedHint())
	}
	// Before anything is read: it may have been acknowledged before a restart.
	if err := p.node.Apply(acked); err != nil {
		return err
	}
	p.node.Committer().Open(acked, p.node.Applied())
	p.change(func(m *mode) { m.role, m.serving = Primary, true })
	p.EndWait()
	return nil
}

// resume takes up the role that the region remembers.
func (p *Pair) resume() error {
	st := p.node.State()
	last := st.History.Last()
	needsPeer := last.PeerIn && (!last.Async || !p.cfg.Async)
	p.mode.Store(&mode{role: st.Role, required: st.Role == Primary && needsPeer})
	c := p.node.Committer()
	if err := c.Acquire(p.ctx); err != nil {
		return err
	}
	defer c.Release()
	switch {
	case st.Blank() && p.cfg.Transport == nil:
		if err := p.mint(false, func(st *State) {
			st.Lineage, st.Role, st.Title, st.Alone, st.Lease = newUUID(), Primary, true, p.cfg.Alone, p.lease
		}); err != nil {
			return err
		}
		return p.serve()
	case st.Role != Primary:
		c.Close(p.NotPrimary(), p.NotPrimary())
	case p.cfg.Transport == nil && !needsPeer && !p.node.Damaged():
		return p.goOn()
	default:
		// Its peer may have been promoted, and may hold log that this node lost.
		// It waits for it for a time only where it needs nobody: no acknowledgement,
		// no repair (which an operator can give up), and no title, which the peer
		// may still hold, and have been promoted by, where the mode was being changed.
		p.fresh = true
		p.looking.Store(!needsPeer && !p.node.Damaged() && st.Title)
	}
	return nil
}

// goOn mints an epoch in which nobody else is required than before, and serves:
// what a primary that needs nobody does once it has looked for its peer. The
// caller has the role.
func (p *Pair) goOn() error {
	peerIn := p.node.State().History.Last().PeerIn
	err := p.mint(peerIn, func(st *State) {
		if !peerIn {
			st.Alone = p.cfg.Alone
		}
	})
	if err != nil {
		return err
	}
	return p.serve()
}

// untilAlone is how long the peer may still come back before this node goes on
// without it; ok is false where it does not.
func (p *Pair) untilAlone() (d time.Duration, ok bool) {
	st := p.node.State()
	may := !p.rival.Load() && st.Title && (p.looking.Load() || p.Required() && st.Alone)
	if !may || st.Role != Primary || p.node.Damaged() || p.node.Failed() != nil {
		return 0, false
	}
	return max(0, p.lost+p.cfg.Timeout-p.now()), true
}

// goWithout is what untilAlone waits for.
func (p *Pair) goWithout(why string) error {
	if !p.looking.Load() {
		return p.goAlone(why)
	}
	err := p.asPrimary(p.goOn)
	if err == nil {
		p.log.Info("primary", zap.String("why", why), zap.Stringer("epoch", p.node.State().History.Last().Epoch))
	}
	return err
}

// goAlone records durably that the peer is out, then acknowledges without it.
// It runs between sessions, or where the session has shipped nothing yet.
func (p *Pair) goAlone(why string) error {
	err := p.asPrimary(func() error {
		if err := p.mint(false, func(st *State) { st.Title = true }); err != nil {
			return err
		}
		return p.serve()
	})
	if err == nil {
		p.log.Warn("alone: the peer is out", zap.String("why", why), zap.Stringer("epoch", p.node.State().History.Last().Epoch))
	}
	return err
}

// asPrimary runs f with the committer's role, unless the node has been demoted
// meanwhile, and drives what waited for it.
func (p *Pair) asPrimary(f func() error) error {
	c := p.node.Committer()
	if err := c.Acquire(p.ctx); err != nil {
		return err
	}
	err := p.NotPrimary()
	if p.node.State().Role == Primary {
		err = f()
	}
	c.Release()
	if err == nil {
		c.Tick()
	}
	return err
}

// ContinueAlone makes a primary that waits for its lost peer go on without
// it: unforced only with the title, since without it the peer may have been
// promoted.
func (p *Pair) ContinueAlone(ctx context.Context, force bool) error {
	alone := func() bool { return *p.mode.Load() == mode{role: Primary, serving: true} }
	if err := p.mayGoAlone(force); err != nil || alone() {
		return err
	}
	return p.between(ctx, func() error {
		// The session that ended meanwhile may have moved the title.
		if err := p.mayGoAlone(force); err != nil || alone() {
			return err
		}
		return p.goAlone("told so by the operator")
	})
}

// mayGoAlone says what stands in the way of acknowledging without the peer.
func (p *Pair) mayGoAlone(force bool) error {
	st := p.node.State()
	switch {
	case st.Role != Primary:
		return fmt.Errorf("only a primary can continue alone: %w", p.NotPrimary())
	case !p.Required() && p.Serving():
		return nil // it does not need the peer
	case p.node.Damaged() && !force:
		return &RefusedError{"the journal here is damaged below what was acknowledged; reconnect the peer, which can repair it, or force it and lose that"}
	case p.Phase() == PhaseInSync && !force:
		return &RefusedError{"the peer is in sync; nothing is waiting for it"}
	case !st.Title && !force: // as of each primary in sync under policy block
		return &RefusedError{"this node does not hold the title: the peer does and may have been promoted, or the title was on its way; make sure that the peer is down for good, then use force"}
	case p.rival.Load() && !force:
		return &RefusedError{"the peer is primary as well; settle first whose data is to stay, then demote the other or replace its region"}
	}
	return nil
}

// Promote makes this node the primary: unforced only by the title, or, on a
// blank node, with the consent of an equally blank peer. While the peer is
// connected, what stands in the way is given the timeout to pass: a peer that
// was just demoted may still be handing over.
func (p *Pair) Promote(ctx context.Context, force bool) error {
	if st := p.node.State(); st.Blank() && !force {
		if settled, err := p.promoteBlank(ctx); settled {
			return err
		}
	}
	defer p.wantTitle.Store(false)
	for start := p.now(); ; {
		p.wantTitle.Store(true)
		if p.node.State().Role == Primary {
			return nil
		}
		err := p.promotable(force)
		if err == nil {
			return p.between(ctx, func() error {
				// The session that ended meanwhile may have moved the title.
				if err := p.promotable(force); err != nil || p.node.State().Role == Primary {
					return err
				}
				return p.becomePrimary(ctx)
			})
		}
		if p.now()-start > p.cfg.Timeout || !p.connected() || !wait(ctx, p.cfg.Timeout/200) {
			return err
		}
	}
}

// promotable says what stands in the way of promoting this node.
func (p *Pair) promotable(force bool) error {
	st := p.node.State()
	switch {
	case st.Resync != nil:
		return &RefusedError{"a full copy onto this node has not finished: it does not hold the whole volume"}
	case force:
		return nil
	case p.node.Damaged():
		return &RefusedError{"the journal here is damaged below what was acknowledged; reconnect the primary, which can repair it, or force it and lose that"}
	case !st.Title:
		return &RefusedError{"this node does not hold the title, so the other may have acknowledged what is not here; promote that one, or, where it is down for good or its region is a new one, use force"}
	case p.primaryAlive():
		return &RefusedError{"the peer is primary and connected; demote it first, or, where the handshake is refused, settle whose data is to stay"}
	}
	return nil
}

// connected reports whether a session is up, or was a moment ago: a change of
// role at the peer ends it and begins another.
func (p *Pair) connected() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if ended := p.sessionEnded.Load(); ended != 0 && p.now()-time.Duration(ended) < p.cfg.Timeout/2 {
		return true
	}
	return p.phase != PhaseLost && p.phase != PhaseNone && p.phase != PhaseRefused
}

// primaryAlive reports whether a session with a primary peer is up, or was refused just
// now where that peer may serve.
func (p *Pair) primaryAlive() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.phase == PhaseRefused {
		return p.rival.Load() && p.verdict.Rule != RuleUnrepairable
	}
	return (p.phase == PhaseInSync || p.phase == PhaseCatchUp || p.phase == PhaseResync) && !p.verdict.Mine
}

// promoteBlank makes a blank node the primary once its equally blank peer has
// left the beginning of the volume to it: in their session, see idle. It is not
// settled where the node is blank no more.
func (p *Pair) promoteBlank(ctx context.Context) (settled bool, err error) {
	c := &call{f: func() error { return p.becomePrimary(p.ctx) }, done: make(chan error, 1)}
	if !p.claim.CompareAndSwap(nil, c) {
		return true, errors.New("another promotion of this node is under way")
	}
	long, cancel := context.WithTimeout(ctx, 10*time.Second+2*p.heartbeat)
	defer cancel()
	for blank := true; blank && p.cfg.Transport != nil && p.ctx.Err() == nil && wait(long, 20*time.Millisecond); {
		st := p.node.State()
		blank = st.Blank()
	}
	if !p.claim.CompareAndSwap(c, nil) {
		return true, <-c.done // the session has taken it
	}
	if st := p.node.State(); !st.Blank() {
		return false, nil
	}
	if p.ctx.Err() != nil {
		return true, errors.New("the node is being closed")
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return true, ctx.Err() // given up; where its time is over, this says why
	}
	p.mu.Lock()
	reason := string(p.phase) + ": " + p.reason
	p.mu.Unlock()
	return true, &RefusedError{"this node is blank, and no equally blank peer is connected (" + reason + "); if it is to start a volume of its own, use force"}
}

// stall is how late a timer is where the process was stopped, and not just busy.
const stall = 100 * time.Millisecond

// becomePrimary runs between sessions, or in one in which nothing is shipped:
// no receiver is at work. The order is what makes it safe: the old primary's
// reads have ended before this node is durably the primary, since a restart
// serves what the region says at once; and that is durable before it serves.
//
// Where ctx ends before the old primary's lease has, the node stays what it is.
func (p *Pair) becomePrimary(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.ctx, cancel)()
	c := p.node.Committer()
	if err := c.Acquire(p.ctx); err != nil {
		return err
	}
	st := p.node.State()
	var err error
	if !st.Blank() { // also without a peer now: who has served may be cut off, not gone
		// A tenth more than the lease: the bound on how much faster this
		// clock may run than the other's.
		quiet := max(p.started, time.Duration(p.lastAnswer.Load())) + st.Lease + st.Lease/10
		if d := quiet - p.now(); d > 0 {
			wait(ctx, d)
			if p.now() > quiet+stall { // stopped meanwhile: whether the caller is still there may come late too
				wait(ctx, stall)
			}
		}
		err = ctx.Err()
	}
	if err == nil {
		err = p.mint(false, func(st *State) {
			if st.Blank() {
				st.Lineage = newUUID()
			}
			st.Role, st.Title, st.Alone, st.Lease = Primary, true, p.cfg.Alone, p.lease
		})
	}
	if err == nil {
		err = p.serve()
	}
	if err == nil {
		p.log.Info("primary", zap.Stringer("epoch", p.node.State().History.Last().Epoch), zap.Uint64("lsn", uint64(p.node.Log().End())))
	}
	c.Release()
	return err
}

// Demote makes a primary a secondary: it takes no more transactions, waits
// until those that it took are acknowledged, and gives the role up. The peer
// can then be promoted.
func (p *Pair) Demote(ctx context.Context) error {
	if p.Role() != Primary {
		return nil
	}
	c := p.node.Committer()
	if err := c.Acquire(ctx); err != nil {
		return err
	}
	// What waits for a primary that does not serve yet was never taken: who is refused, as
	// beside another primary, must be able to give way.
	gives := !p.Serving() && (p.rival.Load() || p.Phase() == PhaseRefused)
	if p.Required() && p.insync.Load() == nil && !gives {
		c.Release()
		return &RefusedError{"the peer is required and not in sync: nobody could take over what waits here; reconnect it, or continue alone first"}
	}
	c.Close(&ErrNotPrimary{}, nil)
	err := p.drain(ctx)
	if err == nil {
		err = p.stepDownLocked(true)
	}
	if err != nil {
		if e := p.serve(); e != nil && !errors.Is(err, e) {
			err = errors.Join(err, e)
		}
	}
	c.Release()
	if err != nil {
		return fmt.Errorf("still primary: %w", err)
	}
	// Whoever still waits for it: the role is given up, and the session that
	// runs presented this node as primary.
	return p.between(context.WithoutCancel(ctx), func() error { return nil })
}

// drain waits until the peer has everything that was taken. The caller has the
// role, so a session that is lost meanwhile cannot be replaced: that ends it.
func (p *Pair) drain(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s := p.insync.Load()
	if s == nil {
		s = p.follower.Load()
	}
	if s == nil {
		return p.node.Committer().Drain(ctx)
	}
	stop := context.AfterFunc(s.ctx, func() { cancel(errors.New("the session with the peer ended")) })
	defer stop()
	go func() {
		select {
		case <-s.failed:
			cancel(*s.failure.Load())
		case <-ctx.Done():
		}
	}()
	err := p.node.Committer().Drain(ctx)
	for err == nil && p.ackedHint() < p.node.Log().End() { // async: it lags behind
		if s.conn.Wake(); !wait(ctx, p.heartbeat/100) {
			err = ctx.Err()
		} else if err = p.node.Failed(); err != nil { // then nobody watches over the session
			return err
		}
	}
	if err != nil {
		err = context.Cause(ctx)
	}
	return err
}

// stepDown gives up a role that the peer has gone beyond, and the title as well unless
// it is to be kept.
func (p *Pair) stepDown(keepTitle bool) error {
	c := p.node.Committer()
	if err := c.Acquire(p.ctx); err != nil {
		return err
	}
	defer c.Release()
	return p.stepDownLocked(keepTitle)
}

func (p *Pair) stepDownLocked(keepTitle bool) error {
	acked := p.Acked() // for the peer, where it has lost any of it since
	if err := p.node.Update(func(st *State) error {
		st.Role, st.Acked, st.Title = Secondary, max(st.Acked, acked), st.Title && keepTitle
		return nil
	}); err != nil {
		return err
	}
	p.mode.Store(&mode{role: Secondary})
	p.EndWait()
	p.fresh = false
	p.looking.Store(false)
	p.node.Committer().Close(p.NotPrimary(), fmt.Errorf("this node is no longer primary"))
	p.log.Info("secondary")
	return nil
}
