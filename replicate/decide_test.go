package replicate

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/nvmmirror/nvmmirror/journal"
)

var update = flag.Bool("update", false, "rewrite golden files")

const (
	nodeA = 0xaaaa
	nodeB = 0xbbbb
)

var (
	lineage  = UUID{1}
	geometry = Geometry{Size: 1 << 20, Journal: 2 << 20, Block: BlockSize}
)

type ack uint8

const (
	both ack = iota
	alone
	async
)

func epoch(counter, node uint64, start journal.LSN, how ack) journal.Entry {
	return journal.Entry{Epoch: journal.Epoch{Counter: counter, Node: node}, Start: start, PeerIn: how != alone, Async: how == async}
}

// The family of histories: one beginning, and what can have become of it.
var (
	begun     = epoch(1, nodeA, 0, both)
	histories = []journal.History{
		{begun},
		{epoch(1, nodeA, 0, async)},
		{begun, epoch(2, nodeA, 128, both)},
		{begun, epoch(2, nodeA, 128, alone)},
		{begun, epoch(2, nodeA, 128, async)},
		{begun, epoch(2, nodeB, 128, alone)},
		{begun, epoch(2, nodeB, 128, both)},
		{begun, epoch(2, nodeA, 128, alone), epoch(3, nodeA, 256, both)},
		{begun, epoch(2, nodeB, 128, alone), epoch(3, nodeB, 256, both)},
		{begun, epoch(3, nodeB, 192, alone)},
		{epoch(3, nodeA, 256, both)}, // pruned
		{epoch(7, nodeB, 0, both)},   // nothing in common but the beginning
		{epoch(9, nodeB, 32, both)},  // nothing in common
	}
	ends = []journal.LSN{64, 128, 192, 320}
)

// logs are all the log states of one node.
func logs(node uint64) (all []Side) {
	for _, h := range histories {
		for _, end := range ends {
			if h.Last().Start > end {
				continue
			}
			for _, acked := range []journal.LSN{0, 128, end} {
				for _, applied := range []journal.LSN{64, end} {
					if acked > end || applied > end || acked == 128 && end == 128 {
						continue
					}
					all = append(all, Side{Node: node, Lineage: lineage, Geometry: geometry, History: h, End: end, Acked: acked, Applied: applied})
				}
			}
		}
	}
	return all
}

