package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

var modes = []struct {
	name string
	opt  Options
}{
	{"block", Options{}},
	{"alone", Options{OnPeerLoss: Alone}},
	{"async", Options{Ack: AckAsync}},
	{"async-alone", Options{Ack: AckAsync, OnPeerLoss: Alone}},
}

// primaryHolds says where the title belongs once a pair is in sync.
func primaryHolds(o Options) bool { return o.Ack == AckAsync || o.OnPeerLoss == Alone }

// pairInSync is a pair with a as primary and some data.
func pairInSync(t testing.TB, c testConfig) (a, b *testNode) {
	t.Helper()
	a, b = newPair(t, c)
	a.promote(false)
	a.inSync()
	b.inSync()
	commit(t, a, a.Size()-blockSize, []byte("begun"))
	return a, b
}

// setMode changes the configuration of closed nodes.
func setMode(o Options, nodes ...*testNode) {
	for _, n := range nodes {
		n.opt.Ack, n.opt.OnPeerLoss = o.Ack, o.OnPeerLoss
	}
}

func TestTitleOfAPairInSync(t *testing.T) {
	t.Parallel()
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			a, b := pairInSync(t, testConfig{opt: m.opt})
			want := primaryHolds(m.opt)
			if a.Status().Title != want || b.Status().Title == want {
				t.Fatalf("title: primary %v, secondary %v", a.Status().Title, b.Status().Title)
			}
			refused(t, "promotion beside a living primary", b.Promote(context.Background(), false))

			b.wire.link.set(true)
			a.peerIs("lost")
			b.peerIs("lost")
			if !want {
				refused(t, "continuing alone without the title", a.ContinueAlone(context.Background(), false))
				b.promote(false)
				return
			}
			refused(t, "promotion without the title", b.Promote(context.Background(), false))
			if err := a.ContinueAlone(context.Background(), false); err != nil {
				t.Fatalf("continuing alone with the title: %v", err)
			}
			commit(t, a, 0, []byte("alone"))
		})
	}
}

// The in-sync secondary holds the title under block: whoever promotes it moves
// the title's use, and the former primary may then do nothing.
func TestTitleGoesWithThePromotion(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{})
	a.crash()
	b.peerIs("lost")
	b.promote(false)
	commit(t, b, 0, []byte("b alone"))
	b.crash()
	a.open()
	a.peerIs("lost")
	refused(t, "continuing alone without the title", a.ContinueAlone(context.Background(), false))
	if a.Status().Serving {
		t.Fatal("a restarted primary serves without having heard its peer")
	}
	b.open()
	a.inSync()
	if got := string(content(t, b)[:7]); got != "b alone" {
		t.Fatalf("read %q", got)
	}
	a.roleIs("secondary")
	identical(t, b, a)
}

// A secondary that lost the title while it was away cannot be promoted.
func TestTitleLostWhileAway(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
	b.crash()
	a.until("alone", func(s Status) bool { return s.Peer == "lost" && !a.pair.Required() })
	commit(t, a, 0, []byte("a alone"))
	a.crash()
	b.open()
	b.peerIs("lost")
	refused(t, "promotion of a node that missed commits", b.Promote(context.Background(), false))
	a.open()
	a.inSync()
	b.inSync()
	refused(t, "promotion without the title", b.Promote(context.Background(), false))
	identical(t, a, b)
}

// A secondary that was never in sync: it follows, but its primary never let it
// join.
func TestTitleNeverInSync(t *testing.T) {
	t.Parallel()
	a, b := newPair(t, testConfig{size: 16 << 20, journal: 2 << 20})
	a.promote(true)
	a.inSync()
	b.close()
	a.until("waiting", func(s Status) bool { return s.Peer == "lost" })
	if err := a.ContinueAlone(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	fill(t, a, 1, 400, 16<<10) // beyond the ring: the next follower needs a full copy
	replace(t, b)
	a.wire.setChop(4<<10, 20*time.Millisecond)
	b.open()
	b.until("resyncing", func(s Status) bool { return s.Peer == "resyncing" })
	refused(t, "promotion of an inconsistent node", b.Promote(context.Background(), false))
	refused(t, "forced promotion of an inconsistent node", b.Promote(context.Background(), true))
	b.crash()
	b.open()
	refused(t, "promotion of an inconsistent node", b.Promote(context.Background(), false))
	refused(t, "forced promotion of an inconsistent node", b.Promote(context.Background(), true))
	a.wire.setChop(0, 0)
	a.inSync()
	identical(t, a, b)
}

func TestTitleBlank(t *testing.T) {
	t.Parallel()
	a, b := newPair(t, testConfig{})
	b.close()
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	refused(t, "promotion of a blank node without peer", a.Promote(ctx, false))
	b.open()
	a.promote(false)
	a.inSync()
	// A blank node beside data is not equally blank.
	replace(t, b)
	a.close()
	b.open()
	ctx, cancel = context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	refused(t, "promotion of a blank node without peer", b.Promote(ctx, false))
	a.open()
	b.inSync()
	refused(t, "promotion beside a primary", b.Promote(context.Background(), false))
}

// Title given up by one and not yet taken by the other: nobody holds it, and
// the next join repairs that.
func TestTitleInNobodysHands(t *testing.T) {
	t.Parallel()
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			a, b := pairInSync(t, testConfig{opt: m.opt})
			a.crash()
			b.crash()
			for _, n := range []*testNode{a, b} {
				n.editState(func(m *metadata) { m.State.Title = false })
			}
			a.open()
			b.wire.link.set(true)
			b.open()
			a.peerIs("lost")
			refused(t, "promotion without the title", b.Promote(context.Background(), false))
			refused(t, "continuing alone without the title", a.ContinueAlone(context.Background(), false))
			if a.Status().Serving {
				t.Fatal("serves without the title, and without having heard its peer")
			}
			b.wire.link.set(false)
			a.inSync()
			b.inSync()
			if want := primaryHolds(m.opt); a.Status().Title != want || b.Status().Title == want {
				t.Fatalf("title: primary %v, secondary %v", a.Status().Title, b.Status().Title)
			}
			identical(t, a, b)
		})
	}
}

