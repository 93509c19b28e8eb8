package replicate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// joinWithin is how far behind a follower may be, in bytes, for the primary to
// stop and let it join.
const joinWithin = 256 << 10

// lead ships the log to a follower: blocks first where the journal does not
// reach, then the log, then it joins. It returns when the session ends.
func (p *Pair) lead(s *session, mine Side, v Verdict) error {
	if _, ok := p.untilAlone(); ok && (v.Full || p.looking.Load()) {
		// What the peer lacks may take long, and until it has it this peer
		// protects nothing.
		if err := p.goWithout("the peer has to catch up"); err != nil {
			return err
		}
	}
	c := &copier{done: true}
	f, err := p.pinFrom(s, v, c)
	if err != nil {
		return err
	}
	defer p.unpin()
	s.sendJSON(msgFollow, f)
	m, body, err := s.readMessage(msgFollowed)
	if err != nil {
		return err
	}
	if err := c.resume(p, &f, body); err != nil {
		return err
	}
	ckpt, size := journal.LSN(m.b), p.node.Log().Size()
	if journal.LSN(m.a) != f.From || ckpt > f.From || f.From-ckpt > size {
		return &WireError{fmt.Sprintf("follows from LSN %d with its checkpoint at %d, told %d", m.a, m.b, f.From)}
	}
	s.sent, s.acked, s.peerCkpt, s.sendEnd = f.From, f.From, ckpt, ckpt+size
	if mine.Title || f.Full {
		s.peer.Title = false // it has given it up, durably: see follow
	}
	s.copied = c.done
	s.lanes.open(laneSends, s.many)
	p.setPhase(PhaseCatchUp, "")
	if !c.done {
		p.copied.Store(0)
		p.setPhase(PhaseResync, v.Why)
	}
	var lap, behind journal.LSN // the log's end when this lap began, and how far the follower was behind it
	for {
		if err := p.shipSome(s, c); err != nil {
			return err
		}
		if !s.copied || s.acked < lap {
			continue
		}
		end := p.node.Log().End()
		now := end - s.acked
		if now <= joinWithin || lap > 0 && now > behind*3/4 {
			break // near, or no longer getting nearer: commits pause for the rest, a ring at most
		}
		lap, behind = end, now
	}
	if err := p.join(s); err != nil {
		return err
	}
	if p.cfg.Async {
		return p.shipAsync(s, c)
	}
	return p.keep(s)
}

// pinFrom keeps the log from where the follower needs it, and says what it is
// to follow. It takes the role, so that nothing is overwritten meanwhile.
func (p *Pair) pinFrom(s *session, v Verdict, c *copier) (follow, error) {
	if err := p.node.Committer().Acquire(s.ctx); err != nil {
		return follow{}, err
	}
	defer p.node.Committer().Release()
	log := p.node.Log()
	st := p.node.State()
	f := follow{Lineage: st.Lineage, History: st.History, From: v.From, Base: log.Ring().Base, Alone: p.cfg.Alone, LeaseNS: int64(p.lease)}
	chain, ok := p.chainAt(f.From)
	if v.Full || !ok {
		// The copy holds the data as applied, and the log goes on from there.
		f.Full = true
		f.From = p.node.Applied()
		if chain, ok = p.chainAt(f.From); !ok {
			return f, &OwnCopyError{f.From, errors.New("no segment where the data ends")}
		}
		f.Copy = p.copyID
		c.start(p.node.Geometry().Size)
	}
	f.Chain = chain
	s.past, s.pastEnd = st.History, log.End()
	p.pin.Store(uint64(f.From))
	return f, nil
}

// chainAt is the checksum of the segment before lsn: the next one carries it.
func (p *Pair) chainAt(lsn journal.LSN) (chain uint32, ok bool) {
	var err error // a page that cannot be read holds no segment
	defer pmem.Recover(p.node.Memory(), pmem.Arm(), &err)
	log := p.node.Log()
	if lsn == log.End() {
		return log.Chain(), true
	}
	if lsn > log.End() || log.End()-lsn > log.Size() || lsn < p.unsound {
		return 0, false
	}
	var h journal.Header
	if log.Ring().Header(lsn, &h) != nil {
		return 0, false
	}
	if e, ok := p.node.State().History.At(lsn); !ok || e.Epoch != h.Epoch {
		return 0, false
	}
	return h.Prev, true
}

// shipSome sends and takes in what there is, waiting a little where there is
// nothing.
func (p *Pair) shipSome(s *session, c *copier) error {
	end := p.node.Log().End()
	if !c.done {
		// Blocks must not be older than log that was sent before them.
		end = p.node.Applied()
	}
	moved, err := s.pump(end)
	if err != nil {
		return err
	}
	if len(s.ctl) == 0 && !c.done && (len(s.pending) == 0 || s.sent != c.sent || s.sent >= end) {
		// Also where log waits to be sent: else writers that are faster than
		// the wire would keep the copy from ever going on. But that log has had
		// its turn since the last blocks: a wire that takes less than two
		// messages at once would never get to it.
		c.sent = s.sent
		if err := c.next(p, s); err != nil {
			return err
		}
		moved = true
	}
	taken, err := p.takeAnswers(s)
	if err != nil {
		return err
	}
	p.pin.Store(uint64(s.acked))
	now := p.now()
	if s.beatDue(now) || s.ctx.Err() != nil || !moved && !taken {
		if err := s.housekeep(now); err != nil {
			return err
		}
	}
	if moved || taken {
		return nil
	}
	return s.conn.Wait(len(s.pending) > 0, s.rest(now))
}

