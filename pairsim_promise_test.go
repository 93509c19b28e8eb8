package nvmmirror

import (
	"bytes"
	"fmt"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// What must hold, whatever the schedule does: the seven promises, each node's
// log and data as the model knows them, and one title.

func (n *simNode) ring(m *metadata) journal.Ring {
	return journal.Ring{Bytes: n.mem.Bytes()[m.Journal.Off:m.Journal.end():m.Journal.end()], Base: m.RingBase}
}

// check is done whenever the pair is quiet.
func (w *simPair) check() {
	titles, readers := 0, 0
	for _, n := range w.nodes {
		st, ok := n.state()
		if ok && st.Title && !n.unheard() && !(n.stale && n.hurt) { // a damaged node keeps it, and is not promoted
			titles++
		}
		if n.up() && n.v != nil {
			n.look(st)
			if n.serves() {
				readers++
			}
		}
		if w.failed == nil && ok && st.Resync == nil && len(n.flipped) == 0 && !n.keepsWhatItOwes() {
			w.broken("%s: its log ends at %v and does not hold %v, which was acknowledged with it", n.name, n.tip, n.owes)
		}
	}
	a, okA := w.nodes[0].state()
	b, okB := w.nodes[1].state()
	if okA && okB && !a.Blank() && !b.Blank() && a.Lineage != b.Lineage {
		w.broken("two volumes: lineage %v at %s, %v at %s", a.Lineage, w.nodes[0].name, b.Lineage, w.nodes[1].name)
	}
	for _, n := range w.nodes {
		n.catchUp()
		n.doubt = n.doubted()
	}
	if titles > 1 {
		w.broken("both nodes hold the title")
	}
	if readers > 1 {
		w.broken("both nodes serve reads")
	}
}

// look compares a living node's log and data with the model.
func (n *simNode) look(st replicate.State) {
	w, v := n.w, n.v
	if st.Resync != nil || v.copying {
		// Its log is what the source said; nothing of it is used.
		if s := w.model.places[simPlace{v.journal.End(), v.journal.Chain()}]; s != nil {
			n.tip = s
		}
		// What is unverified at the source is so here, as it came.
		for b := range w.nodes[1-n.i].trusted {
			n.flipped[b] = true
		}
		return
	}
	tip, err := w.model.walk(v.journal.Ring(), n.tip, simPlace{v.journal.End(), v.journal.Chain()})
	if err != nil {
		w.broken("%s: %v", n.name, err)
		return
	}
	n.tip = tip
	applied := w.model.places[simPlace{v.Applied(), v.chain}]
	if applied == nil || !tip.holds(applied) {
		w.broken("%s: the data holds the log up to LSN %d, chain %08x, the log ends at %v", n.name, v.Applied(), v.chain, tip)
		return
	}
	for b := range n.flipped {
		if delete(n.trusted, b); v.unverified.has(b) {
			n.trusted[b] = true
		}
	}
	if v.Applied() < LSN(v.redoUntil.Load()) {
		return // blocks may hold parts of what was applied before a crash; nothing is read before it has been applied again
	}
	for b := range int64(pairSimSize / blockSize) {
		if have, want := v.block(b), applied.content[b*blockSize:][:blockSize]; !bytes.Equal(have, want) {
			// Where its log was damaged a node does not know how far that had
			// been applied: a block whose checksum it took anew may hold parts
			// of what comes next, and will be compared with the peer's.
			if n.flipped[b] || n.hurt && v.unverified.has(b) {
				continue
			}
			w.broken("%s: block %d is not what the log up to %v makes of it", n.name, b, applied)
			return
		} else if e, ok := v.table.get(b); n.flipped[b] && ok && e.crc == crcOf(have) {
			delete(n.flipped, b)
			delete(n.trusted, b)
		}
	}
	if n.serves() && !tip.holds(w.promised) {
		w.broken("%s serves, its log ends at %v: %v, which was acknowledged or read, is missing", n.name, tip, w.promised)
	}
}

// entitled reports whether the node holds the title, be it void.
func (n *simNode) entitled() bool {
	st, ok := n.state()
	return ok && st.Title
}

// serves reports whether a client could read here now.
func (n *simNode) serves() bool {
	return n.up() && n.v != nil && n.v.pair.Serving() && n.v.pair.Leased() && n.v.failed.Load() == nil
}

// alone reports whether the node has recorded that it need not wait for its
// peer.
func (n *simNode) alone() bool {
	c, err := readMetadata(n.mem)
	return err == nil && len(c.meta.State.History) > 0 && !c.meta.State.History.Last().BothIn()
}

// acknowledged: a client was told that its transaction is committed.
func (w *simPair) acknowledged(n *simNode, tx *simTx, lsn LSN) {
	w.stats.acked++
	n.observe()
	at := n.tip
	if n.hurt && !n.up() { // bits flipped below it, and the process died since
		at = w.model.holding(tx, lsn)
	}
	for at != nil && at.lsn > lsn {
		at = at.parent
	}
	if at == nil || at.lsn != lsn || !at.hasHere(tx) {
		w.broken("%s: transaction %d was acknowledged at LSN %d and is not there", n.name, tx.id, lsn)
		return
	}
	n.owes = deeper(n.owes, at)
	peer := w.nodes[1-n.i]
	if peer.observe(); !n.alone() && !peer.had(at) {
		st, _ := peer.state()
		if !peer.hasOrSays(at) || st.Resync != nil {
			w.broken("%s: transaction %d was acknowledged at %v, the peer's log ends at %v", n.name, tx.id, at, peer.tip)
			return
		}
		peer.owes = deeper(peer.owes, at)
		if peer.tip.holds(at) {
			peer.durable(at)
		}
	}
	n.durable(at)
	w.promise(n, at, fmt.Sprintf("acknowledged transaction %d", tx.id))
}

// hasHere reports whether the segment itself carries the transaction.
func (s *simSegment) hasHere(tx *simTx) bool {
	for _, t := range s.txs {
		if t == tx {
			return true
		}
	}
	return false
}

// observe brings the tip up to date.
func (n *simNode) observe() {
	if !n.up() || n.v == nil {
		return
	}
	st, _ := n.state()
	n.look(st)
}

// durable checks that a segment would outlive a power failure now.
func (n *simNode) durable(s *simSegment) {
	c, err := readMetadata(n.mem)
	if err != nil || s.parent == nil || s.lsn <= c.meta.Checkpoint.LSN || len(n.flipped) > 0 {
		return
	}
	ring := n.ring(c.meta)
	from := s.parent.lsn
	pos := c.meta.Journal.Off + int64(ring.Position(from))
	if !n.mem.Lasts(pos, int64(s.lsn-from)) {
		n.w.broken("%s: the segment up to %v was acknowledged and would not outlive a power failure", n.name, s)
	}
}

// promise: no client may ever see a state without what s holds.
func (w *simPair) promise(n *simNode, s *simSegment, what string) {
	switch {
	case s.holds(w.promised):
		w.promised = s
	case !w.promised.holds(s):
		w.broken("%s: %s at %v, beside %v", n.name, what, s, w.promised)
	}
}

func deeper(a, b *simSegment) *simSegment {
	if b.holds(a) {
		return b
	}
	return a
}

// notCommitted: a client was told that nothing of its transaction will be
// visible.
func (w *simPair) notCommitted(tx *simTx, err error) {
	tx.failed = err.Error()
	for _, n := range w.nodes {
		n.observe()
		if n.tip.has(tx) {
			w.broken("%s: transaction %d is in the log, its client was told %q", n.name, tx.id, err)
		}
	}
}

// wasRead: a client read p. before is what had been promised when it asked.
func (w *simPair) wasRead(n *simNode, p []byte, before *simSegment) {
	w.stats.reads++
	doubt := n.doubt
	n.observe()
	var saw *simSegment
	for _, s := range w.model.find(p) {
		if s.holds(before) && (saw == nil || saw.depth > s.depth) {
			saw = s
		}
	}
	if saw == nil && doubt {
		w.event("%s: read a block that a crash left unverified", n.name)
		w.stats.trusted++
		return
	}
	if saw == nil {
		w.broken("%s: a read saw %s", n.name, w.explain(p, before))
		return
	}
	w.event("%s: read %v", n.name, saw)
	peer := w.nodes[1-n.i]
	peer.observe()
	if st, _ := peer.state(); !n.alone() && !peer.had(saw) && (!peer.hasOrSays(saw) || st.Resync != nil) {
		w.broken("%s: a read saw %v, the peer's log ends at %v", n.name, saw, peer.tip)
		return
	}
	w.promise(n, saw, "read")
}

// doubted reports whether a bit flipped in a block whose checksum was taken
// anew after a crash, and which has not been compared with the peer's yet: what
// is read there cannot be judged. That is a stated limit.
func (n *simNode) doubted() bool {
	for b := range n.flipped {
		if n.trusted[b] {
			return true
		}
	}
	return false
}

// explain says what a read saw that it should not have seen.
func (w *simPair) explain(p []byte, before *simSegment) string {
	if old := w.model.find(p); len(old) > 0 {
		return fmt.Sprintf("the state at %v, which lacks %v", old[0], before)
	}
	near, most := (*simSegment)(nil), -1
	for _, s := range w.model.places {
		same := 0
		for i := range p {
			if p[i] == s.content[i] {
				same++
			}
		}
		if same > most {
			near, most = s, same
		}
	}
	return fmt.Sprintf("what no log ever made; nearest is %v, with %d other bytes", near, len(p)-most)
}
