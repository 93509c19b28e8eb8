package replicate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/journal"
)

// RefusedVerdict is a handshake that ended in refusal.
type RefusedVerdict struct{ Verdict }

func (e *RefusedVerdict) Error() string { return string(e.Rule) + ": " + e.Why }

// side is this node as it presents itself.
func (p *Pair) side() Side {
	st := p.node.State()
	end := p.node.Log().End()
	acked := max(st.Acked, journal.LSN(p.peerAcked.Load()))
	damaged := p.node.Damaged()
	if !damaged {
		acked = min(acked, end)
	}
	return Side{
		Node: st.Node, Lineage: st.Lineage, Geometry: p.node.Geometry(), Role: st.Role, Title: st.Title,
		History: st.History, End: end, Acked: acked, Applied: p.node.Applied(),
		Inconsistent: st.Resync != nil, Damaged: damaged,
	}
}

func (p *Pair) policy() policy {
	return policy{Async: p.cfg.Async, Alone: p.cfg.Alone, TimeoutNS: int64(p.cfg.Timeout)}
}

// noteDiffers notes in what the peer's configuration differs from this node's.
func (p *Pair) noteDiffers(how string) {
	p.mu.Lock()
	news := how != p.differs
	p.differs = how
	p.mu.Unlock()
	if news && how != "" {
		p.log.Warn("the nodes are configured differently", zap.String("how", how))
	}
}

// readFirst reads the first message of a connection that the peer made: a
// hello, or that it is a lane, which is then served.
func (s *session) readFirst() (lane bool, err error) {
	m, body, err := s.readAny()
	switch {
	case err != nil:
		return false, err
	case m.typ == msgLane:
		if err = s.p.acceptLane(s, m); err != nil {
			s.conn.Close()
			s.p.log.Debug("a connection for long segments was refused", zap.Error(err))
		}
		return true, err
	case m.typ == msgBye:
		return false, &ErrClosedByPeer{printable(body)}
	case m.typ != msgHello:
		return false, &WireError{fmt.Sprintf("message type %d where %d was due", m.typ, msgHello)}
	}
	return false, s.takeHello(body)
}

// readHello reads the peer's first message.
func (s *session) readHello() error {
	_, body, err := s.readMessage(msgHello)
	if err != nil {
		return err
	}
	return s.takeHello(body)
}

func (s *session) takeHello(body []byte) error {
	var h hello
	if err := unmarshal(msgHello, body, &h); err != nil {
		return err
	}
	if err := h.History.Validate(); err != nil {
		return &WireError{err.Error()}
	}
	if h.Node == 0 || h.Session == 0 || h.End%journal.Align != 0 || h.Acked > h.End && !h.Damaged {
		return &WireError{fmt.Sprintf("hello of node %x, session %x, LSN %d, acknowledged up to %d", h.Node, h.Session, h.End, h.Acked)}
	}
	s.peer, s.nonce, s.policy = h.Side, h.Session, h.Policy
	s.many = max(0, min(h.Lanes, s.p.cfg.Lanes, MaxLanes))
	return nil
}

// session runs a connection: handshake, then what was decided.
func (p *Pair) session(s *session) error {
	err := p.handshake(s)
	p.sayBye(s, err)
	s.lanes.end()
	var own *OwnCopyError
	if errors.As(err, &own) {
		p.noteOwnDamage(own)
	}
	p.noteFault(err)
	if lane := (*laneError)(nil); errors.As(err, &lane) {
		// A peer that ends the session closes its lanes too: what it said before
		// that is the reason.
		if said := s.lastWord(); said != nil {
			err = said
		}
	}
	var closed *ErrClosedByPeer
	if errors.As(err, &closed) && closed.Reason == byeAgain {
		return errAgain
	}
	return err
}

const byeAgain = "deciding again"

// sayBye tells the peer why this end ends the session, before a lane that is
// closed tells it that it has ended.
func (p *Pair) sayBye(s *session, err error) {
	var closed *ErrClosedByPeer
	if err == nil || errors.As(err, &closed) || s.id == 0 {
		return
	}
	why := err.Error()
	switch {
	case errors.Is(err, errAgain):
		why = byeAgain
	case errors.Is(err, context.Canceled):
		why = "the node is changing its role or stopping"
	}
	s.bye(why)
}

