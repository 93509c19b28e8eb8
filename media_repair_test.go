package nvmmirror

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
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

// A full copy meets a damaged block, of which there is no other copy: the node
// says which, and the copy goes on once the block is written anew.
func TestFullCopyOverADamagedBlock(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
	fill(t, a, 3, 400, 20000) // once around the ring
	quiesce(t, a, b)
	replace(t, b)
	a.until("alone", func(s Status) bool { return s.Serving && s.Peer == "lost" })
	commit(t, a, 0, []byte("alone"))
	const block = 7
	flipLive(a, block*blockSize+100)
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
