package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/replicate"
)

// overtaken is a pair in async mode whose primary has died without anything that its
// peer lacks; that was promoted by force and went on.
func overtaken(t *testing.T) (a, b *testNode) {
	a, b = pairInSync(t, testConfig{opt: Options{Ack: AckAsync}})
	commit(t, a, 0, []byte("before"))
	b.until("level", func(s Status) bool { return s.Applied >= a.Status().Committed })
	a.crash()
	b.promote(true)
	commit(t, b, blockSize, []byte("meanwhile"))
	return a, b
}

// A primary in async mode dies, its peer is promoted by force, and it comes back:
// it looks for its peer before it serves, and follows.
func TestAsyncPrimaryLooksForItsPeer(t *testing.T) {
	t.Parallel()
	a, b := overtaken(t)
	a.open()
	b.inSync()
	a.roleIs("secondary")
	identical(t, b, a)
}

// splitBrain is a pair in async mode of which both nodes are primary and have
// acknowledged what the other lacks; a is closed.
func splitBrain(t *testing.T) (a, b *testNode) {
	a, b = pairInSync(t, testConfig{opt: Options{Ack: AckAsync}})
	b.wire.link.set(true)
	a.peerIs("lost")
	commit(t, a, 0, []byte("of a alone"))
	a.close()
	b.promote(true)
	commit(t, b, 0, []byte("of b alone"))
	b.wire.link.set(false)
	return a, b
}

// Where both have acknowledged what the other lacks, the one that comes back does not
// serve beside the other until it is told to, by force.
func TestAsyncPrimaryBesideAnother(t *testing.T) {
	t.Parallel()
	a, _ := splitBrain(t)
	a.open()
	s := a.until("refused", func(s Status) bool { return s.Rule == string(replicate.RuleSplitBrain) })
	refused(t, "continue-alone beside another primary", a.ContinueAlone(context.Background(), false))
	if s.Serving || a.Status().Serving {
		t.Fatal("serves beside another primary")
	}
	a.demote() // a promotion needs no less
	a.until("refused", func(s Status) bool { return s.Rule == string(replicate.RuleSplitBrain) && s.Peer == "refused" })
	refused(t, "promote beside another primary", a.Promote(context.Background(), false))
	a.promote(true)
}

// And goes on where it is told to by force.
func TestAsyncPrimaryBesideAnotherByForce(t *testing.T) {
	t.Parallel()
	a, _ := splitBrain(t)
	a.open()
	a.until("refused", func(s Status) bool { return s.Rule == string(replicate.RuleSplitBrain) })
	if err := a.ContinueAlone(context.Background(), true); err != nil || !a.Status().Serving {
		t.Fatalf("by force: %v, %+v", err, a.Status())
	}
}

// Where its peer does not answer, and where it is no primary, a primary that needs
// nobody goes on after a restart.
func TestAsyncPrimaryGoesOn(t *testing.T) {
	t.Parallel()
	for _, there := range []bool{false, true} {
		c := testConfig{opt: Options{Ack: AckAsync}, size: 32 << 20}
		if there {
			c.timeout = 5 * time.Second
		}
		a, b := pairInSync(t, c)
		for range 3 * MinJournal / (100 << 10) { // the journal does not reach back
			commit(t, a, 0, make([]byte, 100<<10))
		}
		a.close()
		replace(t, b)
		a.wire.setChop(16<<10, 5*time.Millisecond)
		if there {
			b.open()
		}
		a.open()
		commit(t, a, 0, []byte("after"))
		if there {
			a.peerIs("resyncing")
		}
	}
}

// A primary that looks for its peer is demoted as its time is over.
func TestDemoteWhileLooking(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{Ack: AckAsync}})
	commit(t, a, 0, []byte("before"))
	a.close()
	b.close()
	a.open()
	if err := a.committer.Acquire(context.Background()); err != nil {
		t.Fatal(err)
	}
	demoted := make(chan error, 1)
	go func() { demoted <- a.Demote(context.Background()) }()
	time.Sleep(2 * a.opt.Peer.Timeout) // for its time to be over; less shows nothing
	a.committer.Release()
	if err := <-demoted; err != nil {
		t.Fatal(err)
	}
	if a.pair.Role() == replicate.Primary || a.pair.Serving() {
		t.Fatal("a demoted node is primary")
	}
}

// A restarted primary hears that its peer is primary as well, and the link is lost
// before they agree, or before it is told to follow: it does not serve beside that.
func TestLostBeforeItFollows(t *testing.T) {
	for _, in := range []string{`"rule"`, `"lease_ns"`} { // of the verdict, of the message that tells to follow
		t.Run(in, func(t *testing.T) {
			t.Parallel()
			a, b := overtaken(t)
			var cut atomic.Bool
			b.wire.setCorrupt(func(out []byte) int {
				i := bytes.Index(out, []byte(in))
				if i >= 0 {
					out[i] ^= 1
					cut.Store(true)
				}
				return i
			})
			a.open()
			a.until("cut", func(Status) bool { return cut.Load() })
			b.wire.link.set(true)
			a.peerIs("lost")
			time.Sleep(2 * a.opt.Peer.Timeout) // in which it would go on
			if a.Status().Serving {
				t.Fatal("serves beside the primary that it has heard")
			}
			b.wire.setCorrupt(nil)
			b.wire.link.set(false)
			b.inSync()
			a.roleIs("secondary")
			identical(t, b, a)
		})
	}
}

// Under policy alone, a primary does not go alone by itself beside another one.
func TestNotAloneBesideAnother(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
	commit(t, a, 0, []byte("one"))
	quiesce(t, a, b)
	b.close()
	old, err := os.ReadFile(b.path)
	if err != nil {
		t.Fatal(err)
	}
	b.open()
	a.inSync()
	commit(t, a, 0, []byte("two"))
	quiesce(t, a, b)
	a.close()
	b.close()
	if err := os.WriteFile(b.path, old, 0o600); err != nil { // an older state of b
		t.Fatal(err)
	}
	b.open()
	b.promote(true)
	commit(t, b, 0, []byte("of b"))
	a.open()
	a.peerIs("refused")
	refused(t, "continue-alone", a.ContinueAlone(context.Background(), false))
	time.Sleep(3 * a.opt.Peer.Timeout) // in which it would go alone
	if a.Status().Serving {
		t.Fatal("went alone by itself beside another primary")
	}
}

// Persistence fails while a primary looks for its peer: who waits for it to serve is
// told.
func TestFailedWhileLooking(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{Ack: AckAsync}, timeout: time.Minute})
	a.close()
	b.close()
	a.open()
	why := errors.New("checkpoint: msync: input/output error")
	told := make(chan error, 1)
	tx := a.Begin()
	if err := tx.Write(0, []byte("x")); err != nil {
		t.Fatal(err)
	}
	go func() {
		_, err := tx.Commit(context.Background())
		told <- err
	}()
	a.fail(why)
	if err := <-told; !errors.Is(err, why) {
		t.Fatal(err)
	}
}
