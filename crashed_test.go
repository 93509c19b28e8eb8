package nvmmirror

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// crashed is a small region as crashes leave it, and what was committed to it.
type crashed struct {
	clean   []byte   // closed cleanly
	applied []byte   // killed after all was applied
	pending []byte   // killed after the last segment was persistent, before it was applied
	states  [][]byte // the volume after each transaction; states[0] is zeros
	ends    []LSN    // the log's end after each
	meta    metadata // of applied
}

var sharedCrashed struct {
	sync.Once
	*crashed
}

// makeCrashed is the same region for all tests, which copy what they change.
func makeCrashed(t testing.TB) *crashed {
	t.Helper()
	sharedCrashed.Do(func() { sharedCrashed.crashed = buildCrashed(t) })
	if sharedCrashed.crashed == nil {
		t.Fatal("another test failed to make the region")
	}
	return sharedCrashed.crashed
}

// buildCrashed fills the ring once, moves the checkpoint, and goes on across
// the ring's end, so that the live journal has a padding segment.
func buildCrashed(t testing.TB) *crashed {
	t.Helper()
	const seed = 20261
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	mem := newImage(t, smallSize, smallJournal)
	v := openQuiet(t, mem)
	c := &crashed{states: [][]byte{make([]byte, smallSize)}, ends: []LSN{0}}
	do := func(tx transaction) {
		end, err := tx.commit(v)
		if err != nil {
			t.Fatal(err)
		}
		next := slices.Clone(c.states[len(c.states)-1])
		tx.applyTo(next)
		c.states, c.ends = append(c.states, next), append(c.ends, end)
	}
	ckpt := func() {
		if err := v.checkpoint(false); err != nil {
			t.Fatal(err)
		}
	}
	for v.journal.End() < smallJournal-8<<10 {
		do(transaction{{rng.Int64N(smallSize / 2), bytes.Repeat([]byte{byte(rng.Uint32()) | 1}, 4<<10)}})
		ckpt()
	}
	for v.journal.End() < smallJournal-1<<10 {
		do(randomTransaction(rng, smallSize/2, 3, 200))
	}
	do(transaction{{5000, bytes.Repeat([]byte("behind the padding"), 100)}})
	if c.ends[len(c.ends)-1] < smallJournal+1800 {
		t.Fatal("there is no padding in the journal")
	}
	for range 12 {
		do(randomTransaction(rng, smallSize/2, 3, 600))
	}
	before := slices.Clone(mem.b)
	do(randomTransaction(rng, smallSize/2, 3, 600))
	c.applied, c.meta = slices.Clone(mem.b), v.meta
	c.pending = before
	copy(c.pending[v.meta.Journal.Off:v.meta.Journal.end()], c.applied[v.meta.Journal.Off:])
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	c.clean = mem.b
	return c
}

// prefixOf is how many transactions data is the effect of, among the last few;
// blocks in skip are not looked at.
func (c *crashed) prefixOf(data []byte, skip map[int64]bool) int {
	for n := len(c.states) - 1; n >= max(0, len(c.states)-100); n-- {
		equal := true
		for b := int64(0); equal && b < smallSize/blockSize; b++ {
			lo, hi := b*blockSize, (b+1)*blockSize
			equal = skip[b] || bytes.Equal(data[lo:hi], c.states[n][lo:hi])
		}
		if equal {
			return n
		}
	}
	return -1
}

// outcome is what recovery made of a corrupted image.
type outcome struct {
	err     error // it was refused
	damaged bool  // a standalone start would refuse it
	prefix  int   // else: how many transactions are there, -1: no prefix
	bad     int   // blocks that reads report
	redone  map[int64]bool
	end     LSN
}

// recoverImage recovers a region, looks at it, and puts it back.
func (c *crashed) recoverImage(mem *heapMemory) (o outcome) {
	mem.keepUndo = true
	defer mem.restore()
	v, err := openMemory("heap", mem, Options{Logger: nopLogger})
	if err != nil {
		return outcome{err: err}
	}
	data, bad := blockContent(v)
	o = outcome{damaged: v.damage.Load() != nil, bad: len(bad), end: v.journal.End(), redone: map[int64]bool{}}
	for b := range v.meta.Size / blockSize {
		if v.unverified.has(b) {
			o.redone[b] = true
		}
	}
	o.prefix = c.prefixOf(data, bad)
	return o
}
