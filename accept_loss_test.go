package nvmmirror

import (
	"bytes"
	"context"
	"math/rand/v2"
	"testing"

	"github.com/nvmmirror/nvmmirror/pmem/sim"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// Power fails while damaged log is given up, and it is given up once more: what was
// readable before is so afterwards.
func TestPowerFailsWhileLossIsAccepted(t *testing.T) {
	w := newVerdicts(t, 1, nil)
	defer w.mem.Close()
	v := w.v
	write := func(off int64, n int) {
		if _, err := v.WriteAt(bytes.Repeat([]byte("b"), n), off); err != nil {
			t.Fatal(err)
		}
	}
	write(0, 100)
	const repaired = simSize/blockSize - 1 // with a mark of before that
	e, _ := v.table.get(repaired)
	e.damaged = true
	v.table.set(repaired, e)
	if err := v.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	hurt := v.journal.Ring().Position(v.journal.End())
	for b := range int64(8) {
		write(b*blockSize+100, 200)
	}
	write(0, 1)
	v.pair.Close()
	w.mem.Bytes()[v.ring.Off+int64(hurt)+20] ^= 1
	w.mem.Flush(0, int64(len(w.mem.Bytes()))) // all of it is durable
	if err := w.mem.Fence(); err != nil {
		t.Fatal(err)
	}
	accept := func(mem *sim.Memory) *Volume {
		v, err := openMemory("sim", mem, w.o)
		if err == nil && v.damage.Load() != nil {
			err = (*node)(v).AcceptLoss(func(*replicate.State) error { return nil })
		}
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	images := 0
	rng := rand.New(rand.NewPCG(1, 2))
	w.mem.OnOp(func(op sim.Op) {
		w.mem.Images(6, rng, func(image *sim.Memory) {
			images++
			if _, bad := blockContent(accept(image)); len(bad) > 0 {
				t.Errorf("power fails before %v at %s: blocks %v cannot be read", op.Kind, op.Site, bad)
			}
		})
	})
	if accept(w.mem); images == 0 {
		t.Error("there was no damage")
	}
	w.mem.OnOp(nil)
}

// A look at the journal of an open volume whose peer told of log that is lost here says
// so.
func TestInspectOfLostLog(t *testing.T) {
	v := openQuiet(t, newImage(t, smallSize, smallJournal))
	if err := (*node)(v).Lost(v.journal.End() + 64); err != nil {
		t.Fatal(err)
	}
	stop, err := v.InspectJournal(context.Background(), JournalOptions{Records: true, Data: -1}, func(*SegmentInfo) error { return nil })
	if err != nil || !stop.Damaged || stop.Acked != v.damage.Load().Acked || stop.Reason != v.damage.Load().Error() {
		t.Errorf("%v, %+v", err, stop)
	}
	v.damage.Store(nil) // it closes as one that is whole
}
