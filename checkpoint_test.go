package nvmmirror

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/nvmmirror/nvmmirror/pmem/sim"
)

// besideMemory runs f behind the next flush.
type besideMemory struct {
	*sim.Memory
	f func()
}

func (m *besideMemory) Flush(off, n int64) {
	m.Memory.Flush(off, n)
	if f := m.f; f != nil {
		m.f = nil
		f()
	}
}

// A transaction that is committed while a checkpoint flushes
// lies above that checkpoint: after a power failure recovery reads it.
func TestCommitBesideCheckpoint(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	raw, err := sim.New(int64(len(newImage(t, smallSize, smallJournal).b)))
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	raw.Load(newImage(t, smallSize, smallJournal).b)
	mem := &besideMemory{Memory: raw}
	v := openQuiet(t, mem)
	commit := func(off int64, fill byte) {
		if _, err := (transaction{{off, bytes.Repeat([]byte{fill}, 100)}}).commit(v); err != nil {
			t.Error(err)
		}
	}
	commit(10, 1)
	mem.f = func() { commit(10, 2); commit(5*blockSize, 3) }
	if err := v.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	v.pair.Close()
	raw.Images(20, rng, func(img *sim.Memory) {
		w, err := tryOpenQuiet(img)
		if err != nil {
			t.Fatal(err)
		}
		defer w.pair.Close()
		for off, want := range map[int64]byte{10: 2, 5 * blockSize: 3} {
			p := make([]byte, 100)
			if _, err := w.ReadAt(p, off); err != nil || p[0] != want || p[99] != want {
				t.Errorf("at %d: %v, %d", off, err, p[0])
			}
		}
	})
}

// badOnce is memory of which one fence fails, as after a failed msync: the next
// one succeeds.
type badOnce struct {
	*heapMemory
	broken error
}

func (m *badOnce) Fence() error {
	err := m.broken
	m.broken = nil
	return err
}

// A checkpoint that could not be made durable does not move, and is a final error.
func TestFailedCheckpointIsFinal(t *testing.T) {
	mem := &badOnce{heapMemory: newImage(t, smallSize, smallJournal)}
	v := openQuiet(t, mem)
	if _, err := v.WriteAt([]byte("durable"), 0); err != nil {
		t.Fatal(err)
	}
	was := v.Checkpoint()
	mem.broken = errors.New("the medium is gone")
	v.runCheckpoint()
	if at := v.Checkpoint(); at != was {
		t.Errorf("the checkpoint moved from %d to %d", was, at)
	}
	if _, err := v.WriteAt([]byte("x"), 0); err == nil {
		t.Error("it acknowledges on")
	}
	v.runCheckpoint()
	if at := v.Checkpoint(); at != was {
		t.Errorf("the checkpoint moved from %d to %d by another try", was, at)
	}
}
