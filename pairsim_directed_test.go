package nvmmirror

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem/sim"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// Both nodes of a blank pair promoted made two volumes, each of which
// acknowledged.
func TestBlankPairPromotedTwice(t *testing.T) {
	begun := [2]int{}
	child := direct(t, 150, Options{}, func(d *simScript) {
		d.a.open()
		d.b.open()
		stale := d.seed%3 == 2
		d.until("connected", func() bool {
			return d.a.v.pair.Phase() == "connected" && d.b.v.pair.Phase() == "connected"
		})
		asked := [2]bool{}
		for k := 0; k < 60; k++ {
			for i, n := range d.nodes {
				if !asked[i] && d.rng.IntN(3) == 0 {
					asked[i] = true
					n.promote()
				}
			}
			if stale && d.rng.IntN(10) == 0 {
				d.event("what leaves %s is lost", d.nodes[k%2].name)
				d.net.cut[k%2] = !d.net.cut[k%2]
			}
			if !d.step(false) {
				d.sleep(d.timeout / 40)
			}
			d.settle()
			d.whole("both promoted")
		}
		d.partition(false)
		d.until("in sync", d.every(nil, d.inSync))
		begun[d.primary().i]++
		d.primary().commit(false, 0)
		d.until("acknowledged", func() bool { return d.stats.acked > 0 })
	})
	if child && (begun[0] == 0 || begun[1] == 0) {
		t.Errorf("always the same node begins: %v", begun)
	}
}

// The answer to an offer of the title was taken for the answer to the request
// that followed it.
func TestTitleAskedWhileOffered(t *testing.T) {
	direct(t, 60, Options{OnPeerLoss: Alone}, func(d *simScript) {
		d.begin()
		d.a.demote()
		st := func(n *simNode) replicate.State { s, _ := n.state(); return s }
		d.until("offered", func() bool {
			if st(d.a).Title || d.a.command {
				return false
			}
			d.net.cut[0] = true // what offers it stays on its way
			return true
		})
		if st(d.b).Title {
			return // it came through at once
		}
		d.a.promote()
		for range 3 { // heartbeats of b: with them a looks at what it wants
			d.sleep(d.timeout / 8)
			for d.step(true) {
				d.settle()
			}
			d.whole("asked")
		}
		d.net.cut[0] = false
		for range 40 {
			d.step(false)
			d.settle()
			d.whole("answered")
		}
		d.until("in sync", d.every(nil, d.inSync))
	})
}

// A promotion recorded the new role and then waited until the old primary's
// lease was over. A node killed in that wait served as soon as it was restarted,
// beside the old primary.
func TestPromotionCutShort(t *testing.T) {
	both := 0
	child := direct(t, 20, Options{}, func(d *simScript) {
		d.begin()
		d.partition(true)
		d.net.mu.Lock()
		for _, q := range d.net.pipes {
			d.net.lose(q)
		}
		d.net.mu.Unlock()
		d.settle()
		d.b.promote()
		if d.a.serves() {
			both++
		}
		d.sleep(d.timeout / 100 * time.Duration(d.seed))
		d.settle()
		d.whole("promoted")
		d.kill(d.b)
		d.b.open()
		for range 40 {
			d.sleep(d.timeout / 50)
			d.settle()
			d.whole("restarted")
		}
		d.partition(false)
		d.b.promote()
		d.until("primary", func() bool { return d.b.serves() && !d.b.command })
		d.until("in sync", d.every(nil, d.inSync))
	})
	if child && both == 0 {
		t.Error("the old primary's lease was always over")
	}
}

