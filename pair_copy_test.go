package nvmmirror

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// copyPair is a primary and a blank node in its peer's place, still closed, that only a
// full copy helps. The log of both has what is logged.
func copyPair(t *testing.T, c testConfig) (a, b *testNode, logged *observer.ObservedLogs) {
	t.Helper()
	core, logged := observer.New(zap.InfoLevel)
	c.size, c.quiet = 16<<20, true
	a, b = pairInSync(t, c)
	for range 3 * MinJournal / (100 << 10) {
		commit(t, a, 0, make([]byte, 100<<10))
	}
	a.close()
	replace(t, b)
	a.opt.Logger, b.opt.Logger = zap.New(core), zap.New(core)
	a.open()
	return a, b, logged
}

// TestFullCopyGoesOn: a wire that cuts each session off after a part of a full copy is
// got over, while the volume changes. What the copy then has is the volume, also where
// a session ends before it has replaced all that changed before it.
func TestFullCopyGoesOn(t *testing.T) {
	t.Parallel()
	a, b, logged := copyPair(t, testConfig{opt: Options{OnPeerLoss: Alone}, plain: true, timeout: slow(500 * time.Millisecond)})
	var mu sync.Mutex
	sent := 0
	a.wire.setCorrupt(func(out []byte) int {
		mu.Lock()
		defer mu.Unlock()
		if sent += len(out); sent > 3<<20 && len(out) > 8<<10 {
			sent = 0
			out[len(out)/2] ^= 1
		}
		return -1
	})
	b.open()
	goesOn := func() int { return logged.FilterMessageSnippet("full copy of what").Len() }
	rng := rand.New(rand.NewPCG(5, 6))
	for i := range 6 { // sessions
		a.until("another session", func(Status) bool { return goesOn() >= 2*i }) // both log it
		for range 400 {
			p := make([]byte, 1+rng.IntN(3*blockSize))
			for j := range p {
				p[j] = byte(rng.Uint32())
			}
			commit(t, a, rng.Int64N(a.Size()-int64(len(p))), p)
		}
	}
	a.inSync()
	a.wire.setCorrupt(nil)
	identical(t, a, b)
	t.Logf("it went on %d times", goesOn()/2)
}

