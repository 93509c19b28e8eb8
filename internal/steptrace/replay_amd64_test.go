package steptrace

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/pmem/sim"
)

// play plays a trace into simulated memory. change may alter an operation, or
// leave it out; at looks at the memory before each.
func play(tr *trace, change func(i int, o op) (op, bool), at func(i int, mem *sim.Memory) error) error {
	mem, err := sim.New(tr.size)
	if err != nil {
		return err
	}
	defer mem.Close()
	for i, o := range tr.ops {
		if err := at(i, mem); err != nil {
			return err
		}
		if change != nil {
			var ok bool
			if o, ok = change(i, o); !ok {
				continue
			}
		}
		switch o.kind {
		case opStore, opNT:
			mem.Raw(o.off, o.data, o.kind == opNT)
			if tr.cachesLast && o.kind == opStore {
				mem.Flush(o.off, int64(len(o.data)))
			}
		case opFlush:
			mem.Flush(o.off, 1)
		case opFence:
			mem.Fence()
		case opReset:
			mem.Load(o.data)
		case opKilled:
			if tr.cachesLast {
				mem.Fence() // what the kernel does before another process runs is one
			} else {
				mem.Killed()
			}
		}
	}
	return at(len(tr.ops), mem)
}

// examiner tries crash images of a trace.
type examiner struct {
	tr  *trace
	m   *model
	r   *recoverer
	rng *rand.Rand
	// caches: power failure keeps what is visible (class byte).
	caches  bool
	atFence int // images at each fence and acknowledgement
	samples int // of crash points that are neither
	tried   int
	points  int
}

// images recovers at most n of the regions that power failure could leave
// before op i.
func (x *examiner) images(i int, mem *sim.Memory, n int) error {
	x.points++
	if x.caches {
		x.tried++
		return x.m.judge(x.r, i, mem.Bytes())
	}
	var bad error
	mem.Images(n, x.rng, func(img *sim.Memory) {
		if bad == nil {
			x.tried++
			bad = x.m.judge(x.r, i, img.Bytes())
		}
	})
	return bad
}

// Crash points of a run.
const (
	atFence  = 3 // images at each; in the brief ones 2
	atSample = 2 // at each of a sample of the other operations
)

// crash tries the trace as it is.
func (x *examiner) crash() error {
	events := 0
	for _, o := range x.tr.ops {
		if o.kind == opStore || o.kind == opNT || o.kind == opFlush {
			events++
		}
	}
	known := false // the memory holds what the region does
	return play(x.tr, nil, func(i int, mem *sim.Memory) error {
		n := 0
		if i > 0 {
			switch last := x.tr.ops[i-1]; {
			case last.kind == opReset:
				known = true
			case last.kind == opMark && last.mark.kind == markOff:
				known = false
			}
		}
		switch {
		case !known:
		case i == len(x.tr.ops) || x.tr.ops[i].kind == opFence || x.tr.ops[i].kind == opKilled:
			n = x.atFence
		case x.tr.ops[i-1].kind == opMark && x.tr.ops[i-1].mark.kind != markBegin: // acknowledged, recovered
			n = x.atFence
		case x.tr.ops[i].kind <= opFlush && x.rng.IntN(events) < x.samples:
			n = atSample
		}
		if n == 0 {
			return nil
		}
		if err := x.images(i, mem, n); err != nil {
			return fmt.Errorf("power failure before %s: %w", x.describe(i), err)
		}
		return nil
	})
}

func (x *examiner) describe(i int) string {
	if i == len(x.tr.ops) {
		return "the end"
	}
	return x.tr.ops[i].String()
}

// stop ends a play.
var errStop = errors.New("far enough")

