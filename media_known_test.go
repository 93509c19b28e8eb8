package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/pmem/sim"
)

// knownDamage is a volume whose block 0 was found to have a flip at 2000, and a
// checkpoint after that.
func knownDamage(t *testing.T) (*heapMemory, *Volume) {
	t.Helper()
	mem := newImage(t, smallSize, smallJournal)
	v := openQuiet(t, mem)
	if _, err := v.WriteAt(bytes.Repeat([]byte("a"), blockSize), 0); err != nil {
		t.Fatal(err)
	}
	if err := v.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	mem.b[v.data.Off+2000] ^= 1
	if _, err := v.ReadAt(make([]byte, 1), 2000); !isCorrupt(err) {
		t.Fatalf("not found: %v", err)
	}
	if err := v.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	return mem, v
}

// A block that was found damaged is changed in part, and the process killed before
// the next checkpoint: recovery does not take its checksum anew.
func TestKnownDamageAfterAKill(t *testing.T) {
	mem, v := knownDamage(t)
	p := make([]byte, 1)
	if _, err := v.WriteAt([]byte("beside it"), 0); err != nil {
		t.Fatal(err)
	}
	image := newHeapMemory(slices.Clone(mem.b)) // killed here
	path := writeRegion(t, image.b)
	w := openQuiet(t, image)
	if _, err := w.ReadAt(p, 2000); !isCorrupt(err) {
		t.Fatalf("%q was served: %v", p, err)
	}
	if r, err := Check(path); err != nil || r.Blocks.Damaged != 1 || r.Blocks.Rewritten != 0 {
		t.Errorf("check: %v, %+v", err, r)
	}
	if _, err := w.WriteAt(bytes.Repeat([]byte("b"), blockSize), 0); err != nil {
		t.Fatal(err)
	}
	if e, ok := w.table.get(0); !ok || e.damaged {
		t.Errorf("rewritten, and %+v", e)
	}
	if _, err := w.ReadAt(p, 2000); err != nil || p[0] != 'b' {
		t.Errorf("%q, %v", p, err)
	}
}

// A block that was found damaged, and that log changes which a restarted primary has
// yet to redo: a peer that is copied to does not get it, nor is its checksum taken anew.
func TestKnownDamageBeforeACopy(t *testing.T) {
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Block}, quiet: true})
	fill(t, a, 1, 500, 20000) // the ring no longer reaches the log's start
	quiesce(t, a, b)
	const block = 5
	commit(t, a, block*blockSize, bytes.Repeat([]byte("a"), blockSize))
	quiesce(t, a, b)
	if err := a.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	b.wire.link.set(true)
	a.peerIs("lost")
	flipLive(a, block*blockSize+2000)
	if bad, err := a.judge(block); !bad || err != nil { // what ReadAt does
		t.Fatal(bad, err)
	}
	if err := a.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	before := a.Status().Committed
	waiting := begin(context.Background(), a, block*blockSize, []byte("beside it"))
	a.until("written", func(s Status) bool { return s.Committed > before })
	a.crash()
	<-waiting
	replace(t, b)
	b.wire.link.set(false)
	a.open()
	if e, _ := a.table.get(block); !e.damaged {
		t.Fatal("mark is gone")
	}
	b.open()
	a.until("the block named", func(s Status) bool {
		return slices.ContainsFunc(s.Degraded, func(d string) bool { return strings.Contains(d, "full copy: block 5: corrupt") })
	})
	if bad, err := a.judge(block); !bad || err != nil {
		t.Errorf("it is sound: %v", err)
	}
}

