package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Writers and readers go on while the primary is killed, its peer promoted,
// and the dead node comes back; three times over.
func TestFailoverUnderLoad(t *testing.T) {
	t.Parallel()
	for _, m := range modes[:1] {
		t.Run(m.name, func(t *testing.T) {
			a, b := pairInSync(t, testConfig{opt: m.opt, quiet: true, size: 8 << 20})
			var primary atomic.Pointer[Volume]
			primary.Store(a.Volume)
			l := startLoad(t, 16, primary.Load)
			stop := make(chan struct{})
			var readers sync.WaitGroup
			// What a reader has seen, no later reader may miss.
			seen := make([]atomic.Uint64, len(l.slots))
			for range 4 {
				readers.Go(func() {
					for g := 0; ; g = (g + 1) % len(l.slots) {
						select {
						case <-stop:
							return
						default:
						}
						floor := seen[g].Load()
						count, err := slotAt(primary.Load(), g)
						if err != nil {
							time.Sleep(time.Millisecond)
							continue
						}
						if count < floor {
							t.Errorf("slot %d: read %d after %d", g, count, floor)
							return
						}
						for old := seen[g].Load(); count > old && !seen[g].CompareAndSwap(old, count); old = seen[g].Load() {
						}
					}
				})
			}
			for range 3 {
				l.more(300)
				a.crash()
				b.peerIs("lost")
				b.promote(false)
				primary.Store(b.Volume)
				l.more(100)
				a.open()
				a.inSync()
				b.inSync()
				a, b = b, a
			}
			close(stop)
			readers.Wait()
			l.end()
			l.check(a)
			identical(t, a, b)
		})
	}
}

// The secondary is killed and returns; the writers only wait.
func TestPeerRestartUnderLoad(t *testing.T) {
	t.Parallel()
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			a, b := pairInSync(t, testConfig{opt: m.opt, quiet: true})
			l := startLoad(t, 8, func() *Volume { return a.Volume })
			for i := range 4 {
				l.more(100)
				if i%2 == 0 {
					b.crash()
				} else {
					b.close()
				}
				b.open()
				b.inSync()
			}
			l.more(100)
			l.end()
			l.check(a)
			identical(t, a, b)
		})
	}
}

// The primary is killed and returns as primary, under load.
func TestPrimaryRestartUnderLoad(t *testing.T) {
	t.Parallel()
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			a, b := pairInSync(t, testConfig{opt: m.opt, quiet: true})
			var primary atomic.Pointer[Volume]
			primary.Store(a.Volume)
			l := startLoad(t, 8, primary.Load)
			for i := range 4 {
				l.more(100)
				primary.Store(nil)
				if i%2 == 0 {
					a.crash()
				} else {
					a.close()
				}
				a.open()
				primary.Store(a.Volume)
			}
			l.more(100)
			l.end()
			l.check(a)
			b.inSync()
			identical(t, a, b)
		})
	}
}

// Both are killed, and return in either order.
func TestBothKilled(t *testing.T) {
	t.Parallel()
	for _, m := range modes {
		for _, first := range []string{"primary first", "secondary first"} {
			t.Run(m.name+" "+first, func(t *testing.T) {
				a, b := pairInSync(t, testConfig{opt: m.opt, quiet: true})
				l := startLoad(t, 8, func() *Volume { return a.Volume })
				l.more(200)
				// Nothing leaves either of them from here on.
				a.wire.dead.Store(true)
				b.wire.dead.Store(true)
				a.committer.Acquire(context.Background())
				a.committer.Close(errCrashed, errCrashed)
				a.committer.Release()
				l.end()
				a.crash()
				b.crash()
				nodes := []*testNode{a, b}
				if first == "secondary first" {
					nodes = []*testNode{b, a}
				}
				nodes[0].open()
				nodes[0].until("looking for its peer", func(s Status) bool { return s.Counters.DialFailures > 0 })
				nodes[1].open()
				a.inSync()
				l.check(a)
				identical(t, a, b)
			})
		}
	}
}

