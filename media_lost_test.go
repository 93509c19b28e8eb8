package nvmmirror

import (
	"bytes"
	"context"
	"os"
	"strings"
	"testing"
	"time"
)

// lostIn makes a part of a live node's region unreadable: a page of it, or
// everything from there on.
func lostIn(t *testing.T, n *testNode, how, area string) {
	t.Helper()
	at := map[string]int64{
		"data": n.data.Off + 8*blockSize, "block table": n.table.area.Off, "metadata": 0,
		"journal": n.ring.Off + int64(n.journal.Ring().Position(n.journal.End())),
	}[area]
	if how == "poisoned" {
		poison(t, n.mem.Bytes(), at)
	} else if err := os.Truncate(n.path, at&^(blockSize-1)); err != nil {
		t.Fatal(err)
	}
}

// The primary's region is cut off, or a page of it poisoned, while it serves.
// It ends with an error at the next store there, its peer is promoted without
// force, and lacks nothing that was acknowledged.
func TestPrimaryLosesItsRegion(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"cut off", "poisoned"} {
		for _, area := range []string{"data", "block table", "journal"} {
			t.Run(how+", "+area, func(t *testing.T) {
				t.Parallel()
				a, b, model := mediaPair(t, &media{seed: 1}, 40, Options{})
				lostIn(t, a, how, area)
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				defer cancel()
				p := bytes.Repeat([]byte("in doubt"), 10)
				err := <-begin(ctx, a, 8*blockSize, p)
				if err == nil || ctx.Err() != nil {
					t.Fatalf("commit: %v", err)
				}
				a.until("failed", func(s Status) bool {
					return strings.Contains(strings.Join(s.Degraded, "\n"), "persistence failed")
				})
				if _, err := a.ReadAt(p, 0); err == nil {
					t.Error("it goes on reading")
				}
				b.peerIs("lost")
				b.promote(false)
				got := content(t, b)
				copy(got[8*blockSize:], model[8*blockSize:][:80]) // was in doubt
				if !bytes.Equal(got, model) {
					t.Fatal("acknowledged data is lost")
				}
				commit(t, b, 0, []byte("goes on"))
				a.Volume.Close() // it says what it has said before
				a.Volume = nil
			})
		}
	}
}

// The same on the secondary, and its ring goes too: it ends, the primary goes
// on alone, and a new region in its place is filled.
func TestSecondaryLosesItsRegion(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"cut off", "poisoned"} {
		for _, area := range []string{"data", "block table", "journal"} {
			t.Run(how+", "+area, func(t *testing.T) {
				t.Parallel()
				a, b, model := mediaPair(t, &media{seed: 1}, 41, Options{OnPeerLoss: Alone})
				lostIn(t, b, how, area)
				p := bytes.Repeat([]byte("goes on"), 20)
				commit(t, a, 8*blockSize, p)
				copy(model[8*blockSize:], p)
				b.until("failed", func(s Status) bool {
					return strings.Contains(strings.Join(s.Degraded, "\n"), "persistence failed")
				})
				a.until("alone", func(s Status) bool { return s.Peer == "lost" && !a.pair.Required() })
				commit(t, a, 0, p)
				copy(model, p)
				m := a.meta
				b.Volume.Close()
				b.Volume = nil
				if err := os.Remove(b.path); err != nil {
					t.Fatal(err)
				}
				if err := Create(b.path, CreateOptions{Size: m.Size, JournalSize: m.Journal.Len, Accept: 1}); err != nil {
					t.Fatal(err)
				}
				b.open()
				a.inSync()
				b.inSync()
				unharmed(t, b, model)
				identical(t, a, b)
			})
		}
	}
}

// A page of the ring that a returning peer needs cannot be read: the process
// lives, says so and ends the node.
func TestPoisonedLogToCatchUpBy(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
	fill(t, a, 1, 10, 5000)
	quiesce(t, a, b)
	b.wire.link.set(true)
	a.until("alone", func(s Status) bool { return s.Peer == "lost" && !a.pair.Required() })
	from := a.Status().Committed
	for range 20 {
		commit(t, a, 0, make([]byte, 4000))
	}
	at := a.ring.Off + int64(a.journal.Ring().Position(from))
	poison(t, a.mem.Bytes(), at+3*blockSize)
	b.wire.link.set(false)
	a.until("told", func(s Status) bool {
		return strings.Contains(strings.Join(s.Degraded, "\n"), "the journal cannot be read")
	})
	a.Volume.Close()
	a.Volume = nil
}
