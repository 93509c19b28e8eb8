package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/replicate"
)

// mediaPair is a pair in sync with random content.
func mediaPair(t *testing.T, m *media, salt uint64, o Options) (a, b *testNode, model []byte) {
	t.Helper()
	a, b = pairInSync(t, testConfig{size: 1 << 20, opt: o, quiet: true, timeout: 3 * time.Second})
	rng := m.rng(salt)
	for off := int64(0); off < a.Size(); off += 4 * blockSize {
		commit(t, a, off, randomBytes(rng, 4*blockSize))
	}
	quiesce(t, a, b)
	return a, b, content(t, a)
}

// leased reads as soon as the node may: a busy machine can hold a heartbeat up
// for longer than the lease.
func leased(n *testNode, off int64, size int) ([]byte, error) {
	p := make([]byte, size)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := n.ReadAt(p, off); !errors.Is(err, ErrNoLease) || time.Now().After(deadline) {
			return p, err
		}
	}
}

// settled reads the whole volume. A read is refused while the peer does not
// answer; it is never wrong, and in the end it succeeds.
func settled(t *testing.T, n *testNode, model []byte) bool {
	t.Helper()
	p := make([]byte, n.Size())
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		_, err := n.ReadAt(p, 0)
		if err == nil {
			return bytes.Equal(p, model)
		}
		if !errors.Is(err, ErrNoLease) && !isCorrupt(err) || time.Now().After(deadline) {
			t.Fatalf("%s: read: %v", n.name, err)
		}
	}
}

// switchOver makes the secondary primary, with both in sync before and after.
func switchOver(t *testing.T, a, b *testNode) {
	t.Helper()
	a.demote()
	b.until("title", func(s Status) bool { return s.Title })
	b.promote(false)
	a.inSync()
	b.inSync()
}

// Flips in data and block table of either node of a pair in sync. The primary
// repairs what is read or changed; so does the secondary what is changed, and
// the rest once it is promoted and read.
func mediaPairLive(t *testing.T, m *media) {
	for _, where := range []string{"primary", "secondary"} {
		a, b, model := mediaPair(t, m, 20, Options{})
		rng := m.rng(21)
		n, other := a, b
		if where == "secondary" {
			n, other = b, a
		}
		if err := n.checkpoint(false); err != nil { // a change verifies the block first
			t.Fatal(err)
		}
		raw := twin(t, n.path)
		areas := map[string]*mediaRow{}
		bad := uint64(0)
		flip := func(area string, b int64) {
			at := n.data.Off + b*blockSize + rng.Int64N(blockSize)
			if area == "block table" {
				at = n.table.area.Off + b*tableEntry + rng.Int64N(tableEntry)
			}
			raw[at] ^= 1 << rng.IntN(8)
			bad++
			key := area
			if areas[key] == nil {
				areas[key] = &mediaRow{where: "pair, " + where, area: area, found: "read, change"}
			}
			areas[key].flips++
			areas[key].repaired++
		}
		for i, b := range rng.Perm(int(n.Size() / blockSize))[:80] {
			block := int64(b)
			flip([]string{"data", "block table"}[i%2], block)
			switch {
			case i%4 < 2: // changed beside the flip, or over it
				p := randomBytes(rng, 1+rng.IntN(200))
				off := block*blockSize + rng.Int64N(blockSize-200)
				commit(t, a, off, p)
				copy(model[off:], p)
			case where == "primary":
				off := block*blockSize + rng.Int64N(blockSize-300)
				if p, err := leased(n, off, 300); err != nil || !bytes.Equal(p, model[off:off+300]) {
					t.Fatalf("block %d: %v", block, err)
				}
			}
		}
		quiesce(t, a, b)
		unharmed(t, other, model)
		if where == "secondary" {
			switchOver(t, a, b)
			a, b = b, a
		}
		if !settled(t, a, model) {
			t.Fatal("what was read is not what was written")
		}
		s := n.until("repaired", func(s Status) bool { return s.Counters.RepairedBlocks >= bad && len(s.Degraded) == 1 })
		if s.Counters.BadBlocks != bad {
			t.Errorf("%d flips, counted %d", bad, s.Counters.BadBlocks)
		}
		quiesce(t, a, b)
		unharmed(t, n, model)
		unharmed(t, other, model)
		identical(t, a, b)
		if c := other.Status().Counters; c.BadBlocks+c.RepairedBlocks > 0 {
			t.Errorf("%s, of which nothing flipped: %+v", other.name, c)
		}
		for _, r := range areas {
			m.add(*r)
		}
	}
}