// A primary that gave the title up to join, and stepped down before the peer
// had answered, has an epoch that the peer does not know: nobody took the title.
func TestTitleLostBesideAnEpoch(t *testing.T) {
	direct(t, 4, Options{}, func(d *simScript) {
		d.begin()
		d.a.commit(false, 0)
		d.until("acknowledged", func() bool { return d.stats.acked > 0 && d.a.tip == d.b.tip })
		d.kill(d.a)
		d.kill(d.b)
		for i, n := range d.nodes {
			c, err := readMetadata(n.mem)
			if err != nil {
				d.t.Fatal(err)
			}
			st := &c.meta.State
			*st = st.Clone()
			st.Role, st.Title = replicate.Secondary, false
			if i == int(d.seed%2) {
				last := st.History.Last().Epoch
				st.History = st.History.Append(journal.Entry{Epoch: journal.Epoch{Counter: last.Counter + 1, Node: d.a.v0()}, Start: n.tip.lsn, PeerIn: true})
			}
			if err := writeMetadata(n.mem, c.meta); err != nil {
				d.t.Fatal(err)
			}
			n.open()
		}
		d.until("in sync", d.every(nil, d.inSync))
	})
}

// loseWhileCatchingUp lets power fail at b at some operation of its catching up.
// whole says that it left a gap in the log, with the whole segment h behind it; lost
// is false where b caught up with fewer operations.
func (d *simScript) loseWhileCatchingUp() (h journal.Header, whole, lost bool) {
	d.b.outage = true
	d.b.media.at = d.b.media.ops + 1 + int(d.seed)/2
	d.until("lost", func() bool { return !d.b.up() || d.inSync() })
	if d.b.up() {
		return h, false, false
	}
	c, err := readMetadata(d.b.mem)
	if err != nil {
		d.t.Fatal(err)
	}
	_, whole = journal.NewFinder(d.b.ring(c.meta), c.meta.State.History, d.a.tip.lsn).Next(d.b.tip.lsn+journal.Align, &h)
	return h, whole, true
}

// A power failure that hit a secondary while it caught up left a gap in log that
// it had not made durable, with whole segments behind it: those of a primary that
// was alone, which say that the gap was acknowledged. The secondary took it for
// damage; where the primary's last epoch, under which nothing was written, gave
// way meanwhile, they refused each other.
func TestGapWhileCatchingUp(t *testing.T) {
	gaps := 0
	child := direct(t, 40, Options{OnPeerLoss: Alone}, func(d *simScript) {
		d.begin()
		d.partition(true)
		d.until("alone", func() bool { return d.a.alone() && d.a.serves() })
		for k := 1; k <= 6; k++ {
			d.a.commit(false, 0)
			d.until("acknowledged", func() bool { return d.stats.acked == k })
		}
		d.kill(d.a)
		d.a.open()
		d.until("alone again", d.a.serves)
		heard, _ := d.a.state()
		d.partition(false)
		d.until("catching up", func() bool {
			st, _ := d.b.state()
			return st.History.Last() == heard.History.Last()
		})
		_, whole, lost := d.loseWhileCatchingUp()
		if !lost {
			return
		}
		if whole {
			gaps++
		}
		d.partition(true)
		d.kill(d.a)
		d.a.open()
		d.until("alone once more", d.a.serves)
		d.b.open()
		if d.b.v.damage.Load() != nil {
			d.t.Fatalf("seed %d: %s", d.seed, d.b.v.recovery.Damage)
		}
		d.partition(false)
		d.until("in sync", d.every(nil, d.inSync))
	})
	if child && gaps == 0 {
		t.Error("no power failure left a gap")
	}
}

// The same gap at a new region that takes the place of a lost node: its log was
// acknowledged by both, the other one being the node that is gone.
func TestGapAtANewRegion(t *testing.T) { gapAtANewRegion(t, false) }

// The connection is lost once before: then the node is not blank any more.
func TestGapAtANewRegionThatConnectsTwice(t *testing.T) { gapAtANewRegion(t, true) }

