package nvmmirror

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// lanePair is a pair in sync with so many connections for long transactions.
func lanePair(t *testing.T, lanes int, c testConfig) (a, b *testNode) {
	t.Helper()
	c.size, c.journal = 32<<20, 16<<20
	a, b = newPair(t, c)
	a.opt.Peer.Connections, b.opt.Peer.Connections = lanes, lanes+1 // the smaller number counts
	a.close()
	b.close()
	a.open()
	b.open()
	a.promote(true)
	a.inSync()
	a.until("all connections", func(s Status) bool { return s.Lanes == lanes })
	return a, b
}

// laneLoad commits transactions of all lengths from several writers, each in
// its part of the volume, until each has done so many.
func laneLoad(t *testing.T, n *testNode, writers, count int) {
	var wg sync.WaitGroup
	share := n.Size() / int64(writers)
	for w := range writers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 77))
			buf := make([]byte, 3<<20)
			for i := range buf {
				buf[i] = byte(rng.Uint32())
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			for i := range count {
				size := 1 + rng.IntN(2000)
				if i%2 == 0 {
					size = 1 + rng.IntN(3<<20)
				}
				from := rng.IntN(len(buf) - size + 1)
				tx := n.Begin()
				tx.Write(int64(w)*share+rng.Int64N(share-int64(size)), buf[from:from+size])
				if _, err := tx.Commit(ctx); err != nil {
					t.Errorf("writer %d, transaction %d: %v", w, i, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestLanes: long transactions cross by the other connections, short ones
// between them by the session's own, and both nodes hold the same.
func TestLanes(t *testing.T) {
	t.Parallel()
	for _, lanes := range []int{1, 2, 4} {
		t.Run(fmt.Sprint(lanes), func(t *testing.T) {
			a, b := lanePair(t, lanes, testConfig{})
			laneLoad(t, a, 4, 25)
			identical(t, a, b)
			if n := b.Status().Counters.CRCFailures; n != 0 {
				t.Errorf("%d bad checksums", n)
			}
			used := 0
			for _, c := range a.wire.made() {
				if c.sent.Load() > 1<<20 {
					used++
				}
			}
			if used < lanes {
				t.Errorf("%d connections were used, of %d", used, lanes)
			}
		})
	}
}

// TestLaneLost: a lost connection for long transactions begins the session
// anew, and nothing is lost.
func TestLaneLost(t *testing.T) {
	t.Parallel()
	a, b := lanePair(t, 2, testConfig{})
	for round := range 3 {
		n := a
		if round%2 == 1 {
			n = b
		}
		before := map[*wireConn]int64{}
		for _, c := range n.wire.made() {
			before[c] = c.moved.Load()
		}
		end := make(chan struct{})
		go func() {
			defer close(end)
			laneLoad(t, a, 4, 10)
		}()
		var lane *wireConn // of those that were made, some may have been refused
		n.until("under load", func(Status) bool {
			made := n.wire.made()
			i := slices.IndexFunc(made, func(c *wireConn) bool { return c.moved.Load() >= before[c]+1<<20 })
			if i >= 0 {
				lane = made[i]
			}
			return i >= 0
		})
		lane.Close()
		<-end
		a.inSync()
		a.until("all connections", func(s Status) bool { return s.Lanes == 2 })
		identical(t, a, b)
	}
	if s := a.Status(); s.Counters.Reconnects < 3 {
		t.Errorf("%d new sessions after 3 losses", s.Counters.Reconnects)
	}
}

// TestLastWord: a peer that ends the session closes its lanes too, which the
// primary notices first. The log has what the peer said, and not that.
func TestLastWord(t *testing.T) {
	t.Parallel()
	a, b := lanePair(t, 2, testConfig{quiet: true})
	core, logged := observer.New(zap.WarnLevel)
	a.close()
	a.opt.Logger = zap.New(core)
	a.open()
	a.inSync()
	a.until("all connections", func(s Status) bool { return s.Lanes == 2 })
	b.close()
	a.until("without its peer", func(s Status) bool { return s.Peer == "lost" })
	all := logged.FilterMessage("session ended").All()
	if len(all) == 0 {
		t.Error("nothing logged")
	}
	for _, e := range all { // a session that was just begun may end as well
		if e.ContextMap()["error"] != "the peer ended the session: the node is changing its role or stopping" {
			t.Errorf("logged %v", e)
		}
	}
}

// TestLaneCorruption: without signatures, a flip in a piece is found by its
// checksum, and the piece is sent again.
func TestLaneCorruption(t *testing.T) {
	t.Parallel()
	a, b := lanePair(t, 2, testConfig{plain: true})
	for range 3 {
		before, sent := b.Status().Counters.CRCFailures, a.Status().Counters.Resends
		a.wire.setCorrupt(func(out []byte) int {
			if len(out) < 32<<10 {
				return -1
			}
			out[20<<10] ^= 4
			return 20 << 10
		})
		laneLoad(t, a, 2, 8)
		a.inSync()
		identical(t, a, b)
		if b.Status().Counters.CRCFailures == before {
			t.Fatal("no flip was seen")
		}
		if a.Status().Counters.Resends == sent {
			t.Fatal("nothing was sent again")
		}
	}
}

// A wire that damages one frame in five costs what is sent again, and no session;
// and the log has not a line for each.
func TestManyDamagedFrames(t *testing.T) {
	t.Parallel()
	a, b := lanePair(t, 3, testConfig{plain: true, timeout: steady(), quiet: true})
	a.close()
	b.close()
	core, logged := observer.New(zap.WarnLevel)
	for _, n := range []*testNode{a, b} {
		n.opt.Logger = zap.New(core)
		n.open()
	}
	a.inSync()
	a.until("all connections", func(s Status) bool { return s.Lanes == 3 })
	begin, before := time.Now(), a.Status().Counters
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(1, 2))
	a.wire.setCorrupt(func(out []byte) int {
		mu.Lock()
		defer mu.Unlock()
		const frame = 11
		if len(out) <= 64 || rng.IntN(5) != 0 {
			return -1
		}
		switch n := int(binary.LittleEndian.Uint32(out[40:])); {
		case string(out[:4]) == "NVMW" && out[6] == frame:
			out[64+rng.IntN(len(out)-64)] ^= 4
		case string(out[:4]) == "NVMS" && 64 < n && n <= len(out):
			out[64+rng.IntN(n-64)] ^= 4
		}
		return -1
	})
	laneLoad(t, a, 4, 20)
	a.wire.setCorrupt(nil)
	identical(t, a, b)
	c := a.Status().Counters
	again := c.Resends - before.Resends
	if again < 20 || c.Reconnects != before.Reconnects {
		t.Errorf("%d frames sent again, %d sessions after the first", again, c.Reconnects-before.Reconnects)
	}
	lines := logged.FilterMessageSnippet("its checksum").Len()
	if most := 2 * (1 + int(time.Since(begin)/time.Minute)); lines < 2 || lines > most {
		t.Errorf("%d lines for %d frames, want at most %d", lines, again, most)
	}
}

// TestLanesOnlyInSync: what a primary wrote alone comes to a follower in order,
// by the session's own connection. With a gap in it, a follower that dies would
// take what lies behind, which says that it is acknowledged, for a proof of
// damage.
func TestLanesOnlyInSync(t *testing.T) {
	t.Parallel()
	a, b := lanePair(t, 2, testConfig{opt: Options{OnPeerLoss: Alone}})
	b.close()
	for i := range 6 {
		p := make([]byte, 1<<20)
		p[0] = byte(i)
		commit(t, a, int64(i)<<20, p)
	}
	before := len(a.wire.made())
	a.wire.setChop(32<<10, 2*time.Millisecond) // the other connections are up before it is through
	b.open()
	a.inSync()
	a.wire.setChop(0, 0)
	identical(t, a, b)
	used := 0
	for _, c := range a.wire.made()[before:] {
		if c.sent.Load() > 512<<10 {
			used++
		}
	}
	if used != 1 {
		t.Errorf("%d connections carried the log", used)
	}
}
