package nvmmirror

import (
	"encoding/binary"
	"slices"

	"github.com/nvmmirror/nvmmirror/replicate"
)

// A node that was left behind: an operator forced the other one to go on without it, or
// another region took the place of its own, an older copy or a new one.
//
// What must hold of such a node is what must hold of all: if it serves it holds everything
// that was acknowledged or read; one node at most serves reads; in the end the pair is in
// sync. What was acknowledged with a node stays in its log, from the new region on: what it
// held before, the other one holds. One thing is left out: its title is not counted before
// it has heard its peer, and that of a damaged node not before it has caught up.
//
// It has heard its peer once they have a session, or with no more than a hello on a
// connection that it dialled: a title that the peer has gone beyond is given up then. Of
// two titles over one log the verdict decides; before that it has heard nothing.
//
// Where it goes on by itself before, as a primary may that need not wait for its peer, no
// software can tell: two logs are acknowledged. This, and nothing else, makes a schedule
// void: it ends there. What had happened until then was checked.
//
// What an operator may do:
//   - copy the region of a node that is down, and was not left behind;
//   - put the copy, or a new region, in the place of a node that is down, if the other one
//     was not left behind, and holds all that was acknowledged, read, or is in the log that
//     goes;
//   - put copies in the place of both, where one's log continues the other's: what was
//     promised after they were made is gone, and the older one is left behind;
//   - promote a node that was left behind, or let it continue alone, once it has heard its
//     peer; demote it where it is refused. He forces nothing on either node before it has
//     caught up;
//   - where the title went with a region, promote by force the node that holds everything,
//     with both nodes up.

// simImage is a copy of a node's region.
type simImage struct {
	region   []byte
	tip      *simSegment
	promised *simSegment // then
}

// drawRegions draws from a stream of its own: the rest of a seed's plan does not depend
// on it.
func (w *simPair) drawRegions() {
	p, rng := &w.plan, simRand(w.seed, 4)
	images, blanks := rng.IntN(2) == 0, rng.IntN(4) == 0
	if p.large || p.flips { // the other node may not hold everything, or not readably
		return
	}
	p.images, p.blanks = images, blanks
	p.crashes = p.crashes || images || blanks
}

// regions is what can happen to the region of a node that is down.
func (w *simPair) regions(add adder, n *simNode) {
	p := &w.plan
	weight := 15
	if n.entitled() {
		weight = 40
	}
	add(p.images && n.image == nil && n.mayCopy(), weight, n.copyRegion)
	add(p.images && n.image != nil && n.mayReplace(), 12, n.putBack)
	add(p.blanks && n.mayReplace(), 8, n.renew)
}

// afterHello lets the link go when a node that was left behind has heard its peer's hello,
// and no verdict yet.
func (w *simPair) afterHello(add adder, n *simNode) {
	add(n.stale && n.v.pair.Phase() == replicate.PhaseLost && n.greeted(), 200, func() {
		w.event("%s: the link goes after the hello", n.name)
		w.net.cut = [2]bool{true, true}
		w.net.mu.Lock()
		defer w.net.mu.Unlock()
		for _, q := range w.net.pipes {
			w.net.lose(q)
		}
	})
}

// mayCopy reports whether the region is whole, and not left behind itself.
func (n *simNode) mayCopy() bool {
	st, ok := n.state()
	return ok && !st.Blank() && st.Resync == nil && !n.closing && !n.stale && !n.hurt && len(n.flipped) == 0
}

func (n *simNode) copyRegion() {
	n.w.event("%s: its region is copied", n.name)
	var p []byte
	if k := len(spareImages) - 1; k >= 0 {
		p, spareImages = spareImages[k], spareImages[:k]
	}
	n.image = &simImage{append(p[:0], n.mem.Bytes()...), n.tip, n.w.promised}
}

// spareImages are of schedules that are over: fresh pages cost more than the copy.
var spareImages [][]byte

// mayReplace reports whether nothing is lost with the region: the other node holds it.
func (n *simNode) mayReplace() bool {
	other := n.w.nodes[1-n.i]
	st, ok := other.state()
	if _, mine := n.state(); !ok || !mine || st.Blank() || st.Resync != nil {
		return false
	}
	for _, x := range n.w.nodes {
		if x.closing || x.command {
			return false
		}
	}
	return n.busy == 0 && !other.stale && !other.hurt && len(other.flipped) == 0 &&
		other.tip.holds(n.w.promised) && other.tip.holds(n.owes) && other.tip.holds(n.tip)
}

// putBack puts the older copy in the region's place.
func (n *simNode) putBack() {
	n.w.event("%s: an older copy of its region is put back", n.name)
	n.before = append(n.before, n.tip)
	n.load()
	n.leaveBehind()
	n.survey()
}

func (n *simNode) load() {
	n.w.stats.images++
	n.mem.Load(n.image.region)
	n.flipped, n.once, n.trusted = map[int64]bool{}, map[int64]int{}, map[int64]bool{}
	n.tip, n.owes, n.hurt, n.lost = n.image.tip, nil, false, false
	n.stale, n.heard, n.renewed = false, false, false
}

// mayPutBackBoth reports whether there is a copy of both regions, of one log.
func (w *simPair) mayPutBackBoth() bool {
	for _, n := range w.nodes {
		if n.up() || n.closing || n.command || n.busy > 0 || n.image == nil {
			return false
		}
	}
	a, b := w.nodes[0].image.tip, w.nodes[1].image.tip
	return a.holds(b) || b.holds(a)
}

