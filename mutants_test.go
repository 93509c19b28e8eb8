package nvmmirror

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
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
	damageMutants(t, dropped)
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
	eachMutant(t, slices.Sorted(maps.Keys(sites)), func(m string) (line string, caught bool) {
		for seed := uint64(1); seed <= 3; seed++ {
			if err := run(seed, 120, func(o sim.Op) bool { return o.Kind != sim.Store && mutantOf(o) == m }).broken; err != nil {
				return fmt.Sprintf("%5d times  %v", sites[m], err), true
			}
		}
		return fmt.Sprintf("%5d times  SURVIVED", sites[m]), false
	})
	return sites
}

// damageMutants changes a block that is known to be damaged, and repairs one, less what
// was dropped already.
func damageMutants(t *testing.T, dropped map[string]int) {
	only := map[string]bool{}
	var mu sync.Mutex
	run := func(drop func(sim.Op) bool) error {
		if err := knownDamageUnderLoad(t, drop); err != nil {
			return err
		}
		if err := repairOverPowerFailures(t, drop); err != nil {
			return err
		}
		if err := repairOverAKill(t, drop); err != nil {
			return err
		}
		return verdictOverAKill(t, drop)
	}
	err := run(func(o sim.Op) bool {
		mu.Lock()
		defer mu.Unlock()
		if m := mutantOf(o); o.Kind != sim.Store && dropped[m] == 0 && !strings.Contains(m, "_test.go") {
			only[m] = true
		}
		return false
	})
	if err != nil || len(only) == 0 {
		t.Fatalf("without a mutant: %v, %d of its own", err, len(only))
	}
	for m := range only {
		dropped[m]++
	}
	eachMutant(t, slices.Sorted(maps.Keys(only)), func(m string) (line string, caught bool) {
		err := run(func(o sim.Op) bool { return o.Kind != sim.Store && mutantOf(o) == m })
		return fmt.Sprintf("known damage  %v", err), err != nil
	})
}

// eachMutant tries mutants, as many at once as there are processors, and prints
// what became of each.
func eachMutant(t *testing.T, mutants []string, try func(m string) (line string, caught bool)) {
	t.Helper()
	lines, caught := make([]string, len(mutants)), make([]bool, len(mutants))
	var next atomic.Int32
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(mutants); i = int(next.Add(1)) - 1 {
				lines[i], caught[i] = try(mutants[i])
			}
		})
	}
	wg.Wait()
	for i, m := range mutants {
		t.Logf("%-30s %s", m, lines[i])
		if !caught[i] {
			t.Errorf("%s survived", m)
		}
	}
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
	only := slices.DeleteFunc(r.sites, func(m string) bool { return dropped[m] > 0 })
	for _, m := range only {
		dropped[m]++
	}
	eachMutant(t, only, func(m string) (line string, caught bool) {
		for seed := uint64(1); seed < schedules; seed += pairSimChunk {
			if failure := runPairSim(t, seed, pairSimChunk, 0, nil, pairSimDrop+"="+m).failure; failure != "" {
				return "in a pair  " + failure, true
			}
		}
		return "in a pair  SURVIVED", false
	})
}
