package nvmmirror

import (
	"bytes"
	"context"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestCrashAtEachStore crashes a volume after each single store that it makes:
// in an append, in applying, in a checkpoint, in a change of the metadata.
func TestCrashAtEachStore(t *testing.T) {
	const seed = 7
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	mem := newImage(t, smallSize, smallJournal)
	image := newHeapMemory(slices.Clone(mem.b))
	v := openQuiet(t, mem)
	c := &crashed{states: [][]byte{make([]byte, smallSize)}, ends: []LSN{0}}
	replay(image, mem) // the lineage and the first epoch
	mem.keepLog = true
	type mark struct{ stores, acked int }
	var marks []mark
	for i := range 60 {
		tx := randomTransaction(rng, smallSize, 4, 9000)
		end, err := tx.commit(v)
		if err != nil {
			t.Fatal(err)
		}
		next := slices.Clone(c.states[i])
		tx.applyTo(next)
		c.states, c.ends = append(c.states, next), append(c.ends, end)
		marks = append(marks, mark{len(mem.log), i + 1})
		if i%7 == 6 {
			if err := v.checkpoint(false); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	acked := 0
	for n, s := range mem.log {
		copy(image.b[s.off:], s.data)
		for acked < len(marks) && marks[acked].stores <= n+1 {
			acked++
		}
		o := c.recoverImage(image)
		if o.err != nil || o.damaged || o.bad > 0 || o.prefix < acked || o.end != c.ends[o.prefix] {
			t.Fatalf("after store %d of %d (offset %d, %d bytes): %d acknowledged, %+v", n, len(mem.log), s.off, len(s.data), acked, o)
		}
		if r, err := checkImage(image.b); err != nil || r.Damaged {
			t.Fatalf("after store %d of %d: check: %v, %+v", n, len(mem.log), err, r)
		}
	}
	t.Logf("%d stores", len(mem.log))
}

// replay makes image what mem holds.
func replay(image, mem *heapMemory) { copy(image.b, mem.b) }

// TestFlipAfterPartialApply flips bytes of the last segment of a volume that
// was killed while it applied that segment: in what is left of it nobody may
// take it for a torn tail, and a part of it for the state before.
func TestFlipAfterPartialApply(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	v := openQuiet(t, mem)
	first := transaction{{0, bytes.Repeat([]byte{1}, 3*blockSize)}}
	second := transaction{{100, bytes.Repeat([]byte{2}, 100)}, {2*blockSize + 100, bytes.Repeat([]byte{2}, 100)}}
	c := &crashed{states: [][]byte{make([]byte, smallSize)}, ends: []LSN{0}}
	var image *heapMemory
	for i, tx := range []transaction{first, second} {
		if i == 1 {
			if err := v.checkpoint(false); err != nil {
				t.Fatal(err)
			}
			image = newHeapMemory(slices.Clone(mem.b))
			mem.keepLog = true
		}
		end, err := tx.commit(v)
		if err != nil {
			t.Fatal(err)
		}
		next := slices.Clone(c.states[i])
		tx.applyTo(next)
		c.states, c.ends = append(c.states, next), append(c.ends, end)
	}
	segment := int64(ringOf(mem.b, &v.meta).Position(c.ends[1])) + v.meta.Journal.Off
	var asTorn, refused, unreadable int
	for n, s := range mem.log {
		copy(image.b[s.off:], s.data)
		if s.off < v.meta.Table.Off {
			continue // still being written
		}
		for at := segment; at < segment+int64(c.ends[2]-c.ends[1]); at++ {
			image.b[at] ^= 4
			o := c.recoverImage(image)
			image.b[at] ^= 4
			switch {
			case o.damaged:
				refused++
			case o.bad > 0:
				unreadable++
			case o.prefix == 1:
				asTorn++
			default:
				t.Fatalf("store %d, byte %d: wrong content was accepted: %+v", n, at, o)
			}
		}
	}
	t.Logf("%d refused as damage, %d with an unreadable block, %d like a torn tail before anything was applied", refused, unreadable, asTorn)
	if refused == 0 || unreadable == 0 {
		t.Error("the test did not reach what it is for")
	}
}

// TestManyCrashesWithoutCheckpoint: each start mints an epoch, and the history
// is bounded. The epochs of the live journal must stay.
func TestManyCrashesWithoutCheckpoint(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	for i := range 700 {
		v, err := tryOpenQuiet(mem)
		if err != nil {
			t.Fatalf("start %d: %v", i, err)
		}
		if i > 0 {
			p := make([]byte, 4)
			if _, err := v.ReadAt(p, 0); err != nil || !bytes.Equal(p, []byte{byte(i - 1), byte((i - 1) >> 8), 1, 1}) {
				t.Fatalf("start %d: %v, %v", i, p, err)
			}
		}
		_, err = transaction{{0, []byte{byte(i), byte(i >> 8), 1, 1}}}.commit(v)
		v.pair.Close() // and no more: the process is killed
		if err != nil {
			t.Fatalf("start %d: %v", i, err)
		}
	}
}

// TestCloseWithPartlyApplied: a primary was killed while it applied a segment,
// started, found no peer, and was closed before anything told it how far its
// log is acknowledged. The close must not hide that blocks may hold parts of
// what is not applied.
func TestCloseWithPartlyApplied(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	v := openQuiet(t, mem)
	commit := func(fill byte) {
		if _, err := (transaction{{10, bytes.Repeat([]byte{fill}, 100)}}).commit(v); err != nil {
			t.Fatal(err)
		}
	}
	commit(1)
	table := slices.Clone(mem.b[v.meta.Table.Off:v.meta.Table.end()])
	commit(2)
	v.pair.Close()
	copy(mem.b[v.meta.Table.Off:], table) // the block is changed, its entry not yet
	m := v.meta
	m.State.History = slices.Clone(m.State.History)
	m.State.History[0].PeerIn = true // a peer was required
	if err := writeMetadata(mem, &m); err != nil {
		t.Fatal(err)
	}
	v = openQuiet(t, mem)
	if v.Applied() == v.journal.End() {
		t.Fatal("the log was applied without the peer")
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if r, err := checkImage(mem.b); err != nil || r.Damaged {
		t.Fatalf("check: %v, %+v", err, r)
	}
	if v = openQuiet(t, mem); v.recovery.Clean {
		t.Fatal("taken for closed cleanly")
	}
	if err := v.pair.ContinueAlone(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 200)
	if _, err := v.ReadAt(p, 0); err != nil || p[10] != 2 || v.bad.n.Load() != 0 {
		t.Fatalf("%v, %v, %d damaged blocks", err, p[:12], v.bad.n.Load())
	}
}

// withoutMarks is a region with each block of its table taken for verified.
func withoutMarks(t *testing.T, region []byte) []byte {
	region = slices.Clone(region)
	m := metadataOf(t, region)
	for b := range m.Size / blockSize {
		p := region[m.Table.Off+b*tableEntry:][:tableEntry]
		if e, ok := decodeEntry(p, b); ok {
			e.unverified = false
			putEntry(p, e, b)
		}
	}
	return region
}

// TestRecoveryIsIdempotent recovers crash images again and again, also after a
// recovery that was itself killed after each of its stores: that may leave
// more blocks unverified, and nothing else.
func TestRecoveryIsIdempotent(t *testing.T) {
	t.Parallel()
	c := makeCrashed(t)
	for name, image := range map[string][]byte{"applied": c.applied, "pending": c.pending} {
		once := newHeapMemory(slices.Clone(image))
		once.keepLog = true
		if _, err := openMemory("heap", once, Options{Logger: nopLogger}); err != nil {
			t.Fatal(err)
		}
		log := once.log
		once.keepLog, once.log = false, nil
		want := slices.Clone(once.b)
		if _, err := openMemory("heap", once, Options{Logger: nopLogger}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(once.b, want) {
			t.Fatalf("%s: a second recovery changed the region", name)
		}
		unmarked := withoutMarks(t, want)
		part := newHeapMemory(slices.Clone(image))
		for n, s := range log {
			copy(part.b[s.off:], s.data)
			if raceEnabled && n%8 != 0 {
				continue // one goroutine: nothing to race
			}
			part.keepUndo = true
			if _, err := openMemory("heap", part, Options{Logger: nopLogger}); err != nil {
				t.Fatalf("%s: killed after store %d of recovery: %v", name, n, err)
			}
			if !bytes.Equal(withoutMarks(t, part.b), unmarked) {
				t.Fatalf("%s: killed after store %d of recovery: another result", name, n)
			}
			part.restore()
		}
		t.Logf("%s: %d stores", name, len(log))
	}
}