// takeAnswers takes in what the follower sent, no more of it once too much waits
// to be sent in answer.
func (p *Pair) takeAnswers(s *session) (taken bool, err error) {
	var m message
	for looks := 0; looks < 64 && len(s.ctl) <= maxQueued; looks++ { // a peer can talk without end
		n, err := s.receive()
		if err != nil {
			return taken, err
		}
		full := n > 0 && s.w == len(s.stage) // there may be more
		for {
			body, ok, err := s.tryMessage(&m)
			if err != nil {
				return taken, err
			}
			if !ok {
				break
			}
			taken = true
			if err := p.answer(s, &m, body); err != nil {
				return taken, err
			}
		}
		if !full {
			break
		}
	}
	return taken, nil
}

func (p *Pair) answer(s *session, m *message, body []byte) error {
	switch m.typ {
	case msgAck:
		return p.takeAck(s, m)
	case msgResend:
		p.warnOfFrame("the peer asks for a frame again: its checksum did not match there", m.a)
		if m.c != 0 {
			return s.lanes.resend(journal.LSN(m.a), journal.LSN(m.b))
		}
		return s.rewind(journal.LSN(m.a))
	case msgFollowed:
		s.copied = true
	case msgHeartbeat:
	case msgBlockRequest:
		p.sendBlock(s, m.a)
	case msgBlocks, msgBlockMissing:
		return p.takeRepair(m, body)
	case msgBye:
		return &ErrClosedByPeer{printable(body)}
	default:
		return &WireError{fmt.Sprintf("message type %d from a follower", m.typ)}
	}
	return nil
}

// takeAck takes an acknowledgement. An echoed heartbeat renews the read lease,
// counted from when it was sent.
func (p *Pair) takeAck(s *session, m *message) error {
	acked, ckpt := journal.LSN(m.a), journal.LSN(m.b)
	sent := max(s.sent, s.segEnd)
	if acked > sent || ckpt > acked {
		return &WireError{fmt.Sprintf("acknowledges LSN %d, checkpoint %d, with %d sent and %d acknowledged", acked, ckpt, sent, s.acked)}
	}
	if acked > s.acked && (acked != s.sent || s.segEnd != 0) && s.within(acked) {
		return &WireError{fmt.Sprintf("acknowledges LSN %d, inside a segment", acked)}
	}
	s.acked = max(s.acked, acked)
	if ckpt > s.peerCkpt {
		s.peerCkpt = ckpt
		s.sendEnd = ckpt + p.node.Log().Size()
	}
	if m.c != 0 && time.Duration(m.c) <= p.now() {
		p.renewLease(time.Duration(m.c))
	}
	return nil
}

// join makes the follower one that is required (or, in async mode, one that
// follows for good). It takes the role: commits pause until the follower has
// the whole log, the epoch and the title are durable where they belong.
func (p *Pair) join(s *session) error {
	if err := p.node.Committer().Acquire(s.ctx); err != nil {
		return err
	}
	defer p.node.Committer().Release()
	if p.node.State().Role != Primary { // demoted while the follower caught up
		return errAgain
	}
	end := p.node.Log().End()
	for s.acked < end || len(s.pending)+len(s.ctl) > 0 {
		if err := p.shipSome(s, &copier{done: true}); err != nil {
			return err
		}
	}

	st := p.node.State()
	if p.cfg.Async && s.peer.Title && st.History.Last().PeerIn {
		// Before an entry that does not require the peer is recorded here, it
		// must be sure that the peer is not promoted beside it.
		s.sendJSON(msgJoin, join{History: st.History, Alone: st.Alone, Title: titleRelease})
		if _, _, err := s.readMessage(msgJoined); err != nil {
			return err
		}
		if err := p.setTitle(true); err != nil {
			return err
		}
		s.peer.Title = false
		st = p.node.State()
	}
	keepTitle := p.cfg.Alone || p.cfg.Async
	j := join{Alone: p.cfg.Alone}
	held := st.Title
	switch {
	case keepTitle && s.peer.Title:
		j.Title = titleRelease
	case !keepTitle && !s.peer.Title:
		j.Title = titleTake
	}
	want := journal.Entry{PeerIn: true, Async: p.cfg.Async}
	last := st.History.Last()
	mint := p.fresh || last.PeerIn != want.PeerIn || last.Async != want.Async
	err := p.node.Update(func(st *State) error {
		if mint {
			want.Epoch = p.nextEpoch(st)
			want.Start = end
			st.History = st.History.Append(want)
		}
		st.Alone = p.cfg.Alone
		st.Lease = p.lease
		st.Peer = s.peer.Node
		st.Acked = end
		if !keepTitle {
			st.Title = false // given up here before the peer takes it
		}
		return nil
	})
	if err != nil {
		return err
	}
	st = p.node.State()
	p.node.Log().SetEpoch(st.History.Last().Epoch)
	p.fresh = false
	p.looking.Store(false)
	// From here on nothing may be acknowledged without the peer. Where this
	// node held the title, the peer cannot be promoted before it has answered
	// this, and then waits the lease out: so the lease may begin before the
	// answer.
	if held {
		p.renewLease(p.now())
	}
	p.change(func(m *mode) { m.required = !p.cfg.Async })

	j.History = st.History
	asked := p.now()
	s.sendJSON(msgJoin, j)
	if _, _, err := s.readMessage(msgJoined); err != nil {
		return err
	}
	if keepTitle && !st.Title {
		if err := p.node.Update(func(st *State) error { st.Title = true; return nil }); err != nil {
			return err
		}
	}
	s.peer.Title = !keepTitle
	p.renewLease(asked)
	p.peerAcked.Store(uint64(s.acked))
	if err := p.serve(); err != nil {
		return err
	}
	if !p.cfg.Async {
		p.insync.Store(s)
	}
	s.joined = true
	p.setPhase(PhaseInSync, "")
	p.log.Info("in sync", zap.Uint64("lsn", uint64(end)), zap.Stringer("epoch", st.History.Last().Epoch))
	return nil
}

