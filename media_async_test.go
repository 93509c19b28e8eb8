package nvmmirror

import (
	"sync"
	"testing"
	"time"
)

// In async mode the log runs on while the follower's ring is full: what has no
// room there waits, and the session goes on.
func TestAsyncFollowersRingIsFull(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{Ack: AckAsync}, quiet: true, timeout: steady()})
	fill(t, a, 1, 20, 5000)
	quiesce(t, a, b)
	before := a.Status().Counters.Reconnects
	if err := b.checkpoint(false); err != nil {
		t.Fatal(err)
	}
	b.ckptMu.Lock() // b's checkpoint stays where it is
	move := sync.OnceFunc(b.ckptMu.Unlock)
	defer move()
	room := b.Checkpoint() + LSN(b.ring.Len)
	// Up to the last segment that fits, and no further for two heartbeats.
	var fits LSN
	for end := LSN(0); end < room+100000; {
		end = commit(t, a, 0, make([]byte, 9000))
		if end <= room {
			fits = end
		}
	}
	if fits == room {
		t.Fatal("a segment ends just where the room does")
	}
	b.until("full", func(s Status) bool { return s.Committed >= fits })
	for end := time.Now().Add(2 * steady() / 5); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if s := b.Status(); s.Committed > fits || s.Peer != "in-sync" {
			t.Fatalf("LSN %d with room up to %d, peer %s: %s", s.Committed, room, s.Peer, s.Reason)
		}
	}
	move()
	identical(t, a, b)
	if n := a.Status().Counters.Reconnects; n != before {
		t.Errorf("%d sessions ended", n-before)
	}
}
