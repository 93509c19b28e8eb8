package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// begin starts a commit that is expected to wait, and returns what becomes of
// it.
func begin(ctx context.Context, n *testNode, off int64, p []byte) <-chan error {
	done := make(chan error, 1)
	tx := n.Begin()
	tx.Write(off, p)
	go func() { _, err := tx.Commit(ctx); done <- err }()
	return done
}

// lostTail commits n times with a peer that is cut off, and gives up once there
// is a log that nobody else holds. It returns where that ends.
func lostTail(t testing.TB, n *testNode, count int, p []byte) LSN {
	t.Helper()
	before := n.Status().Committed
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var waiting []<-chan error
	for i := range count {
		waiting = append(waiting, begin(ctx, n, int64(i)*1000, p))
	}
	n.until("written", func(s Status) bool { return s.Committed > before })
	cancel()
	for _, w := range waiting {
		if err := <-w; !errors.Is(err, ErrOutcomeUnknown) && !errors.Is(err, context.Canceled) {
			t.Fatalf("commit without the peer: %v", err)
		}
	}
	s := n.Status()
	if s.Committed == s.Acked {
		t.Fatal("no tail")
	}
	return s.Committed
}

// ruleIs waits for the rule of a connection. That of the next may be another:
// a node whose machine stalls as it catches up begins there.
func (n *testNode) ruleIs(r replicate.Rule) {
	n.t.Helper()
	n.until("by rule "+string(r), func(s Status) bool { return replicate.Rule(s.Rule) == r })
}

func TestGoingAlone(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
	before := a.Status()
	b.wire.link.set(true)
	waiting := begin(context.Background(), a, 100, []byte("waits"))
	a.until("written", func(s Status) bool { return s.Committed > before.Committed })
	if err := <-waiting; err != nil {
		t.Fatalf("a waiting commit failed as its node went alone: %v", err)
	}
	s := a.Status()
	if last := a.meta.State.History.Last(); last.PeerIn || s.Epoch.Counter <= before.Epoch.Counter || !s.Title {
		t.Fatalf("alone with history entry %+v, title %v", last, s.Title)
	}
	l := startLoad(t, 4, func() *Volume { return a.Volume })
	l.more(200)
	b.wire.link.set(false)
	b.inSync()
	l.more(200)
	l.end()
	l.check(a)
	identical(t, a, b)
	a.crash()
	a.open() // the entry with the peer is durable: it needs the peer again
	a.inSync()
	l.check(a)
}

func TestAsync(t *testing.T) {
	a, b := pairInSync(t, testConfig{opt: Options{Ack: AckAsync}})
	b.wire.link.set(true)
	fill(t, a, 1, 20, 1000) // acknowledged without the peer
	if s := a.Status(); s.Acked != s.Committed {
		t.Fatalf("async: acknowledged up to %d of %d", s.Acked, s.Committed)
	}
	if lag := b.Status().Committed; lag >= a.Status().Committed {
		t.Fatal("the peer does not lag behind a cut link")
	}
	b.wire.link.set(false)
	b.inSync()
	l := startLoad(t, 4, func() *Volume { return a.Volume })
	l.more(500)
	l.end()
	l.check(a)
	identical(t, a, b)
}

func TestAbsence(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		count int
		rule  replicate.Rule
	}{
		{"short", 20, replicate.RuleCatchUp},
		{"long", 500, replicate.RuleFull},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
			b.crash()
			fill(t, a, 2, c.count, 20000)
			b.open()
			b.ruleIs(c.rule)
			b.inSync()
			identical(t, a, b)
		})
	}
}