func TestDecideAll(t *testing.T) {
	as, bs := logs(nodeA), logs(nodeB)
	rules := map[Rule]int{}
	n := 0
	for _, a := range as {
		for _, b := range bs {
			for bits := range 64 {
				a.Role, b.Role = Role(bits&1), Role(bits>>1&1)
				a.Known, b.Known = bits&4 != 0, bits&8 != 0
				a.Damaged, b.Damaged = bits&16 != 0, bits&32 != 0
				rules[checkDecision(t, a, b).Rule]++
				n++
			}
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d combinations: %v", n, rules)
}

func TestDecideInconsistentAndBlank(t *testing.T) {
	variants := func(s Side) []Side {
		i, blank := s, Side{Node: s.Node, Geometry: s.Geometry}
		i.Inconsistent = true
		return []Side{s, i, blank}
	}
	for _, a := range logs(nodeA) {
		for _, b := range logs(nodeB) {
			if a.Acked != a.End || b.Acked != b.End || a.Applied != a.End || b.Applied != b.End {
				continue
			}
			for _, a := range variants(a) {
				for _, b := range variants(b) {
					for bits := range 64 {
						a.Role, b.Role = Role(bits&1), Role(bits>>1&1)
						a.Known, b.Known = bits&4 != 0, bits&8 != 0
						a.Damaged, b.Damaged = bits&16 != 0, bits&32 != 0
						checkDecision(t, a, b)
					}
				}
			}
		}
		if t.Failed() {
			return
		}
	}
}

// checkDecision checks what must hold of each verdict.
func checkDecision(t *testing.T, a, b Side) Verdict {
	v := Decide(a, b)
	w := Decide(b, a)
	fail := func(format string, args ...any) {
		t.Helper()
		t.Errorf("%s\n a: %+v\n b: %+v\n %+v", fmt.Sprintf(format, args...), a, b, v)
	}
	if v.Rule != w.Rule || v.Action != w.Action || v.From != w.From || v.Full != w.Full ||
		v.Action >= Follow && v.Mine == w.Mine || v.Action < Follow && (v.Mine || w.Mine) {
		fail("not the mirror image: %+v", w)
	}
	a.Title = true
	if x := Decide(a, b); x != v {
		fail("the title matters: %+v", x)
	}
	a.Title = false
	if v.Action < Follow {
		if v.Full {
			fail("copies, and does nothing")
		}
		return v
	}
	source, target := a, b
	if !v.Mine {
		source, target = b, a
	}
	blank := target.Lineage == UUID{}
	if (source.Lineage == UUID{}) || source.Inconsistent {
		fail("the source holds no whole volume")
	}
	f := findFork(source, target)
	switch v.Action {
	case Follow:
		switch {
		case source.Role != Primary:
			fail("the source is not primary")
		case source.Damaged:
			fail("the source has lost acknowledged log")
		case v.Full != (!source.Known || target.Inconsistent) && v.From < source.End:
			fail("full copy: %v, the journal reaches: %v", v.Full, source.Known)
		case v.From > source.End || !blank && !target.Inconsistent && (v.From != f.common || v.From > target.End):
			fail("from LSN %d, common up to %d", v.From, f.common)
		}
		if blank || target.Inconsistent {
			break
		}
		if target.Acked > f.common {
			fail("the target knows LSN %d to be acknowledged, the source lacks it", target.Acked)
		}
		if target.Applied > f.common {
			fail("the target has applied LSN %d, beyond the fork", target.Applied)
		}
		if target.End > f.common || f.newerB {
			if v.Rule != RuleDropTail {
				fail("drops log under another name")
			}
			for i, e := range target.History {
				inForce := i == len(target.History)-1 || target.History[i+1].Start > f.common
				if inForce && !e.BothIn() && (target.Role == Primary || target.End > f.common) {
					fail("the target may have acknowledged alone under %+v", e)
				}
			}
		}
		if target.History = source.History; !v.Full {
			target.End, target.Role, target.Damaged = source.End, Secondary, false
			target.Acked, target.Applied = min(target.Acked, target.End), min(target.Applied, target.End)
			source.Known, target.Known = true, true
			if x := Decide(source, target); x.Rule != RuleInSync || !x.Mine {
				fail("after it was done: %+v", x)
			}
		}
	case Fetch:
		if target.Role != Primary || source.Role == Primary || f.newerA || f.newerB || source.End <= target.End || target.End != f.common || !source.Known {
			fail("takes log that is not the continuation of its own")
		}
	case StepDown:
		if target.Role != Primary || source.Role == Primary || !f.newerA && !droppable(target, f.common) {
			fail("steps down for a node that did not go on")
		}
		if target.Role = Secondary; Decide(source, target).Action == StepDown {
			fail("steps down twice")
		}
	}
	return v
}

func TestDecideChangesNothing(t *testing.T) {
	a := Side{Node: nodeA, Lineage: lineage, Geometry: geometry, Role: Primary, History: histories[7], End: 320, Acked: 256, Known: true}
	b := Side{Node: nodeB, Lineage: lineage, Geometry: geometry, History: histories[5], End: 192, Acked: 64, Known: true}
	ca, cb := a, b
	ca.History, cb.History = append(journal.History(nil), a.History...), append(journal.History(nil), b.History...)
	Decide(a, b)
	if !reflect.DeepEqual(a, ca) || !reflect.DeepEqual(b, cb) {
		t.Fatal("Decide changed what it was given")
	}
}

// TestDecideTable is the readable part: named situations, and what is done.
func TestDecideTable(t *testing.T) {
	side := func(node uint64, role Role, end journal.LSN, h ...journal.Entry) Side {
		return Side{Node: node, Lineage: lineage, Geometry: geometry, Role: role, History: h, End: end, Acked: end, Applied: end, Known: true, Chain: 1}
	}
	with := func(s Side, f func(*Side)) Side { f(&s); return s }
	unknown := func(s *Side) { s.Known = false }
	unacked := func(lsn journal.LSN) func(*Side) { return func(s *Side) { s.Acked, s.Applied = lsn, lsn } }
	damaged := func(s *Side) { s.Damaged = true }
	inconsistent := func(s *Side) { s.Inconsistent = true }
	blank := func(node uint64) Side { return Side{Node: node, Geometry: geometry} }
	promoted := epoch(2, nodeB, 128, alone)
	var out bytes.Buffer
	for _, c := range []struct {
		name string
		a, b Side
	}{
		{"both blank", blank(nodeA), blank(nodeB)},
		{"a blank node beside a primary", side(nodeA, Primary, 320, begun), blank(nodeB)},
		{"a blank node, the journal no longer begins at its start", with(side(nodeA, Primary, 320, begun), unknown), blank(nodeB)},
		{"a blank node beside a secondary with data", side(nodeA, Secondary, 320, begun), blank(nodeB)},
		{"in sync", side(nodeA, Primary, 320, begun), side(nodeB, Secondary, 320, begun)},
		{"in sync, the primary has a new epoch", side(nodeA, Primary, 320, begun, epoch(2, nodeA, 320, both)), side(nodeB, Secondary, 320, begun)},
		{"catch up", side(nodeA, Primary, 320, begun), side(nodeB, Secondary, 192, begun)},
		{"catch up after the primary was alone", side(nodeA, Primary, 320, begun, epoch(2, nodeA, 192, alone)), side(nodeB, Secondary, 192, begun)},
		{"full copy: the journal no longer reaches back", with(side(nodeA, Primary, 320, begun), unknown), side(nodeB, Secondary, 64, begun)},
		{"full copy anew: the last one did not finish", side(nodeA, Primary, 320, begun), with(side(nodeB, Secondary, 64, begun), inconsistent)},
		{"former primary with a tail that nobody acknowledged", with(side(nodeA, Primary, 320, begun), unacked(128)), side(nodeB, Primary, 192, begun, promoted)},
		{"the same, and the journal no longer reaches the fork", with(side(nodeA, Primary, 320, begun), unacked(128)), with(side(nodeB, Primary, 192, begun, promoted), unknown)},
		{"former primary without a tail", side(nodeA, Primary, 128, begun), side(nodeB, Primary, 192, begun, promoted)},
		{"former primary whose tail is known to be acknowledged", side(nodeA, Primary, 320, begun), side(nodeB, Primary, 192, begun, promoted)},
		{"former primary that went alone", with(side(nodeA, Primary, 320, begun, epoch(2, nodeA, 192, alone)), unacked(128)), side(nodeB, Primary, 192, begun, promoted)},
		{"former primary in async mode", with(side(nodeA, Primary, 320, epoch(1, nodeA, 0, async)), unacked(128)), side(nodeB, Primary, 192, epoch(1, nodeA, 0, async), promoted)},
		{"former primary, the promoted one was demoted", with(side(nodeA, Primary, 320, begun), unacked(128)), side(nodeB, Secondary, 192, begun, promoted)},
		{"former primary without a tail, the promoted one was demoted", side(nodeA, Primary, 128, begun), side(nodeB, Secondary, 192, begun, promoted)},
		{"two secondaries", side(nodeA, Secondary, 320, begun), side(nodeB, Secondary, 320, begun)},
		{"two secondaries, one behind", side(nodeA, Secondary, 320, begun), side(nodeB, Secondary, 128, begun)},
		{"both primary in one epoch", side(nodeA, Primary, 320, begun), side(nodeB, Primary, 320, begun)},
		{"restarted primary, the peer holds more", with(side(nodeA, Primary, 192, begun), unacked(128)), side(nodeB, Secondary, 320, begun)},
		{"restarted primary, damaged, the peer holds more", with(side(nodeA, Primary, 192, begun), damaged), side(nodeB, Secondary, 320, begun)},
		{"restarted primary, the peer's journal no longer reaches back", side(nodeA, Primary, 64, begun), with(side(nodeB, Secondary, 320, begun), unknown)},
		{"damaged primary, the peer does not hold what is lost", with(side(nodeA, Primary, 192, begun), damaged), side(nodeB, Secondary, 192, begun)},
		{"damaged secondary", side(nodeA, Primary, 320, begun), with(side(nodeB, Secondary, 192, begun), damaged)},
		{"both inconsistent", with(side(nodeA, Secondary, 64, begun), inconsistent), with(side(nodeB, Secondary, 64, begun), inconsistent)},
		{"inconsistent beside a secondary", side(nodeA, Secondary, 320, begun), with(side(nodeB, Secondary, 64, begun), inconsistent)},
		{"both promoted, both acknowledged", side(nodeA, Primary, 320, begun, epoch(2, nodeA, 128, alone)), side(nodeB, Primary, 192, begun, promoted)},
		{"both promoted, nothing acknowledged since", side(nodeA, Primary, 128, begun, epoch(2, nodeA, 128, alone)), side(nodeB, Primary, 128, begun, promoted)},
		{"interrupted while joining, the lone primary restarted, nothing written", side(nodeA, Secondary, 128, begun, promoted), side(nodeB, Primary, 128, begun, epoch(3, nodeB, 128, alone))},
		{"interrupted at the join, nothing written", side(nodeA, Secondary, 128, begun, promoted), side(nodeB, Primary, 128, begun, epoch(3, nodeB, 128, both))},
		{"interrupted at the join of a former primary, nothing written", side(nodeA, Primary, 128, begun, epoch(2, nodeA, 128, both)), side(nodeB, Primary, 128, begun, epoch(4, nodeB, 128, both))},
		{"interrupted at the join, damaged since", with(side(nodeA, Secondary, 128, begun, promoted), damaged), side(nodeB, Primary, 128, begun, epoch(3, nodeB, 128, alone))},
		{"other lineage", side(nodeA, Primary, 320, begun), with(side(nodeB, Primary, 320, begun), func(s *Side) { s.Lineage = UUID{2} })},
		{"other size", side(nodeA, Primary, 320, begun), with(blank(nodeB), func(s *Side) { s.Geometry.Size *= 2 })},
		{"other journal size", side(nodeA, Primary, 320, begun), with(blank(nodeB), func(s *Side) { s.Geometry.Journal *= 2 })},
		{"a copy of the region", side(nodeA, Primary, 320, begun), side(nodeA, Primary, 320, begun)},
		{"no epoch in common", side(nodeA, Primary, 320, begun), side(nodeB, Secondary, 320, epoch(9, nodeB, 64, both))},
		{"failed over before anything was written", side(nodeA, Primary, 0, begun), side(nodeB, Primary, 0, epoch(2, nodeB, 0, alone))},
		{"failed over before anything was acknowledged", with(side(nodeA, Primary, 192, begun), unacked(0)), side(nodeB, Primary, 320, epoch(2, nodeB, 0, alone))},
		{"nothing in common but the beginning, both acknowledged", side(nodeA, Primary, 192, begun), side(nodeB, Primary, 320, epoch(2, nodeB, 0, alone))},
		{"promoted and demoted while a join of the other had begun an epoch, nothing written", side(nodeA, Primary, 320, begun, epoch(2, nodeA, 320, both)), side(nodeB, Secondary, 320, begun, epoch(2, nodeB, 320, alone))},
		{"the same, with a tail that nobody acknowledged", with(side(nodeA, Primary, 384, begun, epoch(2, nodeA, 320, both)), unacked(320)), side(nodeB, Secondary, 320, begun, epoch(2, nodeB, 320, alone))},
		{"the same, and it still serves alone", side(nodeA, Primary, 320, begun, epoch(2, nodeA, 320, both)), side(nodeB, Primary, 320, begun, epoch(2, nodeB, 320, alone))},
		{"another segment before the common LSN", side(nodeA, Primary, 320, begun), with(side(nodeB, Secondary, 192, begun), func(s *Side) { s.Chain = 2 })},
	} {
		v := checkDecision(t, c.a, c.b)
		fmt.Fprintf(&out, "%s\n  a: %s\n  b: %s\n  -> %s: %s\n\n", c.name, describe(c.a), describe(c.b), v.Rule, does(v))
	}
	golden := filepath.Join("testdata", "decide.txt")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, out.Bytes()) {
		t.Errorf("decisions differ from %s; look at the difference, then rewrite it with -update:\n%s", golden, out.Bytes())
	}
}

func describe(s Side) string {
	if (s.Lineage == UUID{}) {
		return "blank"
	}
	out := fmt.Sprintf("%s, log to %d, acknowledged to %d, epochs", s.Role, s.End, s.Acked)
	for _, e := range s.History {
		how := map[[2]bool]string{{true, false}: "both", {false, false}: "alone", {true, true}: "async"}[[2]bool{e.PeerIn, e.Async}]
		out += fmt.Sprintf(" [%d of %s, %s, from %d]", e.Epoch.Counter, map[uint64]string{nodeA: "a", nodeB: "b"}[e.Epoch.Node], how, e.Start)
	}
	for name, on := range map[string]bool{", damaged": s.Damaged, ", inconsistent": s.Inconsistent, ", its ring no longer reaches back": !s.Known} {
		if on {
			out += name
		}
	}
	return out
}

func does(v Verdict) string {
	who, other := "a", "b"
	if !v.Mine {
		who, other = other, who
	}
	switch v.Action {
	case Refuse:
		return "nothing is done, on either side"
	case Idle:
		return "connected, nothing is shipped"
	case Follow:
		s := fmt.Sprintf("%s follows %s from %d", other, who, v.From)
		if v.Full {
			s = fmt.Sprintf("%s takes a full copy of %s", other, who)
		}
		return s
	case Fetch:
		return fmt.Sprintf("%s takes the log of %s from %d, then decide again", other, who, v.From)
	case StepDown:
		return fmt.Sprintf("%s becomes a secondary, then decide again", other)
	}
	return strings.ToUpper(fmt.Sprint(v.Action))
}
