package nvmmirror

import (
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// Bits that flip at rest, in the memory of a node that runs or is down. Blocks,
// block table and journal are hurt on one node only, since what is lost on both
// nobody can repair; metadata has a second copy.

func (w *simPair) flip(n *simNode) {
	c, err := readMetadata(n.mem)
	if err != nil || c.meta.State.Resync != nil {
		return
	}
	other := w.nodes[1-n.i]
	kind := w.rng.IntN(8)
	switch {
	case kind == 0:
		w.flipMetadata(n, c)
	case other.hurt || len(other.flipped) > 0:
	case kind < 4:
		w.flipLog(n, c.meta)
	case n.up() && n.v != nil: // what a crash undoes and what not is known at the crash
		w.flipBlock(n)
	}
}

// at flips a bit of n bytes at off.
func (w *simPair) at(n *simNode, what string, off, size int64) {
	w.stats.flips++
	off += w.rng.Int64N(size)
	w.event("%s: a bit of %s flips, at %d", n.name, what, off)
	n.mem.Bytes()[off] ^= 1 << w.rng.IntN(8)
}

func (w *simPair) flipBlock(n *simNode) {
	b := int64(w.rng.IntN(pairSimSize / blockSize))
	n.flipped[b] = true
	n.once[b]++
	if w.rng.IntN(4) == 0 {
		w.at(n, "a block's entry", n.v.table.area.Off+b*tableEntry, tableEntry)
		return
	}
	w.at(n, "a block", n.v.data.Off+b*blockSize, blockSize)
}

// flipMetadata hurts one copy, where the other is as good.
func (w *simPair) flipMetadata(n *simNode, c copies) {
	if c.repair {
		return
	}
	size := int64(len(c.meta.encode(make([]byte, metaMax))))
	w.at(n, "a metadata copy", w.rng.Int64N(2)*metaArea, size)
}

// flipLog hurts a segment that this node answers for, and that something else
// proves to have been there: where nothing does, one node alone cannot tell a flip
// from a torn tail, which is a stated limit.
func (w *simPair) flipLog(n *simNode, m *metadata) {
	n.observe()
	at := n.owes
	if !n.tip.holds(at) {
		return
	}
	ring, self := n.ring(m), m.State.Node
	proof := m.State.Acked
	var live []journal.Header
	for ; at != nil && at.parent != nil && at.parent.lsn >= m.Checkpoint.LSN; at = at.parent {
		var h journal.Header
		if _, err := ring.Segment(at.parent.lsn, &h); err != nil {
			continue // hurt already
		}
		if e, ok := m.State.History.At(h.LSN); ok && e.Binds(self) {
			proof = max(proof, h.Acked)
		}
		live = append(live, h)
	}
	for len(live) > 0 && live[0].LSN >= proof {
		live = live[1:]
	}
	if len(live) == 0 {
		return
	}
	h := live[w.rng.IntN(len(live))]
	n.hurt = true
	w.at(n, "the log", m.Journal.Off+int64(ring.Position(h.LSN)), int64(h.WireLength()))
	if !n.up() {
		n.survey()
	}
}

// damaged reports whether the node says that its log is damaged, or would.
func (n *simNode) damaged() bool {
	if n.up() && n.v != nil {
		return (*node)(n.v).Damaged()
	}
	c, err := readMetadata(n.mem)
	if err != nil {
		return false
	}
	scan, err := survey(n.mem.Bytes(), c.meta, nil)
	return err == nil && scan.Damage != nil
}

// hasOrSays reports whether the node's log holds s, as far as flips left it
// readable: bits below it may have flipped, and the node have died since.
func (n *simNode) hasOrSays(s *simSegment) bool {
	return n.tip.holds(s) || n.hurt && n.damaged()
}

// keepsWhatItOwes reports whether the node's log holds what was acknowledged with
// it. Where bits of it flipped, it says so instead, until that was repaired.
func (n *simNode) keepsWhatItOwes() bool {
	if n.tip.holds(n.owes) {
		n.lost = false
		return true
	}
	if n.hurt && n.damaged() {
		n.lost = true
	}
	return n.lost
}

// lawful reports whether the pair may stay as it is, since a node reports damage
// that the other cannot repair.
func (w *simPair) lawful() bool {
	for _, n := range w.nodes {
		if !n.up() || n.v == nil {
			return false
		}
	}
	for _, n := range w.nodes {
		if n.lostForGood() || n.badForGood() {
			w.stats.reported++
			return true
		}
	}
	return false
}

// badForGood: a block of the node is damaged, and the peer's, which was not
// verified since a crash, is confirmed by nothing: the one here was not verified
// either, or two bits of it flipped. Or the peer's is not there.
func (n *simNode) badForGood() bool {
	other := n.w.nodes[1-n.i]
	for b := range n.v.bad.all() {
		if other.v.unverified.has(b) && (n.v.unverified.has(b) || n.once[b] > 1) || other.v.copying {
			n.w.event("%s: block %d stays damaged, and is reported", n.name, b)
			return true
		}
	}
	return false
}

// lostForGood: log of the node is damaged, by a flip, and an operator has to
// decide: the other does not hold it, or no longer in its ring, or they refuse each
// other; or there is no primary, and the other has no title to be promoted by.
func (n *simNode) lostForGood() bool {
	other := n.w.nodes[1-n.i]
	if !n.hurt || !n.damaged() {
		return false
	}
	st, _ := other.state()
	nobody := !st.Title && n.v.pair.Role() != replicate.Primary && other.v.pair.Role() != replicate.Primary
	if other.tip.holds(n.owes) && !nobody && n.phase != "refused" {
		return false
	}
	n.w.event("%s: its log stays damaged, and is reported: the other's ends at %v", n.name, other.tip)
	return true
}