// The peer stalls, the ring is small: committers wait, memory stays bounded,
// and nobody is told of a success that is none.
func TestFullRing(t *testing.T) {
	a, b := pairInSync(t, testConfig{quiet: true, size: 16 << 20, timeout: time.Second})
	quiesce(t, a, b)
	b.wire.link.set(true)
	const writers, size = 100, 60 << 10
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	data := make([][]byte, writers)
	waits := make([]<-chan error, writers)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range writers {
		data[i] = bytes.Repeat([]byte{byte(i + 1)}, size)
		c := ctx
		if i%2 == 0 {
			c = context.Background()
		}
		waits[i] = begin(c, a, int64(i)*size, data[i])
	}
	var last LSN
	a.until("full", func(s Status) bool {
		full := s.Committed == last && s.Committed-s.Acked > 1<<20
		last = s.Committed
		return full && s.Peer == "lost"
	})
	runtime.GC()
	runtime.ReadMemStats(&after)
	if s := a.Status(); s.Committed-s.Ckpt > 2<<20 {
		t.Fatalf("%d bytes of log in a ring of %d", s.Committed-s.Ckpt, 2<<20)
	}
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > writers*size+8<<20 {
		t.Fatalf("the heap grew by %d", grown)
	}
	for i, w := range waits {
		select {
		case err := <-w:
			t.Fatalf("writer %d came back without the peer: %v", i, err)
		default:
		}
	}
	cancel()
	var never []int
	for i := 1; i < writers; i += 2 {
		err := <-waits[i]
		switch {
		case errors.Is(err, ErrOutcomeUnknown):
		case errors.Is(err, context.Canceled):
			never = append(never, i)
		default:
			t.Fatalf("writer %d: %v", i, err)
		}
	}
	if len(never) == 0 {
		t.Fatal("all fit into the ring")
	}
	b.wire.link.set(false)
	for i := 0; i < writers; i += 2 {
		if err := <-waits[i]; err != nil {
			t.Fatalf("writer %d: %v", i, err)
		}
	}
	for i := 0; i < writers; i += 2 {
		p := make([]byte, size)
		if _, err := a.ReadAt(p, int64(i)*size); err != nil || !bytes.Equal(p, data[i]) {
			t.Fatalf("writer %d's data is not there (%v)", i, err)
		}
	}
	for _, i := range never {
		p := make([]byte, size)
		if _, err := a.ReadAt(p, int64(i)*size); err != nil || !bytes.Equal(p[16:], make([]byte, size)[16:]) {
			t.Fatalf("writer %d was told that nothing was committed, and its data is there (%v)", i, err)
		}
	}
	identical(t, a, b)
}

func TestOversizedTransaction(t *testing.T) {
	a, b := pairInSync(t, testConfig{timeout: steady()})
	before := b.Status().Counters.Reconnects
	big := make([]byte, 1<<20)
	tx := a.Begin()
	tx.Write(0, big)
	if _, err := tx.Commit(context.Background()); !errors.Is(err, ErrTooLarge) {
		t.Fatalf("%v", err)
	}
	limit := a.journal.MaxTransaction()
	commit(t, a, 0, bytes.Repeat([]byte("f"), limit-64)) // the largest
	identical(t, a, b)
	if b.Status().Counters.Reconnects != before {
		t.Fatal("the session ended")
	}
}

// What a secondary's log brings is its session's to apply. Its committer has
// nothing to do, also where it is asked to.
func TestSecondaryAppliesOnce(t *testing.T) {
	a, b := pairInSync(t, testConfig{quiet: true})
	a.demote()
	b.promote(false)
	a.inSync()
	l := startLoad(t, 4, func() *Volume { return b.Volume })
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				a.committer.Tick()
			}
		}
	})
	l.more(2000)
	close(stop)
	wg.Wait()
	l.end()
	identical(t, b, a)
}

// Segments that end exactly where the ring does leave no padding: a run of log
// that is sent must not go over the ring's end.
func TestCatchUpAcrossTheRingsEnd(t *testing.T) {
	t.Parallel()
	a, b := newPair(t, testConfig{opt: Options{OnPeerLoss: Alone}, quiet: true})
	a.promote(false)
	a.inSync()
	b.inSync()
	segment := make([]byte, 4096-64-16)
	for range 2<<20/4096 - 50 {
		commit(t, a, 0, segment)
	}
	b.wire.link.set(true)
	for range 100 {
		commit(t, a, 8192, segment)
	}
	b.wire.link.set(false)
	b.inSync()
	if a.Status().Committed%(2<<20) != 50*4096 {
		t.Fatalf("the log ends at %d: segments do not end where the ring does", a.Status().Committed)
	}
	identical(t, a, b)
}

// Each restart and failover adds an epoch. A long history still crosses the
// wire.
func TestLongHistory(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}, quiet: true})
	fill(t, a, 12, 20, 5000)
	quiesce(t, a, b)
	b.close()
	a.until("alone", func(s Status) bool { return s.Peer == "lost" && !a.pair.Required() })
	a.close()
	for _, n := range []*testNode{a, b} {
		n.editState(func(m *metadata) {
			last := m.State.History.Last()
			m.State.History = nil
			for i := range 400 {
				e := last
				e.Epoch.Counter = uint64(i + 1)
				e.Start = LSN(i)
				m.State.History = append(m.State.History, e)
			}
			last.Epoch.Counter = 1000
			last.Start = n.endOnDisk
			m.State.History = append(m.State.History, last)
		})
	}
	a.open()
	b.open()
	a.inSync()
	b.inSync()
	identical(t, a, b)
}
