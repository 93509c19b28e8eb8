package replicate

import (
	"context"
	"errors"
	"math"
	"time"

	"github.com/nvmmirror/nvmmirror/journal"
)

// What committers and readers see of a pair.

// Progress implements the committer's sink, as far as the pair goes: what all
// required nodes hold, and where the ring must not be written.
func (p *Pair) Progress() (acked, limit journal.LSN) {
	end := p.node.Log().End()
	size := p.node.Log().Size()
	limit = p.node.Checkpoint() + size
	if s := p.insync.Load(); s != nil {
		p.progress(s)
		limit = min(limit, s.peerCkpt+size)
		acked = s.acked
	} else if f := p.follower.Load(); f != nil && journal.LSN(p.peerAcked.Load()) < end {
		f.conn.Wake()
	}
	if pin := p.pin.Load(); pin != math.MaxUint64 {
		limit = min(limit, journal.LSN(pin)+size)
	}
	switch m := p.mode.Load(); {
	case !m.serving:
		acked = 0 // the log is a session's, which applies it itself
	case !m.required:
		acked = end
	}
	return acked, limit
}

// Wait sleeps until Progress may have something, for d at most. It returns false
// at once where no session is in sync. The caller has the role.
func (p *Pair) Wait(d time.Duration) bool {
	if s := p.insync.Load(); s != nil {
		s.wait(p.node.Log().End()-s.acked > spreadFrom, d)
		return true
	}
	return false
}

// Wake makes whoever waits on the session that runs look around: a driver for
// what is queued, a secondary for its own checkpoint, which the primary waits
// for where the ring is full.
func (p *Pair) Wake() {
	if s := p.current.Load(); s != nil {
		s.conn.Wake()
	}
}

// renewLease extends the read lease, counted from when what was answered left.
func (p *Pair) renewLease(sent time.Duration) {
	if until := int64(sent + p.lease); until > p.leaseUntil.Load() {
		p.leaseUntil.Store(until)
	}
}

// Leased reports whether this node may serve a read that it has just done: it is
// a primary that serves, and alone by decision, or its lease has not run out, so
// that no one can have been promoted.
func (p *Pair) Leased() bool {
	m := p.mode.Load()
	return m.role == Primary && m.serving && (!m.required || int64(p.now()) < p.leaseUntil.Load())
}

// Serving reports whether transactions are taken; on a secondary they are
// refused.
func (p *Pair) Serving() bool { return p.mode.Load().serving }

// EndWait ends each AwaitServing: the node serves, or will not as it is.
func (p *Pair) EndWait() { p.readied.Do(func() { close(p.ready) }) }

// AwaitServing waits until a primary that was restarted serves: until its peer
// has been heard, or it goes on alone by decision. It returns at once on a
// secondary.
func (p *Pair) AwaitServing(ctx context.Context) error {
	if p.Role() != Primary {
		return nil // the committer says so
	}
	select {
	case <-p.ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-p.ctx.Done():
		return errors.New("the node is being closed")
	}
}

func (p *Pair) ackedHint() journal.LSN { return journal.LSN(p.peerAcked.Load()) }

// Acked is the LSN up to which all required nodes are known to hold the log;
// on a secondary what the primary said of it.
func (p *Pair) Acked() journal.LSN {
	end := p.node.Log().End()
	if m := p.mode.Load(); m.role == Primary && !m.required {
		return end
	}
	return min(end, p.ackedHint())
}

// Role is what the node is now.
func (p *Pair) Role() Role { return p.mode.Load().role }

// NotPrimary is the error that says who is.
func (p *Pair) NotPrimary() error {
	e := &ErrNotPrimary{}
	st := p.node.State()
	if last := st.History.Last(); last.Epoch.Node != 0 && last.Epoch.Node != st.Node && p.cfg.Transport != nil {
		e.Primary = p.cfg.Peer.Addr().String()
	}
	return e
}

// Required reports whether acknowledgements need the peer.
func (p *Pair) Required() bool { return p.mode.Load().required }

// Status is the pair as status shows it.
type Status struct {
	Phase  Phase
	Reason string
	Rule   Rule  // of the last handshake
	Copied int64 // bytes of a full copy so far
	Lanes  int   // connections for long segments that are up
	// Differs is in what the peer is configured differently, as it said last.
	Differs string
}

// Status is the pair's state now.
func (p *Pair) Status() Status {
	var up int32
	if s := p.current.Load(); s != nil {
		up = s.lanes.up.Load()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return Status{Phase: p.phase, Reason: p.reason, Rule: p.verdict.Rule, Copied: p.copied.Load(), Lanes: int(up), Differs: p.differs}
}

// Counters are the pair's counters.
func (p *Pair) Counters() *Counters { return &p.counters }

// Phase is the peer's state.
func (p *Pair) Phase() Phase {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.phase
}
