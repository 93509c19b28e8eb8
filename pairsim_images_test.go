package nvmmirror

import (
	"bytes"
	"encoding/binary"
	"slices"

	"github.com/nvmmirror/nvmmirror/replicate"
)

// Another region in the place of a node's own: an older copy of it, or a new one.
//
// What must hold of such a node is what must hold of all: if it serves it holds everything
// that was acknowledged or read; one node at most serves reads; in the end the pair is in
// sync. What was acknowledged with a node stays in its log, from the new region on: what it
// held before, the other one holds. One thing is left out: the title in an older copy is not
// counted before that has caught up, since the title may have moved on. What the copy must
// not do is act on it.
//
// What an operator may do, while a node is down:
//   - copy its region, other than one that would go on by itself once it is put back: that
//     of a primary which need not wait for its peer;
//   - put the copy, or a new region, in the node's place, if the other node holds all that
//     was acknowledged, read, or is in the log that goes;
//   - promote the copy, or let it continue alone, once it has heard its peer, be it no more
//     than a hello: a title that the peer has gone beyond is given up then. Of two titles
//     over one log the verdict decides; he waits for that. He forces nothing on either
//     node before the copy has caught up;
//   - where the title went with a region, promote by force the node that holds everything,
//     with both nodes up.

// simImage is a copy of a node's region.
type simImage struct {
	region []byte
	tip    *simSegment
}

// drawRegions draws from a stream of its own: the rest of a seed's plan does not depend
// on it.
func (w *simPair) drawRegions() {
	p, rng := &w.plan, simRand(w.seed, 4)
	images, blanks := rng.IntN(2) == 0, rng.IntN(6) == 0
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
	add(p.images && n.image != nil && n.mayReplace(), 25, n.putBack)
	add(p.blanks && n.mayReplace(), 6, n.renew)
}

// afterHello lets the link go when an older copy has heard its peer's hello, and no
// verdict yet.
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

// mayCopy reports whether the region, put back later, would wait for its peer or an
// operator.
func (n *simNode) mayCopy() bool {
	st, ok := n.state()
	if !ok || st.Blank() || st.Resync != nil || n.closing || n.gone || n.void || n.stale || n.hurt || len(n.flipped) > 0 {
		return false
	}
	last := st.History.Last()
	return st.Role != replicate.Primary || !st.Title && last.BothIn() && !last.Async
}

func (n *simNode) copyRegion() {
	n.w.event("%s: its region is copied", n.name)
	n.image = &simImage{bytes.Clone(n.mem.Bytes()), n.tip}
}

// mayReplace reports whether nothing is lost with the region: the other node holds it.
func (n *simNode) mayReplace() bool {
	other := n.w.nodes[1-n.i]
	st, ok := other.state()
	if _, mine := n.state(); !ok || !mine || st.Blank() || st.Resync != nil {
		return false
	}
	for _, x := range n.w.nodes {
		if x.closing || x.command || x.gone || x.void || x.stale {
			return false
		}
	}
	return n.busy == 0 && !other.hurt && len(other.flipped) == 0 &&
		other.tip.holds(n.w.promised) && other.tip.holds(n.owes) && other.tip.holds(n.tip)
}

// putBack puts the older copy in the region's place.
func (n *simNode) putBack() {
	n.w.event("%s: an older copy of its region is put back", n.name)
	n.w.stats.images++
	n.before = append(n.before, n.tip)
	n.mem.Load(n.image.region)
	n.flipped, n.once, n.trusted = map[int64]bool{}, map[int64]int{}, map[int64]bool{}
	n.tip, n.owes, n.hurt, n.lost = n.image.tip, nil, false, false
	n.stale, n.heard, n.renewed = true, false, false
	n.survey()
}

// renew puts a new region in the place of a lost one.
func (n *simNode) renew() {
	n.w.event("%s: a new region, the old one is lost", n.name)
	n.w.stats.blanks++
	n.before = append(n.before, n.tip)
	n.create()
	n.renewed = true
}

// catchUp notes how far a node has come whose region is another one than it was.
func (n *simNode) catchUp() {
	if !n.up() || n.v == nil || !n.stale && !n.renewed && len(n.before) == 0 {
		return
	}
	if st, _ := n.state(); st.Resync == nil {
		n.before = slices.DeleteFunc(n.before, n.tip.holds)
	}
	other := n.w.nodes[1-n.i]
	whole := n.tip.holds(n.w.promised)
	contested := n.stale && whole && n.entitled() && other.entitled() // the verdict decides
	switch phase := n.v.pair.Phase(); {
	case contested:
	case phase == replicate.PhaseInSync:
		n.heard, n.renewed = true, false
	case phase == replicate.PhaseConnected, phase == replicate.PhaseCatchUp, phase == replicate.PhaseResync, n.greeted():
		n.heard = true
	}
	if n.stale && n.heard && !contested && whole && n.tip == other.tip {
		n.w.event("%s: the older copy has caught up", n.name)
		n.stale = false
	}
}

// greeted reports whether it has read its peer's hello on a connection that it dialled:
// from then on its title is none that the peer has gone beyond, whether a verdict comes or
// not. Where a write may keep its goroutine, that may still be on its way.
func (n *simNode) greeted() bool {
	n.w.net.mu.Lock()
	defer n.w.net.mu.Unlock()
	return !n.w.plan.naps && slices.ContainsFunc(n.w.net.pipes, func(q *simPipe) bool {
		return q.dst.life == n.life && q.answer && q.helloTaken()
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