// The same between two secondaries, in the middle of a planned switch-over.
func TestTitleInNobodysHandsWithoutPrimary(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{})
	a.demote()
	a.crash()
	b.crash()
	for _, n := range []*testNode{a, b} {
		n.editState(func(m *metadata) { m.State.Title = false })
	}
	a.open()
	b.open()
	a.peerIs("connected")
	b.until("title", func(s Status) bool { return s.Title })
	if a.Status().Title {
		t.Fatal("both hold the title")
	}
	b.promote(false)
	a.inSync()
	identical(t, b, a)
}

// Mode changed to async while the secondary holds the title: until it has
// released it, the primary must not acknowledge alone, also after a crash.
func TestTitleModeChangeInterrupted(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{})
	a.crash()
	b.crash()
	// The primary's part of the join is durable, the secondary never heard of it.
	a.editState(func(m *metadata) {
		last := m.State.History.Last()
		last.Epoch.Counter++
		last.Async = true
		last.Start = a.endOnDisk
		m.State.History = m.State.History.Append(last)
		m.State.Title = false
	})
	setMode(Options{Ack: AckAsync}, a, b)
	b.wire.link.set(true)
	a.open()
	b.open()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	tx := a.Begin()
	tx.Write(0, []byte("must not be acknowledged"))
	if _, err := tx.Commit(ctx); err == nil {
		t.Fatal("acknowledged alone while the peer holds the title")
	}
	b.promote(false)
	commit(t, b, 0, []byte("b's"))
	b.wire.link.set(false)
	// The primary's history says that it may have acknowledged alone. Only an
	// operator knows better; nothing is copied over.
	b.peerIs("refused")
	a.peerIs("refused")
	if got := string(content(t, b)[:3]); got != "b's" {
		t.Fatalf("read %q", got)
	}
}

func TestSwitchOver(t *testing.T) {
	t.Parallel()
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			a, b := pairInSync(t, testConfig{opt: m.opt})
			for i := range 4 {
				fill(t, a, uint64(i), 50, 20000)
				want := content(t, a)
				a.demote()
				var e *ErrNotPrimary
				if _, err := a.WriteAt([]byte("x"), 0); !errors.As(err, &e) {
					t.Fatalf("write on a secondary: %v", err)
				}
				if _, err := a.ReadAt(make([]byte, 1), 0); !errors.As(err, &e) {
					t.Fatalf("read on a secondary: %v", err)
				}
				b.until("title", func(s Status) bool { return s.Title })
				b.promote(false)
				b.inSync()
				if string(content(t, b)) != string(want) {
					t.Fatal("content changed with the switch-over")
				}
				a, b = b, a
			}
			identical(t, a, b)
		})
	}
}

// The peer is lost while a demotion waits for it: the node stays primary, and
// goes on once the peer is back.
func TestDemoteWithoutAnswer(t *testing.T) {
	t.Parallel()
	for _, m := range modes {
		if m.opt.OnPeerLoss == Alone {
			continue
		}
		t.Run(m.name, func(t *testing.T) {
			a, b := pairInSync(t, testConfig{opt: m.opt})
			quiesce(t, a, b)
			b.wire.link.set(true)
			before := a.Status().Committed
			waiting := begin(context.Background(), a, 0, []byte("waits"))
			a.until("written", func(s Status) bool { return s.Committed > before })
			if err := a.Demote(context.Background()); err == nil {
				t.Fatal("demoted while nobody has what was written")
			}
			if s := a.Status(); s.Role != "primary" {
				t.Fatalf("%+v", s)
			}
			b.wire.link.set(false)
			if err := <-waiting; err != nil {
				t.Fatal(err)
			}
			identical(t, a, b)
		})
	}
}