// Loss of log is accepted over a block that was found damaged.
func TestKnownDamageBeforeALoss(t *testing.T) {
	mem, v := knownDamage(t)
	at := v.journal.End()
	for range 3 {
		if _, err := v.WriteAt([]byte("x"), 7); err != nil {
			t.Fatal(err)
		}
	}
	image := newHeapMemory(slices.Clone(mem.b))
	image.b[v.ring.Off+int64(v.journal.Ring().Position(at))+20] ^= 1
	o, _ := Options{Logger: nopLogger, AcceptLoss: true}.withDefaults()
	w, err := openMemory("x", image, o)
	if err == nil {
		err = w.takeUp()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer w.pair.Close()
	p := make([]byte, 1)
	if _, err := w.ReadAt(p, 2000); err == nil {
		t.Errorf("%q is served", p)
	}
}

// What is known to be damaged is so after a restart, also a clean one, and repaired.
func TestKnownDamageOverARestart(t *testing.T) {
	a, b := pairInSync(t, testConfig{quiet: true, timeout: steady()})
	fill(t, a, 3, 20, 20000)
	quiesce(t, a, b)
	a.wire.link.set(true)
	b.peerIs("lost")
	flipLive(b, 5*blockSize+100)
	if bad, err := b.judge(5); !bad || err != nil {
		t.Fatal(bad, err)
	}
	if err := b.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	b.close()
	b.open()
	if n := b.bad.n.Load(); n != 1 {
		t.Errorf("%d blocks are damaged after a restart", n)
	}
	a.wire.link.set(false)
	b.until("repaired", func(s Status) bool { return s.Counters.RepairedBlocks == 1 && b.bad.n.Load() == 0 })
	if e, _ := b.table.get(5); e.damaged {
		t.Error("repaired, and its entry says damaged")
	}
}

// A power failure between a repaired block and its entry leaves a mark on a block that
// is sound: it goes when the region is opened, before a change that a crash cuts off
// could look like damage, or with the next change.
func TestStaleMarkOfDamage(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		mem := newImage(t, smallSize, smallJournal)
		v := openQuiet(t, mem)
		if _, err := v.WriteAt(bytes.Repeat([]byte("a"), blockSize), 0); err != nil {
			t.Fatal(err)
		}
		e, _ := v.table.get(0)
		e.damaged = true
		v.table.set(0, e)
		if err := v.checkpoint(false); err != nil {
			t.Fatal(err)
		}
		if restarted {
			mem = newHeapMemory(slices.Clone(mem.b))
			if v = openQuiet(t, mem); v.bad.n.Load() != 0 {
				t.Error("a sound block counts as damaged")
			}
			if !v.unverified.has(0) {
				t.Error("it is not compared with the peer's")
			}
		}
		if !restarted {
			v.bad.add(0)
		}
		was := slices.Clone(mem.b[v.table.area.Off:][:tableEntry])
		// Verified before a change: sound.
		if _, err := v.WriteAt([]byte("x"), 10); err != nil {
			t.Fatal(err)
		}
		if restarted { // power fails at once: the data's line is kept, the entry's is not
			image := newHeapMemory(slices.Clone(mem.b))
			copy(image.b[v.table.area.Off:], was)
			if _, err := openQuiet(t, image).ReadAt(make([]byte, 11), 0); err != nil {
				t.Errorf("changed for the first time since the restart: %v", err)
			}
		}
		if err := v.checkpoint(false); err != nil {
			t.Fatal(err)
		}
		if e, ok := v.table.get(0); !ok || e.damaged || v.bad.n.Load() != 0 {
			t.Errorf("restarted %v: %+v, %d damaged", restarted, e, v.bad.n.Load())
		}
		old := slices.Clone(mem.b[v.table.area.Off:][:tableEntry])
		if _, err := v.WriteAt([]byte("y"), 20); err != nil {
			t.Fatal(err)
		}
		image := newHeapMemory(slices.Clone(mem.b)) // power fails: the data's line is kept, the entry's is not
		copy(image.b[v.table.area.Off:], old)
		if _, err := openQuiet(t, image).ReadAt(make([]byte, 10), 0); err != nil {
			t.Errorf("restarted %v: %v", restarted, err)
		}
	}
}

// That a block was found damaged is durable soon, also where commits never pause, and
// stays so whatever they change in it: over a power failure at any moment.
func TestKnownDamageUnderLoad(t *testing.T) {
	if err := knownDamageUnderLoad(t, nil); err != nil {
		t.Fatal(err)
	}
}

// knownDamageUnderLoad is the first thing wrong with that, less the flushes and fences
// that drop names.
func knownDamageUnderLoad(t *testing.T, drop func(sim.Op) bool) error {
	m := layout(simSize, MinJournal)
	mem, err := sim.New(m.Data.end())
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if err := format(mem, m); err != nil {
		t.Fatal(err)
	}
	mem.Mutate(drop)
	o, _ := Options{}.withDefaults()
	v, err := openMemory("sim", mem, o)
	if err == nil {
		err = v.start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	write := func(off int64, p []byte) {
		if _, err := v.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	write(7*blockSize, bytes.Repeat([]byte("a"), blockSize))
	if err := v.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	const flip = 7*blockSize + 2000
	mem.Raw(v.data.Off+flip, []byte{'X'}, false) // in the medium
	mem.Flush(v.data.Off+flip, 1)
	if err := mem.Fence(); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 1)
	if _, err := v.ReadAt(p, flip); !isCorrupt(err) {
		t.Fatal(err)
	}
	for n := 0; v.unstored.Load(); n++ { // never idle, and never a quarter of the ring
		write(0, []byte("elsewhere"))
		if v.checkpointDue() || n > 2000 {
			return errors.New("the verdict is not made durable while there are commits")
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err := v.checkpoint(false); err != nil { // waits for the one that has begun
		t.Fatal(err)
	}
	for range 3 {
		write(7*blockSize, []byte("beside"))
	}
	if err := v.committer.Acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer v.committer.Release()
	v.ckptMu.Lock() // else one could run beside Images
	defer v.ckptMu.Unlock()
	var wrong error
	mem.Images(40, rand.New(rand.NewPCG(1, 2)), func(img *sim.Memory) {
		w, err := openMemory("sim", img, o)
		if err == nil {
			err = w.takeUp()
		}
		if err != nil {
			wrong = err
			return
		}
		if _, err := w.ReadAt(p, flip); !isCorrupt(err) {
			wrong = fmt.Errorf("%q was served: %v", p, err)
		}
		w.pair.Close()
	})
	return wrong
}
