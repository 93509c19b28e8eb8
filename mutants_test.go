package nvmmirror

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/nvmmirror/nvmmirror/pmem/sim"
)

// mutantOf names the mutant that leaves a flush or a fence out.
func mutantOf(o sim.Op) string { return fmt.Sprintf("%s %s", o.Kind, o.Site) }

// TestMutants drops, one after the other, each flush and each fence that the
// code issues (by the line that issues it), and wants recovery, or the check of
// the simulated pair, to break a promise for it. A mutant that survives is a
// flush or a fence too many, or a gap in the workload. `make mutants` runs it
// and prints the table.
func TestMutants(t *testing.T) {
	if os.Getenv("NVMMIRROR_MUTANTS") == "" {
		t.Skip("set NVMMIRROR_MUTANTS=1, or run make mutants: it takes minutes")
	}
	dropped := standaloneMutants(t)
	pairMutants(t, dropped)
	refusalMutants(t, dropped)
}

// standaloneMutants runs the crash workload of one node, and returns what that
// issues.
func standaloneMutants(t *testing.T) (sites map[string]int) {
	sites = map[string]int{}
	run := func(seed uint64, transactions int, drop func(sim.Op) bool) *simWorld {
		w := newSimWorld(t, rand.New(rand.NewPCG(seed, 2)), drop)
		w.every, w.images = 100, 12
		defer w.mem.Close()
		w.run(transactions)
		return w
	}
	if w := run(1, 60, func(o sim.Op) bool {
		if o.Kind != sim.Store {
			sites[mutantOf(o)]++
		}
		return false
	}); w.broken != nil {
		t.Fatal("without a mutant: ", w.broken)
	}
	for _, m := range slices.Sorted(maps.Keys(sites)) {
		var caught error
		for seed := uint64(1); seed <= 3 && caught == nil; seed++ {
			caught = run(seed, 120, func(o sim.Op) bool { return o.Kind != sim.Store && mutantOf(o) == m }).broken
		}
		if caught == nil {
			t.Errorf("%-30s %5d times  SURVIVED", m, sites[m])
		} else {
			t.Logf("%-30s %5d times  %v", m, sites[m], caught)
		}
	}
	return sites
}

// refusalMutants does what a node does whose peer lies, less what was dropped
// already.
func refusalMutants(t *testing.T, dropped map[string]int) {
	const test = "TestRefusedSegmentStaysOut"
	out, err := runDirect(t, test, pairSimDrop+"=none")
	if err != nil {
		t.Fatalf("without a mutant: %v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		m, ok := strings.CutPrefix(strings.TrimSpace(line), "site ")
		if !ok || dropped[m] > 0 {
			continue
		}
		out, err := runDirect(t, test, pairSimDrop+"="+m)
		what := slices.Collect(strings.Lines(string(out)))
		if i := slices.IndexFunc(what, func(s string) bool { return strings.Contains(s, "seed ") }); err == nil || i < 0 {
			t.Errorf("%-30s with a peer that lies  SURVIVED", m)
		} else {
			t.Logf("%-30s with a peer that lies  %s", m, strings.TrimSpace(what[i]))
		}
	}
}

// pairMutants does what only a pair does, less what was dropped already:
// schedules of the simulated pair, from seed 1 on.
func pairMutants(t *testing.T, dropped map[string]int) {
	needSelf(t)
	const schedules = 500
	r := runPairSim(t, 1, 100, 0, nil, pairSimDrop+"=none")
	if r.failure != "" {
		t.Fatal("without a mutant: ", r.failure)
	}
	slices.Sort(r.sites)
	if len(r.sites) == 0 {
		t.Fatal("a pair without a flush or a fence")
	}
	for _, m := range r.sites {
		if dropped[m] > 0 {
			continue
		}
		dropped[m]++
		var caught string
		for seed := uint64(1); seed < schedules && caught == ""; seed += pairSimChunk {
			caught = runPairSim(t, seed, pairSimChunk, 0, nil, pairSimDrop+"="+m).failure
		}
		if caught == "" {
			t.Errorf("%-30s in a pair  SURVIVED", m)
		} else {
			t.Logf("%-30s in a pair  %s", m, caught)
		}
	}
}