// Policy and mode change across restarts, from each to each, with a peer.
func TestModeChange(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{timeout: 300 * time.Millisecond})
	for i := range modes {
		for j := range modes {
			if i == j {
				continue
			}
			for _, k := range []int{i, j} {
				a.close()
				b.close()
				setMode(modes[k].opt, a, b)
				b.open()
				a.open()
				a.inSync()
				b.inSync()
				commit(t, a, int64(i*100+j), []byte{byte(i), byte(j)})
				s := a.Status()
				wantAck, wantLoss := modes[k].opt.Ack, modes[k].opt.OnPeerLoss
				if wantAck == "" {
					wantAck = AckBoth
				}
				if wantLoss == "" {
					wantLoss = Block
				}
				if s.Ack != wantAck || s.OnLoss != wantLoss || s.Title != primaryHolds(modes[k].opt) || s.Title == b.Status().Title {
					t.Fatalf("%s to %s: in force %s, %s, title %v and %v", modes[i].name, modes[j].name, s.Ack, s.OnLoss, s.Title, b.Status().Title)
				}
			}
		}
	}
	identical(t, a, b)
}

// TestSwitchOverAfterACopyThatDidNotJoin: async; the session is lost between the end
// of a full copy and the join. Both hold the same log, and the title goes along.
func TestSwitchOverAfterACopyThatDidNotJoin(t *testing.T) {
	a, b := pairInSync(t, testConfig{opt: Options{Ack: AckAsync}, quiet: true})
	fill(t, a, 9, 10, 3000)
	replace(t, b)
	copied := make(chan struct{}, 100)
	core, _ := observer.New(zap.InfoLevel)
	b.opt.Logger = zap.New(core, zap.Hooks(func(e zapcore.Entry) error {
		if e.Message == "full copy done" {
			b.wire.link.set(true)
			copied <- struct{}{}
		}
		return nil
	}))
	fill(t, a, 10, 900, 5000) // beyond what the ring holds
	b.open()
	<-copied
	a.peerIs("lost")
	a.demote()
	b.wire.link.set(false)
	b.until("connected", func(s Status) bool { return s.Peer == "connected" })
	b.promote(false)
}

// Two secondaries, of which the one with the title has lost log that the other holds:
// the title goes to the other.
func TestTitleWithoutTheLog(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{})
	fill(t, a, 7, 10, 3000)
	quiesce(t, a, b)
	m := b.meta
	before := bytes.Clone(b.block(0)) // what a power failure leaves of it: nothing was flushed since
	e, _ := b.table.get(0)
	var ends []LSN
	for i := range 3 {
		ends = append(ends, commit(t, a, int64(i)*100, bytes.Repeat([]byte{byte(i + 1)}, 100)))
	}
	want := content(t, a)
	b.until("title", func(s Status) bool { return s.Title })
	a.demote()
	b.crash()
	if acked := (*node)(a.Volume).State().Acked; acked < ends[2] {
		t.Errorf("demoted, and knows durably of acknowledgements up to %d of %d", acked, ends[2])
	}
	a.crash()
	b.change(func(region []byte) {
		forgetLog(region, ends[0], ends[2])
		copy(region[m.Data.Off:], before)
		putEntry(region[m.Table.Off:], e, 0)
	})
	b.open()
	if s := b.Status(); !s.Title || s.Damaged {
		t.Fatalf("title %v, damaged %v", s.Title, s.Damaged)
	}
	a.open()
	a.until("title", func(s Status) bool { return s.Title })
	refused(t, "promote", b.Promote(context.Background(), false))
	if s := b.Status(); s.Title || !s.Damaged {
		t.Errorf("title %v, damaged %v", s.Title, s.Damaged)
	}
	a.promote(false)
	a.inSync()
	if !bytes.Equal(content(t, a), want) {
		t.Error("what was acknowledged is gone")
	}
	if s := b.Status(); s.Damaged {
		t.Error("the log is whole again, and counts as damaged")
	}
}

// Policy alone: an old image of the primary is put back, of before its last start, and
// steps down. It held the title, and does not keep it beside the node that holds what
// was acknowledged since.
func TestTitleOfAnOldImage(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{quiet: true, opt: Options{OnPeerLoss: Alone}})
	fill(t, a, 7, 10, 3000)
	quiesce(t, a, b)
	var old []byte
	a.crash()
	a.change(func(region []byte) { old = bytes.Clone(region) })
	a.open()
	a.inSync() // in a new epoch
	fill(t, a, 9, 3, 3000)
	quiesce(t, a, b)
	want := content(t, a)
	a.crash()
	b.crash()
	a.change(func(region []byte) { copy(region, old) })
	a.open()
	b.open()
	b.until("title", func(s Status) bool { return s.Title })
	refused(t, "promote", a.Promote(context.Background(), false))
	b.promote(false)
	b.inSync()
	if !bytes.Equal(content(t, b), want) {
		t.Error("what was acknowledged is gone")
	}
}
