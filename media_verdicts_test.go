package nvmmirror

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/nvmmirror/nvmmirror/pmem/sim"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// verdicts is random work on a volume in which bits of blocks and of their entries flip
// and are found: changes of parts of damaged blocks and of whole ones, repairs,
// checkpoints, kills. Power may fail at each store, flush and fence of it. Once it is
// durable that a block was found damaged, no flip is ever served, and no block without
// one is lost.
type verdicts struct {
	seed  uint64
	rng   *rand.Rand
	mem   *sim.Memory
	v     *Volume
	o     Options
	doing string

	old, next []byte         // acknowledged content; with what is under way
	flipped   map[int64]bool // blocks with a flip that was found
	wrong     error
}

const verdictBlocks = 4

// newVerdicts begins with a blank volume, on memory that leaves out what drop names.
func newVerdicts(t *testing.T, seed uint64, drop func(sim.Op) bool) *verdicts {
	t.Helper()
	l := layout(simSize, MinJournal)
	mem, err := sim.New(l.Data.end())
	if err != nil {
		t.Fatal(err)
	}
	if err := format(mem, l); err != nil {
		t.Fatal(err)
	}
	mem.Mutate(drop)
	o, _ := Options{Logger: nopLogger}.withDefaults()
	w := &verdicts{
		seed: seed, rng: rand.New(rand.NewPCG(seed, 3)), mem: mem, o: o,
		old: make([]byte, simSize), next: make([]byte, simSize), flipped: map[int64]bool{},
	}
	if w.v = w.open(mem); w.v == nil {
		t.Fatal(w.wrong)
	}
	return w
}

// fail keeps the first thing wrong.
func (w *verdicts) fail(format string, args ...any) {
	if w.wrong == nil {
		w.wrong = fmt.Errorf("seed %d, %s: %w", w.seed, w.doing, fmt.Errorf(format, args...))
	}
}

func (w *verdicts) must(err error) {
	if err != nil {
		w.fail("%w", err)
	}
}

func (w *verdicts) open(mem *sim.Memory) *Volume {
	v, err := openMemory("sim", mem, w.o)
	if err == nil {
		err = v.takeUp()
	}
	if err != nil {
		w.fail("open: %w", err)
		return nil
	}
	return v
}

// sometimes looks before an operation, not at each store.
func (w *verdicts) sometimes(op sim.Op) {
	if op.Kind != sim.Store || w.rng.IntN(12) == 0 {
		w.look(op, 2)
	}
}

// look opens so many states that a power failure may leave before an operation.
func (w *verdicts) look(op sim.Op, images int) {
	w.mem.Images(images, w.rng, func(image *sim.Memory) {
		v := w.open(image)
		if v == nil {
			return
		}
		defer v.pair.Close()
		p := make([]byte, blockSize)
		for b := range int64(verdictBlocks) {
			at := b * blockSize
			_, err := v.ReadAt(p, at)
			switch {
			case err == nil && !bytes.Equal(p, w.old[at:][:blockSize]) && !bytes.Equal(p, w.next[at:][:blockSize]):
				w.fail("power fails before %v at %s: block %d is served, and is not what was written (flip found: %v)", op.Kind, op.Site, b, w.flipped[b])
			case err != nil && !(isCorrupt(err) && w.flipped[b]):
				w.fail("power fails before %v at %s: block %d: %w", op.Kind, op.Site, b, err)
			}
		}
	})
}

