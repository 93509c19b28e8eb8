package nvmmirror

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// twice asks for the same change of a node's role twice at once. When one is
// told that another is under way, that other has passed its checks and waits
// for the session to end: what becomes of it comes over the channel.
func twice(t *testing.T, f func() error) <-chan error {
	t.Helper()
	results := make(chan error, 2)
	for range 2 {
		go func() { results <- f() }()
	}
	select {
	case err := <-results:
		if err == nil || !strings.Contains(err.Error(), "another change") {
			t.Fatalf("the first answer: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("none of the two is told of the other")
	}
	return results
}

// What the node may do is judged again when the session has ended: it may have
// begun a full copy onto this node meanwhile.
func TestPromoteJudgesAgain(t *testing.T) {
	a, b := pairInSync(t, testConfig{quiet: true})
	quiesce(t, a, b)
	b.applyMu.RLock() // its session does not end before it has applied
	commit(t, a, 0, []byte("is being applied"))
	promoted := twice(t, func() error { return b.Promote(context.Background(), true) })
	err := b.updateMeta(func(m *metadata) error {
		m.State = m.State.Clone()
		m.State.Resync = &replicate.Resync{Epoch: m.State.History.Last().Epoch}
		return nil
	})
	b.applyMu.RUnlock()
	if err != nil {
		t.Fatal(err)
	}
	refused(t, "promotion of a node that has become inconsistent", <-promoted)
	if s := b.Status(); s.Role != "secondary" {
		t.Errorf("%+v", s)
	}
}

// The same for going on alone: the node may have stepped down meanwhile.
func TestContinueAloneJudgesAgain(t *testing.T) {
	a, b := pairInSync(t, testConfig{quiet: true})
	quiesce(t, a, b)
	if err := a.committer.Acquire(context.Background()); err != nil { // its session cannot end
		t.Fatal(err)
	}
	alone := twice(t, func() error { return a.ContinueAlone(context.Background(), true) })
	err := a.updateMeta(func(m *metadata) error { m.State.Role = replicate.Secondary; return nil })
	a.committer.Release()
	if err != nil {
		t.Fatal(err)
	}
	if err := <-alone; err == nil || !strings.Contains(err.Error(), "only a primary can continue alone") {
		t.Fatalf("a node that is no longer primary went on alone: %v", err)
	}
}

// A session in sync ends only when no committer is in it: the connection is
// the driver's until then.
func TestSessionEndsBehindItsDriver(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{quiet: true, timeout: 2 * time.Second})
	quiesce(t, a, b)
	if err := a.committer.Acquire(context.Background()); err != nil { // as a driver
		t.Fatal(err)
	}
	b.crash()
	b.open() // connects, which ends the old session
	b.until("calling", func(s Status) bool { return b.wire.dials.Load() > 0 })
	for end := time.Now().Add(700 * time.Millisecond); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if s := a.Status(); s.Peer != "in-sync" {
			t.Errorf("the session ended (%s: %s) while a committer was in it", s.Peer, s.Reason)
			break
		}
	}
	a.committer.Release()
	a.inSync()
	b.inSync()
	identical(t, a, b) // which commits
}

// A pair was in async mode, its primary comes back in mode both: what it
// acknowledged alone before says nothing of what it may acknowledge now.
func TestAsyncToBothNeedsThePeer(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{Ack: AckAsync}})
	quiesce(t, a, b)
	a.close()
	b.close()
	setMode(Options{}, a, b)
	a.open()
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	if err := <-begin(ctx, a, 0, []byte("needs both")); err == nil {
		t.Fatal("acknowledged in mode both, without the peer")
	}
	if s := a.Status(); s.Serving || !strings.Contains(strings.Join(s.Degraded, "\n"), "commits wait for the peer") {
		t.Errorf("%+v", s)
	}
	b.open()
	a.inSync()
	b.inSync()
	if s := a.Status(); s.Ack != AckBoth {
		t.Errorf("in force: %s", s.Ack)
	}
	identical(t, a, b)
}

// A lone primary whose journal is damaged does not serve. It requires no peer,
// and status says that commits wait for one.
func TestStatusOfAPrimaryThatDoesNotServe(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
	b.close()
	a.until("alone", func(s Status) bool { return s.Serving && !a.pair.Required() })
	var ends []LSN
	for i := range 4 {
		ends = append(ends, commit(t, a, int64(i)*5000, bytes.Repeat([]byte{1}, 100)))
	}
	a.crash()
	a.change(func(region []byte) {
		m := metadataOf(t, region)
		ring := journal.Ring{Bytes: region[m.Journal.Off:m.Journal.end():m.Journal.end()], Base: m.RingBase}
		ring.Raw(ends[1], 80)[70] ^= 4
	})
	a.open()
	s := a.Status()
	if s.Serving || a.pair.Required() {
		t.Fatalf("%+v", s)
	}
	if all := strings.Join(s.Degraded, "\n"); !strings.Contains(all, "commits wait for the peer") || !strings.Contains(all, "journal damaged") {
		t.Errorf("degraded: %q", s.Degraded)
	}
}
