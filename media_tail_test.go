package nvmmirror

import (
	"bytes"
	"context"
	"testing"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// A node that was copied to in full keeps in its ring, below where its log begins
// since, a tail of its own that was dropped, where the other's log had as many bytes.
// Of that nothing is sent to a new region at its side.
func TestDroppedTailBelowACopy(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{quiet: true})
	fill(t, a, 1, 4, 3000)
	quiesce(t, a, b)
	long := bytes.Repeat([]byte{1}, 40000)
	b.wire.link.set(true)
	a.peerIs(replicate.PhaseLost)
	fork := a.Status().Committed
	for range 5 { // a tail that nobody hears of
		ctx, cancel := context.WithCancel(context.Background())
		end := a.Status().Committed
		done := begin(ctx, a, 0, long)
		a.until("written", func(s Status) bool { return s.Committed > end })
		cancel()
		<-done
	}
	b.peerIs(replicate.PhaseLost)
	b.promote(false)
	var ends []LSN
	for range 3 {
		ends = append(ends, commit(t, b, 0, long))
	}
	b.journal.Ring().Raw(ends[0], journal.HeaderSize)[20] ^= 1 // so that a is copied to in full
	b.wire.link.set(false)
	b.inSync()
	var h journal.Header
	if err := a.journal.Ring().Header(fork, &h); err != nil || h.Epoch.Counter >= b.Status().Epoch.Counter {
		t.Fatalf("there is nothing left of the tail: %v %+v", err, h)
	}
	commit(t, b, 0, long)
	quiesce(t, b, a)
	b.close()
	a.peerIs(replicate.PhaseLost)
	a.promote(false)
	replace(t, b)
	b.open()
	a.inSync()
	identical(t, a, b)
}