// TestFullCopyOfWhatChanged: a node that was away for more log than the ring holds gets
// the blocks that have changed since, and nothing else; what its log goes beyond, or its
// table is wrong about, all.
func TestFullCopyOfWhatChanged(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		change func(t *testing.T, region []byte) // of the node that was away
		whole  bool                              // all is copied
	}{
		{"killed", nil, false},
		{"a damaged block", func(t *testing.T, region []byte) {
			m := metadataOf(t, region)
			region[m.Data.Off+1000*blockSize] ^= 1
			p := region[m.Table.Off+1000*tableEntry:][:tableEntry]
			e, _ := decodeEntry(p, 1000)
			e.damaged = true
			putEntry(p, e, 1000)
		}, false},
		{"a damaged block at the source", nil, false},
		{"one that changed after that", nil, true},
		{"another block", func(t *testing.T, region []byte) { // with a table entry to match
			m := metadataOf(t, region)
			p := region[m.Data.Off+1000*blockSize:][:blockSize]
			p[0] ^= 1
			putEntry(region[m.Table.Off+1000*tableEntry:], entry{crc: crc32c.Sum(p)}, 1000)
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			core, logged := observer.New(zap.InfoLevel)
			a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, size: 16 << 20, quiet: true})
			fill(t, a, 4, 300, 3*blockSize)
			quiesce(t, a, b)
			if err := b.checkpoint(false); err != nil {
				t.Fatal(err)
			}
			b.crash()
			if c.change != nil {
				b.change(func(region []byte) { c.change(t, region) })
			}
			for range 3 * MinJournal / (100 << 10) { // 25 blocks
				commit(t, a, 0, make([]byte, 100<<10))
			}
			commit(t, a, a.Size()-1, []byte{7})
			switch c.name {
			case "a damaged block at the source", "one that changed after that":
				a.applyMu.Lock()
				a.block(1000)[0] ^= 1
				a.applyMu.Unlock()
				if _, err := a.ReadAt(make([]byte, 1), 1000*blockSize); !isCorrupt(err) {
					t.Fatal(err)
				}
				if c.whole {
					commit(t, a, 1000*blockSize+77, []byte("changed"))
				}
			}
			b.opt.Logger = zap.New(core)
			sent := func() (n int64) {
				for _, c := range a.wire.made() {
					n += c.sent.Load()
				}
				return n
			}
			before := sent()
			b.open()
			if c.name == "one that changed after that" { // nobody has it
				b.until("what it has does not count", func(Status) bool {
					return logged.Filter(func(e observer.LoggedEntry) bool {
						return strings.Contains(fmt.Sprint(e.ContextMap()), "are not what the peer has")
					}).Len() > 0
				})
				commit(t, a, 1000*blockSize, make([]byte, blockSize))
			}
			a.inSync()
			b.inSync()
			if n := sent() - before; (n > a.Size()) != c.whole || !c.whole && n > 400<<10 {
				t.Errorf("%d bytes were sent", n)
			}
			if s := b.Status(); s.Rule != string(replicate.RuleFull) {
				t.Errorf("it followed by %s", s.Rule)
			}
			if n := b.Status().Counters.RepairedBlocks; n > 0 {
				t.Errorf("%d blocks came as repairs, and not with the copy", n)
			}
			if c.name == "a damaged block at the source" {
				a.until("repaired", func(s Status) bool { return s.Counters.RepairedBlocks > 0 })
			}
			identical(t, a, b)
			for _, e := range logged.FilterMessage("session ended").All() {
				t.Log(e.ContextMap()["error"])
			}
		})
	}
}

// TestFullCopyBeginsAnew: where one of the nodes has restarted meanwhile, nobody
// knows any more what the part of a copy is worth. A primary that waits for its peer
// is in the same epoch as before.
func TestFullCopyBeginsAnew(t *testing.T) {
	t.Parallel()
	for _, who := range []string{"primary", "waiting primary", "follower"} {
		t.Run(who, func(t *testing.T) {
			t.Parallel()
			c := testConfig{opt: Options{OnPeerLoss: Alone}}
			if who == "waiting primary" {
				c.opt.OnPeerLoss = Block
			}
			a, b, logged := copyPair(t, c)
			a.wire.setChop(128<<10, 20*time.Millisecond)
			b.open()
			b.until("a part", func(s Status) bool { return s.Resync != nil && s.Resync.Done > 1<<20 })
			restarts := a
			if who == "follower" {
				restarts = b
			}
			restarts.crash()
			restarts.open()
			b.until("a part", func(s Status) bool { return s.Resync != nil && s.Resync.Done > 1<<20 })
			a.wire.setChop(0, 0)
			a.until("serving", func(s Status) bool { return s.Serving })
			fill(t, a, 3, 50, 3*blockSize)
			identical(t, a, b)
			if n := logged.FilterMessageSnippet("full copy of what").Len(); n > 0 {
				t.Error("the copy of before went on")
			}
		})
	}
}

// TestUnreadableTableUnderACopy: a page of the block table that cannot be read is an
// error of the copy that goes on, as where blocks are read, and not the end of the process.
func TestUnreadableTableUnderACopy(t *testing.T) {
	needFaults(t)
	v, _, _ := lone(t, &media{seed: 1}, 45)
	poison(t, v.mem.Bytes(), v.table.area.Off)
	var fault *pmem.FaultError
	if _, err := (*node)(v).Entries(0, make([]replicate.BlockInfo, 1)); !errors.As(err, &fault) {
		t.Errorf("%v", err)
	}
}