func gapAtANewRegion(t *testing.T, twice bool) {
	gaps := 0
	child := direct(t, 40, Options{OnPeerLoss: Alone}, func(d *simScript) {
		d.begin()
		for k := 1; k <= 6; k++ {
			d.a.commit(false, 0)
			d.until("acknowledged", func() bool { return d.stats.acked == k })
		}
		d.kill(d.b)
		d.b.create()
		d.until("alone", func() bool { return d.a.alone() && d.a.serves() })
		d.b.open()
		d.until("catching up", func() bool { st, _ := d.b.state(); return !st.Blank() })
		if twice {
			d.net.mu.Lock()
			for _, p := range d.net.pipes {
				d.net.lose(p)
			}
			d.net.mu.Unlock()
			d.settle()
			d.until("catching up again", func() bool { return d.b.v.pair.Phase() == replicate.PhaseCatchUp })
		}
		h, whole, lost := d.loseWhileCatchingUp()
		if !lost {
			return
		}
		if whole && h.Acked > d.b.tip.lsn {
			gaps++
		}
		d.b.open()
		if d.b.v.damage.Load() != nil {
			d.t.Fatalf("seed %d: %s", d.seed, d.b.v.recovery.Damage)
		}
		d.until("in sync", d.every(nil, d.inSync))
	})
	if child && gaps == 0 {
		t.Error("no power failure left a gap with a hint behind it")
	}
}

// A peer that lies sends a segment that is right in all but where its records go.
// It lies in the ring when that is seen: power may fail right after.
func TestRefusedSegmentStaysOut(t *testing.T) {
	direct(t, 10, Options{}, func(d *simScript) {
		d.begin()
		tx := d.model.tx(d.rng, false)
		tx.off, tx.data = tx.off[:1], tx.data[:1]
		done := false
		d.a.client(func(v *Volume) {
			x := v.Begin()
			x.Write(tx.off[0], tx.data[0])
			x.Commit(d.t.Context())
		}, func(bool) { done = true })
		d.settle()
		forged := false
		for _, p := range d.net.pipes {
			at := bytes.Index(p.under, binary.LittleEndian.AppendUint32(nil, journal.Magic))
			if p.from == 0 && at >= 0 {
				segment := p.under[at:]
				segment[journal.HeaderSize+7] = 1 // of the offset
				forgeHeader(segment, func(h []byte) {
					binary.LittleEndian.PutUint32(h[52:], crc32c.Sum(segment[journal.HeaderSize:binary.LittleEndian.Uint32(h[40:])]))
				})
				forged = true
			}
		}
		if !forged {
			d.t.Fatal("no segment on its way")
		}
		d.until("refused", func() bool {
			for _, p := range d.net.pipes {
				if p.from == 1 && p.fin {
					return true
				}
			}
			return false
		})
		c, err := readMetadata(d.b.mem)
		if err != nil {
			d.t.Fatal(err)
		}
		d.b.mem.Images(1000, d.rng, func(img *sim.Memory) {
			scan, err := survey(img.Bytes(), c.meta, nil)
			if err != nil || scan.End != d.b.tip.lsn {
				d.t.Fatalf("seed %d: power failure leaves log up to LSN %d, and not %d, which was refused: %v", d.seed, scan.End, d.b.tip.lsn, err)
			}
		})
		d.until("acknowledged", func() bool { return done })
	})
}

// A flip in the log of a primary in async mode: it took from its peer what was
// missing, and forgot its own log behind that, which the peer had never had.
func TestOwnLogBehindDamage(t *testing.T) {
	direct(t, 8, Options{Ack: AckAsync}, func(d *simScript) {
		d.begin()
		acked := func(n int) {
			for range n {
				d.a.commit(false, 0)
				want := d.stats.acked + 1
				d.until("acknowledged", func() bool { return d.stats.acked == want })
			}
		}
		acked(3)
		d.until("shipped", func() bool { return d.b.tip == d.a.tip })
		hurt := d.a.tip.parent
		acked(1)
		d.until("shipped", func() bool { return d.b.tip == d.a.tip })
		d.kill(d.b)
		acked(1 + int(d.seed%3))
		d.a.hurt = true
		c, err := readMetadata(d.a.mem)
		if err != nil {
			d.t.Fatal(err)
		}
		d.a.mem.Bytes()[c.meta.Journal.Off+int64(d.a.ring(c.meta).Position(hurt.parent.lsn))+20] ^= 1
		d.kill(d.a)
		d.a.open()
		d.b.open()
		d.until("in sync", d.every(nil, d.inSync))
		if !d.a.tip.holds(d.a.owes) {
			d.t.Fatalf("seed %d: the log ends at %v, and lacks %v", d.seed, d.a.tip, d.a.owes)
		}
	})
}

