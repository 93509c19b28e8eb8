package replicate

import (
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/journal"
)

// follow takes the source's log, and acknowledges it, until the session ends.
func (p *Pair) follow(s *session, v Verdict) error {
	_, body, err := s.readMessage(msgFollow)
	if err != nil {
		return err
	}
	var f follow
	if err := unmarshal(msgFollow, body, &f); err != nil {
		return err
	}
	// A former primary's committers end here.
	if err := p.node.Committer().Acquire(s.ctx); err != nil {
		return err
	}
	if err := p.checkFollow(&f, v, s); err != nil {
		p.node.Committer().Release()
		return err
	}
	p.node.Committer().Close(p.NotPrimary(), fmt.Errorf("the peer went on as primary"))
	p.change(func(m *mode) { m.serving = false })
	p.EndWait()
	p.node.Committer().Release()

	adopt := func(st *State) {
		// What both had to hold another node held, or this one, which gives it up: it
		// answers for nothing before it joins (journal.Entry.Binds), however often it
		// is told.
		history := slices.Clone(f.History)
		for i, e := range history {
			e.PeerIn = false
			if st.Blank() || f.Full || slices.Contains(st.History, e) {
				history[i] = e
			}
		}
		st.Lineage = f.Lineage
		st.History = history
		st.Role = Secondary
		st.Alone = f.Alone
		st.Lease = time.Duration(f.LeaseNS)
		st.Peer = s.peer.Node
		if s.peer.Title || f.Full {
			st.Title = false
		}
	}
	log := p.node.Log()
	r := &receiver{p: p, s: s, log: log, apply: true, full: f.Full}
	var record Resync
	var has []byte
	switch {
	case f.Full:
		p.copied.Store(0)
		p.setPhase(PhaseResync, v.Why)
		record = Resync{Fork: f.From, Base: f.Base, Chain: f.Chain, Epoch: f.History.Last().Epoch}
		c := p.claimOf(&f, v)
		r.have = c.Parts
		p.have = copied{}
		if err := p.node.StartCopy(record, len(r.have) > 0, adopt); err != nil {
			return err
		}
		if len(r.have) > 0 {
			p.log.Info("full copy of what is missing here", zap.Int64("has", r.have.blocks()))
			has = marshal(c)
		}
	default:
		p.setPhase(PhaseCatchUp, "")
		if err := p.node.Update(func(st *State) error { adopt(st); return nil }); err != nil {
			return err
		}
		if drop := log.End() - f.From; drop > 0 {
			p.log.Warn("dropping log that was never acknowledged", zap.Uint64("from", uint64(f.From)), zap.Uint64("bytes", uint64(drop)))
			if err := p.node.Truncate(f.From, f.Chain); err != nil {
				return err
			}
		}
	}
	s.send(message{typ: msgFollowed, a: uint64(log.End()), b: uint64(p.node.Checkpoint())}, has)
	p.mode.Store(&mode{role: Secondary})
	s.lanes.done = log.End()
	s.lanes.open(laneReceives, s.many)
	err = r.run()
	if r.full {
		p.have = copied{f.Copy, record, r.have.after(r.nextBlock, p.node.Applied())}
	}
	return err
}

func (p *Pair) checkFollow(f *follow, v Verdict, s *session) error {
	st := p.node.State()
	log := p.node.Log()
	size := log.Size()
	switch {
	case f.Lineage == UUID{} || !st.Blank() && f.Lineage != st.Lineage:
		return &WireError{fmt.Sprintf("told to follow lineage %v", f.Lineage)}
	case f.History.Validate() != nil || len(f.History) == 0:
		return &WireError{"told to follow without a valid epoch history"}
	case f.From%journal.Align != 0 || f.Base%journal.Align != 0 || f.LeaseNS < 0 || f.LeaseNS > int64(time.Hour):
		return &WireError{fmt.Sprintf("told to follow from LSN %d, base %d, lease %d ns", f.From, f.Base, f.LeaseNS)}
	case f.From < f.Base || f.Full && f.From-f.Base > 1<<62:
		return &WireError{fmt.Sprintf("told to follow from LSN %d in a ring that starts at %d", f.From, f.Base)}
	case f.Full:
		return nil
	case f.From != v.From || f.From > log.End() || log.End()-f.From > size || f.Base != log.Ring().Base:
		return &WireError{fmt.Sprintf("told to follow from LSN %d, ring base %d; the decision was %d, base %d here", f.From, f.Base, v.From, log.Ring().Base)}
	}
	if p.node.Applied() > f.From {
		return fmt.Errorf("the data here holds the log up to LSN %d, beyond the fork at %d; replace this region to rejoin", p.node.Applied(), f.From)
	}
	if chain, ok := p.chainAt(f.From); !ok || chain != f.Chain {
		return fmt.Errorf("the peer's log before LSN %d is not the one that is here", f.From)
	}
	return nil
}

// fetch takes the log that a restarted primary lacks. Nothing of it is
// applied: the next handshake decides.
func (p *Pair) fetch(s *session, v Verdict) error {
	if err := p.node.Committer().Acquire(s.ctx); err != nil {
		return err
	}
	defer p.node.Committer().Release()
	p.setPhase(PhaseCatchUp, "taking log from the peer")
	r := &receiver{p: p, s: s, log: p.node.Log(), until: s.peer.End}
	if err := r.run(); err != nil {
		return err
	}
	// Where a flip made the hole that was filled, this node's own log goes on
	// behind it, perhaps further than the peer's: acknowledged alone, or async.
	if err := p.node.Extend(); err != nil {
		return err
	}
	p.log.Info("took the log that the peer holds", zap.Uint64("from", uint64(v.From)), zap.Uint64("to", uint64(s.peer.End)))
	return errAgain
}
