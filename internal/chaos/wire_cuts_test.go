package chaos

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/internal/faultwire"
)

// The link is cut, both ways or one way, for less and for more than the peer
// timeout, and healed, while words are swapped: writers wait, nothing that was
// acknowledged is lost, and the pair is in sync again each time.
func TestWireCuts(t *testing.T) {
	const timeout = 300 * time.Millisecond
	seed := seedOf(t)
	r := newRig(t, pairConfig{timeout: timeout, seed: seed})
	rng := rand.New(rand.NewPCG(seed, 1))
	r.wire.SetPlan(faultwire.Plan{Swap: faultwire.Rule{Every: 200}, Add: faultwire.Rule{Every: 200}})
	before := r.read()
	cuts := sized(40, 4)
	lost := 0
	for n := range cuts {
		r.load.more(writers)
		directions := [][]*faultwire.Direction{{r.wire.AtoB, r.wire.BtoA}, {r.wire.AtoB}, {r.wire.BtoA}}[n%3]
		// Half of the cuts are shorter than the timeout.
		d := time.Duration(rng.Int64N(int64(timeout)))
		if n%2 == 1 {
			d += timeout
			lost++
		}
		for _, way := range directions {
			way.SetCut(true)
		}
		hold(t, d)
		for _, way := range directions {
			way.SetCut(false)
		}
		r.load.more(writers)
		if primary, _ := r.inSync(); primary != r.a {
			t.Fatalf("%s is primary, and nobody was promoted", primary.name)
		}
	}
	after := r.read()
	if n := after.reconnects - before.reconnects; n < uint64(lost) {
		t.Errorf("%d reconnects after %d cuts that were longer than the timeout", n, lost)
	}
	r.wire.SetPlan(faultwire.Plan{})
	r.load.end()
	r.soundPair()
	r.identical()
	t.Logf("%d cuts, %d reconnects, %d transactions acknowledged and verified on both nodes", cuts, after.reconnects-before.reconnects, r.load.commits.Load())
}

// hold lets a fault last. It is no synchronisation: what follows waits for
// what it needs.
func hold(t *testing.T, d time.Duration) {
	t.Helper()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.Context().Done():
	}
}