// v0 is the node's id.
func (n *simNode) v0() uint64 { st, _ := n.state(); return st.Node }

// A primary that was restarted in async mode recorded so before its peer, which
// held the title, had given it up: where the peer was promoted instead, both
// refused each other.
func TestModeChangeCutShort(t *testing.T) {
	direct(t, 20, Options{}, func(d *simScript) {
		d.begin()
		d.kill(d.a)
		d.a.opt.Ack = AckAsync
		d.a.open()
		d.until("joining", func() bool {
			a, _ := d.a.state()
			b, _ := d.b.state()
			return a.History.Last().Async || !b.Title || d.joinUnderWay()
		})
		d.net.cut[0] = true
		d.kill(d.a)
		d.b.promote()
		d.until("told", func() bool { return !d.b.command })
		if d.b.serves() {
			d.b.commit(false, 0)
			d.until("acknowledged", func() bool { return d.stats.acked > 0 })
		}
		d.partition(false)
		d.a.open()
		d.until("in sync", d.every(nil, d.inSync))
	})
}

// joinUnderWay reports whether a message that moves the title is on its way.
func (d *simScript) joinUnderWay() bool {
	for _, p := range d.net.pipes {
		if p.from == 0 && strings.Contains(string(p.under), `"title":"release"`) {
			return true
		}
	}
	return false
}

// A former primary that had stepped down applied its unacknowledged tail when
// it was restarted, and could never follow again.
func TestSteppedDownTailIsNotApplied(t *testing.T) {
	direct(t, 10, Options{}, func(d *simScript) {
		d.begin()
		d.partition(true)
		d.a.commit(false, 0) // nobody hears of it
		d.settle()
		fork := d.b.v.journal.End()
		if d.a.v.journal.End() == fork {
			d.t.Fatal("no tail")
		}
		d.kill(d.a)
		d.b.promote()
		d.until("promoted", func() bool { return !d.b.command && d.b.serves() })
		d.b.commit(false, 0)
		d.until("acknowledged", func() bool { return d.stats.acked > 0 })
		d.b.demote()
		d.until("demoted", func() bool { return !d.b.command })
		d.partition(false)
		d.a.open()
		d.until("stepped down", func() bool { return d.a.v.pair.Role() == replicate.Secondary })
		d.kill(d.a)
		d.a.open()
		if v := d.a.v; v.journal.End() <= fork || v.Applied() > fork {
			d.t.Fatalf("applied up to LSN %d, the log goes to %d, the fork is at %d", v.Applied(), v.journal.End(), fork)
		}
		d.until("in sync", d.every(nil, d.inSync))
	})
}

// A block whose checksum was taken anew after a crash counted as verified after
// the next: a flip in it stayed, and was taken by the peer.
func TestUnverifiedOutlivesRestarts(t *testing.T) {
	direct(t, 4, Options{OnPeerLoss: Alone}, func(d *simScript) {
		d.begin()
		for range 5 {
			d.a.commit(false, 0)
		}
		d.until("acknowledged", func() bool { return d.stats.acked == 5 && d.b.v.Applied() == d.a.v.journal.End() })
		d.kill(d.a)
		d.partition(true)
		d.a.flipped[0] = true
		c, err := readMetadata(d.a.mem)
		if err != nil {
			d.t.Fatal(err)
		}
		at := c.meta.Data.Off + 1 // the name of a transaction that there is not: no record covers it
		d.a.mem.Bytes()[at] ^= 4
		for range 3 {
			d.a.open()
			if !d.a.v.unverified.has(0) || d.a.v.Status().Counters.UnverifiedBlocks == 0 {
				d.t.Fatal("block 0 counts as verified")
			}
			if err := d.a.v.checkpoint(false); err != nil {
				d.t.Fatal(err)
			}
			d.kill(d.a)
		}
		d.a.open()
		d.partition(false)
		d.until("compared", func() bool { return d.inSync() && len(d.a.flipped) == 0 && !d.a.v.unverified.has(0) })
		if e, ok := d.a.v.table.get(0); !ok || e.unverified {
			d.t.Fatalf("the entry still says so: %+v", e)
		}
	})
}

