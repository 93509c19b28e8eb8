package nvmmirror

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// A block that cannot be read is fetched from the peer, as one that is damaged,
// into memory that can: on the primary, and on a secondary once it is promoted.
func TestUnreadableBlockOfAPair(t *testing.T) {
	needFaults(t)
	t.Parallel()
	a, b, model := mediaPair(t, &media{seed: 1}, 42, Options{})
	for _, n := range []*testNode{a, b} {
		if n == b {
			switchOver(t, a, b)
		}
		if err := n.checkpoint(false); err != nil { // it would end at a page that it has to flush
			t.Fatal(err)
		}
		const block = 9
		poison(t, n.mem.Bytes(), n.data.Off+block*blockSize)
		p, err := leased(n, block*blockSize-50, blockSize+100)
		if err != nil || !bytes.Equal(p, model[block*blockSize-50:][:len(p)]) {
			t.Fatalf("%s: %v, or not what was there", n.name, err)
		}
		if c := n.Status().Counters; c.BadBlocks != 1 || c.RepairedBlocks != 1 || n.bad.n.Load() != 0 {
			t.Errorf("%s: %+v", n.name, c)
		}
		if !bytes.Equal(twin(t, n.path)[n.data.Off:][:n.size], model) {
			t.Errorf("%s: the repair is not in the file", n.name)
		}
		commit(t, n, block*blockSize+5, []byte("goes on"))
		copy(model[block*blockSize+5:], "goes on")
	}
	quiesce(t, b, a)
	identical(t, b, a)
}