// A full copy onto a new region, while writers go on.
func TestFullCopyUnderLoad(t *testing.T) {
	t.Parallel()
	a, b := newPair(t, testConfig{size: 32 << 20, opt: Options{OnPeerLoss: Alone}})
	a.promote(false)
	a.inSync()
	replace(t, b)
	a.until("alone", func(s Status) bool { return s.Peer == "lost" && !a.pair.Required() })
	fill(t, a, 3, 500, 20000)
	l := startLoad(t, 8, func() *Volume { return a.Volume })
	l.more(50)
	b.open()
	// On a busy machine the copy may be interrupted and begin anew later.
	s := b.until("resyncing", func(s Status) bool { return s.Peer == "resyncing" })
	if got := replicate.Rule(s.Rule); got != replicate.RuleAdoptFull && got != replicate.RuleFull {
		t.Errorf("rule %q", got)
	}
	b.inSync()
	l.more(200)
	l.end()
	l.check(a)
	identical(t, a, b)
	want := content(t, a)
	a.demote()
	b.until("title", func(s Status) bool { return s.Title })
	b.promote(false)
	if !bytes.Equal(content(t, b), want) {
		t.Fatal("the copy differs")
	}
	l.check(b)
}

// Commits wait for the peer: they are in the log, and in no block that is
// copied. The copy must not undo what the log brought before it.
func TestFullCopyWithCommitsWaiting(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{})
	fill(t, a, 16, 500, 20000)
	b.close()
	var waiting []<-chan error
	for i := range int64(20) {
		waiting = append(waiting, begin(context.Background(), a, i*200000, []byte("waits for the peer")))
	}
	a.until("waiting", func(s Status) bool { return s.Committed > s.Applied && s.Peer == "lost" })
	replace(t, b)
	b.open()
	b.inSync()
	for _, w := range waiting {
		if err := <-w; err != nil {
			t.Fatal(err)
		}
	}
	identical(t, a, b)
}

// The target of a full copy crashes in the middle: it is inconsistent until a
// copy has gone through.
func TestFullCopyInterrupted(t *testing.T) {
	t.Parallel()
	a, b := newPair(t, testConfig{size: 16 << 20, opt: Options{OnPeerLoss: Alone}})
	a.promote(false)
	a.inSync()
	replace(t, b)
	fill(t, a, 4, 500, 20000)
	a.wire.setChop(32<<10, time.Millisecond)
	for range 3 {
		b.open()
		b.until("copying", func(s Status) bool { return s.Resync != nil && s.Resync.Done > 1<<20 })
		b.crash()
	}
	b.wire.link.set(true)
	b.open()
	if s := b.Status(); len(s.Degraded) == 0 || b.meta.State.Resync == nil {
		t.Fatalf("not inconsistent after a copy that was cut short: %+v", s)
	}
	refused(t, "promotion of an inconsistent node", b.Promote(context.Background(), true))
	a.wire.setChop(0, 0)
	b.wire.link.set(false)
	b.inSync()
	identical(t, a, b)
}

// A former primary that was cut off before it died holds log that nobody
// acknowledged. It drops it as it returns.
func TestDropTail(t *testing.T) {
	t.Parallel()
	for _, kill := range []string{"crash", "close", "alive"} {
		t.Run(kill, func(t *testing.T) {
			a, b := pairInSync(t, testConfig{})
			fill(t, a, 5, 30, 5000)
			quiesce(t, a, b)
			b.wire.link.set(true)
			lostTail(t, a, 5, bytes.Repeat([]byte("lost"), 3000))
			switch kill {
			case "crash":
				a.crash()
			case "close":
				a.close()
			}
			b.peerIs("lost")
			b.promote(false)
			fill(t, b, 6, 30, 5000)
			want := content(t, b)
			b.wire.link.set(false)
			if kill != "alive" {
				a.open()
			}
			a.ruleIs(replicate.RuleDropTail)
			a.inSync()
			b.inSync()
			identical(t, b, a)
			b.demote()
			a.until("title", func(s Status) bool { return s.Title })
			a.promote(false)
			if !bytes.Equal(content(t, a), want) {
				t.Fatal("content differs after the tail was dropped")
			}
		})
	}
}

// lastOfTheLog commits, and returns where the last three segments end. Both nodes have
// applied what is before them.
func lastOfTheLog(t *testing.T, a, b *testNode) (ends []LSN) {
	t.Helper()
	fill(t, a, 7, 10, 3000)
	quiesce(t, a, b)
	for i := range 3 {
		ends = append(ends, commit(t, a, int64(i)*100, bytes.Repeat([]byte{byte(i + 1)}, 100)))
	}
	return ends
}

