package chaos

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/faultwire"
)

// wireTime bounds a phase; nothing that works comes near it.
const wireTime = 4 * time.Minute

// rig is a pair under load, over a wire whose faults are counted.
type rig struct {
	*pair
	load  *load
	start time.Time
}

func newRig(t *testing.T, c pairConfig) *rig {
	t.Helper()
	c.policy, c.size, c.journal = nvmmirror.Block, volumeSize, 32<<20
	p := newPair(t, c)
	return &rig{pair: p, load: startLoad(p, c.seed), start: time.Now()}
}

// reading is everything that counts, at a moment when the wire is good.
type reading struct {
	toA, toB   faultwire.Stats // what was done to packets for a, for b
	atA, atB   faultwire.Counters
	reconnects uint64
}

func (r *rig) read() reading {
	r.t.Helper()
	var x reading
	var err error
	x.toA, x.toB = r.wire.BtoA.Stats(), r.wire.AtoB.Stats()
	if x.atA, err = r.wire.A.Counters(); err != nil {
		r.t.Fatal(err)
	}
	if x.atB, err = r.wire.B.Counters(); err != nil {
		r.t.Fatal(err)
	}
	x.reconnects = r.a.status().Counters.Reconnects + r.b.status().Counters.Reconnects
	return x
}

// suffered is what a phase did to one node's packets, and where its kernel
// found it.
type suffered struct {
	node                         string
	faultwire.Stats              // in the phase
	md5, checksum, short, absent uint64
}

func (s *suffered) String() string {
	return fmt.Sprintf("to %s: %d packets (%d data), %d dropped, %d duplicated, %d reordered, %d delayed, %d truncated, %d flipped, %d swapped, %d added; TCPMD5Failure %d, InCsumErrors %d, InTruncatedPkts %d",
		s.node, s.Packets, s.Data, s.Dropped, s.Duplicated, s.Reordered, s.Delayed, s.Truncated, s.Flipped, s.Swapped, s.Added, s.md5, s.checksum, s.short)
}

func since(node string, now, before faultwire.Stats, kernel, kernelBefore faultwire.Counters) *suffered {
	rise := func(name string) uint64 { return kernel.Rise(kernelBefore, name) }
	return &suffered{
		node: node,
		Stats: faultwire.Stats{
			Packets: now.Packets - before.Packets, Data: now.Data - before.Data,
			Dropped: now.Dropped - before.Dropped, Duplicated: now.Duplicated - before.Duplicated, Reordered: now.Reordered - before.Reordered,
			Truncated: now.Truncated - before.Truncated, Flipped: now.Flipped - before.Flipped, Swapped: now.Swapped - before.Swapped,
			Added: now.Added - before.Added, Delayed: now.Delayed - before.Delayed, Cut: now.Cut - before.Cut,
		},
		md5: rise(faultwire.MD5Failure), checksum: rise(faultwire.CsumErrors),
		short: rise(faultwire.InTruncated) + rise(faultwire.InTruncated6), absent: rise(faultwire.MD5NotFound),
	}
}

// phase sets a plan until enough holds for what it has done, in sum of both
// directions, then makes the wire good again.
func (r *rig) phase(name string, plan faultwire.Plan, enough func(faultwire.Stats) bool) []*suffered {
	r.t.Helper()
	begin := time.Now()
	before := r.read()
	committed, written := r.load.commits.Load(), r.load.bytes.Load()
	r.wire.SetPlan(plan)
	ctx, cancel := context.WithTimeoutCause(r.t.Context(), wireTime, fmt.Errorf("%s: not enough within %v", name, wireTime))
	defer cancel()
	err := r.wire.AtoB.Await(ctx, func(s faultwire.Stats) bool {
		return r.t.Failed() || enough(since("b", s, before.toB, nil, nil).Stats)
	})
	r.wire.SetPlan(faultwire.Plan{})
	if err != nil {
		r.t.Fatalf("%v; b's log: %s", err, r.b.lastLines())
	}
	r.load.more(writers) // over a good wire: the retransmissions are through
	after := r.read()
	found := []*suffered{
		since("a", after.toA, before.toA, after.atA, before.atA),
		since("b", after.toB, before.toB, after.atB, before.atB),
	}
	took := time.Since(begin)
	corrupted := found[0].Corrupted() + found[1].Corrupted()
	r.t.Logf("%s: %d corrupted in %.1f s (%.0f/s), %d commits, %.1f MB/s", name, corrupted, took.Seconds(), float64(corrupted)/took.Seconds(),
		r.load.commits.Load()-committed, float64(r.load.bytes.Load()-written)/took.Seconds()/1e6)
	for _, s := range found {
		r.t.Logf("  %v", s)
	}
	if n := after.reconnects - before.reconnects; n != 0 {
		r.t.Errorf("%s: %d reconnects: a fault below TCP reached the pair", name, n)
	}
	return found
}

// unseen swaps and adds, which TCP's checksum does not see, until so many packets
// are corrupted, then makes the wire good again. No kernel may have found any.
func (r *rig) unseen(want int) (corrupted, reconnects uint64) {
	r.t.Helper()
	const every = 400
	before := r.read()
	r.wire.SetPlan(faultwire.Plan{Swap: faultwire.Rule{Every: 2 * every}, Add: faultwire.Rule{Every: 2 * every}})
	poll(r.t, wireTime, "corrupted packets", func() (bool, string) {
		a, b := r.wire.BtoA.Stats(), r.wire.AtoB.Stats()
		return r.t.Failed() || a.Corrupted()+b.Corrupted() >= uint64(want), r.b.lastLines()
	})
	r.wire.SetPlan(faultwire.Plan{})
	r.load.more(writers)
	after := r.read()
	for _, s := range []*suffered{
		since("a", after.toA, before.toA, after.atA, before.atA),
		since("b", after.toB, before.toB, after.atB, before.atB),
	} {
		r.t.Logf("%v", s)
		corrupted += s.Corrupted()
		if s.md5+s.checksum+s.short != 0 {
			r.t.Errorf("the kernel found damage that it cannot find: %v", s)
		}
	}
	return corrupted, after.reconnects - before.reconnects
}