// putBackBoth puts older copies in the place of both regions. What stays promised is what
// was when one of them was made, as far as it is in the longer log.
func (w *simPair) putBackBoth() {
	w.event("older copies of both regions are put back")
	newer, older := w.nodes[0], w.nodes[1]
	if a, b := newer.image.tip, older.image.tip; b.holds(a) && (a != b || w.rng.IntN(2) == 0) {
		newer, older = older, newer
	}
	w.promised = w.model.places[simPlace{}]
	for _, n := range w.nodes {
		if p := n.image.promised; newer.image.tip.holds(p) {
			w.promised = deeper(w.promised, p)
		}
		n.load()
		n.before = nil
	}
	older.leaveBehind()
	for _, n := range w.nodes {
		n.survey()
	}
}

// renew puts a new region in the place of a lost one, which may be found again.
func (n *simNode) renew() {
	if n.w.plan.images && n.image == nil && n.mayCopy() {
		n.copyRegion()
	}
	n.w.event("%s: a new region, the old one is lost", n.name)
	n.w.stats.blanks++
	n.before = append(n.before, n.tip)
	n.create()
	n.renewed = true
}

// catchUp notes how far a node has come that was left behind, or whose region is
// another one than it was.
func (n *simNode) catchUp() {
	if !n.up() || n.v == nil || !n.stale && !n.renewed && len(n.before) == 0 {
		return
	}
	if st, _ := n.state(); st.Resync == nil {
		n.before = slices.DeleteFunc(n.before, n.tip.holds)
	}
	if n.v.pair.Phase() == replicate.PhaseInSync {
		n.renewed = false
	}
	n.hear()
	if n.stale && n.heard && !n.contested() && n.tip.holds(n.w.promised) && n.tip == n.w.nodes[1-n.i].tip {
		n.w.event("%s: it has caught up", n.name)
		n.stale = false
	}
}

// contested reports whether a node that was left behind holds a title, and lacks nothing
// by which it could tell that the other one's is the later.
func (n *simNode) contested() bool {
	other := n.w.nodes[1-n.i]
	return n.stale && n.tip.holds(n.w.promised) && n.entitled() && (other.command || other.entitled())
}

// leaveBehind: the other one goes on without it.
func (n *simNode) leaveBehind() {
	n.stale, n.heard = true, false
	n.silence()
}

// silence: what it has heard so far said nothing of that.
func (n *simNode) silence() {
	n.w.net.mu.Lock()
	defer n.w.net.mu.Unlock()
	n.since = n.w.net.next
}

// hear notes whether a node that was left behind has heard of it.
func (n *simNode) hear() {
	if !n.stale || n.heard || !n.up() || n.v == nil {
		return
	}
	switch phase := n.v.pair.Phase(); {
	case n.contested():
		n.silence()
	case phase == replicate.PhaseInSync, phase == replicate.PhaseConnected, phase == replicate.PhaseCatchUp, phase == replicate.PhaseResync, n.greeted():
		n.heard = true
		n.w.event("%s: it has heard its peer", n.name)
	}
}

// goesOnUnheard makes a schedule void, before anything is checked, in which a node that was
// left behind goes on by itself, and could not know it.
func (n *simNode) goesOnUnheard() {
	n.hear()
	if w := n.w; n.unheard() && n.v != nil && n.v.pair.Serving() && !n.v.pair.Required() && !w.voided {
		switch n.v.pair.Phase() {
		case replicate.PhaseConnected, replicate.PhaseCatchUp, replicate.PhaseResync, replicate.PhaseInSync:
			return // with its peer, over one log
		}
		w.voided = true
		w.stats.voided++
		w.event("%s: it goes on by itself, and has not heard its peer: void", n.name)
	}
}

// greeted reports whether it has read its peer's hello on a connection that it dialled:
// from then on its title is none that the peer has gone beyond, whether a verdict comes or
// not. Where a write may keep its goroutine, that may still be on its way.
func (n *simNode) greeted() bool {
	n.w.net.mu.Lock()
	defer n.w.net.mu.Unlock()
	return !n.w.plan.naps && slices.ContainsFunc(n.w.net.pipes, func(q *simPipe) bool {
		return q.dst.life == n.life && q.id >= n.since && q.answer && q.helloTaken()
	})
}

// As package replicate encodes the header of a message: its type, the length of its body.
const (
	simHeader    = 64
	simHeaderLen = 48
	simHello     = 1
)

// took notes what has been read from a pipe.
func (q *simPipe) took(p []byte) {
	q.taken += len(p)
	q.head = append(q.head, p[:min(len(p), simHeader-len(q.head))]...)
}

// helloTaken reports whether the first message was a hello, and was read.
func (q *simPipe) helloTaken() bool {
	le := binary.LittleEndian
	return len(q.head) == simHeader && le.Uint16(q.head[6:]) == simHello && q.taken >= simHeader+int(le.Uint32(q.head[simHeaderLen:]))
}

// unheard: an operator does not let it go on yet.
func (n *simNode) unheard() bool { return n.stale && !n.heard }

// had reports whether its log held s in a region that is gone, and has not since: that one's
// acknowledgement may still be under way.
func (n *simNode) had(s *simSegment) bool {
	return slices.ContainsFunc(n.before, func(b *simSegment) bool { return b.holds(s) })
}

// inherits reports whether the title is gone with the other node's region, and the node
// holds everything.
func (n *simNode) inherits() bool {
	other := n.w.nodes[1-n.i]
	mine, _ := n.state()
	theirs, _ := other.state()
	return !mine.Title && !theirs.Title && !mine.Blank() && mine.Resync == nil && !n.stale && n.tip.holds(n.w.promised) &&
		!other.command && (other.stale || other.renewed)
}
