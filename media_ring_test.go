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
	"go.uber.org/zap/zaptest/observer"
)

// flipLog flips one bit of the segment at an LSN of a live node's ring.
func flipLog(n *testNode, lsn LSN, at int) {
	n.applyMu.Lock()
	defer n.applyMu.Unlock()
	n.journal.Ring().Raw(lsn, at+1)[at] ^= 4
}

// A follower comes back, and the log that it lacks is damaged at its source,
// which has applied it long ago: the data is whole, and is copied.
func TestDamagedLogToCatchUpBy(t *testing.T) {
	for _, m := range modes {
		if m.name == "block" {
			continue // nothing is applied without the peer
		}
		for _, at := range []int{20, 64 + 30} {
			t.Run(m.name+map[bool]string{true: ", header", false: ", body"}[at < 64], func(t *testing.T) {
				t.Parallel()
				a, b := pairInSync(t, testConfig{opt: m.opt})
				fill(t, a, 1, 10, 5000)
				quiesce(t, a, b)
				b.wire.link.set(true)
				a.until("alone", func(s Status) bool { return s.Peer == "lost" && !a.pair.Required() })
				var starts []LSN
				for i := range 20 {
					starts = append(starts, a.Status().Committed)
					commit(t, a, int64(i)*5000, bytes.Repeat([]byte{byte(i + 1)}, 4000))
				}
				want := content(t, a)
				flipLog(a, starts[7], at)
				flipLog(a, starts[12], at)
				b.wire.link.set(false)
				a.inSync()
				b.inSync()
				if r := a.Status().Rule; r != "full-copy" {
					t.Errorf("rule %s", r)
				}
				if !bytes.Equal(content(t, a), want) {
					t.Fatal("content differs")
				}
				identical(t, a, b)
			})
		}
	}
}

// A segment that waits for the peer is damaged where it waits. It is applied
// nowhere and sent nowhere; the node says so, and stops.
func TestDamagedLogThatWaits(t *testing.T) {
	for _, at := range []int{20, 64 + 30} {
		t.Run(map[bool]string{true: "header", false: "body"}[at < 64], func(t *testing.T) {
			t.Parallel()
			a, b := pairInSync(t, testConfig{})
			fill(t, a, 1, 10, 5000)
			quiesce(t, a, b)
			want := content(t, a)
			b.wire.link.set(true)
			a.peerIs("lost")
			before := a.Status().Committed
			waiting := begin(context.Background(), a, 0, bytes.Repeat([]byte("lost"), 300))
			a.until("written", func(s Status) bool { return s.Committed > before })
			flipLog(a, before, at)
			b.wire.link.set(false)
			select {
			case err := <-waiting:
				if !errors.Is(err, ErrOutcomeUnknown) || !strings.Contains(err.Error(), "restart the node") {
					t.Fatalf("a commit of which nothing is left: %v", err)
				}
			case <-time.After(20 * time.Second):
				t.Fatal("the commit waits for ever")
			}
			if s := a.Status(); !strings.Contains(strings.Join(s.Degraded, "\n"), "is not whole in this node's persistent memory") {
				t.Errorf("degraded: %q", s.Degraded)
			}
			if _, err := a.ReadAt(make([]byte, 1), 0); err == nil {
				t.Error("it goes on reading")
			}
			a.crash()
			a.open()
			a.inSync()
			b.inSync()
			if !bytes.Equal(content(t, a), want) {
				t.Fatal("content differs")
			}
			identical(t, a, b)
		})
	}
}

// A primary whose persistence has failed does not go on alone. It tried to
// without a pause, and logged each try.
func TestFailedNodeDoesNotGoAlone(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, quiet: true})
	core, logged := observer.New(zap.ErrorLevel)
	a.close()
	a.opt.Logger = zap.New(core)
	a.open()
	a.inSync()
	b.inSync()
	a.fail(errors.New("made up"))
	b.wire.link.set(true)
	failures := a.Status().Counters.DialFailures
	a.until("looking for its peer", func(s Status) bool { return s.Peer == "lost" && s.Counters.DialFailures > failures })
	b.wire.link.set(false)
	if n := logged.FilterMessage("going alone failed").Len(); n != 0 {
		t.Errorf("tried %d times", n)
	}
	if s := a.Status(); !slices.ContainsFunc(s.Degraded, func(d string) bool { return strings.Contains(d, "made up") }) {
		t.Errorf("%q", s.Degraded)
	}
}