// openUntilItTookTheLog opens a node that lacks log of its peer's, and cuts the link
// when it has taken that.
func openUntilItTookTheLog(a, b *testNode) {
	took := make(chan struct{})
	core, _ := observer.New(zap.InfoLevel)
	a.opt.Logger = zap.New(core, zap.Hooks(func(e zapcore.Entry) error {
		if strings.HasPrefix(e.Message, "took the log") {
			b.wire.link.set(true)
			close(took)
		}
		return nil
	}))
	a.open()
	<-took
}

// forgetLog makes a closed region one that crashed before it applied log from an LSN
// on, and lost that up to end.
func forgetLog(region []byte, from, end LSN) {
	clear(forgetEntries(region, from).Raw(from, int(end-from)))
}

// forgetEntries makes block table entries tell nothing of log from an LSN on, and
// returns the ring.
func forgetEntries(region []byte, from LSN) journal.Ring {
	c, err := readCopies(metadataBytes(region))
	if err != nil {
		panic(err)
	}
	m := c.meta
	for b := range m.Size / blockSize {
		e := region[m.Table.Off+b*tableEntry:][:tableEntry]
		if old, ok := decodeEntry(e, b); ok && old.lsn >= from {
			putEntry(e, entry{crc: old.crc}, b)
		}
	}
	return ringOf(region, m)
}

// A primary whose last segments were lost, above what it knows to be
// acknowledged, looks like one with a torn tail. Its peer has them.
func TestTakeLog(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"truncated", "flipped"} {
		t.Run(how, func(t *testing.T) {
			a, b := pairInSync(t, testConfig{})
			ends := lastOfTheLog(t, a, b)
			want := content(t, a)
			a.crash()
			a.change(func(region []byte) {
				if how == "truncated" {
					forgetLog(region, ends[0], ends[2])
					return
				}
				// The third segment: its predecessors' hints end before it.
				forgetEntries(region, ends[0]).Raw(ends[1], 80)[70] ^= 4
			})
			a.open()
			if r := a.Status().Recovery; r.End >= ends[2] || r.Damage != "" {
				t.Fatalf("recovered up to %d of %d, damage %q", r.End, ends[2], r.Damage)
			}
			a.inSync()
			if s := a.Status(); s.Committed < ends[2] {
				t.Fatalf("the log ends at %d, the peer held it up to %d", s.Committed, ends[2])
			}
			if !bytes.Equal(content(t, a), want) {
				t.Fatal("acknowledged data is lost")
			}
			identical(t, a, b)
		})
	}
}

// Damage below what is known to be acknowledged, on the primary: fetched from
// the peer, never skipped.
func TestDamagedPrimary(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{})
	a.ckptMu.Lock() // what is damaged stays above the checkpoint
	at := a.Status().Committed
	fill(t, a, 8, 10, 3000)
	want := content(t, a)
	crashHeld(a, func(region []byte) { flip(t, region, at) })
	b.wire.link.set(true)
	a.open()
	if s := a.Status(); s.Recovery.Damage == "" || s.Serving {
		t.Fatalf("damage not seen, or served: %+v", s)
	}
	refused(t, "continuing alone with a damaged journal", a.ContinueAlone(context.Background(), false))
	b.wire.link.set(false)
	a.inSync()
	if !bytes.Equal(content(t, a), want) {
		t.Fatal("acknowledged data is lost")
	}
	identical(t, a, b)
}

// Damage on the secondary: repaired by the primary.
func TestDamagedSecondary(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{})
	b.ckptMu.Lock() // what is damaged stays above the checkpoint
	at := a.Status().Committed
	fill(t, a, 9, 10, 3000)
	quiesce(t, a, b)
	b.until("told", func(s Status) bool { return s.Acked == s.Committed })
	crashHeld(b, func(region []byte) { flip(t, region, at) })
	a.wire.link.set(true)
	b.open()
	if b.Status().Recovery.Damage == "" {
		t.Fatal("damage not seen")
	}
	refused(t, "promotion with a damaged journal", b.Promote(context.Background(), false))
	a.wire.link.set(false)
	b.inSync()
	identical(t, a, b)
}

