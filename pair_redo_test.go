package nvmmirror

import (
	"math/rand/v2"
	"testing"
)

// What a returning primary drops was never applied: the log that takes its
// place is no redo. So the blocks that it changes are verified first, and a
// node that follows it and stops is closed cleanly.
func TestDroppedTailIsNoRedo(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{})
	fill(t, a, 5, 30, 5000)
	quiesce(t, a, b)
	b.wire.link.set(true)
	rng := rand.New(rand.NewPCG(7, 8))
	tail := make([]byte, 300_000)
	for i := range tail {
		tail[i] = byte(rng.Uint32())
	}
	end := lostTail(t, a, 1, tail)
	a.crash()
	b.peerIs("lost")
	b.promote(false)
	b.wire.link.set(false)
	a.open()
	a.inSync()
	b.inSync()
	quiesce(t, b, a)
	before := a.Status().Counters.UnverifiedBlocks // by the redo of what was acknowledged
	fill(t, b, 6, 20, 3000)
	quiesce(t, b, a)
	if s := a.Status(); s.Committed >= end {
		t.Fatalf("the log, up to LSN %v, has grown beyond the tail that was dropped, to %v", s.Committed, end)
	} else if s.Counters.UnverifiedBlocks > before {
		t.Errorf("%d blocks are unverified, %d were before", s.Counters.UnverifiedBlocks, before)
	}
	a.close()
	a.open()
	if !a.Status().Recovery.Clean {
		t.Error("it was not closed cleanly")
	}
}
