package nvmmirror

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// A node that dies under load holds a tail that nobody acknowledged, and the title.
// Beside a node that was promoted by force, and acknowledged, it gives the title up.
func TestTwoTitlesBesideATail(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, timeout: slow(2 * time.Second)})
	fill(t, a, 1, 10, 5000)
	quiesce(t, a, b)
	b.wire.link.set(true)
	lostTail(t, a, 5, bytes.Repeat([]byte("lost"), 3000))
	a.crash()
	b.peerIs(replicate.PhaseLost)
	b.promote(true)
	fill(t, b, 2, 10, 5000) // acknowledged
	want := content(t, b)
	b.demote()
	b.wire.link.set(false)
	a.open()
	a.roleIs("secondary")
	a.until("without the title", func(s Status) bool { return !s.Title })
	refused(t, "promotion of the one with a tail", a.Promote(context.Background(), false))
	b.peerIs(replicate.PhaseConnected)
	b.promote(false)
	a.inSync()
	if !bytes.Equal(content(t, b), want) {
		t.Error("what was acknowledged is gone")
	}
	quiesce(t, b, a)
	identical(t, b, a)
}

// A peer that comes again and again, and never joins, does not hold up policy alone.
func TestAloneBesideAPeerThatNeverJoins(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
	fill(t, a, 1, 10, 5000)
	quiesce(t, a, b)
	a.wire.setCorrupt(func(out []byte) int { // of the message that says from where to follow
		if i := bytes.Index(out, []byte(`"lease_ns"`)); i >= 0 {
			out[i] ^= 1
		}
		return -1
	})
	b.close()
	ctx, cancel := context.WithTimeout(context.Background(), slow(20*time.Second))
	defer cancel()
	done := begin(ctx, a, 0, []byte("alone"))
	for {
		select {
		case err := <-done:
			if err != nil || a.pair.Required() {
				t.Errorf("%v, peer required: %v", err, a.pair.Required())
			}
			return
		default:
		}
		before := a.Status().Counters.Reconnects
		b.open()
		for ctx.Err() == nil && a.pair.Required() && a.Status().Counters.Reconnects == before {
			time.Sleep(time.Millisecond)
		}
		b.close()
	}
}

// waits: a primary with policy alone does not go on without its lost peer.
func waits(t *testing.T, a *testNode) {
	t.Helper()
	a.peerIs(replicate.PhaseLost)
	time.Sleep(a.opt.Peer.Timeout * 3 / 2) // in which it would have gone alone
	refused(t, "continue-alone", a.ContinueAlone(context.Background(), false))
}

// takesTheLog: once b can be heard again, a has what was acknowledged.
func takesTheLog(t *testing.T, a, b *testNode, want []byte) {
	t.Helper()
	b.wire.setCorrupt(nil)
	b.wire.link.set(false)
	a.inSync()
	if !bytes.Equal(content(t, a), want) {
		t.Error("what was acknowledged is gone")
	}
}

// A primary has heard that its peer holds acknowledged log that it lost itself, and
// the link goes before it has it: it waits for the peer, or for force.
func TestAloneWithoutLogThatThePeerHolds(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
	ends := lastOfTheLog(t, a, b)
	want := content(t, a)
	a.crash()
	a.change(func(region []byte) { forgetLog(region, ends[0], ends[2]) })
	var cut atomic.Bool
	b.wire.setCorrupt(func(out []byte) int {
		magic := binary.LittleEndian.AppendUint32(nil, journal.Magic)
		for i := bytes.Index(out, magic); i >= 0; i = bytes.Index(out, magic) {
			out[i] ^= 1
			cut.Store(true)
		}
		return -1
	})
	a.open()
	a.until("told", func(s Status) bool { return cut.Load() && s.Rule == string(replicate.RuleTakeLog) })
	b.wire.link.set(true)
	waits(t, a)
	a.crash() // it does not forget that
	a.open()
	waits(t, a)
	takesTheLog(t, a, b, want)
}

// chainCorrupt flips a bit of each chain message: the session ends between hello and
// verdict.
func chainCorrupt(told *atomic.Bool) func(out []byte) int {
	return func(out []byte) int {
		for i := range max(0, len(out)-20) {
			if m := out[i:]; bytes.Equal(m[:4], []byte("NVMW")) && m[6] == 2 { // chain
				m[20] ^= 1
				told.Store(true)
			}
		}
		return -1
	}
}