func corruptedAtLeast(n int) func(faultwire.Stats) bool {
	return func(s faultwire.Stats) bool { return s.Corrupted() >= uint64(n) }
}

// A signed pair under load, and every fault that a wire can have. Each damaged
// packet is found by the receiving kernel, none reaches the pair.
func TestWireSigned(t *testing.T) {
	r := newRig(t, pairConfig{timeout: 10 * time.Second, seed: seedOf(t)})
	every := func(n int) faultwire.Rule { return faultwire.Rule{Every: n} }
	onlySignature := func(name string, found []*suffered) {
		t.Helper()
		for _, s := range found {
			if n := s.Swapped + s.Added; s.md5 != n || s.checksum != 0 || s.Corrupted() != n {
				t.Errorf("%s: %v", name, s)
			}
		}
	}
	sumOrSignature := func(name string, found []*suffered) {
		t.Helper()
		for _, s := range found {
			if s.md5+s.checksum != s.Corrupted() {
				t.Errorf("%s: %v", name, s)
			}
		}
	}
	many := sized(34_000, 700)
	some := sized(1_000, 50)

	onlySignature("swaps", r.phase("swaps, 1 in 20", faultwire.Plan{Swap: every(20)}, corruptedAtLeast(many)))
	onlySignature("+1/-1", r.phase("+1/-1, 1 in 20", faultwire.Plan{Add: every(20)}, corruptedAtLeast(many)))
	onlySignature("both", r.phase("swaps and +1/-1, 1 in 25", faultwire.Plan{Swap: every(50), Add: every(50)}, corruptedAtLeast(many)))
	sumOrSignature("flips", r.phase("flips, 1 in 40", faultwire.Plan{Flip: every(40)}, corruptedAtLeast(some)))
	sumOrSignature("cut short", r.phase("truncated, length right", faultwire.Plan{Truncate: every(40), FixLength: true}, corruptedAtLeast(some)))
	for _, s := range r.phase("truncated, length wrong", faultwire.Plan{Truncate: every(40)}, corruptedAtLeast(some)) {
		if s.short != s.Truncated || s.md5 != 0 || s.checksum != 0 {
			t.Errorf("truncated: %v", s)
		}
	}
	for _, c := range []struct {
		name string
		plan faultwire.Plan
	}{
		{"drops", faultwire.Plan{Drop: every(40)}},
		{"duplicates", faultwire.Plan{Duplicate: every(20)}},
		{"reordered", faultwire.Plan{Reorder: every(20), ReorderBy: 5}},
		{"delayed", faultwire.Plan{Delay: every(20), DelayFor: 2 * time.Millisecond}},
	} {
		for _, s := range r.phase(c.name, c.plan, func(s faultwire.Stats) bool {
			return s.Dropped+s.Duplicated+s.Reordered+s.Delayed >= uint64(some)
		}) {
			if s.md5+s.checksum+s.short != 0 {
				t.Errorf("%s: %v", c.name, s)
			}
		}
	}
	sumOrSignature("all", r.phase("all at once", faultwire.Plan{
		Drop: every(400), Duplicate: every(200), Reorder: every(200), ReorderBy: 3, Truncate: every(200), FixLength: true,
		Flip: every(100), Swap: every(100), Add: every(100),
	}, corruptedAtLeast(some)))
	r.thirdParty()

	r.load.end()
	r.settle()
	r.statusShows()
	r.soundPair()
	r.identical()
	all := r.wire.AtoB.Stats()
	back := r.wire.BtoA.Stats()
	t.Logf("in all %d packets corrupted, %d transactions of %d MB acknowledged and verified on both nodes, in %.0f s",
		all.Corrupted()+back.Corrupted(), r.load.commits.Load(), r.load.bytes.Load()>>20, time.Since(r.start).Seconds())
}

// statusShows compares what the daemons say of MD5 failures with the kernel's
// counters of their namespaces, which were 0 when they started.
func (p *pair) statusShows() {
	p.t.Helper()
	for _, n := range []*node{p.a, p.b} {
		kernel, err := n.host.Counters()
		if err != nil {
			p.t.Fatal(err)
		}
		want := kernel[faultwire.MD5Failure]
		if got := n.status().Counters.MD5Failures; got != want || want == 0 {
			p.t.Errorf("status of %s shows %d MD5 failures, its kernel counts %d", n.name, got, want)
		}
		out, err := exec.Command(program, "status", "--socket", n.socket).CombinedOutput()
		if text := fmt.Sprintf("MD5 failures %d", want); err != nil || !strings.Contains(string(out), text) {
			p.t.Errorf("nvmmirrord status of %s does not show %q: %v\n%s", n.name, text, err, out)
		}
	}
}

// soundPair checks that no damage came as far as the pair's own checksums.
func (p *pair) soundPair() {
	p.t.Helper()
	for _, n := range []*node{p.a, p.b} {
		c := n.status().Counters
		if c.CRCFailures+c.Resends+c.BadBlocks+c.RepairedBlocks+c.Refused != 0 {
			p.t.Errorf("%s: %+v", n.name, c)
		}
	}
}