func (p *Pair) handshake(s *session) error {
	if err := p.node.Failed(); err != nil {
		s.bye(err.Error()) // in the place of a hello
		return err
	}
	mine := p.side()
	nonce := NewNodeID()
	s.sendJSON(msgHello, hello{Side: mine, Session: nonce, Lanes: p.cfg.Lanes, Policy: p.policy()})
	if s.dialed {
		if err := s.readHello(); err != nil {
			return err
		}
	}
	if err := s.flush(); err != nil {
		return err
	}
	s.id = nonce ^ s.nonce | 1
	s.established.Store(true)
	theirs := s.peer
	if theirs.Role == Primary {
		p.rival.Store(true) // before the verdict, which may not come: it is no longer unheard
	}
	p.noteDiffers(p.policy().differs(s.policy))

	if upTo := lostLog(mine, theirs); upTo > 0 && !p.Serving() { // who serves has begun an epoch that the peer lacks
		// Before the verdict, which may not come, and durably: until it has that log
		// again, this node neither goes on nor is promoted without the peer.
		if err := p.node.Lost(upTo); err != nil {
			return err
		}
		return errAgain
	}

	if outdated(mine, theirs) && !(p.Serving() && !p.Required()) { // who serves without the peer has a log of its own
		// Durably, and before the verdict, as above.
		var err error
		if mine.Role == Primary && theirs.Role != Primary {
			err = p.stepDown(false) // title and role in one step: between the two, promote would find a primary
		} else {
			err = p.setTitle(false)
		}
		if err != nil {
			return err
		}
		return errAgain
	}

	common := Common(mine, theirs)
	// Committers may be at work: the log's end and its chain are the owner's.
	if err := p.node.Committer().Acquire(s.ctx); err != nil {
		return err
	}
	mine.Chain, mine.Known = p.chainAt(common)
	p.node.Committer().Release()
	var known uint64
	if mine.Known {
		known = 1
	}
	s.send(message{typ: msgChain, a: uint64(common), b: uint64(mine.Chain), c: known}, nil)
	m, _, err := s.readMessage(msgChain)
	if err != nil {
		return err
	}
	if journal.LSN(m.a) != common {
		return &WireError{fmt.Sprintf("common log up to LSN %d here, %d there", common, m.a)}
	}
	theirs.Chain, theirs.Known = uint32(m.b), m.c == 1

	v := Decide(mine, theirs)
	s.sendJSON(msgVerdict, verdict{Rule: v.Rule, From: v.From})
	_, body, err := s.readMessage(msgVerdict)
	if err != nil {
		return err
	}
	var other verdict
	if err := json.Unmarshal(body, &other); err != nil || other.Rule != v.Rule || other.From != v.From {
		return &WireError{fmt.Sprintf("decided %s at LSN %d here, %s at %d there: run the same release on both nodes", v.Rule, v.From, printable(string(other.Rule)), other.From)}
	}
	p.mu.Lock()
	p.verdict = v
	p.mu.Unlock()
	level := zap.DebugLevel // a peer may shake hands and go, again and again
	if p.news(fmt.Sprintf("handshake: %s with %x", v.Rule, theirs.Node)) {
		level = zap.InfoLevel
	}
	p.log.Log(level, "handshake", zap.String("rule", string(v.Rule)), zap.Uint64("from", uint64(v.From)),
		zap.Bool("source", v.Mine && v.Action >= Follow), zap.String("why", v.Why))

	p.rival.Store(theirs.Role == Primary && !(v.Mine && v.Action == Follow)) // also until its log is followed
	switch v.Action {
	case Idle:
		return p.idle(s, mine, v)
	case Follow:
		if v.Mine {
			return p.lead(s, mine, v)
		}
		return p.follow(s, v)
	case Fetch:
		if v.Mine {
			return p.handOver(s, v)
		}
		return p.fetch(s, v)
	case StepDown:
		if v.Mine {
			return p.idle(s, mine, v)
		}
		if err := p.stepDown(true); err != nil {
			return err
		}
		return errAgain
	}
	if _, ok := p.untilAlone(); ok && p.looking.Load() {
		if err := p.goWithout("the peer is refused, and no primary"); err != nil {
			return err
		}
	}
	p.counters.Refused.Add(1)
	p.setPhase(PhaseRefused, string(v.Rule)+": "+v.Why)
	return &RefusedVerdict{v}
}