// A former primary comes back with a damaged log and a tail behind the damage
// that its peer never had: what it wrote itself proves nothing, so the tail is
// dropped, and the node is whole once its peer has repaired it.
func TestDamageBeforeALostTail(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{})
	a.ckptMu.Lock() // what is damaged stays above the checkpoint
	at := a.Status().Committed
	fill(t, a, 8, 10, 3000)
	quiesce(t, a, b)
	b.wire.link.set(true)
	lostTail(t, a, 5, bytes.Repeat([]byte("lost"), 3000))
	crashHeld(a, func(region []byte) { flip(t, region, at) })
	b.peerIs("lost")
	b.promote(false)
	want := content(t, b)
	b.wire.link.set(false)
	a.open()
	if a.Status().Recovery.Damage == "" {
		t.Fatal("damage not seen")
	}
	a.inSync()
	b.inSync()
	b.demote()
	a.until("title", func(s Status) bool { return s.Title })
	a.promote(false)
	if !bytes.Equal(content(t, a), want) {
		t.Fatal("content differs")
	}
	identical(t, a, b)
}

// flip flips one bit in the segment at lsn of a closed region.
func flip(t testing.TB, region []byte, lsn LSN) {
	t.Helper()
	m := metadataOf(t, region)
	if lsn < m.Checkpoint.LSN {
		t.Fatalf("LSN %d lies below the checkpoint at %d", lsn, m.Checkpoint.LSN)
	}
	ring := journal.Ring{Bytes: region[m.Journal.Off:m.Journal.end():m.Journal.end()], Base: m.RingBase}
	ring.Raw(lsn, journal.Align)[40] ^= 1
}

// TestCopyFromRestartedPrimary: power fails at a primary right after it applied its
// last transaction. Its data, stored past the cache, is durable, its table entry is
// not, and nothing tells yet that it was acknowledged, so that recovery leaves it.
// The peer is lost in the same event, and replaced: the copy that it gets holds the
// block as redo would leave it.
func TestCopyFromRestartedPrimary(t *testing.T) {
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Block}, quiet: true})
	fill(t, a, 1, 500, 20000) // the ring no longer reaches the log's start
	quiesce(t, a, b)
	if err := a.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	before := a.Status().Committed
	b.wire.link.set(true)
	const block = 5
	data := bytes.Repeat([]byte{0xab}, blockSize)
	waiting := begin(context.Background(), a, block*blockSize, data)
	a.until("written", func(s Status) bool { return s.Committed > before })
	a.crash()
	<-waiting
	replace(t, b)
	a.change(func(region []byte) { copy(region[metadataOf(t, region).Data.Off+block*blockSize:], data) })
	b.wire.link.set(false)
	a.open()
	b.open()
	a.until("in sync", func(s Status) bool { return s.Peer == "in-sync" })
	a.until("compared", func(s Status) bool { return s.Counters.UnverifiedBlocks == 0 })
	if s := a.Status(); s.Counters.BadBlocks != 0 {
		t.Errorf("a block that was still to be redone counted as damaged: %+v", s)
	}
	got := make([]byte, blockSize)
	if _, err := a.ReadAt(got, block*blockSize); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%v: %x…", err, got[:8])
	}
	// A block that really is damaged is still found.
	func() {
		a.applyMu.Lock()
		defer a.applyMu.Unlock()
		a.block(block + 1)[9] ^= 1
	}()
	var corrupt *CorruptError
	if _, err := (*node)(a.Volume).ReadBlocks(block, make([]byte, 2*blockSize), make([]replicate.BlockInfo, 2)); !errors.As(err, &corrupt) {
		t.Errorf("a damaged block: %v", err)
	}
}

