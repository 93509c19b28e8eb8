package faultwire

import (
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// run asks a schedule about n packets and returns those that were struck.
func run(r Rule, seed uint64, n int) (struck []int) {
	s := schedule{rng: rand.New(rand.NewPCG(seed, 0))}
	s.set(r)
	for i := range n {
		if s.due() {
			s.took()
			struck = append(struck, i)
		}
	}
	return struck
}

func TestScheduleStrikesOnceInEachRun(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		every := rapid.IntRange(1, 50).Draw(t, "every")
		runs := rapid.IntRange(0, 20).Draw(t, "runs")
		seed := rapid.Uint64().Draw(t, "seed")
		struck := run(Rule{Every: every}, seed, every*runs)
		if len(struck) != runs {
			t.Fatalf("%d struck in %d runs", len(struck), runs)
		}
		for i, at := range struck {
			if at/every != i {
				t.Fatalf("packet %d was struck for run %d of %d", at, i, every)
			}
		}
		if !slices.Equal(struck, run(Rule{Every: every}, seed, every*runs)) {
			t.Fatal("the same seed struck others")
		}
	})
}

func TestScheduleLimit(t *testing.T) {
	if got := run(Rule{Every: 3, Limit: 4}, 1, 300); len(got) != 4 {
		t.Errorf("struck %v, want 4", got)
	}
}

func TestScheduleSeedsDiffer(t *testing.T) {
	if slices.Equal(run(Rule{Every: 10}, 1, 500), run(Rule{Every: 10}, 2, 500)) {
		t.Error("two seeds made the same 50 choices")
	}
}

// A packet that cannot take the fault leaves it to the next one.
func TestSchedulePendingWaits(t *testing.T) {
	s := schedule{rng: rand.New(rand.NewPCG(1, 0))}
	s.set(Rule{Every: 1})
	for range 3 {
		if !s.due() {
			t.Fatal("not due")
		}
	}
	s.took()
	if s.taken != 1 {
		t.Errorf("taken %d", s.taken)
	}
}

func TestFaultNamesAndCounters(t *testing.T) {
	seen := map[string]bool{}
	var s Stats
	for f := range faultCount {
		if seen[f.String()] {
			t.Errorf("two faults are named %q", f)
		}
		seen[f.String()] = true
		*s.counter(f) += uint64(f) + 1
	}
	for f := range faultCount {
		if s.Of(f) != uint64(f)+1 {
			t.Errorf("%v shares a counter", f)
		}
	}
	if noFault.String() != "none" || s.Of(noFault) != 0 {
		t.Error("no fault has a name or a count")
	}
	if want := s.Truncated + s.Flipped + s.Swapped + s.Added; s.Corrupted() != want {
		t.Errorf("Corrupted is %d, want %d", s.Corrupted(), want)
	}
}
