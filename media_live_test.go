package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// lone is a standalone volume on tmpfs, filled at random, with its content and
// a second mapping of its file.
func lone(t *testing.T, m *media, salt uint64) (v *Volume, model, raw []byte) {
	t.Helper()
	path := filepath.Join(shm(t), "r")
	if err := Create(path, CreateOptions{Size: 512 << 10, JournalSize: MinJournal, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	v, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	model = make([]byte, v.Size())
	rng := m.rng(salt)
	for off := int64(0); off < v.Size(); off += 2 * blockSize {
		p := randomBytes(rng, 2*blockSize)
		if _, err := v.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
		copy(model[off:], p)
	}
	return v, model, twin(t, path)
}

// Data and block table of an open volume. A reader that is at it while the bit
// flips gets the right bytes or an error; whoever comes later the error.
func mediaLiveData(t *testing.T, m *media) {
	v, model, raw := lone(t, m, 1)
	rng := m.rng(2)
	row := map[bool]*mediaRow{
		true:  {where: "one node, open", area: "block table", found: "read"},
		false: {where: "one node, open", area: "data", found: "read"},
	}
	rounds := 8
	if testing.Short() || raceEnabled {
		rounds = 2
	}
	for b := range v.size / blockSize {
		for i := range rounds {
			entry := i%4 == 3
			at := v.data.Off + b*blockSize + rng.Int64N(blockSize)
			if entry {
				at = v.table.area.Off + b*tableEntry + rng.Int64N(tableEntry)
			}
			bit := byte(1) << rng.IntN(8)
			off, n := b*blockSize+rng.Int64N(blockSize), 1+rng.IntN(2*blockSize)
			if off+int64(n) > v.size || i%2 == 0 {
				off, n = b*blockSize, blockSize
			}
			var wg sync.WaitGroup
			started := make(chan struct{}, 1)
			wg.Go(func() {
				p := make([]byte, n)
				for {
					_, err := v.ReadAt(p, off)
					select {
					case started <- struct{}{}:
					default:
					}
					if err != nil {
						if !isCorrupt(err) {
							t.Errorf("block %d: %v", b, err)
						}
						return
					}
					if !bytes.Equal(p, model[off:off+int64(n)]) {
						t.Errorf("block %d: the flip at offset %d of the file was served", b, at)
						return
					}
				}
			})
			<-started
			raw[at] ^= bit
			wg.Wait()
			row[entry].flips++
			row[entry].reported++
			raw[at] ^= bit // while nobody reads
			if t.Failed() {
				return
			}
		}
	}
	p := make([]byte, v.size)
	if _, err := v.ReadAt(p, 0); err != nil || !bytes.Equal(p, model) {
		t.Fatalf("not sound any more: %v", err)
	}
	// What nobody reads, changes beside the flip do not bless, nor does a clean
	// close: check finds it.
	var want []string
	for i, b := range []int64{3, 50, 101} {
		at := v.data.Off + b*blockSize + 100
		area := "data"
		if i == 2 {
			at, area = v.table.area.Off+b*tableEntry+2, "block table"
		}
		raw[at] ^= 4
		want = append(want, area)
		if i == 0 {
			if _, err := v.WriteAt([]byte("beside it"), b*blockSize+2000); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := Check(v.path)
	if err != nil || !r.Damaged || len(r.Findings) != 3 || r.Blocks.Damaged != 3 {
		t.Fatalf("%v, %+v", err, r)
	}
	for i, f := range r.Findings {
		if f.Area != want[i] || !f.Damage {
			t.Errorf("%+v", f)
		}
	}
	m.add(*row[false])
	m.add(*row[true])
	m.add(mediaRow{where: "one node, open", area: "data, table, not read", flips: 3, found: "check", reported: 3})
}

// Metadata of an open volume: the next change writes both copies anew. If the
// process dies before that, the next open repairs one copy from the other.
func mediaLiveMetadata(t *testing.T, m *media) {
	v, model, raw := lone(t, m, 3)
	rng := m.rng(4)
	v.metaMu.Lock()
	used := int64(metaFixed + len(v.meta.State.History)*metaEntry + 4)
	v.metaMu.Unlock()
	rewritten, one, both := 0, 0, 0
	for i := range 60 {
		// What the file shows is what a process that dies now leaves behind.
		at := rng.Int64N(used)
		bit := byte(1) << rng.IntN(8)
		copies := [][]int64{{0}, {metaArea}, {0, metaArea}}[i%3]
		v.ckptMu.Lock() // no change comes between
		for _, c := range copies {
			raw[c+at] ^= bit
		}
		image := newHeapMemory(bytes.Clone(raw))
		v.ckptMu.Unlock()
		killed, err := openMemory("killed", image, Options{Logger: nopLogger})
		switch {
		case len(copies) == 2:
			if both++; err == nil || !typed(err) {
				t.Fatalf("byte %d of both copies: %v", at, err)
			}
		case err != nil || killed.counters.metaRepairs.Load() != 1:
			t.Fatalf("byte %d of one copy: %v", at, err)
		default:
			one++
			if data, bad := blockContent(killed); len(bad) > 0 || !bytes.Equal(data, model) {
				t.Fatal("content differs")
			}
		}
		if err := v.checkpoint(false); err != nil {
			t.Fatal(err)
		}
		c, err := readCopies(metadataBytes(raw))
		if err != nil || c.repair {
			t.Fatalf("byte %d is still flipped after a change: %v", at, err)
		}
		rewritten++
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if r, err := Check(v.path); err != nil || r.Damaged {
		t.Fatalf("%v %+v", err, r)
	}
	m.add(mediaRow{where: "one node, open", area: "metadata", flips: 60, found: "next change", repaired: rewritten})
	m.add(mediaRow{where: "one node, open, then killed", area: "metadata, one copy", flips: one, found: "open", repaired: one})
	m.add(mediaRow{where: "one node, open, then killed", area: "metadata, both", flips: both, found: "open", reported: both})
}

// The live journal of an open volume: before it is applied, apply finds it and
// the node ends; after, the data holds it, and only a recovery would need it.
func mediaLiveJournal(t *testing.T, m *media) {
	before, after := 0, 0
	mem := newImage(t, smallSize, smallJournal)
	rng := m.rng(5)
	for i := range 40 {
		mem.keepUndo = true
		v, err := tryOpenQuiet(mem)
		if err != nil {
			t.Fatal(err)
		}
		var ends []LSN
		for k := range 5 {
			end, err := (transaction{{int64(k) * 1000, randomBytes(rng, 700)}}).commit(v)
			if err != nil {
				t.Fatal(err)
			}
			ends = append(ends, end)
		}
		// One segment more: durable, and not applied yet.
		r := journal.NewRequest()
		r.Add(100, randomBytes(rng, 700))
		if err := v.committer.Acquire(context.Background()); err != nil {
			t.Fatal(err)
		}
		last := v.journal.End()
		end, err := v.journal.Append([]*journal.Request{r}, r.Size(), last)
		if err != nil {
			t.Fatal(err)
		}
		data, _ := blockContent(v)
		shown := bytes.Clone(data)
		at := last
		if i%2 == 1 {
			at = ends[rng.IntN(4)]
		}
		// Each byte below the padding of the segment counts.
		mem.b[v.ring.Off+int64(at)+rng.Int64N(64+16+700)] ^= 1 << rng.IntN(8)
		err = v.apply(end)
		if i%2 == 0 {
			before++
			if err == nil || !strings.Contains(err.Error(), "changed after it was written") || v.failed.Load() == nil {
				t.Fatalf("a flip in log that was not applied: %v", err)
			}
			if now, bad := blockContent(v); len(bad) > 0 || !bytes.Equal(now, shown) {
				t.Fatal("it was applied")
			}
			if _, err := v.ReadAt(make([]byte, 1), 0); err == nil {
				t.Fatal("the node goes on")
			}
		} else {
			after++
			if err != nil {
				t.Fatal(err)
			}
			stop, err := v.InspectJournal(context.Background(), JournalOptions{}, func(*SegmentInfo) error { return nil })
			if err != nil || stop.End != at {
				t.Fatalf("a look at the live journal: %v, %+v", err, stop)
			}
			s := inspected(t, mem.b)
			if s.scan.Damage == nil || s.scan.End != at {
				t.Fatalf("killed now, recovery sees %+v", s.scan)
			}
		}
		v.committer.Release()
		v.pair.Close()
		mem.restore()
	}
	m.add(mediaRow{where: "one node, open", area: "journal, not applied", flips: before, found: "apply", reported: before})
	m.add(mediaRow{where: "one node, open, then killed", area: "journal, applied", flips: after, found: "journal inspection, recovery", reported: after})
}

// A file that is cut off under an open volume: errors, no crash, and the node
// ends with the first store into what is gone. Closed: open says so.
func TestTruncatedLive(t *testing.T) {
	needFaults(t)
	for _, area := range []string{"data", "block table", "journal", "metadata"} {
		t.Run(area, func(t *testing.T) {
			m := &media{seed: 1}
			v, model, _ := lone(t, m, 6)
			cut := map[string]int64{"data": v.data.Off + v.size/2, "block table": v.table.area.Off, "journal": v.ring.Off, "metadata": 0}[area]
			whole := int64(len(v.mem.Bytes()))
			if err := os.Truncate(v.path, cut); err != nil {
				t.Fatal(err)
			}
			var fault *pmem.FaultError
			p := make([]byte, 100)
			if _, err := v.ReadAt(p, v.size-100); !errors.As(err, &fault) || fault.Offset < cut {
				t.Fatalf("read: %v", err)
			}
			if area == "data" {
				// Unless a checkpoint has just met the cut, and ended the node.
				if _, err := v.ReadAt(p, 0); (err != nil || !bytes.Equal(p, model[:100])) && v.failed.Load() == nil {
					t.Fatalf("read below the cut: %v", err)
				}
			}
			if _, err := v.WriteAt(p, v.size-100); !errors.As(err, &fault) {
				t.Fatalf("write: %v", err)
			}
			endsHere(t, v)
			var length *LengthError
			_, err := Open(v.path, Options{})
			if cut == 0 && err == nil || cut > 0 && (!errors.As(err, &length) || length.Have != cut || length.Want != whole) {
				t.Errorf("open: %v", err)
			}
			if r, err := Check(v.path); err == nil && !r.Damaged {
				t.Error("check finds nothing")
			}
		})
	}
}

// A page that cannot be read, in each area.
func TestPoisonedLive(t *testing.T) {
	needFaults(t)
	for _, area := range []string{"data", "block table", "journal", "metadata"} {
		t.Run(area, func(t *testing.T) {
			m := &media{seed: 1}
			v, model, _ := lone(t, m, 7)
			const block = 9
			at := map[string]int64{
				"data": v.data.Off + block*blockSize, "block table": v.table.area.Off,
				"journal": v.ring.Off + int64(v.journal.Ring().Position(v.journal.End())), "metadata": 0,
			}[area]
			poison(t, v.mem.Bytes(), at)
			var fault *pmem.FaultError
			p := make([]byte, 100)
			if area == "data" || area == "block table" {
				if _, err := v.ReadAt(p, block*blockSize+7); !errors.As(err, &fault) || fault.Offset/4096 != at/4096 {
					t.Fatalf("read: %v", err)
				}
			}
			if area == "data" {
				// Unless a checkpoint has just met the page, and ended the node.
				if _, err := v.ReadAt(p, (block+1)*blockSize); (err != nil || !bytes.Equal(p, model[(block+1)*blockSize:][:100])) && v.failed.Load() == nil {
					t.Fatalf("read beside it: %v", err)
				}
			}
			// A store into it is a failure of persistence.
			var err error
			if area == "metadata" {
				err = v.checkpoint(false)
			} else {
				_, err = v.WriteAt(p, block*blockSize)
			}
			if !errors.As(err, &fault) {
				t.Fatalf("store: %v", err)
			}
			endsHere(t, v)
		})
	}
}

// endsHere wants a volume whose persistence has failed to say so and to
// acknowledge nothing more, and closes it.
func endsHere(t *testing.T, v *Volume) {
	t.Helper()
	if s := v.Status(); !strings.Contains(strings.Join(s.Degraded, "\n"), "persistence failed") {
		t.Errorf("degraded: %q", s.Degraded)
	}
	if _, err := v.WriteAt(make([]byte, 100), 0); err == nil {
		t.Error("it goes on acknowledging")
	}
	v.Close()
}