// caught plays the trace with the operation pick left out; for a non-temporal
// store, with all of the commit's in that line made cached ones. It reports what recovery broke where c was acknowledged.
// void: what the operation was for was in the region before.
func (x *examiner) caught(c *commit, pick int) (broken error, void bool, err error) {
	p := x.tr.ops[pick]
	var before []byte
	change := func(i int, o op) (op, bool) {
		if p.kind == opNT && o.kind == opNT && i >= c.begin && i < c.end && o.off&^63 == p.off&^63 {
			o.kind = opStore
			return o, true
		}
		return o, i != pick
	}
	err = play(x.tr, change, func(i int, mem *sim.Memory) error {
		n := len(p.data)
		if p.kind == opFlush {
			n = pmem.LineSize
		}
		now := mem.Bytes()[p.off:][:n]
		switch {
		case i == c.begin:
			before = bytes.Clone(now)
		case i == pick+1 && p.kind != opFence && bytes.Equal(now, before):
			void = true
			return errStop
		case i == c.end+1:
			broken = x.images(i, mem, atFence)
			return errStop
		}
		return nil
	})
	if errors.Is(err, errStop) {
		err = nil
	}
	return broken, void, err
}

// mutants are changes to the trace that recovery must not bear: for up to n
// commits each, one flush left out, the fence left out, non-temporal stores
// made cached ones.
func (x *examiner) mutants(n int) (tried []string, err error) {
	type kind struct {
		name  string
		picks func(c *commit) []int
	}
	kinds := []kind{
		{"a flush left out", x.loneFlushes},
		{"the fence left out", func(c *commit) []int { return x.within(c, opFence) }},
		{"non-temporal stores made cached ones", func(c *commit) []int { return x.within(c, opNT) }},
	}
	if x.tr.cachesLast { // no flush to leave out, and none that cached stores would need
		kinds = kinds[1:2]
	}
	for _, k := range kinds {
		done := 0
		for _, at := range x.rng.Perm(len(x.m.commits)) {
			c := &x.m.commits[at]
			if done == n || !c.traced || c.shared || c.end < 0 || x.tr.ops[c.end].mark.kind == markOpened {
				continue
			}
			picks := k.picks(c)
			if len(picks) == 0 {
				continue
			}
			pick := picks[x.rng.IntN(len(picks))]
			broken, void, err := x.caught(c, pick)
			if err != nil {
				return nil, err
			}
			if void {
				continue
			}
			if broken == nil {
				return nil, fmt.Errorf("%s (%v) in transaction %d of kind %d: recovery did not notice", k.name, x.tr.ops[pick], c.a, c.b)
			}
			done++
			tried = append(tried, fmt.Sprintf("%s: %v", k.name, broken))
		}
	}
	return tried, nil
}

// untrusted plays a trace whose child was killed with a whole transaction
// visible and not durable, without the flushes by which recovery makes
// it durable before it relies on it, and reports what broke.
func (x *examiner) untrusted() (broken, err error) {
	opened := slices.IndexFunc(x.tr.ops, func(o op) bool { return o.kind == opMark && o.mark.kind == markOpened })
	killed := slices.IndexFunc(x.tr.ops, func(o op) bool { return o.kind == opKilled })
	dropped := false
	change := func(i int, o op) (op, bool) {
		if i > killed && o.kind == opFlush && strings.HasPrefix(function(o.pc), module+"/journal.(*Log).Flush") {
			dropped = true
			return o, false
		}
		return o, true
	}
	err = play(x.tr, change, func(i int, mem *sim.Memory) error {
		if i != opened+1 {
			return nil
		}
		broken = x.images(i, mem, atFence)
		return errStop
	})
	if !dropped {
		return nil, errors.New("recovery's flushes of the journal were not found in the trace")
	}
	if errors.Is(err, errStop) {
		err = nil
	}
	return broken, err
}

// within are the places of operations of a kind in a commit, up to its fence.
func (x *examiner) within(c *commit, kind opKind) (places []int) {
	for i := c.begin; i < c.end; i++ {
		o := &x.tr.ops[i]
		if o.kind == kind {
			places = append(places, i)
		}
		if o.kind == opFence {
			break
		}
	}
	return places
}

// loneFlushes are flushes of lines that the commit flushes once.
func (x *examiner) loneFlushes(c *commit) (places []int) {
	n := map[int64]int{}
	all := x.within(c, opFlush)
	for _, i := range all {
		n[x.tr.ops[i].off]++
	}
	for _, i := range all {
		if n[x.tr.ops[i].off] == 1 {
			places = append(places, i)
		}
	}
	return places
}
