package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// TestForcedOverDamageBesideAnother: an operator forces a node over its damaged
// journal while the other one acknowledges. What that holds from the damage on is a
// fork, and the next handshake says so, as it does where nothing is damaged.
func TestForcedOverDamageBesideAnother(t *testing.T) {
	for _, damaged := range []bool{false, true} {
		a, b := pairInSync(t, testConfig{opt: Options{Ack: AckAsync}, quiet: true})
		b.ckptMu.Lock() // what is damaged stays above the checkpoint
		at := a.Status().Committed
		fill(t, a, 9, 10, 3000)
		quiesce(t, a, b)
		b.until("told", func(s Status) bool { return s.Acked == s.Committed })
		crashHeld(b, func(region []byte) {
			if damaged {
				flip(t, region, at)
			}
		})
		a.wire.link.set(true)
		b.open()
		if got := b.Status().Damaged; got != damaged {
			t.Fatalf("damaged %v: %+v", got, b.Status().Recovery)
		}
		b.promote(true)
		commit(t, b, 1<<20, []byte("of b"))
		commit(t, a, 0, []byte("acknowledged by a"))
		a.wire.link.set(false)
		if s := a.peerIs("refused"); replicate.Rule(s.Rule) != replicate.RuleSplitBrain {
			t.Fatalf("damaged %v: %+v", damaged, s)
		}
		got := make([]byte, 17)
		if a.read(t, got, 0); string(got) != "acknowledged by a" {
			t.Errorf("damaged %v: %q", damaged, got)
		}
		b.close()
		a.close()
	}
}

// The same where the other node is alone by decision, and this one, which has its
// history, died while it caught up.
func TestForcedOverDamageBesideOneAlone(t *testing.T) {
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, quiet: true, timeout: slow(2 * time.Second)})
	b.close()
	a.until("alone", func(s Status) bool { return s.Peer == "lost" && !a.pair.Required() })
	at := a.Status().Committed
	fill(t, a, 9, 300, 5000)
	a.wire.setChop(4096, 10*time.Millisecond)
	b.open()
	b.ckptMu.Lock() // what is damaged stays above the checkpoint
	b.until("catching up", func(s Status) bool { return s.Peer == "catching-up" && s.Applied > at+100<<10 })
	crashHeld(b, func(region []byte) { flip(t, region, at) })
	a.wire.link.set(true)
	b.open()
	if !b.Status().Damaged {
		t.Fatalf("%+v", b.Status().Recovery)
	}
	b.promote(true)
	commit(t, b, 1<<20, []byte("of b"))
	commit(t, a, 0, []byte("acknowledged by a"))
	a.wire.setChop(0, 0)
	a.wire.link.set(false)
	if s := a.peerIs("refused"); replicate.Rule(s.Rule) != replicate.RuleSplitBrain {
		t.Fatalf("%+v", s)
	}
}

// mortal is memory whose owner dies at a fence.
type mortal struct {
	*heapMemory
	fences int // that it lives to see
}

var errDied = errors.New("died")

func (m *mortal) Fence() error {
	if m.fences--; m.fences < 0 {
		return errDied
	}
	return m.heapMemory.Fence()
}

