package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/replicate"
)

// A flip in a block that writers change without a pause. The peer's block is
// nearly always of another moment; the read still gets it repaired.
func TestRepairOfABlockThatChangesAllTheTime(t *testing.T) {
	t.Parallel()
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			a, b := pairInSync(t, testConfig{opt: m.opt, quiet: true, timeout: steady()})
			const block = 7
			still := bytes.Repeat([]byte("never changed "), 50)
			commit(t, a, block*blockSize+2000, still)
			var wg sync.WaitGroup
			ctx, stop := context.WithCancel(context.Background())
			for g := range int64(8) {
				wg.Go(func() {
					for i := byte(1); ctx.Err() == nil; i++ {
						tx := a.Begin()
						tx.Write(block*blockSize+g*64, bytes.Repeat([]byte{i}, 64))
						tx.Commit(ctx)
					}
				})
			}
			p := make([]byte, len(still))
			for i := range int64(25) {
				flipLive(a, block*blockSize+2000+i*7)
				if _, err := a.ReadAt(p, block*blockSize+2000); err != nil {
					t.Errorf("flip %d: %v", i, err)
					break
				}
				if !bytes.Equal(p, still) {
					t.Errorf("flip %d was served", i)
					break
				}
			}
			stop()
			wg.Wait()
			if t.Failed() {
				return
			}
			if c := a.Status().Counters; c.RepairedBlocks < 25 {
				t.Errorf("%+v", c)
			}
			identical(t, a, b)
		})
	}
}

// A change goes over the flipped bytes themselves: what the block holds then is
// right, and the checksum that was carried over the flip is not. The peer's
// tells.
func TestChangeOverAFlip(t *testing.T) {
	for _, first := range []bool{true, false} { // the first change since a checkpoint, or a later one
		for _, where := range []string{"primary", "secondary"} {
			name := where + ", first change"
			if !first {
				name = where + ", later change"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				a, b := pairInSync(t, testConfig{})
				fill(t, a, 3, 20, 20000)
				quiesce(t, a, b)
				n := a
				if where == "secondary" {
					n = b
				}
				const off = 5 * blockSize
				for _, m := range []*testNode{a, b} {
					if err := m.checkpoint(false); err != nil {
						t.Fatal(err)
					}
				}
				if !first {
					commit(t, a, off+3000, []byte("earlier"))
					quiesce(t, a, b)
				}
				want := content(t, a)
				flipLive(n, off+100)
				commit(t, a, off+50, bytes.Repeat([]byte("o"), 100))
				copy(want[off+50:], bytes.Repeat([]byte("o"), 100))
				quiesce(t, a, b)
				if where == "secondary" { // it is read there once it is promoted
					a.demote()
					b.until("title", func(s Status) bool { return s.Title })
					b.promote(false)
					b.inSync()
					a, b = b, a
				}
				if !bytes.Equal(content(t, a), want) {
					t.Fatal("content differs")
				}
				n.until("repaired", func(s Status) bool { return s.Counters.RepairedBlocks == 1 && len(s.Degraded) == 1 })
				identical(t, a, b)
			})
		}
	}
}

// A full copy meets a damaged block, or one that cannot be read, of which there is
// no other copy: the node says which, serves on, and the copy goes on once the block
// is written anew.
func TestFullCopyOverADamagedBlock(t *testing.T) {
	t.Parallel()
	t.Run("flipped", func(t *testing.T) { fullCopyOverADamagedBlock(t, flipLive) })
	t.Run("unreadable", func(t *testing.T) {
		needFaults(t)
		fullCopyOverADamagedBlock(t, func(n *testNode, off int64) {
			if err := n.checkpoint(false); err != nil {
				t.Fatal(err)
			}
			poison(t, n.mem.Bytes(), n.data.Off+off)
		})
	})
}

func fullCopyOverADamagedBlock(t *testing.T, damage func(n *testNode, off int64)) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
	fill(t, a, 3, 400, 20000) // once around the ring
	quiesce(t, a, b)
	replace(t, b)
	a.until("alone", func(s Status) bool { return s.Serving && s.Peer == "lost" })
	commit(t, a, 0, []byte("alone"))
	const block = 7
	damage(a, block*blockSize+100)
	b.open()
	a.until("the block named", func(s Status) bool {
		return s.Counters.BadBlocks == 1 && slices.Contains(s.Degraded, "1 damaged blocks") &&
			slices.ContainsFunc(s.Degraded, func(d string) bool {
				return strings.Contains(d, "full copy: block 7: corrupt") && strings.Contains(d, "write all its 4096 bytes at offset 28672 anew")
			})
	})
	commit(t, a, block*blockSize, bytes.Repeat([]byte("n"), blockSize))
	a.inSync()
	b.inSync()
	identical(t, a, b)
	if s := a.Status(); slices.Contains(s.Degraded, "1 damaged blocks") {
		t.Errorf("%v", s.Degraded)
	}
}

// A follower asks for a block when there is cause to, not at its primary's next
// heartbeat, which is a minute away here.
func TestFollowerLooksWhenItIsWoken(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{quiet: true, timeout: 5 * time.Minute, opt: Options{OnPeerLoss: Alone}})
	fill(t, a, 3, 20, 20000)
	quiesce(t, a, b)
	b.applyMu.Lock()
	b.noteBad(5, "for the test")
	b.applyMu.Unlock()
	b.until("answered", func(s Status) bool {
		return s.Counters.BadBlocks == 1 && slices.Index(s.Degraded, "1 damaged blocks") < 0
	})
}