// Flips in each area of a node that is down, closed or killed, and comes back.
func mediaPairDown(t *testing.T, m *media) {
	for _, where := range []string{"primary", "secondary"} {
		a, b, model := mediaPair(t, m, 22, Options{})
		rng := m.rng(23)
		n := a
		if where == "secondary" {
			n = b
		}
		// Else the log that wrote every block is redone, over all flips.
		n.until("checkpointed", func(s Status) bool { return s.Ckpt > 0 })
		for round, how := range []string{"killed", "closed"} {
			for range 20 { // a live journal, and blocks that recovery writes again
				off := rng.Int64N(a.Size() - 3000)
				p := randomBytes(rng, 1+rng.IntN(3000))
				commit(t, a, off, p)
				copy(model[off:], p)
			}
			quiesce(t, a, b)
			region := "pair, " + where + " " + how
			if how == "killed" {
				n.crash()
			} else {
				n.close()
			}
			journalFlip := false
			n.change(func(raw []byte) {
				md := metadataOf(t, raw)
				used := int64(metaFixed + len(md.State.History)*metaEntry + 4)
				raw[int64(round%2)*metaArea+rng.Int64N(used)] ^= 1 << rng.IntN(8)
				m.add(mediaRow{where: region, area: "metadata, one copy", flips: 1, found: "open", repaired: 1})
				if how == "killed" {
					if end := inspected(t, raw).scan.End; end > md.Checkpoint.LSN {
						raw[md.Journal.Off+int64(ringOf(raw, md).Position(md.Checkpoint.LSN))+rng.Int64N(64)] ^= 1
						journalFlip = true
						m.add(mediaRow{where: region, area: "journal", flips: 1, found: "open", repaired: 1})
					}
				}
				for i, b := range rng.Perm(int(md.Size / blockSize))[:20] {
					at := md.Data.Off + int64(b)*blockSize + rng.Int64N(blockSize)
					if i%2 == 1 {
						at = md.Table.Off + int64(b)*tableEntry + rng.Int64N(tableEntry)
					}
					raw[at] ^= 1 << rng.IntN(8)
				}
			})
			m.add(mediaRow{where: region, area: "data, block table", flips: 20, found: "read, comparison with the peer", repaired: 20})
			n.open()
			s := n.Status()
			if s.Counters.MetadataRepairs != 1 {
				t.Errorf("%s: metadata: %+v", region, s.Counters)
			}
			if journalFlip && s.Recovery.Damage == "" && !strings.Contains(s.Recovery.Stop, "checksum") && !strings.Contains(s.Recovery.Stop, "no segment") {
				t.Errorf("%s: a flip in the journal: %+v", region, s.Recovery)
			}
			a.inSync()
			b.inSync()
			n.until("compared", func(s Status) bool { return s.Counters.UnverifiedBlocks == 0 })
			if where == "secondary" {
				switchOver(t, a, b)
			}
			p, other := a, b
			if where == "secondary" {
				p, other = b, a
			}
			if !settled(t, p, model) {
				t.Fatalf("%s: what was read is not what was written", region)
			}
			unharmed(t, other, model)
			quiesce(t, p, other)
			unharmed(t, n, model)
			if s := n.Status(); s.Counters.RepairedBlocks == 0 || len(s.Degraded) != 1 {
				t.Errorf("%s: %+v", region, s)
			}
			identical(t, p, other)
			if where == "secondary" {
				switchOver(t, b, a)
			}
		}
	}
}