func (w *verdicts) step(i int) {
	b := w.rng.Int64N(verdictBlocks)
	at := b * blockSize
	fresh := bytes.Repeat([]byte{byte('b' + i)}, blockSize)
	w.mem.OnOp(w.sometimes)
	switch k := w.rng.IntN(10); {
	case k < 4:
		w.doing = fmt.Sprintf("step %d, a part of block %d", i, b)
		off := at + w.rng.Int64N(1900) // the flip is further back
		n := copy(w.next[off:], fresh[:1+w.rng.IntN(60)])
		_, err := w.v.WriteAt(fresh[:n], off)
		w.must(err)
	case k < 5:
		w.doing = fmt.Sprintf("step %d, the whole of block %d", i, b)
		copy(w.next[at:], fresh)
		_, err := w.v.WriteAt(fresh, at)
		w.must(err)
		delete(w.flipped, b)
	case k < 7:
		w.doing = fmt.Sprintf("step %d, checkpoint", i)
		w.must(w.v.checkpoint(false))
	case k < 8:
		if !w.flipped[b] {
			return
		}
		w.doing = fmt.Sprintf("step %d, repair of block %d", i, b)
		lsn := w.v.Applied()
		if e, ok := w.v.table.get(b); ok {
			lsn = e.lsn
		}
		good := bytes.Clone(w.old[at:][:blockSize])
		w.must(w.v.takeRepair(b, good, replicate.BlockInfo{LSN: lsn, CRC: crcOf(good)}, w.v.Applied()))
		w.must(w.v.checkpoint(false))
		delete(w.flipped, b)
	case k < 9:
		if w.flipped[b] {
			return
		}
		w.mem.OnOp(nil)
		w.doing = fmt.Sprintf("step %d, flips in block %d, or its entry", i, b)
		w.must(w.v.checkpoint(false))
		flips := []int64{w.v.data.Off + at + 2000, w.v.table.area.Off + b*tableEntry + w.rng.Int64N(tableEntry)}
		switch w.rng.IntN(4) { // else both
		case 0, 1:
			flips = flips[:1]
		case 2:
			flips = flips[1:]
		}
		for _, flip := range flips {
			w.mem.Raw(flip, []byte{w.mem.Bytes()[flip] ^ 0x80}, false)
			w.mem.Flush(flip, 1)
		}
		w.must(w.mem.Fence())
		if _, err := w.v.ReadAt(make([]byte, 1), at); !isCorrupt(err) {
			w.fail("not found: %v", err)
		}
		w.must(w.v.checkpoint(false))
		w.flipped[b] = true
	default:
		w.mem.OnOp(nil)
		w.doing = fmt.Sprintf("step %d, kill", i)
		w.v.pair.Close()
		w.mem.Killed()
		if w.rng.IntN(2) == 0 {
			w.mem.OnOp(w.sometimes)
		}
		if w.v = w.open(w.mem); w.v == nil {
			return
		}
	}
	copy(w.old, w.next)
}

func TestVerdictsOutlivePowerFailures(t *testing.T) {
	t.Parallel()
	seeds := uint64(4)
	if testing.Short() || raceEnabled {
		seeds = 1
	}
	for seed := uint64(1); seed <= seeds; seed++ {
		w := newVerdicts(t, seed, nil)
		for i := 0; i < 40 && w.wrong == nil; i++ {
			w.step(i)
		}
		w.mem.OnOp(nil)
		if w.v != nil {
			w.v.pair.Close()
		}
		w.mem.Close()
		if w.wrong != nil {
			t.Fatal(w.wrong)
		}
	}
}

// write commits a change.
func (w *verdicts) write(off int64, p []byte) {
	copy(w.next[off:], p)
	_, err := w.v.WriteAt(p, off)
	w.must(err)
	copy(w.old, w.next)
}

// damage writes a block, flips a byte of it once that is durable, and has it found.
func (w *verdicts) damage(block int64) {
	w.write(block*blockSize, bytes.Repeat([]byte("a"), blockSize))
	w.must(w.v.checkpoint(false))
	flip := w.v.data.Off + block*blockSize + 2000
	w.mem.Raw(flip, []byte{'X'}, false)
	w.mem.Flush(flip, 1)
	w.must(w.mem.Fence())
	if _, err := w.v.ReadAt(make([]byte, 1), block*blockSize); !isCorrupt(err) {
		w.fail("not found: %v", err)
	}
	w.flipped[block] = true
}

