package nvmmirror

import (
	"bytes"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// flippingMemory flips a bit before the first whole block is copied.
type flippingMemory struct {
	*heapMemory
	flip func()
}

func (m *flippingMemory) Copy(off int64, p []byte) {
	if m.flip != nil && len(p) == blockSize {
		m.flip()
		m.flip = nil
	}
	m.heapMemory.Copy(off, p)
}

// Recovery takes the checksums of whole blocks once, as it scans the log. What
// changes in memory before it is applied is found all the same: a block does
// not match its entry, and the rest of a segment does not match its checksum.
func TestLogChangesAfterTheScan(t *testing.T) {
	for _, c := range []struct {
		name    string
		segment int // the flip's: the first or the second
		at      int // in the segment's body
		block   int64
		err     string
	}{
		{"a block of the segment that is being applied", 0, journal.RecordHeaderSize + blockSize + 77, 1, ""},
		{"a block of a later segment", 1, journal.RecordHeaderSize + 1000 + 77, 5, ""},
		{"before the first whole block", 1, journal.RecordHeaderSize + 77, 0, "the journal changed after it was written"},
		{"behind the last whole block", 1, journal.RecordHeaderSize + 1000 + blockSize + 7, 0, "the journal changed after it was written"},
		{"a record's header", 1, 3, 0, "the journal changed after it was written"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem := newImage(t, smallSize, smallJournal)
			v := openQuiet(t, mem)
			ring := v.journal.Ring()
			at := []LSN{v.journal.End()}
			for _, w := range []store{{0, bytes.Repeat([]byte{7}, 3*blockSize)}, {5*blockSize - 1000, bytes.Repeat([]byte{9}, 1000+blockSize+10)}} {
				if _, err := (transaction{w}).commit(v); err != nil {
					t.Fatal(err)
				}
				at = append(at, v.journal.End())
			}
			flip := func() { ring.Raw(at[c.segment], blockSize*3)[journal.HeaderSize+c.at] ^= 0x10 }
			again, err := tryOpenQuiet(&flippingMemory{mem, flip})
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("%v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer again.pair.Close()
			for b := range again.size / blockSize {
				_, err := again.ReadAt(make([]byte, blockSize), b*blockSize)
				var corrupt *CorruptError
				if b == c.block && !errors.As(err, &corrupt) || b != c.block && err != nil {
					t.Errorf("block %d: %v", b, err)
				}
			}
		})
	}
}

// cleanTail closes a region cleanly with segments behind its checkpoint, as a
// secondary is that could not acknowledge its last ones.
func cleanTail(t *testing.T, v *Volume, writes ...journal.Write) {
	t.Helper()
	for _, w := range writes {
		r := journal.NewRequest()
		r.Add(w.Off, w.Data)
		if _, err := v.journal.Append([]*journal.Request{r}, r.Size(), v.journal.End()); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.checkpoint(true); err != nil {
		t.Fatal(err)
	}
	if !v.meta.Clean || v.Checkpoint() == v.journal.End() {
		t.Fatalf("clean %v, checkpoint %d of %d", v.meta.Clean, v.Checkpoint(), v.journal.End())
	}
}

// TestCleanTailIsRedoneAgain: what a start after a clean close applies may be
// there in part when that start is cut short.
func TestCleanTailIsRedoneAgain(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	v := openQuiet(t, mem)
	if _, err := (transaction{{100, bytes.Repeat([]byte{1}, 300)}}).commit(v); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{2}, 500)
	cleanTail(t, v, journal.Write{Off: 200, Data: want})
	image := bytes.Clone(mem.b)
	whole := newHeapMemory(bytes.Clone(image))
	whole.keepLog = true
	if _, err := openMemory("heap", whole, Options{Logger: nopLogger}); err != nil {
		t.Fatal(err)
	}
	for n := range len(whole.log) + 1 {
		cut := newHeapMemory(bytes.Clone(image))
		for _, s := range whole.log[:n] {
			copy(cut.b[s.off:], s.data)
		}
		again, err := tryOpenQuiet(cut)
		if err != nil {
			t.Fatalf("cut short after %d stores of %d: %v", n, len(whole.log), err)
		}
		got := make([]byte, len(want))
		if _, err := again.ReadAt(got, 200); err != nil || !bytes.Equal(got, want) {
			t.Errorf("cut short after %d stores of %d: %v", n, len(whole.log), err)
		}
		again.pair.Close()
	}
}

// TestDamagedCleanTail: log that was acknowledged and is damaged is said to be,
// also where the region was closed cleanly with it.
func TestDamagedCleanTail(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	v := openQuiet(t, mem)
	at := v.journal.End()
	cleanTail(t, v, journal.Write{Off: 200, Data: make([]byte, 500)})
	if v.meta.State.Acked != v.journal.End() {
		if err := v.updateMeta(func(m *metadata) error { m.State.Acked = v.journal.End(); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	v.journal.Ring().Raw(at, 1000)[200] ^= 4
	again, err := openMemory("heap", mem, Options{Logger: nopLogger})
	if err != nil {
		t.Fatal(err)
	}
	if again.recovery.Damage == "" || !(*node)(again).Damaged() {
		t.Errorf("damaged %v: %+v", (*node)(again).Damaged(), again.recovery)
	}
}

// TestDirtyShutdowns: a device that loses what was flushed is noticed from the
// first time on, and not where nothing was open.
func TestDirtyShutdowns(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	open := func() *Volume {
		v, err := openMemory("heap", mem, Options{Logger: nopLogger})
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	if err := open().noteShutdowns(0); err != nil {
		t.Fatal(err)
	}
	v := open()
	var lost *ShutdownError
	if err := v.noteShutdowns(1); !v.meta.Counts || !errors.As(err, &lost) || *lost != (ShutdownError{Have: 1, Want: 0}) {
		t.Errorf("0, then 1 while it was open: %v", err)
	}
	if err := v.checkpoint(true); err != nil {
		t.Fatal(err)
	}
	if err := open().noteShutdowns(1); err != nil {
		t.Errorf("0, then 1 after a clean close: %v", err)
	}
	if v := open(); v.meta.Shutdowns != 1 || !v.meta.Counts {
		t.Errorf("noted are %d, %v", v.meta.Shutdowns, v.meta.Counts)
	}
}

// TestRepairOfAnIdleNodeIsStored: a block that was repaired, and a verdict, are
// flushed though nothing is committed.
func TestRepairOfAnIdleNodeIsStored(t *testing.T) {
	path := filepath.Join(shm(t), "r")
	if err := Create(path, CreateOptions{Size: smallSize, JournalSize: MinJournal, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	v, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	idle := func(what string) {
		t.Helper()
		for stop := time.Now().Add(slow(20 * time.Second)); ; time.Sleep(time.Millisecond) {
			v.applyMu.RLock()
			rest := v.Checkpoint() == v.Applied() && len(slices.Collect(v.dirty.all())) == 0
			v.applyMu.RUnlock()
			if rest {
				return
			}
			if time.Now().After(stop) {
				t.Fatalf("%s: not stored on an idle node", what)
			}
		}
	}
	if _, err := v.WriteAt(bytes.Repeat([]byte{3}, blockSize), blockSize); err != nil {
		t.Fatal(err)
	}
	idle("a commit")
	v.applyMu.Lock()
	e, _ := v.table.get(1)
	data := bytes.Clone(v.block(1))
	v.block(1)[9] ^= 1
	v.applyMu.Unlock()
	v.ckptMu.Lock() // the repair kicks a checkpoint
	err = v.takeRepair(1, data, replicate.BlockInfo{LSN: e.lsn, CRC: e.crc}, v.Applied())
	unstored := v.unstored.Load()
	v.ckptMu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if !unstored {
		t.Error("a repair is not known to be unstored")
	}
	idle("a repair")
	if v.unstored.Load() {
		t.Error("a checkpoint has passed, and a repair counts as unstored")
	}
}