// TestLogBesideACopyIsFlushed: what log changes while a copy is under way does not all
// wait for the copy's end either. One that goes on may look at many blocks, and copy few.
func TestLogBesideACopyIsFlushed(t *testing.T) {
	path := filepath.Join(shm(t), "r")
	if err := Create(path, CreateOptions{Size: 2 * copyStep, JournalSize: 8 << 20, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	r, err := pmem.Open(path, pmem.Options{Accept: pmem.Emulated})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	v := openQuiet(t, r)
	v.applyMu.Lock()
	v.copying = true
	v.applyMu.Unlock()
	p := make([]byte, 1<<20)
	for off := int64(0); off < v.size; off += int64(len(p)) {
		if _, err := v.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	v.copying = false
	left := 0
	for range v.dirty.all() {
		left++
	}
	if most := (copyStep + len(p)) / blockSize; left > most {
		t.Errorf("%d blocks wait to be flushed, of %d", left, v.size/blockSize)
	}
}

// firstByte is what a node reads at the beginning of a block.
func firstByte(t *testing.T, n *testNode, block int64) byte {
	t.Helper()
	var p [1]byte
	n.read(t, p[:], block*blockSize)
	return p[0]
}

// TestFullCopyOfADoubtfulBlock: a block that is unverified at the source may have
// changed after what its entry says. The peer that was away does not keep what it has,
// and nothing is repaired by that.
func TestFullCopyOfADoubtfulBlock(t *testing.T) {
	t.Parallel()
	const block = 2000
	for name, doubt := range map[string]func(t *testing.T, a *testNode){
		"damaged when it changed, and whole again": func(t *testing.T, a *testNode) {
			flip := func() {
				a.applyMu.Lock()
				a.block(block)[4000] ^= 1
				a.applyMu.Unlock()
			}
			flip()
			if _, err := a.ReadAt(make([]byte, 1), block*blockSize); !isCorrupt(err) {
				t.Fatal(err)
			}
			commit(t, a, block*blockSize, []byte{2})
			flip()
			for range 3 * MinJournal / (100 << 10) { // the journal does not reach back
				commit(t, a, 0, make([]byte, 100<<10))
			}
			a.close()
			a.open()
		},
		"changed by log that was given up from where the peer's ends on": func(t *testing.T, a *testNode) {
			if err := a.checkpoint(false); err != nil { // else redo would write the block as it was
				t.Fatal(err)
			}
			a.ckptMu.Lock() // what is damaged stays above the checkpoint
			at := a.Status().Committed
			commit(t, a, 0, []byte{2})
			commit(t, a, block*blockSize, []byte{2})
			commit(t, a, 0, []byte{3})
			crashHeld(a, func(region []byte) { flip(t, region, at) })
			a.open()
			a.until("damaged", func(s Status) bool { return s.Damaged })
			if err := a.ContinueAlone(t.Context(), true); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, size: 16 << 20, quiet: true})
			commit(t, a, block*blockSize, []byte{1})
			quiesce(t, a, b)
			b.close()
			a.until("alone", func(Status) bool { return !a.pair.Required() })
			doubt(t, a)
			a.until("serving", func(s Status) bool { return s.Serving })
			if got := firstByte(t, a, block); got != 2 || a.unverified.n.Load() == 0 {
				t.Fatalf("%d, and %d blocks are unverified", got, a.unverified.n.Load())
			}
			core, logged := observer.New(zap.InfoLevel)
			b.opt.Logger = zap.New(core)
			b.open()
			a.inSync()
			for _, e := range logged.FilterMessage("session ended").All() {
				if err := fmt.Sprint(e.ContextMap()["error"]); strings.Contains(err, "are not what the peer has") {
					t.Errorf("it was left out, and only the comparison found it: %s", err)
				}
			}
			if s := b.Status(); s.Rule != string(replicate.RuleFull) {
				t.Errorf("it followed by %s", s.Rule)
			}
			identical(t, a, b)
			a.until("compared", func(s Status) bool { return s.Counters.UnverifiedBlocks == 0 })
			if got := firstByte(t, a, block); got != 2 {
				t.Errorf("%d where 2 was acknowledged and served", got)
			}
		})
	}
}