// A damaged block was changed above the checkpoint, and is repaired by the peer's. The
// repair's data is durable before its entry: else recovery would take the block for one
// with a change that was cut off, and serve the flip.
func TestRepairOutlivesAPowerFailure(t *testing.T) {
	if err := repairOverPowerFailures(t, nil); err != nil {
		t.Fatal(err)
	}
}

func repairOverPowerFailures(t *testing.T, drop func(sim.Op) bool) error {
	w := newVerdicts(t, 1, drop)
	defer w.mem.Close()
	const block = 2
	w.doing = "the repair"
	w.damage(block)
	w.must(w.v.checkpoint(false))
	w.write(block*blockSize, []byte("beside it"))
	w.mem.Flush(0, int64(len(w.mem.Bytes()))) // all of that is durable
	w.must(w.mem.Fence())
	e, _ := w.v.table.get(block)
	good := w.old[block*blockSize:][:blockSize]
	w.mem.OnOp(func(op sim.Op) {
		if op.Kind == sim.Fence {
			w.look(op, 300)
		}
	})
	w.must(w.v.takeRepair(block, good, replicate.BlockInfo{LSN: e.lsn, CRC: crcOf(good)}, w.v.Applied()))
	w.must(w.v.checkpoint(false))
	w.mem.OnOp(nil)
	w.v.pair.Close()
	return w.wrong
}

// A process is killed before the checkpoint that would store the verdict on a block. The
// next one sees it, and counts the block as damaged: so it has to be durable there.
func TestVerdictOutlivesAKillAndAPowerFailure(t *testing.T) {
	if err := verdictOverAKill(t, nil); err != nil {
		t.Fatal(err)
	}
}

func verdictOverAKill(t *testing.T, drop func(sim.Op) bool) error {
	w := newVerdicts(t, 1, drop)
	defer w.mem.Close()
	w.doing = "after a kill"
	const block = 2
	w.damage(block)
	w.v.pair.Close()
	w.mem.Killed()
	known := func(mem *sim.Memory) *Volume {
		v, err := openMemory("sim", mem, w.o)
		if w.must(err); err == nil && !v.bad.has(block) {
			w.fail("the verdict is gone")
		}
		return v
	}
	v := known(w.mem)
	w.mem.Images(10, w.rng, func(image *sim.Memory) { known(image) }) // power fails where recovery ends
	if w.wrong != nil {
		return w.wrong
	}
	w.v = v
	w.must(v.takeUp())
	defer v.pair.Close()
	w.write(block*blockSize, []byte("beside it"))
	w.look(sim.Op{}, 300)
	return w.wrong
}

// A block is repaired, and the process killed before the checkpoint that would store its
// entry: the next one serves the block, and so does the one after a power failure.
func TestRepairOutlivesAKillAndAPowerFailure(t *testing.T) {
	if err := repairOverAKill(t, nil); err != nil {
		t.Fatal(err)
	}
}

func repairOverAKill(t *testing.T, drop func(sim.Op) bool) error {
	w := newVerdicts(t, 1, drop)
	defer w.mem.Close()
	w.doing = "a repair, and a kill"
	const block = 2
	w.damage(block)
	w.write(block*blockSize+1990, []byte("over the flip"))
	w.must(w.v.checkpoint(false))
	good := w.old[block*blockSize:][:blockSize]
	w.must(w.v.takeRepair(block, good, replicate.BlockInfo{LSN: w.v.Applied(), CRC: crcOf(good)}, w.v.Applied()))
	w.flipped[block] = false
	w.v.pair.Close()
	w.mem.Killed()
	if w.v = w.open(w.mem); w.v == nil {
		return w.wrong
	}
	defer w.v.pair.Close()
	w.must(w.v.checkpoint(false))
	w.look(sim.Op{}, 10)
	return w.wrong
}
