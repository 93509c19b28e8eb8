package nvmmirror

import (
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// pass is a whole pass at once.
func pass(v *Volume) {
	s := v.newScrubber()
	s.due = float64(v.size / blockSize)
	s.look()
}

// Flips in data that nobody reads or changes, on both nodes of a pair: each is found,
// and repaired from the other one.
func TestScrubRepairs(t *testing.T) {
	t.Parallel()
	a, b, model := mediaPair(t, &media{seed: 1}, 50, Options{})
	for i, n := range []*testNode{a, b} {
		raw := twin(t, n.path)
		for _, at := range []int64{
			n.data.Off + int64(7+i)*blockSize + 5, n.data.Off + n.size - 1, n.table.area.Off + int64(20+i)*tableEntry + 9,
		} {
			raw[at] ^= 4
		}
		before := n.Status().Counters
		pass(n.Volume)
		s := n.until("repaired", func(s Status) bool { return s.Counters.RepairedBlocks == before.RepairedBlocks+3 })
		if c := s.Counters; c.BadBlocks != before.BadBlocks+3 || c.ScrubbedBlocks < uint64(n.size/blockSize) || n.bad.n.Load() != 0 {
			t.Errorf("%s: %+v, degraded %v", n.name, c, s.Degraded)
		}
		unharmed(t, n, model)
		pass(n.Volume)
		if c := n.Status().Counters; c.BadBlocks != before.BadBlocks+3 {
			t.Errorf("%s: another pass finds more: %+v", n.name, c)
		}
	}
	identical(t, a, b)
}

// The checkpointer looks at each block once a day, wherever it begins; without a peer
// what it finds is reported.
func TestScrubTakesADay(t *testing.T) {
	// See TestCheckpointerRests.
	defer runtime.GC()
	defer runtime.GC()
	synctest.Test(t, func(t *testing.T) {
		v := found(t, Options{})
		v.wg.Go(v.checkpointer)
		blocks := uint64(v.size / blockSize)
		v.block(5)[100] ^= 1
		time.Sleep(scrubPass / 2)
		synctest.Wait()
		if n := v.Status().Counters.ScrubbedBlocks; n < blocks/2-1 || n > blocks/2 {
			t.Errorf("%d of %d blocks in half a day", n, blocks)
		}
		time.Sleep(scrubPass/2 + restingEvery)
		synctest.Wait()
		s := v.Status()
		if c := s.Counters; c.ScrubbedBlocks != blocks || c.BadBlocks != 1 || !slices.Contains(s.Degraded, "1 damaged blocks") {
			t.Errorf("after a day: %+v, degraded %q", c, s.Degraded)
		}
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// Where a page of the block table cannot be read, that is said, and the rest is looked
// at; a volume that is closed, or whose persistence failed, is left alone.
func TestScrubMeetsAFault(t *testing.T) {
	needFaults(t)
	v, _, _ := lone(t, &media{seed: 1}, 51)
	if err := v.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	core, logged := observer.New(zap.ErrorLevel)
	v.log = zap.New(core)
	poison(t, v.mem.Bytes(), v.data.Off+30*blockSize)
	pass(v)
	if n := logged.FilterMessage("damaged block").Len(); n != 1 || !v.bad.has(30) {
		t.Errorf("a block that cannot be read: %v", logged.All())
	}
	poison(t, v.mem.Bytes(), v.table.area.Off)
	pass(v)
	if n := logged.FilterMessage("a block cannot be verified").Len(); n == 0 || v.failed.Load() != nil {
		t.Errorf("%d blocks cannot be verified; %v", n, v.failed.Load())
	}
	before := v.Status().Counters.ScrubbedBlocks
	if before != 2*uint64(v.size/blockSize) {
		t.Errorf("%d blocks looked at", before)
	}
	v.Close()
	pass(v)
	if n := v.counters.scrubbed.Load(); n != before {
		t.Errorf("%d blocks looked at after the close", n-before)
	}
}

// Power fails at both nodes while a change is applied, and the primary comes back first.
// Whether its peer has the change it cannot know, so it has not redone it yet: that a
// block does not match its checksum then is no damage, and the block is readable once
// the node goes on.
func TestScrubBeforeRedo(t *testing.T) {
	direct(t, 4, Options{}, func(d *simScript) {
		d.begin()
		d.change(d.nodes[:], 100, []byte("before"))
		var before [2][]byte
		for i, n := range d.nodes {
			if err := n.v.checkpoint(false); err != nil {
				d.t.Fatal(err)
			}
			before[i] = slices.Clone(n.mem.Bytes())
		}
		d.change(d.nodes[:], 200, []byte("torn by it"))
		table, data := d.a.v.table.area, d.a.v.data
		d.kill(d.a)
		d.kill(d.b)
		for i, n := range d.nodes { // of what was applied, 8 bytes got out
			mem := n.mem.Bytes()
			at := data.Off + 7*blockSize + 200
			out := slices.Clone(mem[at : at+8])
			copy(mem[table.Off:], before[i][table.Off:])
			copy(mem[at:], out)
		}
		d.a.open()
		v := d.a.v
		if v.Applied() >= LSN(v.redoUntil.Load()) {
			d.t.Fatal("there is nothing left to redo")
		}
		pass(v)
		if n := v.bad.n.Load(); n != 0 {
			d.t.Errorf("seed %d: %d blocks count as damaged", d.seed, n)
		}
		d.a.continueByForce()
		d.until("alone", func() bool { return d.a.alone() && d.a.serves() })
		d.a.read()
		d.until("read", func() bool { return d.a.busy == 0 })
		if d.stats.reads == 0 {
			d.t.Errorf("seed %d: what was acknowledged cannot be read", d.seed)
		}
		pass(v)
		if v.counters.scrubbed.Load() == 0 {
			d.t.Errorf("seed %d: it is not scrubbed either now", d.seed)
		}
		d.b.open()
		d.until("in sync", func() bool { return d.inSync() })
		d.settled()
	})
}