// The same where the link goes right after the peer's hello.
func TestAloneAfterAHello(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
	ends := lastOfTheLog(t, a, b)
	want := content(t, a)
	a.crash()
	a.change(func(region []byte) { forgetLog(region, ends[0], ends[2]) })
	var told atomic.Bool
	b.wire.setCorrupt(chainCorrupt(&told))
	a.open()
	a.until("told", func(s Status) bool { return told.Load() && s.Damaged })
	b.wire.link.set(true)
	waits(t, a)
	takesTheLog(t, a, b, want)
}

// A promotion whose caller has gone, while the old primary's lease is waited for,
// changes nothing.
func TestPromotionGivenUp(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{timeout: slow(4 * time.Second)})
	quiesce(t, a, b)
	a.crash()
	b.peerIs(replicate.PhaseLost)
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	if err := b.Promote(ctx, false); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%v", err)
	}
	if s := b.Status(); s.Role != "secondary" || !s.Title {
		t.Errorf("%s, title %v", s.Role, s.Title)
	}
	b.promote(false)
	commit(t, b, 0, []byte("goes on"))
}

// A read that outlives the lease is not served: somebody may have been promoted
// while its bytes were taken.
func TestLeaseEndsWhileBytesAreRead(t *testing.T) {
	var armed atomic.Bool
	var asked atomic.Int32
	began := time.Now()
	clock := func() time.Duration {
		d := time.Since(began) + time.Hour
		if armed.Load() {
			var pcs [8]uintptr
			frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs[:])])
			for more := true; more; {
				var f runtime.Frame
				if f, more = frames.Next(); strings.HasSuffix(f.Function, "(*Volume).readable") && asked.Add(1) > 1 {
					return d + time.Minute
				}
			}
		}
		return d
	}
	a, _ := pairInSync(t, testConfig{opt: Options{clock: clock}, quiet: true, timeout: steady()})
	commit(t, a, 0, []byte{1})
	p := make([]byte, 1)
	a.read(t, p, 0)
	armed.Store(true)
	if _, err := a.ReadAt(p, 0); !errors.Is(err, ErrNoLease) {
		t.Errorf("%v", err)
	}
	armed.Store(false)
}

// So does one whose peer holds more than a ring beyond it: an older state of its region
// was put back.
func TestAloneWithoutMoreLogThanARing(t *testing.T) {
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, quiet: true})
	fill(t, a, 1, 10, 5000)
	quiesce(t, a, b)
	a.applyMu.Lock()
	a.metaMu.Lock()
	old := bytes.Clone(a.mem.Bytes())
	a.metaMu.Unlock()
	a.applyMu.Unlock()
	fill(t, a, 3, 400, 20000) // once around the ring
	quiesce(t, a, b)
	a.crash()
	a.change(func(region []byte) { copy(region, old) })
	a.open()
	a.until("refused", func(s Status) bool { return s.Rule == string(replicate.RuleUnrepairable) })
	time.Sleep(a.opt.Peer.Timeout * 3 / 2) // in which it would have gone alone
	if s := a.Status(); s.Serving {
		t.Errorf("serves alone from LSN %d: %v %v", s.Committed, s.Rule, s.Degraded)
	}
	const says = "the peer holds acknowledged log that this node has lost"
	if d := a.Status().Degraded; !strings.Contains(strings.Join(d, "\n"), says) {
		t.Errorf("degraded: %q", d)
	}
	if err := a.ContinueAlone(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	if s := a.Status(); !s.Serving || s.Damaged || strings.Contains(strings.Join(s.Degraded, "\n"), says) {
		t.Errorf("forced: %v, %q", s.Serving, s.Degraded)
	}
}

// Once it has that log, it goes alone.
func TestAloneOnceItHasTheLog(t *testing.T) {
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, quiet: true})
	ends := lastOfTheLog(t, a, b)
	a.crash()
	a.change(func(region []byte) { forgetLog(region, ends[0], ends[2]) })
	openUntilItTookTheLog(a, b)
	a.until("alone", func(s Status) bool { return s.Serving && s.Committed >= ends[2] })
}