// A block that a commit has rewritten since a reader found it damaged is sound.
func TestRewrittenBeforeItsRepair(t *testing.T) {
	v := openQuiet(t, newImage(t, smallSize, smallJournal))
	v.block(0)[7] ^= 1
	bad, err := v.readOnce(make([]byte, 10), 0)
	if bad != 0 || err != nil {
		t.Fatal(bad, err)
	}
	if _, err := (transaction{{0, make([]byte, blockSize)}}).commit(v); err != nil {
		t.Fatal(err)
	}
	if err := v.repair(bad); err != nil || v.bad.n.Load() != 0 {
		t.Errorf("%v, %d damaged blocks", err, v.bad.n.Load())
	}
}

// Where the entry here is damaged, the peer's block is taken only if it is the state
// that the data here must have.
func TestRepairOfADamagedEntry(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	v := openQuiet(t, mem)
	put := func(fill byte) (LSN, []byte, replicate.BlockInfo) {
		lsn, err := (transaction{{0, bytes.Repeat([]byte{fill}, 100)}}).commit(v)
		if err != nil {
			t.Fatal(err)
		}
		p := bytes.Clone(v.block(0))
		return lsn, p, replicate.BlockInfo{LSN: lsn, CRC: crcOf(p)}
	}
	then, old, oldInfo := put(1)
	now, data, info := put(2)
	later := now + 256
	newer := bytes.Repeat([]byte{3}, blockSize)
	mem.b[v.table.area.Off+12] ^= 1
	for what, err := range map[string]error{
		"older": v.takeRepair(0, old, oldInfo, then),
		"newer": v.takeRepair(0, newer, replicate.BlockInfo{LSN: later, CRC: crcOf(newer)}, later),
	} {
		if !errors.Is(err, errRetryRepair) {
			t.Errorf("%s block: %v", what, err)
		}
	}
	if err := v.takeRepair(0, data, info, now); err != nil || !bytes.Equal(v.block(0), data) {
		t.Errorf("%v, %d", err, v.block(0)[0])
	}
}

// A block that is unverified counts as that also after a clean close.
func TestUnverifiedOutlivesACleanClose(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	v := openQuiet(t, mem)
	lsn, err := (transaction{{0, bytes.Repeat([]byte{1}, 100)}}).commit(v)
	if err != nil {
		t.Fatal(err)
	}
	v.table.set(0, entry{lsn: lsn, crc: crcOf(v.block(0)), unverified: true})
	v.unverified.add(0)
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if v = openQuiet(t, mem); !v.recovery.Clean || v.unverified.n.Load() != 1 || !v.unverified.has(0) {
		t.Errorf("clean %v, %d blocks unverified", v.recovery.Clean, v.unverified.n.Load())
	}
}

// Thousands of damaged blocks are noted at once: the peer is asked for some at a time,
// and the session goes on.
func TestManyRepairsAtOnce(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{quiet: true, size: 16 << 20, timeout: steady()})
	const blocks = 1500
	quiesce(t, a, b)
	if err := b.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	sessions := a.Status().Counters.Reconnects
	b.applyMu.Lock()
	for i := range int64(blocks) {
		b.block(i)[100] ^= 1
	}
	b.applyMu.Unlock()
	tx := a.Begin()
	for i := range int64(blocks) { // b finds each as it changes a part of it
		if err := tx.Write(i*blockSize, []byte{1}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := tx.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	b.until("repaired", func(s Status) bool { return s.Counters.RepairedBlocks >= blocks && b.bad.n.Load() == 0 })
	if n := a.Status().Counters.Reconnects; n != sessions {
		t.Errorf("the session was lost %d times over it", n-sessions)
	}
	identical(t, a, b)
}

// The LSN of a damaged block's entry stays as it was: a block of the peer's from before a
// change here is not taken for the one that is lacking.
func TestRepairOfADamagedBlockIsOfOneMoment(t *testing.T) {
	v, model, raw := lone(t, &media{seed: 1}, 52)
	const block = 9
	raw[v.data.Off+block*blockSize+2000] ^= 1
	if _, err := v.ReadAt(make([]byte, 1), block*blockSize); !isCorrupt(err) {
		t.Fatal(err)
	}
	e, _ := v.table.get(block)
	before := bytes.Clone(model[block*blockSize:][:blockSize])
	applied := v.Applied()
	if _, err := v.WriteAt([]byte("a change"), block*blockSize); err != nil {
		t.Fatal(err)
	}
	info := replicate.BlockInfo{LSN: e.lsn, CRC: crcOf(before)}
	if err := v.takeRepair(block, before, info, applied); err != errRetryRepair {
		t.Fatalf("the block of before: %v", err)
	}
	after := bytes.Clone(before)
	copy(after, "a change")
	info = replicate.BlockInfo{LSN: v.Applied(), CRC: crcOf(after)}
	if err := v.takeRepair(block, after, info, v.Applied()); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, blockSize)
	if _, err := v.ReadAt(p, block*blockSize); err != nil || !bytes.Equal(p, after) {
		t.Errorf("%v, or something else", err)
	}
}