// TestLossCutShort: a crash anywhere while damaged log is given up leaves the damage,
// and how far the log went, or a region that has given it up and begun an epoch where
// the damage was.
func TestLossCutShort(t *testing.T) {
	c := makeCrashed(t)
	image := slices.Clone(c.applied)
	m := c.meta
	ring := journal.Ring{Bytes: image[m.Journal.Off:m.Journal.end():m.Journal.end()], Base: m.RingBase}
	ring.Raw(m.Checkpoint.LSN, 80)[70] ^= 1
	open := func(fences int) (*Volume, *mortal) {
		t.Helper()
		mem := &mortal{newHeapMemory(slices.Clone(image)), 1 << 30}
		v, err := openMemory("heap", mem, Options{Logger: nopLogger})
		if err != nil {
			t.Fatal(err)
		}
		mem.fences = fences
		return v, mem
	}
	whole, _ := open(1 << 30)
	before := whole.damage.Load()
	if before == nil {
		t.Fatal("not damaged")
	}
	lost := whole.journal.End()
	epoch := journal.Epoch{Counter: whole.meta.State.History.Last().Epoch.Counter + 77, Node: whole.meta.State.Node}
	begin := func(st *replicate.State) error {
		st.History = st.History.Append(journal.Entry{Epoch: epoch, Start: lost})
		return nil
	}
	for cut := 0; ; cut++ {
		v, mem := open(cut)
		err := (*node)(v).AcceptLoss(begin)
		if err != nil && !errors.Is(err, errDied) {
			t.Fatal(err)
		}
		again, openErr := openMemory("heap", newHeapMemory(slices.Clone(mem.b)), Options{Logger: nopLogger})
		if openErr != nil {
			t.Fatal(openErr)
		}
		last := again.meta.State.History.Last()
		switch d := again.damage.Load(); {
		case d != nil && (d.At != before.At || d.Acked != before.Acked):
			t.Errorf("cut at fence %d: %v, before: %v", cut, d, before)
		case d == nil && (last.Epoch != epoch || last.Start != lost):
			t.Errorf("cut at fence %d: the damage is forgotten, and the last epoch is %+v", cut, last)
		case d != nil && err == nil:
			t.Errorf("given up, and still there: %v", d)
		}
		if err == nil {
			if cut < 4 {
				t.Errorf("%d fences are all", cut)
			}
			return
		}
	}
}

// TestFollowerKeepsItsHistory: the primary has pruned its history up to an epoch that
// began above the follower's checkpoint. The follower makes its data durable before it
// takes that history: of older log it could not say afterwards that it is its own.
func TestFollowerKeepsItsHistory(t *testing.T) {
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, quiet: true})
	b.ckptMu.Lock() // a slow checkpoint
	for i := range 5 {
		a.close()
		a.open()
		a.inSync()
		b.inSync()
		commit(t, a, int64(i)*blockSize, []byte("both"))
	}
	quiesce(t, a, b)
	b.ckptMu.Unlock()
	b.crash()
	var old journal.History
	b.change(func(region []byte) { old = metadataOf(t, region).State.History })
	a.until("alone", func(s Status) bool { return s.Peer == "lost" && !a.pair.Required() })
	a.close()
	peer, wire := a.opt.Peer, a.wire
	a.opt.Peer, a.wire = nil, nil
	for n := 0; ; n++ { // each start begins an epoch
		a.open()
		commit(t, a, 64<<10, []byte{byte(n)})
		first := a.meta.State.History[0]
		a.close()
		if first.Epoch == old[3].Epoch {
			break
		}
	}
	a.opt.Peer, a.wire, a.opt.OnPeerLoss = peer, wire, Block
	b.wire.link.set(true)
	b.open()
	b.ckptMu.Lock()
	if b.Checkpoint() >= old[3].Start {
		b.ckptMu.Unlock()
		t.Skip("its checkpoint came too soon")
	}
	a.open()
	b.wire.link.set(false)
	b.until("catching up", func(s Status) bool { return s.Peer == "catching-up" || s.Peer == "in-sync" })
	for deadline := time.Now().Add(300 * time.Millisecond); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if b.Status().Peer == "in-sync" {
			t.Error("in sync with a history that begins above its checkpoint")
			break
		}
	}
	b.ckptMu.Unlock()
	a.inSync()
	b.inSync()
	commit(t, a, 0, []byte("acknowledged by both"))
	b.crash()
	a.close()
	b.open()
	b.promote(false)
	got := make([]byte, 20)
	if b.read(t, got, 0); string(got) != "acknowledged by both" {
		t.Errorf("%q", got)
	}
}

// TestAloneBesideARefusedPeer: a peer that is refused again and again is no peer that
// has been heard.
func TestAloneBesideARefusedPeer(t *testing.T) {
	for _, part := range []time.Duration{1, 2} { // of the timeout: who dials first
		a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, quiet: true})
		b.close()
		if err := os.Remove(b.path); err != nil {
			t.Fatal(err)
		}
		if err := Create(b.path, CreateOptions{Size: 6 << 20, JournalSize: 2 << 20, Accept: pmem.Emulated}); err != nil {
			t.Fatal(err)
		}
		peer := *b.opt.Peer
		peer.Timeout /= part
		b.opt.Peer = &peer
		b.open()
		a.peerIs("refused")
		ctx, cancel := context.WithTimeout(t.Context(), slow(20*time.Second))
		if err := <-begin(ctx, a, 0, []byte{1}); err != nil {
			t.Errorf("timeout 1/%d: %v, %+v", part, err, a.Status())
		}
		cancel()
		b.close()
		a.close()
	}
}

