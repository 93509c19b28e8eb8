package nvmmirror

import (
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/nvmmirror/nvmmirror/pmem/sim"
)

// TestMutants drops, one after the other, each flush and each fence that the
// code issues (by the line that issues it), and wants recovery to break a
// promise for it. A mutant that survives is a flush or a fence too many, or a
// gap in the workload. `make mutants` runs it and prints the table.
func TestMutants(t *testing.T) {
	if os.Getenv("NVMMIRROR_MUTANTS") == "" {
		t.Skip("set NVMMIRROR_MUTANTS=1, or run make mutants: it takes minutes")
	}
	type mutant struct {
		kind sim.Kind
		site string
	}
	sites := map[mutant]int{}
	run := func(seed uint64, transactions int, drop func(sim.Op) bool) *simWorld {
		w := newSimWorld(t, rand.New(rand.NewPCG(seed, 2)), drop)
		w.every, w.images = 100, 12
		defer w.mem.Close()
		w.run(transactions)
		return w
	}
	if w := run(1, 60, func(o sim.Op) bool {
		if o.Kind != sim.Store {
			sites[mutant{o.Kind, o.Site}]++
		}
		return false
	}); w.broken != nil {
		t.Fatal("without a mutant: ", w.broken)
	}
	for _, m := range slices.SortedFunc(maps.Keys(sites), func(a, b mutant) int {
		if a.site != b.site {
			if a.site < b.site {
				return -1
			}
			return 1
		}
		return int(a.kind) - int(b.kind)
	}) {
		var caught error
		for seed := uint64(1); seed <= 3 && caught == nil; seed++ {
			caught = run(seed, 120, func(o sim.Op) bool { return o.Kind == m.kind && o.Site == m.site }).broken
		}
		if caught == nil {
			t.Errorf("%-24s %-6s %5d times  SURVIVED", m.site, m.kind, sites[m])
		} else {
			t.Logf("%-24s %-6s %5d times  %v", m.site, m.kind, sites[m], caught)
		}
	}
}
