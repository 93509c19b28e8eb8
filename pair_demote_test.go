package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/replicate"
)

// A demotion that has made its role durable ends the session in which this node
// was primary, also where its caller has stopped waiting.
func TestDemoteOutlivesItsCaller(t *testing.T) {
	t.Parallel()
	for range 8 { // whether the caller's end was seen first was a coin's toss
		a, b := pairInSync(t, testConfig{})
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		a.Demote(ctx) // an idle volume has nothing to wait for
		if a.pair.Role() == replicate.Primary {
			t.Fatal("still primary") // or this test shows nothing
		}
		b.until("the title", func(s Status) bool { return s.Title })
		b.promote(false)
		b.inSync()
		a.roleIs("secondary")
		a.close()
		b.close()
	}
}

// endsOnceDemoted is a context that ends when the node's role has changed.
type endsOnceDemoted struct {
	context.Context
	n     *testNode
	ended chan struct{} // closed
}

func (c endsOnceDemoted) Err() error {
	if c.n.pair.Role() == replicate.Primary {
		return nil
	}
	return context.Canceled
}

func (c endsOnceDemoted) Done() <-chan struct{} {
	if c.Err() == nil {
		return nil
	}
	return c.ended
}

// A follower returns, and is told that this node is primary, while it is being
// demoted: it does not become one by the join that follows.
func TestDemoteBesideAJoin(t *testing.T) {
	t.Parallel()
	ended := make(chan struct{})
	close(ended)
	for range 4 {
		a, b := pairInSync(t, testConfig{opt: Options{Ack: AckAsync}})
		b.wire.link.set(true)
		a.peerIs("lost")
		b.peerIs("lost")
		commit(t, a, 0, []byte("while it was away"))
		if err := a.committer.Acquire(context.Background()); err != nil {
			t.Fatal(err)
		}
		var told atomic.Bool
		a.wire.setCorrupt(func(out []byte) int {
			if bytes.Contains(out, []byte(`"history"`)) { // a hello
				told.Store(true)
			}
			return -1
		})
		b.wire.link.set(false)
		b.until("told who is primary", func(Status) bool { return told.Load() })
		demoted := make(chan error, 1)
		go func() { demoted <- a.Demote(endsOnceDemoted{context.Background(), a, ended}) }()
		a.committer.Release()
		if err := <-demoted; err != nil {
			t.Fatal(err)
		}
		b.until("two secondaries", func(s Status) bool { return s.Rule == string(replicate.RuleNoPrimary) })
		if a.pair.Role() == replicate.Primary || a.pair.Serving() {
			t.Fatal("the demoted node is primary")
		}
		a.close()
		b.close()
	}
}

// A node whose persistence has failed acknowledges nothing, and its peer hears why.
func TestFailedNodeLeavesTheSession(t *testing.T) {
	t.Parallel()
	why := errors.New("checkpoint: msync: input/output error")
	for name, ack := range map[string]Ack{"both": AckBoth, "async": AckAsync} {
		for _, failed := range []string{"a", "b"} {
			t.Run(name+"/"+failed, func(t *testing.T) {
				t.Parallel()
				a, b := pairInSync(t, testConfig{opt: Options{Ack: ack}})
				n, other := a, b
				if failed == "b" {
					n, other = b, a
				}
				n.fail(why)
				told := func(s Status) bool {
					return s.Peer != "in-sync" && s.Reason == "the peer ended the session: "+why.Error()
				}
				other.until("told", told)
				b.wire.link.set(true)
				other.until("another reason", func(s Status) bool { return !told(s) })
				b.wire.link.set(false)
				other.until("told in the place of a hello", told)
				if other == a && ack == AckBoth {
					ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
					defer cancel()
					tx := a.Begin()
					if err := tx.Write(0, []byte("x")); err != nil {
						t.Fatal(err)
					}
					if _, err := tx.Commit(ctx); !errors.Is(err, ErrOutcomeUnknown) {
						t.Errorf("commit: %v", err)
					}
				}
			})
		}
	}
}