// Both copies of the metadata: the region is refused, and a new one in its
// place is filled by the peer.
func mediaPairNoMetadata(t *testing.T, m *media) {
	a, b, model := mediaPair(t, m, 24, Options{})
	b.crash()
	rng := m.rng(25)
	at := 16 + rng.Int64N(200)
	var bit byte = 1 << rng.IntN(8)
	restore := func() {
		b.change(func(raw []byte) { raw[at] ^= bit; raw[metaArea+at] ^= bit })
	}
	restore() // flips them
	if _, err := Open(b.path, b.opt); !isCorrupt(err) {
		t.Fatalf("open: %v", err)
	}
	if r, err := Check(b.path); err != nil || !r.Damaged {
		t.Fatalf("check: %v, %+v", err, r)
	}
	restore() // only so that replace can read the sizes
	replace(t, b)
	b.open()
	a.inSync()
	b.inSync()
	unharmed(t, b, model)
	identical(t, a, b)
	m.add(mediaRow{where: "pair, secondary killed", area: "metadata, both", flips: 2, found: "open", repaired: 2, reported: 2})
}

// A full copy of a volume of which a block has flipped at its source: it is
// not copied, and said so, until the block is whole again. A block that flips
// at the target behind the copy is found when it is read there.
func mediaPairCopy(t *testing.T, m *media) {
	a, b, _ := mediaPair(t, m, 26, Options{OnPeerLoss: Alone})
	replace(t, b)
	a.until("alone", func(s Status) bool { return s.Peer == "lost" && !a.pair.Required() })
	fill(t, a, 27, 300, 20000) // beyond the ring
	if err := a.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	model := content(t, a)
	raw := twin(t, a.path)
	const block = 130
	raw[a.data.Off+block*blockSize+77] ^= 2
	b.open()
	a.until("refused", func(s Status) bool { return strings.Contains(s.Reason, "block 130: corrupt") })
	if s := b.Status(); s.Peer == "in-sync" {
		t.Fatalf("%+v", s)
	}
	if p := b.block(block); bytes.Equal(p, a.block(block)) {
		t.Fatal("the flip reached the peer")
	}
	refused(t, "promotion of half a copy", b.Promote(context.Background(), false))
	commit(t, a, block*blockSize, bytes.Repeat([]byte("written anew"), 400)[:blockSize])
	copy(model[block*blockSize:], bytes.Repeat([]byte("written anew"), 400)[:blockSize])
	a.wire.setChop(16<<10, 2*time.Millisecond)
	b.until("copying", func(s Status) bool { return s.Resync != nil && s.Resync.Done > 700<<10 })
	twin(t, b.path)[b.data.Off+5*blockSize+9] ^= 1
	a.wire.setChop(0, 0)
	a.inSync()
	b.inSync()
	switchOver(t, a, b)
	if !settled(t, b, model) {
		t.Fatal("content differs")
	}
	if c := b.Status().Counters; c.RepairedBlocks != 1 {
		t.Errorf("%+v", c)
	}
	unharmed(t, a, model)
	identical(t, b, a)
	m.add(mediaRow{where: "pair, source of a full copy", area: "data", flips: 1, found: "copy", reported: 1})
	m.add(mediaRow{where: "pair, target of a full copy", area: "data", flips: 1, found: "read", repaired: 1})
}

