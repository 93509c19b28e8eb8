package nvmmirror

import (
	"bytes"
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/replicate"
)

// Older copies of a region, put back against the advice of OPERATIONS, and a title that
// another one has gone beyond: what was acknowledged meanwhile is not copied over, nor
// gone on without.

// imageOf is a copy of a node's region, made while the node was stopped.
func imageOf(n *testNode) (image []byte) {
	n.close()
	n.change(func(region []byte) { image = bytes.Clone(region) })
	return image
}

// putBack puts a copy in the place of the region of a node that is stopped.
func putBack(n *testNode, image []byte) { n.change(func(region []byte) { copy(region, image) }) }

// crashHeld crashes a node whose checkpoint the caller has held (ckptMu) where it is, and
// changes what is left.
func crashHeld(n *testNode, change func(region []byte)) {
	n.applyMu.Lock()
	n.metaMu.Lock()
	image := bytes.Clone(n.mem.Bytes())
	n.metaMu.Unlock()
	n.applyMu.Unlock()
	n.ckptMu.Unlock()
	n.crash()
	change(image)
	putBack(n, image)
}

// promotionIsRefused tries one, unforced.
func promotionIsRefused(t *testing.T, n *testNode) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), n.opt.timeout())
	defer cancel()
	refused(t, "promote", n.Promote(ctx, false))
}

// The copy of a primary goes on alone. Its first epoch begins where the one began that
// the original began after the copy was made.
func TestOldImageGoesOnAlone(t *testing.T) {
	for _, m := range modes[1:] {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			a, b := pairInSync(t, testConfig{quiet: true, opt: m.opt})
			fill(t, a, 7, 10, 3000)
			quiesce(t, a, b)
			old := imageOf(a)
			a.open()
			a.inSync()
			fill(t, a, 9, 3, 3000)
			quiesce(t, a, b)
			want := content(t, a)
			a.crash()
			b.crash()
			putBack(a, old)
			a.open()
			a.until("serving", func(s Status) bool { return s.Serving })
			fill(t, a, 10, 6, 3000)
			b.open()
			if s := a.peerIs(replicate.PhaseRefused); replicate.Rule(s.Rule) != replicate.RuleSplitBrain {
				t.Errorf("refused by %s: %s", s.Rule, s.Reason)
			}
			a.close()
			b.promote(true)
			if !bytes.Equal(content(t, b), want) {
				t.Error("what was acknowledged is gone")
			}
		})
	}
}

// b was promoted by force, acknowledged, and was demoted. a, which still believes in its
// title, hears b's hello, and the link goes before the verdict.
func TestAloneAfterAHelloOfALaterEpoch(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, quiet: true})
	quiesce(t, a, b)
	a.crash()
	b.peerIs(replicate.PhaseLost)
	b.promote(true)
	fill(t, b, 5, 5, 3000)
	want := content(t, b)
	b.demote()
	if s := b.Status(); s.Acked != s.Committed {
		t.Errorf("alone, it acknowledged up to %d, and says %d", s.Committed, s.Acked)
	}
	var told atomic.Bool
	b.wire.setCorrupt(chainCorrupt(&told))
	a.open()
	a.until("told", func(s Status) bool { return told.Load() && !s.Title })
	b.wire.link.set(true)
	a.peerIs(replicate.PhaseLost)
	time.Sleep(a.opt.Peer.Timeout * 3 / 2) // in which it would have gone alone
	promotionIsRefused(t, a)
	b.wire.setCorrupt(nil)
	b.wire.link.set(false)
	b.peerIs(replicate.PhaseConnected)
	b.promote(false)
	a.inSync()
	if !bytes.Equal(content(t, b), want) {
		t.Error("what was acknowledged is gone")
	}
	identical(t, b, a)
}

// The copy of a secondary from before the primary's last start catches up in part.
func TestOldImageOfTheSecondary(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{quiet: true})
	fill(t, a, 7, 10, 3000)
	quiesce(t, a, b)
	old := imageOf(b)
	b.open()
	a.inSync()
	a.crash()
	a.open()
	a.inSync() // in a new epoch
	fill(t, a, 9, 30, 3000)
	quiesce(t, a, b)
	b.crash()
	putBack(b, old)
	a.wire.setChop(500, 20*time.Millisecond) // it takes its time
	b.open()
	b.peerIs(replicate.PhaseCatchUp)
	b.wire.link.set(true)
	b.peerIs(replicate.PhaseLost)
	if have, of := b.Status().Committed, a.Status().Committed; have >= of {
		t.Fatalf("it has all of the log, %d of %d", have, of)
	}
	promotionIsRefused(t, b)
	a.wire.setChop(0, 0)
	b.wire.link.set(false)
	a.inSync()
	quiesce(t, a, b)
	identical(t, a, b)
}