// Under policy alone, commits do not wait until a peer whose region is new has
// been copied to in full: until then it protects nothing.
func TestAloneBesideAFullCopy(t *testing.T) {
	t.Parallel()
	for _, restarted := range []bool{false, true} {
		a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, size: 32 << 20, timeout: 5 * time.Second})
		for range 3 * MinJournal / (100 << 10) { // the journal does not reach back
			commit(t, a, 0, make([]byte, 100<<10))
		}
		if restarted {
			a.close()
		}
		replace(t, b)
		a.wire.setChop(16<<10, 5*time.Millisecond) // the copy takes ten seconds
		b.open()
		if restarted {
			a.open()
		}
		a.until("the copy has begun", func(s Status) bool { return s.Peer == "resyncing" })
		commit(t, a, 0, []byte("meanwhile"))
		got := make([]byte, 9)
		a.read(t, got, 0)
		if s := a.Status(); string(got) != "meanwhile" || s.Peer != "resyncing" {
			t.Errorf("restarted %v: %q beside a peer that is %s", restarted, got, s.Peer)
		}
		a.wire.setChop(0, 0)
		a.inSync()
		identical(t, a, b)
	}
}

// While a peer is copied to over a wire that takes one message at a time, the log is sent
// as well: commits go on for more than a ring.
func TestLogBesideASlowCopy(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, size: 32 << 20, timeout: 5 * time.Second})
	for range 3 * MinJournal / (100 << 10) { // the journal does not reach back
		commit(t, a, 0, make([]byte, 100<<10))
	}
	replace(t, b)
	a.wire.setChop(128<<10, 30*time.Millisecond) // the copy takes fifteen seconds
	b.open()
	a.until("the copy has begun", func(s Status) bool { return s.Peer == "resyncing" })
	for range 3 * MinJournal / 2 / (50 << 10) {
		commit(t, a, 0, make([]byte, 50<<10))
	}
	if s := a.Status(); s.Resync == nil || s.Resync.Done > s.Resync.Total/2 {
		t.Errorf("commits waited for the copy: the peer is %s, %+v", s.Peer, s.Resync)
	}
	a.wire.setChop(0, 0)
	a.inSync()
	identical(t, a, b)
}

// Persistence fails while a demotion waits for a peer that has gone.
func TestDemoteOfAFailedNode(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{quiet: true})
	b.wire.mute.Store(true) // no acknowledgement leaves it, as where its power fails
	waits := begin(context.Background(), a, 0, []byte("waits"))
	a.until("written", func(s Status) bool { return s.Committed > s.Acked })
	demoted := make(chan error, 1)
	go func() { demoted <- a.Demote(context.Background()) }()
	a.until("draining", func(Status) bool {
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		var no *ErrNotPrimary
		return errors.As(<-begin(ctx, a, 0, []byte("refused")), &no)
	})
	b.wire.link.set(true) // nor does it dial any more
	a.fail(errors.New("msync: input/output error"))
	if err := <-waits; !errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("commit: %v", err)
	}
	select {
	case err := <-demoted:
		if err == nil || !strings.Contains(err.Error(), "input/output error") {
			t.Errorf("demote: %v", err)
		}
	case <-time.After(slow(20 * time.Second)):
		t.Fatal("it waits for a peer that nobody watches over")
	}
	b.wire.link.set(false)
}

// A primary in async mode dies with nothing that its peer lacks, which is promoted by
// force, and goes on. It comes back in the other mode: refused, because an epoch of its
// own did not require the peer, it is told to be demoted. So it is also where the peer
// has been demoted meanwhile.
func TestDemoteOfARefusedPrimary(t *testing.T) {
	for _, role := range []string{"primary", "secondary"} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			a, b := pairInSync(t, testConfig{opt: Options{Ack: AckAsync}})
			quiesce(t, a, b)
			a.crash()
			a.open()
			a.inSync() // in a new epoch
			a.close()
			b.peerIs(replicate.PhaseLost)
			b.promote(true)
			commit(t, b, 0, []byte("meanwhile"))
			setMode(Options{}, a)
			a.open()
			a.until("refused", func(s Status) bool { return s.Rule == string(replicate.RuleSplitBrain) && !s.Title })
			if role == "secondary" {
				b.demote()
				before := a.Status().Counters.Refused
				a.until("refused by a secondary", func(s Status) bool { return s.Counters.Refused > before+1 })
			}
			ctx, cancel := context.WithTimeout(context.Background(), slow(20*time.Second))
			defer cancel()
			waiting := begin(ctx, a, 0, []byte("waits"))
			a.demote()
			if err := <-waiting; !errors.As(err, new(*ErrNotPrimary)) {
				t.Errorf("a commit that waited: %v", err)
			}
			if role == "secondary" {
				b.peerIs(replicate.PhaseConnected)
				b.promote(false)
			}
			b.inSync()
			a.roleIs("secondary")
			identical(t, b, a)
		})
	}
}