// Where both nodes' blocks are unverified and differ, nobody takes the other's: the
// primary reports it until it is rewritten, and its peer hears that and counts its own
// as damaged too.
func TestUnverifiedOnBothNodes(t *testing.T) {
	direct(t, 4, Options{}, func(d *simScript) {
		d.begin()
		d.a.commit(false, 0)
		d.until("acknowledged", func() bool { return d.stats.acked == 1 && d.b.v.Applied() == d.a.v.journal.End() })
		d.a.flipped[7] = true
		for i, n := range d.nodes {
			v := n.v
			if i == 0 {
				v.block(7)[blockSize-1] ^= 1
			}
			takenAnew(v)
		}
		if d.seed%2 == 0 {
			d.b.v.unverified.remove(7) // it does not ask at the same time
		}
		d.until("reported", func() bool { return d.a.v.bad.has(7) })
		read := func() (err error) {
			p := make([]byte, 1)
			done := false
			d.a.client(func(v *Volume) { _, err = v.ReadAt(p, 8*blockSize-1) }, func(bool) { done = true })
			d.until("read", func() bool { return done })
			return err
		}
		var corrupt *CorruptError
		if err := read(); !errors.As(err, &corrupt) {
			d.t.Fatalf("read: %v", err)
		}
		if d.b.v.block(7)[blockSize-1] != 0 {
			d.t.Fatal("the flip is at the peer")
		}
		// Which may come to serve it.
		d.b.v.applyMu.Lock()
		d.b.v.unverified.add(7)
		d.b.v.applyMu.Unlock()
		d.until("known at the peer", func() bool { return d.b.v.bad.has(7) })
		if e, _ := d.b.v.table.get(7); e.crc == crc32c.Sum(d.b.v.block(7)) || !e.damaged {
			d.t.Fatalf("the peer's entry: %+v", e)
		}
		d.change(d.nodes[:], 0, make([]byte, blockSize))
		d.settled()
		if err := read(); err != nil {
			d.t.Fatal(err)
		}
	})
}

// A primary with policy alone has lost its peer, and waits for it, when that is promoted
// by force, acknowledges, and is demoted. It hears of that, and the link goes before the
// verdict: it does not go alone, though it took transactions all the while.
func TestServingPrimaryIsOutdated(t *testing.T) {
	direct(t, 8, Options{OnPeerLoss: Alone}, func(d *simScript) {
		d.begin()
		d.partition(true)
		d.lose()
		d.a.leaveBehind()
		d.b.operator("promote by force", func(ctx context.Context, v *Volume) error { return v.Promote(ctx, true) })
		d.until("promoted", func() bool { return !d.b.command && d.b.serves() })
		d.b.commit(false, 0)
		d.until("acknowledged", func() bool { return d.stats.acked == 1 })
		d.b.demote()
		d.until("demoted", func() bool { return !d.b.command })
		if d.a.alone() || !d.a.v.pair.Serving() {
			d.t.Fatal("alone already")
		}
		before := d.net.next
		d.partition(false)
		d.until("told", func() bool {
			d.net.mu.Lock()
			defer d.net.mu.Unlock()
			return slices.ContainsFunc(d.net.pipes, func(q *simPipe) bool {
				return q.id >= before && q.dst.life == d.a.life && q.helloTaken()
			})
		})
		if d.a.alone() {
			d.t.Fatal("alone already")
		}
		d.partition(true)
		d.lose()
		for range 40 {
			d.sleep(d.timeout / 10)
			d.settle()
			d.whole("without the link")
		}
		d.partition(false)
		d.until("in sync", d.every(nil, d.inSync))
	})
}