// keep is the session goroutine of a primary in sync: the committers drive
// the connection, it only sees to it that somebody does. It looks as often as a
// heartbeat is due; the answer to one is taken with the next, or by who needs the
// lease that it renews. Each look costs an idle processor some wake-ups.
func (p *Pair) keep(s *session) error {
	t := time.NewTicker(p.heartbeat)
	defer t.Stop()
	err := func() error {
		for {
			select {
			case <-s.failed:
				return *s.failure.Load()
			case <-s.ctx.Done():
				return context.Cause(s.ctx)
			case <-t.C:
			case <-p.kick:
			}
			if err := p.node.Failed(); err != nil {
				return err // no driver goes on: nobody would see to the connection
			}
			s.due.Store(true)
			p.node.Committer().Tick()
			t.Reset(p.nextLook(s)) // from now: after a late look the next is not too early for a heartbeat
		}
	}()
	// Take the connection back: no committer may touch it after this.
	p.node.Committer().Acquire(context.Background())
	p.insync.Store(nil)
	p.node.Committer().Release()
	return err
}

// nextLook is when keep looks again: soon where a block that was asked for has not
// come yet, since nobody else takes it in, or where the peer has just asked for one. It
// asks for some at a time, and for more once those are there.
func (p *Pair) nextLook(s *session) time.Duration {
	soon := p.repairing()
	if s.helping.Load() > 0 {
		s.helping.Add(-1)
		soon = true
	}
	if soon {
		return p.heartbeat / soonLooks
	}
	return p.heartbeat
}

// soonLooks is how many such looks there are in the time of a heartbeat.
const soonLooks = 20

// shipAsync is the session goroutine of a primary in async mode.
func (p *Pair) shipAsync(s *session, c *copier) error {
	p.follower.Store(s)
	defer p.follower.Store(nil)
	for {
		select {
		case <-p.kick:
			p.sendRepairRequests(s)
		default:
		}
		if err := p.node.Failed(); err != nil {
			return err
		}
		if err := p.shipSome(s, c); err != nil {
			return err
		}
		p.peerAcked.Store(uint64(s.acked))
	}
}

// progress is the committers' way through a session that is in sync: it sends
// what is new and takes acknowledgements. The caller has the role.
func (p *Pair) progress(s *session) {
	_, err := s.pump(p.node.Log().End())
	if err == nil {
		_, err = p.takeAnswers(s)
	}
	p.peerAcked.Store(uint64(s.acked))
	p.pin.Store(uint64(s.acked))
	if err == nil && s.due.Load() {
		p.sendRepairRequests(s)
		err = s.housekeep(p.now())
	}
	if err != nil {
		p.insync.Store(nil)
		s.fail(err)
	}
}

// handOver ships log that a restarted primary lacks. It ends the session.
func (p *Pair) handOver(s *session, v Verdict) error {
	if _, ok := p.chainAt(v.From); !ok {
		return fmt.Errorf("the journal no longer reaches back to LSN %d", v.From)
	}
	s.sent, s.acked, s.peerCkpt = v.From, v.From, s.peer.Applied
	s.sendEnd = p.node.Log().End()
	s.past, s.pastEnd = p.node.State().History, s.sendEnd
	for s.acked < p.node.Log().End() {
		if err := p.shipSome(s, &copier{done: true}); err != nil {
			return err
		}
	}
	s.bye("log handed over")
	return errAgain
}
