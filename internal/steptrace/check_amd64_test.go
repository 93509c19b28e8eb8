package steptrace

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// checkCommits: one fence a commit; before it each line that the commit wrote
// is flushed, or was written past the cache, and only by the instructions of
// the choice. ring is the extent of the journal: what commits that ran beside
// others wrote is told by it.
func checkCommits(tr *trace, m *model, ch primitives, ring [2]int64) error {
	fences, lsns, shared := 0, map[int]int{}, 0
	for i := range m.commits {
		c := &m.commits[i]
		switch {
		case !c.traced || c.end < 0 || tr.ops[c.end].mark.kind == markOpened:
		case c.shared:
			lsns[c.lsn]++
			shared++
		default:
			n, err := checkCommit(tr, c, ch)
			if err == nil && n != 1 {
				err = fmt.Errorf("%d fences", n)
			}
			if err != nil {
				return fmt.Errorf("transaction %d of kind %d: %w", c.a, c.b, err)
			}
		}
	}
	if shared == 0 {
		return nil
	}
	first := slices.IndexFunc(m.commits, func(c commit) bool { return c.shared })
	from, to := m.commits[first].begin, 0
	for _, c := range m.commits {
		if c.shared {
			to = max(to, c.end)
		}
	}
	dirty := map[int64]bool{}
	for _, o := range tr.ops[from:to] {
		switch line := o.off &^ 63; {
		case o.kind == opFlush:
			delete(dirty, line)
		case o.kind == opStore && line >= ring[0] && line < ring[1]:
			dirty[line] = true
		case o.kind == opFence && strings.HasPrefix(function(o.pc), module+"/journal.(*Log).Append"):
			if fences++; len(dirty) > 0 && ch.flush != 0 {
				return fmt.Errorf("group commit: %d lines of the journal are not flushed before a fence", len(dirty))
			}
		}
	}
	if fences != len(lsns) || len(lsns) == shared {
		return fmt.Errorf("%d transactions of several committers made %d segments with %d fences: want as many fences as segments, and fewer than transactions", shared, len(lsns), fences)
	}
	return nil
}

// checkCommit checks a commit that ran alone, and counts its fences.
func checkCommit(tr *trace, c *commit, ch primitives) (fences int, err error) {
	dirty := map[int64]op{}
	stores := 0
	for _, o := range tr.ops[c.begin:c.end] {
		switch o.kind {
		case opStore:
			if fences == 0 {
				stores++
				for line := o.off &^ 63; line < o.off+int64(len(o.data)); line += 64 {
					dirty[line] = o
				}
			}
		case opNT:
			stores++
		case opFlush:
			delete(dirty, o.off)
		case opFence:
			if fences++; fences == 1 && len(dirty) > 0 && ch.flush != 0 {
				return 0, fmt.Errorf("%d of its lines are not flushed before its fence: %v", len(dirty), slices.Collect(maps.Values(dirty))[0])
			}
		}
	}
	if stores == 0 {
		return 0, fmt.Errorf("no store of it was seen")
	}
	return fences, nil
}

var flushNames = [...]string{"none", "CLFLUSH", "CLFLUSHOPT", "CLWB"}

// checkInstructions: the trace has the instructions of the choice, and no
// others of their kind.
func checkInstructions(tr *trace, ch primitives) error {
	flushes, widths := map[string]int{}, map[string]int{}
	for _, o := range tr.ops {
		switch o.kind {
		case opFlush:
			flushes[o.name]++
		case opNT:
			widths[fmt.Sprintf("%s %d", o.name, len(o.data))]++
		}
	}
	wantFlush, wantNT := []string{}, []string{}
	if ch.flush != 0 {
		wantFlush = append(wantFlush, flushNames[ch.flush])
	}
	switch ch.width {
	case 8:
		wantNT = append(wantNT, "MOVNTI 8")
	case 32, 64:
		wantNT = append(wantNT, fmt.Sprintf("VMOVNTDQ %d", ch.width))
	}
	if got := slices.Sorted(maps.Keys(flushes)); !slices.Equal(got, wantFlush) {
		return fmt.Errorf("flushes by %v, want %v", got, wantFlush)
	}
	if got := slices.Sorted(maps.Keys(widths)); !slices.Equal(got, wantNT) {
		return fmt.Errorf("non-temporal stores by %v, want %v", got, wantNT)
	}
	return nil
}
