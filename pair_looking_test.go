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

// A restarted primary is told to follow another one, and the link is lost before it
// does: it does not serve beside that.
func TestLostBeforeItFollows(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{Ack: AckAsync}})
	commit(t, a, 0, []byte("before"))
	b.until("level", func(s Status) bool { return s.Applied >= a.Status().Committed })
	a.crash()
	b.promote(true)
	commit(t, b, blockSize, []byte("meanwhile"))
	var cut atomic.Bool
	b.wire.setCorrupt(func(out []byte) int {
		i := bytes.Index(out, []byte(`"lease_ns"`))
		if i >= 0 {
			out[i] ^= 1 // of the message that tells to follow
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
		t.Fatal("serves beside the primary that it was told to follow")
	}
	b.wire.setCorrupt(nil)
	b.wire.link.set(false)
	b.inSync()
	a.roleIs("secondary")
	identical(t, b, a)
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