// A secondary is promoted with flips in it, and there is no peer: what is
// damaged is refused, the rest is served, and the peer repairs it as it comes
// back.
func mediaPromoted(t *testing.T, m *media) {
	a, b, model := mediaPair(t, m, 28, Options{})
	rng := m.rng(29)
	raw := twin(t, b.path)
	a.crash()
	b.peerIs("lost")
	flipped := map[int64]bool{}
	for i, n := range rng.Perm(int(b.Size() / blockSize))[:40] {
		at := b.data.Off + int64(n)*blockSize + rng.Int64N(blockSize)
		if i%2 == 1 {
			at = b.table.area.Off + int64(n)*tableEntry + rng.Int64N(tableEntry)
		}
		raw[at] ^= 1 << rng.IntN(8)
		flipped[int64(n)] = true
	}
	b.promote(false)
	p := make([]byte, blockSize)
	for block := range b.Size() / blockSize {
		_, err := b.ReadAt(p, block*blockSize)
		switch {
		case flipped[block]:
			if !isCorrupt(err) {
				t.Fatalf("block %d has flipped: %v", block, err)
			}
		case err != nil || !bytes.Equal(p, model[block*blockSize:][:blockSize]):
			t.Fatalf("block %d: %v", block, err)
		}
	}
	if s := b.Status(); s.Counters.BadBlocks != 40 || !strings.Contains(strings.Join(s.Degraded, "\n"), "40 damaged blocks") {
		t.Errorf("%+v", s)
	}
	a.open()
	a.inSync()
	b.inSync()
	if !settled(t, b, model) {
		t.Fatal("content differs")
	}
	b.until("repaired", func(s Status) bool { return s.Counters.RepairedBlocks == 40 && len(s.Degraded) == 1 })
	unharmed(t, a, model)
	identical(t, b, a)
	m.add(mediaRow{where: "pair, promoted secondary", area: "data, block table", flips: 40, found: "read", repaired: 40, reported: 40})
}

// What one node alone cannot tell after a kill, the peer can: a flip in the
// last segment, above what is known to be acknowledged, looks like a torn
// tail; a block that recovery changes in part takes its checksum anew.
func mediaAboveTheHint(t *testing.T, m *media) {
	a, b, model := mediaPair(t, m, 30, Options{})
	rng := m.rng(31)
	for round := range 6 {
		for _, n := range []*testNode{a, b} {
			if err := n.checkpoint(false); err != nil {
				t.Fatal(err)
			}
		}
		// b is not heard from any more once it holds the segment: a has not
		// applied it when it dies.
		quiesce(t, a, b)
		last := a.Status().Committed
		block := rng.Int64N(a.Size() / blockSize)
		b.wire.mute.Store(true)
		p := randomBytes(rng, 500)
		waiting := begin(context.Background(), a, block*blockSize+100, p)
		b.until("received", func(s Status) bool { return s.Committed > last })
		copy(model[block*blockSize+100:], p)
		torn := round%2 == 0
		a.crash()
		if err := <-waiting; !errors.Is(err, ErrOutcomeUnknown) {
			t.Fatal(err)
		}
		a.change(func(raw []byte) {
			md := metadataOf(t, raw)
			at := md.Journal.Off + int64(ringOf(raw, md).Position(last)) + rng.Int64N(64+16+500)
			if !torn {
				at = md.Data.Off + block*blockSize + 1000 + rng.Int64N(3000)
			}
			raw[at] ^= 1 << rng.IntN(8)
			r, err := checkImage(raw)
			if err != nil {
				t.Fatal(err)
			}
			if torn && (r.Damaged || r.Recovery.Ending == EndDamaged || r.Recovery.End != last) {
				t.Fatalf("one node alone tells it from a torn tail: %+v", r)
			}
		})
		b.wire.mute.Store(false)
		a.open()
		a.inSync()
		b.inSync()
		if torn && replicate.Rule(a.Status().Rule) == replicate.RuleSplitBrain {
			t.Fatal(a.Status().Reason)
		}
		a.until("compared", func(s Status) bool { return s.Counters.UnverifiedBlocks == 0 })
		if !settled(t, a, model) {
			t.Fatalf("round %d: content differs", round)
		}
		unharmed(t, b, model)
		quiesce(t, a, b)
		unharmed(t, a, model)
		identical(t, a, b)
	}
	m.add(mediaRow{where: "pair, primary killed before apply", area: "journal, last segment", flips: 3, found: "comparison with the peer", repaired: 3, unjudged: 3, peer: 3})
	m.add(mediaRow{where: "pair, primary killed before apply", area: "data that the log changes", flips: 3, found: "comparison with the peer", repaired: 3, unjudged: 3, peer: 3})
}