// The copy of a secondary that was about to be promoted comes back beside the other
// one, which holds what was acknowledged since: that one gets the title.
func TestOldImageOfBeforeAPromotion(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{quiet: true, opt: Options{OnPeerLoss: Alone}})
	fill(t, a, 7, 10, 3000)
	quiesce(t, a, b)
	switchOver(t, a, b)
	b.demote()
	a.until("title", func(s Status) bool { return s.Title })
	old := imageOf(a)
	a.open()
	a.peerIs(replicate.PhaseConnected)
	a.promote(false)
	a.inSync()
	b.inSync()
	fill(t, a, 9, 10, 3000)
	quiesce(t, a, b)
	want := content(t, a)
	b.close()
	a.crash()
	putBack(a, old)
	b.open()
	a.open()
	b.until("title", func(s Status) bool { return s.Title })
	promotionIsRefused(t, a)
	b.promote(false)
	b.inSync()
	if !bytes.Equal(content(t, b), want) {
		t.Error("what was acknowledged is gone")
	}
}

// The same of a primary that had log which nobody acknowledged: the title does not stay
// at neither.
func TestOldImageWithATail(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{quiet: true, opt: Options{OnPeerLoss: Alone}, timeout: slow(2 * time.Second)})
	quiesce(t, a, b)
	b.wire.link.set(true)
	waits := begin(context.Background(), a, 0, []byte("waits"))
	a.until("written", func(s Status) bool { return s.Committed > s.Acked })
	a.crash()
	<-waits
	var old []byte
	a.change(func(region []byte) { old = bytes.Clone(region) })
	b.promote(true)
	commit(t, b, 0, []byte("instead"))
	b.wire.link.set(false)
	a.open()
	b.inSync()
	switchOver(t, b, a)
	fill(t, a, 9, 3, 3000)
	quiesce(t, a, b)
	want := content(t, a)
	a.crash()
	putBack(a, old)
	a.open()
	b.until("title", func(s Status) bool { return s.Title })
	promotionIsRefused(t, a)
	b.promote(false)
	b.inSync()
	if !bytes.Equal(content(t, b), want) {
		t.Error("what was acknowledged is gone")
	}
	identical(t, b, a)
}

// A primary that was alone by decision, and wrote nothing since, comes back beside one
// that was promoted by force and acknowledged: it gives its title up. Once the other one
// is demoted it hears of no primary, and does not go on all the same.
func TestNotAloneOnceTheTitleIsGone(t *testing.T) {
	for _, m := range modes[1:] {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			a, b := pairInSync(t, testConfig{quiet: true, opt: m.opt})
			quiesce(t, a, b)
			b.wire.link.set(true)
			a.peerIs(replicate.PhaseLost)
			if err := a.ContinueAlone(context.Background(), false); err != nil {
				t.Fatal(err)
			}
			a.crash()
			a.open()
			a.until("serving in an epoch of its own", func(s Status) bool { return s.Serving })
			a.crash()
			b.peerIs(replicate.PhaseLost)
			b.promote(true)
			commit(t, b, 0, []byte("acknowledged by b"))
			want := content(t, b)
			b.wire.link.set(false)
			a.open()
			a.until("without the title", func(s Status) bool { return !s.Title && s.Peer == replicate.PhaseRefused })
			b.demote()
			before := a.Status().Counters.Refused
			s := a.until("refused by a secondary", func(s Status) bool { return s.Counters.Refused > before+1 })
			if s.Serving {
				t.Fatalf("serves without the title from LSN %d", s.Committed)
			}
			a.demote()
			b.peerIs(replicate.PhaseConnected)
			b.promote(false)
			a.inSync()
			if !bytes.Equal(content(t, b), want) {
				t.Error("what was acknowledged is gone")
			}
			identical(t, b, a)
		})
	}
}

// A primary that went on alone, by force, beside a peer with the title is damaged where
// it did, or before: it holds no log of its new epoch any more. Its peer hears that log
// was acknowledged under that, and is not promoted without force.
func TestTitleBesideADamagedEpoch(t *testing.T) {
	for _, where := range []string{"there", "before"} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			a, b := pairInSync(t, testConfig{quiet: true})
			at := a.Status().Committed
			a.ckptMu.Lock() // what is flipped stays above the checkpoint
			fill(t, a, 7, 10, 3000)
			quiesce(t, a, b)
			if where == "there" {
				at = a.Status().Committed
			}
			b.wire.link.set(true)
			a.peerIs(replicate.PhaseLost)
			if err := a.ContinueAlone(context.Background(), true); err != nil {
				t.Fatal(err)
			}
			fill(t, a, 9, 10, 3000)
			crashHeld(a, func(region []byte) { flip(t, region, at) })
			b.wire.link.set(false)
			a.open()
			if s := a.Status(); !s.Damaged || s.Committed != at {
				t.Fatalf("damaged %v, the log ends at %d, not %d", s.Damaged, s.Committed, at)
			}
			b.peerIs(replicate.PhaseRefused)
			promotionIsRefused(t, b)
			if b.Status().Title {
				t.Error("it holds the title")
			}
		})
	}
}