// TestCopyAfterTakingTheLog: a restarted primary takes what was damaged in its log
// from its peer, which is lost before they join, and replaced. A block's entry is
// durable from before the crash, its data is not, and the log that changes it is yet
// to be redone: the copy must not say that it holds that.
func TestCopyAfterTakingTheLog(t *testing.T) {
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Block}, quiet: true})
	fill(t, a, 1, 500, 20000) // the ring no longer reaches the log's start
	quiesce(t, a, b)
	if err := a.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	const block = 5
	old := make([]byte, blockSize)
	a.read(t, old, block*blockSize)
	first := a.Status().Committed
	commit(t, a, 9*blockSize, bytes.Repeat([]byte{0xcd}, 300))
	data := bytes.Repeat([]byte{0xab}, 100)
	commit(t, a, block*blockSize, data)
	quiesce(t, a, b)
	a.crash()
	a.change(func(region []byte) {
		m := metadataOf(t, region)
		if m.Checkpoint.LSN > first {
			t.Skip("a checkpoint came between")
		}
		flip(t, region, first)
		copy(region[m.Data.Off+block*blockSize:], old)
	})
	openUntilItTookTheLog(a, b)
	replace(t, b)
	b.wire.link.set(false)
	b.open()
	a.until("in sync", func(s Status) bool { return s.Peer == "in-sync" })
	quiesce(t, a, b)
	a.until("compared", func(s Status) bool { return s.Counters.UnverifiedBlocks == 0 })
	identical(t, a, b)
	got := make([]byte, len(data))
	if a.read(t, got, block*blockSize); !bytes.Equal(got, data) || a.Status().Counters.BadBlocks != 0 {
		t.Errorf("%x…, %+v", got[:4], a.Status().Counters)
	}
}

// Loss from the log's very start on: the blocks stay unverified over a restart.
func TestAcceptLossAtTheStart(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	v := openQuiet(t, mem)
	for range 3 {
		if _, err := v.WriteAt([]byte("x"), 5*blockSize+7); err != nil {
			t.Fatal(err)
		}
	}
	image := newHeapMemory(slices.Clone(mem.b)) // killed before its first checkpoint
	image.b[v.ring.Off+20] ^= 1
	o, err := Options{Logger: nopLogger, AcceptLoss: true}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	w, err := openMemory("x", image, o)
	if err == nil {
		err = w.takeUp()
	}
	if err != nil {
		t.Fatal(err)
	}
	if n := w.unverified.n.Load(); n != 1 {
		t.Fatalf("%d blocks unverified", n)
	}
	w.pair.Close()
	again := openQuiet(t, newHeapMemory(slices.Clone(image.b)))
	if n := again.unverified.n.Load(); n != 1 {
		t.Errorf("%d blocks unverified after a restart", n)
	}
}

// A primary loses the end of its log to a flip while its peer is copied to: the peer
// still says how far it went.
func TestLossBesideACopy(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, size: 32 << 20, quiet: true})
	for range 3 * MinJournal / (100 << 10) { // the journal does not reach back
		commit(t, a, 0, make([]byte, 100<<10))
	}
	replace(t, b)
	a.wire.setChop(128<<10, 50*time.Millisecond) // the copy takes half a minute
	b.open()
	a.until("the copy has begun", func(s Status) bool { return s.Peer == "resyncing" && s.Serving })
	a.ckptMu.Lock() // what is lost stays above the checkpoint
	commit(t, a, 0, []byte("not lost"))
	from := a.Status().Committed
	commit(t, a, 0, []byte("lost"))
	to := a.Status().Committed
	b.until("it has that", func(s Status) bool { return s.Committed >= to })
	crashHeld(a, func(region []byte) { forgetLog(region, from, to) })
	a.wire.setChop(0, 0)
	a.open()
	a.until("refused", func(s Status) bool { return s.Rule == string(replicate.RuleUnrepairable) && s.Damaged })
	if s := a.Status(); s.Serving {
		t.Errorf("serves from LSN %d", s.Committed)
	}
	refused(t, "continue-alone", a.ContinueAlone(context.Background(), false))
	if err := a.ContinueAlone(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	a.inSync()
	identical(t, a, b)
}