// TestCopyOverATornBlock: what a full copy replaces is not reported as damaged.
func TestCopyOverATornBlock(t *testing.T) {
	v := found(t, Options{})
	v.copying = true
	v.block(3)[17] ^= 1 // as a crash in an earlier copy may leave it
	if _, err := v.WriteAt([]byte("live"), 3*blockSize); err != nil {
		t.Fatal(err)
	}
	src := make([]byte, blockSize)
	copy(src, "live")
	if err := (*node)(v).CopyBlocks(3, src, []replicate.BlockInfo{{LSN: v.Applied(), CRC: crcOf(src)}}); err != nil {
		t.Fatal(err)
	}
	if err := (*node)(v).FinishCopy(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := v.ReadAt(got, 3*blockSize); err != nil || !bytes.Equal(got, src[:4]) {
		t.Fatalf("%q, %v", got, err)
	}
	if n, counted := v.bad.n.Load(), v.counters.badBlocks.Load(); n != 0 || counted != 0 {
		t.Errorf("%d damaged blocks, %d counted", n, counted)
	}
}

// TestDamagedBelowTheFork: async; the peer was promoted by force while this node
// acknowledged alone, and then this node's log is damaged below the fork. What it
// acknowledged is in its data, and no log of the peer's repairs that.
func TestDamagedBelowTheFork(t *testing.T) {
	for _, damaged := range []bool{false, true} {
		a, b := pairInSync(t, testConfig{opt: Options{Ack: AckAsync}, quiet: true})
		fill(t, a, 9, 10, 3000)
		quiesce(t, a, b)
		at := a.Status().Committed
		commit(t, a, 0, []byte("held by both"))
		quiesce(t, a, b)
		a.wire.link.set(true)
		a.peerIs("lost")
		commit(t, a, 1<<20, []byte("acknowledged by a alone"))
		b.promote(true)
		commit(t, b, 0, []byte("of b"))
		a.crash()
		a.change(func(region []byte) {
			if m := metadataOf(t, region); m.Checkpoint.LSN > at {
				t.Skip("a checkpoint came between")
			}
			if damaged {
				flip(t, region, at)
			}
		})
		a.open()
		if got := a.Status().Damaged; got != damaged {
			t.Fatalf("damaged %v: %+v", damaged, a.Status().Recovery)
		}
		a.wire.link.set(false)
		if s := b.peerIs("refused"); replicate.Rule(s.Rule) != replicate.RuleSplitBrain {
			t.Errorf("damaged %v: %+v", damaged, s)
		}
		b.close()
		a.close()
	}
}

// TestForcedAfterPartOfTheLog: a damaged primary has taken a part of the log from its
// peer when that is lost, and is forced. What it took, it applies.
func TestForcedAfterPartOfTheLog(t *testing.T) {
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Block}, quiet: true, timeout: slow(3 * time.Second)})
	quiesce(t, a, b)
	if err := a.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	at := a.Status().Committed
	const block = 900
	old := make([]byte, blockSize)
	commit(t, a, 0, []byte("the first, which is damaged"))
	want := []byte("the second, whole at both")
	commit(t, a, block*blockSize, want)
	fill(t, a, 9, 60, 8000)
	quiesce(t, a, b)
	a.crash()
	a.change(func(region []byte) {
		m := metadataOf(t, region)
		if m.Checkpoint.LSN > at {
			t.Skip("a checkpoint came between")
		}
		flip(t, region, at)
		copy(region[m.Data.Off+block*blockSize:][:blockSize], old) // what the crash kept
	})
	b.wire.setChop(2048, 10*time.Millisecond)
	a.open()
	a.until("took a part", func(s Status) bool { return s.Committed > at+20<<10 })
	a.wire.link.set(true)
	a.until("lost", func(s Status) bool { return s.Peer == "lost" })
	if !a.Status().Damaged {
		t.Skip("it took all")
	}
	if err := a.ContinueAlone(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := a.ReadAt(got, block*blockSize); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
}