// idle keeps a session on which nothing is shipped. Where both logs are equal
// the title can move: a former primary offers it, which makes a planned
// switch-over, and a node that is to be promoted asks for it.
//
// Between two blank nodes it is the beginning of the volume that is asked for:
// one node begins it, in the session in which the other said that it may. What
// makes that safe without a record: each node has one session at a time, and
// what it answers and does in it has an order. A node that said yes begins
// nothing itself without the other's yes, and gets none in this session where
// the first yes is taken, nor in a later one: the other is then blank no more.
// Where both ask, the lower node id has it.
func (p *Pair) idle(s *session, mine Side, v Verdict) error {
	p.setPhase(PhaseConnected, string(v.Rule)+": "+v.Why)
	theirs := s.peer
	level := v.Rule == RuleNoPrimary && mine.End == v.From && theirs.End == v.From && len(mine.History) > 0 && len(theirs.History) > 0 &&
		!mine.Inconsistent && !theirs.Inconsistent && !mine.Damaged && !theirs.Damaged
	equal := level && same(mine.History.Last(), theirs.History.Last())
	blank := v.Rule == RuleBothBlank
	asked := false // and not answered yet
	began := mine.History.Last().Epoch.Node
	switch {
	case mine.Title && theirs.Title && mine.End <= v.From && (theirs.End > v.From || later(theirs, mine)),
		mine.Title && theirs.Title && v.Rule == RuleNoPrimary && droppable(mine, v.From) && !expendable(theirs, v.From):
		// It was taken by force, here or there. Of two that hold the same log
		// the later epoch keeps it, else the one that holds more; of two whose
		// logs forked the one that holds what was acknowledged, where the other's
		// tail was not, else an operator has to choose.
		if err := p.setTitle(false); err != nil {
			return err
		}
	case mine.Title && !theirs.Title && v.Rule == RuleNoPrimary && replaces(theirs, mine):
		// This node cannot be promoted without loss, and the other one can, once it
		// has the title: by the next handshake, where nobody has it.
		if err := p.setTitle(false); err != nil {
			return err
		}
		return errAgain
	case equal && mine.Title && !theirs.Title && began == mine.Node:
		if err := p.setTitle(false); err != nil {
			return err
		}
		s.sendJSON(msgJoin, join{History: mine.History, Alone: p.node.State().Alone, Title: titleTake})
	case equal && !mine.Title && !theirs.Title && began != mine.Node && (began == theirs.Node || mine.Node < theirs.Node),
		level && !equal && !mine.Title && !theirs.Title && later(mine, theirs),
		v.Rule == RuleNoPrimary && !mine.Title && !theirs.Title && replaces(mine, theirs):
		// It was lost on its way. Both say so in one handshake: nobody has it.
		if err := p.setTitle(true); err != nil {
			return err
		}
	}
	for {
		if equal && p.wantTitle.Swap(false) && !p.node.State().Title || blank && !asked && p.claim.Load() != nil {
			asked = true
			s.sendJSON(msgJoin, join{History: mine.History, Alone: p.node.State().Alone, Title: titleRelease})
			if err := s.flush(); err != nil {
				return err
			}
		}
		m, body, err := s.readAny()
		if err != nil {
			return err
		}
		switch m.typ {
		case msgHeartbeat, msgAck:
		case msgJoined:
			yes := asked && m.a == 1 // a 0 may answer an offer that was sent before
			switch {
			case blank:
				asked = false
				c := p.claim.Load()
				if !yes || c == nil || !p.claim.CompareAndSwap(c, nil) {
					continue // nobody wants it any more
				}
				err := c.f()
				c.done <- err
				if err != nil {
					return err
				}
				return errAgain
			case yes:
				if err := p.setTitle(true); err != nil {
					return err
				}
			}
		case msgBye:
			return &ErrClosedByPeer{printable(body)}
		case msgJoin:
			var j join
			if err := unmarshal(msgJoin, body, &j); err != nil {
				return err
			}
			if blank && j.Title == titleRelease {
				mayBegin := !asked || theirs.Node < mine.Node
				if mayBegin {
					asked = false // the answer to it means nothing any more
				}
				if err := s.answerJoin(mayBegin); err != nil {
					return err
				}
				continue
			}
			if err := p.moveTitle(s, j.Title, equal); err != nil {
				return err
			}
		default:
			return &WireError{fmt.Sprintf("message type %d on an idle session", m.typ)}
		}
	}
}

// later reports whether a's last epoch is the later one; node ids settle a tie.
func later(a, b Side) bool {
	x, y := a.History.Last().Epoch.Counter, b.History.Last().Epoch.Counter
	return x > y || x == y && a.Node < b.Node
}

// moveTitle does what the peer of an idle session asks of the title. A 1 in
// the answer says that it was given up here.
func (p *Pair) moveTitle(s *session, t title, equal bool) error {
	given := false
	switch {
	case !equal:
		return &WireError{"the title cannot move: the logs are not equal"}
	case t == titleTake:
		if err := p.setTitle(true); err != nil {
			return err
		}
	case t == titleRelease && p.node.State().Title:
		if err := p.setTitle(false); err != nil {
			return err
		}
		given = true
	}
	return s.answerJoin(given)
}

// answerJoin answers a msgJoin on an idle session.
func (s *session) answerJoin(given bool) error {
	var a uint64
	if given {
		a = 1
	}
	s.send(message{typ: msgJoined, a: a}, nil)
	return s.flush()
}

// setTitle takes the title, where both nodes hold all of the log, or gives it up.
func (p *Pair) setTitle(on bool) error {
	err := p.node.Update(func(st *State) error {
		if st.Title = on; on {
			st.Acked = max(st.Acked, p.node.Log().End())
		}
		return nil
	})
	if err != nil {
		return err
	}
	p.log.Info("title", zap.Bool("here", on))
	return nil
}

// readAny waits for one message.
func (s *session) readAny() (m message, body []byte, err error) {
	if s.ctx.Err() != nil { // also where there is always something to read
		return m, nil, context.Cause(s.ctx)
	}
	if err := s.fill(headerSize); err != nil {
		return m, nil, err
	}
	if err := m.decode(s.stage[s.r:s.w]); err != nil {
		return m, nil, err
	}
	s.r += headerSize
	body = make([]byte, m.length)
	if err := s.readFull(body); err != nil {
		return m, nil, err
	}
	return m, body, s.checkBody(&m, body)
}