// Where there is no peer, the error says which block and why; written as a whole it
// is readable again.
func TestUnreadableBlockAlone(t *testing.T) {
	needFaults(t)
	v, model, _ := lone(t, &media{seed: 1}, 43)
	if err := v.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	// One that nobody has read yet.
	poison(t, v.mem.Bytes(), v.data.Off+20*blockSize)
	if _, err := v.WriteAt(model[20*blockSize:21*blockSize], 20*blockSize); err != nil {
		t.Fatal(err)
	}
	const block = 9
	poison(t, v.mem.Bytes(), v.data.Off+block*blockSize)
	p := make([]byte, v.size)
	var fault *pmem.FaultError
	if _, err := v.ReadAt(p, 0); !errors.As(err, &fault) || !isCorrupt(err) || !strings.Contains(err.Error(), "block 9 (bytes 36864 to 40960)") {
		t.Fatalf("read: %v", err)
	}
	if _, err := v.WriteAt(bytes.Repeat([]byte("n"), blockSize), block*blockSize); err != nil {
		t.Fatal(err)
	}
	copy(model[block*blockSize:], bytes.Repeat([]byte("n"), blockSize))
	if _, err := v.ReadAt(p, 0); err != nil || !bytes.Equal(p, model) {
		t.Fatalf("read: %v, or something else", err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if r, err := Check(v.path); err != nil || r.Verdict != Sound {
		t.Errorf("check: %v, %+v", err, r)
	}
}

// A metadata copy that cannot be read is as one that is damaged: the other one does,
// and it is repaired. Without another it stays as it is.
func TestUnreadableMetadata(t *testing.T) {
	needFaults(t)
	for _, bad := range [][]int64{{0}, {1}, {0, 1}} {
		v, _, _ := lone(t, &media{seed: 1}, 44)
		v.Close()
		view, s, err := openSubject(v.path)
		if err != nil {
			t.Fatal(err)
		}
		defer view.Close()
		r, err := pmem.Open(v.path, pmem.Options{Accept: pmem.Emulated})
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		for _, i := range bad {
			poison(t, s.mem, i*metaArea)
			poison(t, r.Bytes(), i*metaArea)
		}
		err = s.inspect()
		if m := s.ins.Metadata[bad[0]]; (err == nil) != (len(bad) == 1) || m.Valid || !strings.Contains(m.Error, "memory fault") {
			t.Errorf("copies %v: info: %v, %+v", bad, err, s.ins.Metadata)
		}
		if err := clearMetadata(r, nopLogger); err != nil {
			t.Fatal(err)
		}
		o, _ := Options{Logger: nopLogger}.withDefaults()
		again, err := newVolume(v.path, r, o)
		if len(bad) == 2 {
			if !isCorrupt(err) || strings.Count(err.Error(), "memory fault") != 2 {
				t.Errorf("both: %v", err)
			}
			continue
		}
		if err != nil {
			t.Fatalf("copy %d: %v", bad[0], err)
		}
		c, err := readCopies(metadataBytes(twin(t, v.path)))
		if err != nil || c.repair || c.meta.Generation != again.meta.Generation {
			t.Errorf("copy %d: %v, %+v", bad[0], err, c)
		}
	}
}

// The same by opening the region.
func TestUnreadableMetadataOpened(t *testing.T) {
	needFaults(t)
	v, model, raw := lone(t, &media{seed: 1}, 45)
	v.Close()
	if !poison(t, raw, metaArea) {
		t.Skip("needs root and a kernel with CONFIG_MEMORY_FAILURE: make test-dax runs it in a guest")
	}
	v, err := Open(v.path, Options{Logger: nopLogger})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, v.size)
	if _, err := v.ReadAt(p, 0); err != nil || !bytes.Equal(p, model) || v.counters.metaRepairs.Load() != 1 {
		t.Errorf("%v, or other data, or %+v", err, v.Status().Counters)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if r, err := Check(v.path); err != nil || r.Verdict != Sound {
		t.Errorf("check: %v, %+v", err, r)
	}
}

// Recovery rewrites a block that the log holds as a whole.
func TestUnreadableBlockRewrittenByRedo(t *testing.T) {
	needFaults(t)
	v, _, raw := lone(t, &media{seed: 1}, 43)
	if err := v.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	const block = 9
	v.ckptMu.Lock() // what is written next is to be redone
	_, err := v.WriteAt(bytes.Repeat([]byte("n"), blockSize), block*blockSize)
	image := bytes.Clone(raw) // killed here
	v.ckptMu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	v.Close()
	if err := os.WriteFile(v.path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := pmem.Open(v.path, pmem.Options{Accept: pmem.Emulated})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	o, _ := Options{Logger: nopLogger}.withDefaults()
	w, err := newVolume(v.path, r, o)
	if err != nil {
		t.Fatal(err)
	}
	w.region = r
	poison(t, r.Bytes(), w.data.Off+block*blockSize)
	if err := w.recover(); err != nil {
		t.Fatal(err)
	}
	if got := w.block(block); string(got) != strings.Repeat("n", blockSize) {
		t.Errorf("%q", got[:10])
	}
}

// A full copy stores to a block that cannot be read.
func TestCopyOntoAnUnreadableBlock(t *testing.T) {
	needFaults(t)
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, quiet: true})
	fill(t, a, 3, 400, 20000)
	quiesce(t, a, b)
	b.wire.link.set(true)
	a.until("alone", func(s Status) bool { return s.Serving && s.Peer == "lost" })
	fill(t, a, 4, 400, 20000)
	if err := b.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	poison(t, b.mem.Bytes(), b.data.Off+7*blockSize)
	b.wire.link.set(false)
	b.inSync()
	a.inSync()
	identical(t, a, b)
}

// A page that a later change may write to counts as well.
func TestUnreadableMetadataBehindItsEnd(t *testing.T) {
	needFaults(t)
	v, _, _ := lone(t, &media{seed: 1}, 44)
	v.Close()
	r, err := pmem.Open(v.path, pmem.Options{Accept: pmem.Emulated})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	poison(t, r.Bytes(), metaArea+4096)
	if err := clearMetadata(r, nopLogger); err != nil {
		t.Fatal(err)
	}
	o, _ := Options{Logger: nopLogger}.withDefaults()
	if _, err := newVolume(v.path, r, o); err != nil {
		t.Error(err)
	}
}

// Where persistence failed because a block cannot be stored to, a read of others says
// that, and not that they are damaged.
func TestReadBesideAFailure(t *testing.T) {
	needFaults(t)
	v, _, _ := lone(t, &media{seed: 1}, 43)
	if err := v.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	const block = 9
	poison(t, v.mem.Bytes(), v.data.Off+block*blockSize)
	if _, err := v.WriteAt([]byte("part of it"), block*blockSize); err == nil || v.failed.Load() == nil {
		t.Fatalf("a part of a block that cannot be stored to was changed: %v", err)
	}
	_, err := v.ReadAt(make([]byte, 100), 20*blockSize)
	if isCorrupt(err) || !errors.Is(err, *v.failed.Load()) {
		t.Errorf("%v", err)
	}
}

// watched is memory of which the test sees each copy before it is done.
type watched struct {
	pmem.Memory
	copies func(off int64)
}

func (m *watched) Copy(off int64, p []byte) {
	if m.copies != nil {
		m.copies(off)
	}
	m.Memory.Copy(off, p)
}

// A block that cannot be read is given new memory, and the process is killed before the
// peer's block is there. Log above the checkpoint has changed a part of it: recovery
// does not take the zeros for what that was cut off from.
func TestKilledBetweenClearAndRepair(t *testing.T) {
	needFaults(t)
	closed, _, _ := lone(t, &media{seed: 1}, 46)
	closed.Close()
	for _, known := range []bool{true, false} {
		for _, entry := range []bool{true, false} { // is it whole?
			r, err := pmem.Open(closed.path, pmem.Options{Accept: pmem.Emulated})
			if err != nil {
				t.Fatal(err)
			}
			o, _ := Options{Logger: nopLogger}.withDefaults()
			mem := &watched{Memory: r}
			v, err := newVolume(closed.path, mem, o)
			if err != nil {
				t.Fatal(err)
			}
			v.region = r
			if err := errors.Join(v.recover(), v.takeUp()); err != nil {
				t.Fatal(err)
			}
			const block = 9
			if _, err := v.WriteAt([]byte("a part of it"), block*blockSize); err != nil {
				t.Fatal(err)
			}
			e, _ := v.table.get(block)
			whole := bytes.Clone(v.block(block))
			if !entry {
				r.Bytes()[v.table.area.Off+block*tableEntry+9] ^= 1
			}
			poison(t, r.Bytes(), v.data.Off+block*blockSize)
			if known {
				if bad, err := v.judge(block); !bad || err != nil { // what a read does
					t.Fatal(bad, err)
				}
			}
			var image []byte
			stores := 0
			mem.copies = func(off int64) {
				if off != v.data.Off+block*blockSize {
					return
				}
				if stores++; stores == 2 { // the first one has met the fault
					if image, err = os.ReadFile(v.path); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := v.takeRepair(block, whole, replicate.BlockInfo{LSN: e.lsn, CRC: crcOf(whole)}, v.Applied()); err != nil {
				t.Fatal(err)
			}
			p := make([]byte, blockSize)
			if _, err := v.ReadAt(p, block*blockSize); err != nil || !bytes.Equal(p, whole) {
				t.Errorf("repaired: %v, or not what was there", err)
			}
			again := openQuiet(t, newHeapMemory(image))
			if _, err := again.ReadAt(p, block*blockSize); !isCorrupt(err) {
				t.Errorf("known %v, entry %v: %q is served: %v", known, entry, p[:20], err)
			}
			var info [1]replicate.BlockInfo
			if (*node)(again).readBlocks(block, p, info[:]); info[0] != (replicate.BlockInfo{}) {
				t.Errorf("known %v, entry %v: it tells the peer %+v of them", known, entry, info[0])
			}
			v.pair.Close()
			r.Close()
		}
	}
}

// A block is known to be unreadable, and the process is killed. Its memory is readable
// again at the next start, as zeros: it was cleared, or a hole was filled.
func TestKnownUnreadableAfterAKill(t *testing.T) {
	needFaults(t)
	v, _, raw := lone(t, &media{seed: 1}, 47)
	const block = 9
	if err := v.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	v.ckptMu.Lock() // a checkpoint would end at the page
	_, err := v.WriteAt([]byte("a part of it"), block*blockSize)
	at := v.data.Off + block*blockSize
	poison(t, v.mem.Bytes(), at)
	if bad, err := v.judge(block); !bad || err != nil {
		t.Fatal(bad, err)
	}
	image := bytes.Join([][]byte{raw[:at], make([]byte, blockSize), raw[at+blockSize:]}, nil)
	v.ckptMu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 20)
	if _, err := openQuiet(t, newHeapMemory(image)).ReadAt(p, block*blockSize); !isCorrupt(err) {
		t.Errorf("%q is served: %v", p, err)
	}
}
