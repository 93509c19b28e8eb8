package journal

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// fakeSink is a peer, a data area and a checkpointer in one: it acknowledges
// late and in jumps, and checks what it is given.
type fakeSink struct {
	log  *Log
	wake chan struct{}
	rng  *rand.Rand // the driver's

	driving atomic.Int32 // goroutines inside
	acked   LSN
	applied atomic.Uint64
	stuck   atomic.Bool // nothing is acknowledged
	fail    error       // of Apply, once applied is at least failAt
	failAt  LSN
	chain   uint32
	content map[int64][]byte // last value by offset
	problem atomic.Pointer[string]
}

func newFakeSink(log *Log, seed uint64) *fakeSink {
	s := &fakeSink{log: log, wake: make(chan struct{}, 1), rng: rand.New(rand.NewPCG(seed, 9)), content: map[int64][]byte{}, acked: log.End()}
	s.applied.Store(uint64(log.End()))
	return s
}

func (s *fakeSink) complain(format string, args ...any) {
	p := fmt.Sprintf(format, args...)
	s.problem.CompareAndSwap(nil, &p)
}

func (s *fakeSink) enter() {
	if s.driving.Add(1) != 1 {
		s.complain("two drivers at once")
	}
}

func (s *fakeSink) Progress() (acked, limit LSN) {
	s.enter()
	defer s.driving.Add(-1)
	if !s.stuck.Load() && s.rng.IntN(3) > 0 {
		// Acknowledgements are at segments' ends, and some are behind.
		var h Header
		for n := s.rng.IntN(4); n >= 0 && s.acked < s.log.End(); n-- {
			if err := s.log.Ring().Header(s.acked, &h); err != nil {
				s.complain("the log below its end: %v", err)
				break
			}
			s.acked = h.End()
		}
	}
	return s.acked, LSN(s.applied.Load()) + LSN(s.log.Ring().Size())
}

func (s *fakeSink) Failed(err error) { s.complain("not durable: %v", err) }

func (s *fakeSink) Apply(upTo LSN) error {
	s.enter()
	defer s.driving.Add(-1)
	if s.fail != nil && upTo >= s.failAt {
		return s.fail
	}
	var h Header
	for at := LSN(s.applied.Load()); at < upTo; at = h.End() {
		body, err := s.log.Ring().Segment(at, &h)
		if err != nil || h.Prev != s.chain || h.End() > upTo || h.Acked > at {
			s.complain("segment at %d: %v, chained to %08x behind %08x", at, err, h.Prev, s.chain)
			return errors.New("bad segment")
		}
		s.chain = h.CRC
		if h.Pad {
			continue
		}
		txs, err := readBack(body)
		if err != nil || len(txs) != int(h.Count) {
			s.complain("segment at %d: %d transactions, not %d: %v", at, len(txs), h.Count, err)
		}
		for _, tx := range txs {
			for _, w := range tx {
				s.content[w.Off] = w.Data
			}
		}
	}
	s.applied.Store(uint64(upTo))
	return nil
}

func (s *fakeSink) Wait(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-s.wake:
	case <-t.C:
	}
}

func (s *fakeSink) Wake() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func openCommitter(t testing.TB, log *Log, s Sink, poll time.Duration) *Committer {
	t.Helper()
	c := NewCommitter(log, s, poll, errors.New("not open"))
	if err := c.Acquire(context.Background()); err != nil {
		t.Fatal(err)
	}
	c.Open(log.End(), log.End())
	c.Release()
	return c
}

// TestCommitter has many goroutines commit into a small ring, some of which
// give up at random moments, while others take the role for themselves. Each
// transaction carries the goroutine's number and a counter in every one of its
// writes, and its buffers are changed as soon as Commit has returned.
func TestCommitter(t *testing.T) {
	const workers, size = 12, 256 * Align
	each := 600
	if testing.Short() {
		each = 100
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	log := newTestLog(t, size, 640)
	sink := newFakeSink(log, seed)
	c := openCommitter(t, log, sink, 20*time.Microsecond)
	var committed, withdrawn, unknownOutcome, exclusive atomic.Int64
	reached := func() bool {
		return committed.Load() > 0 && withdrawn.Load()+unknownOutcome.Load() > 0 && exclusive.Load() > 0
	}
	last := make([]uint64, workers)  // acknowledged
	maybe := make([]uint64, workers) // highest that may be there
	var wg sync.WaitGroup
	for g := range workers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(g)))
			var end LSN
			bufs := make([][]byte, 4)
			for i := range bufs {
				bufs[i] = make([]byte, 8+rng.IntN(500))
			}
			// On a busy machine the role may be taken late.
			for n := uint64(1); n <= uint64(each) || n <= uint64(100*each) && !reached(); n++ {
				r := NewRequest()
				for i, b := range bufs[:1+rng.IntN(4)] {
					binary.LittleEndian.PutUint64(b, n)
					r.Add(int64(g*10+i), b)
				}
				if r.size < 1 {
					t.Error("empty")
				}
				ctx, cancel := context.Background(), context.CancelFunc(func() {})
				if rng.IntN(3) == 0 {
					ctx, cancel = context.WithTimeout(ctx, time.Duration(rng.IntN(300))*time.Microsecond)
				}
				lsn, err := c.Commit(ctx, r)
				cancel()
				for _, b := range bufs {
					clear(b) // nobody may read them any more
				}
				switch {
				case err == nil:
					committed.Add(1)
					if lsn <= end || lsn > LSN(sink.applied.Load()) {
						t.Errorf("acknowledged at %d, after %d, visible up to %d", lsn, end, sink.applied.Load())
					}
					end, last[g], maybe[g] = lsn, n, n
				case errors.Is(err, ErrOutcomeUnknown):
					unknownOutcome.Add(1)
					maybe[g] = n
				case errors.Is(err, context.DeadlineExceeded):
					withdrawn.Add(1)
				default:
					t.Error(err)
				}
			}
		})
	}
	stop := make(chan struct{})
	var helpers sync.WaitGroup
	helpers.Go(func() {
		rng := rand.New(rand.NewPCG(seed, 1000))
		for {
			select {
			case <-stop:
				return
			default:
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rng.IntN(2000))*time.Microsecond)
			if err := c.Acquire(ctx); err == nil {
				sink.enter()
				end := log.End()
				for range 100 {
					if log.End() != end {
						sink.complain("appended while the role was taken")
					}
				}
				sink.driving.Add(-1)
				exclusive.Add(1)
				c.Release()
			}
			cancel()
			c.Tick()
		}
	})
	wg.Wait()
	close(stop)
	helpers.Wait()
	// What nobody waits for any more is the owner's to finish.
	for deadline := time.Now().Add(10 * time.Second); LSN(sink.applied.Load()) < log.End(); c.Tick() {
		if time.Now().After(deadline) {
			t.Fatalf("applied up to %d of %d", sink.applied.Load(), log.End())
		}
	}
	if p := sink.problem.Load(); p != nil {
		t.Error(*p)
	}
	for g := range workers {
		p := sink.content[int64(g*10)]
		if p == nil {
			continue
		}
		if n := binary.LittleEndian.Uint64(p); n < last[g] || n > maybe[g] {
			t.Errorf("goroutine %d: transaction %d is the last that is there, %d was acknowledged, %d may be", g, n, last[g], maybe[g])
		}
	}
	if n := c.Waiting(); n != 0 {
		t.Errorf("%d transactions wait", n)
	}
	t.Logf("%d committed, %d withdrawn, %d of unknown outcome, role taken %d times, %d laps", committed.Load(), withdrawn.Load(), unknownOutcome.Load(), exclusive.Load(), log.End()/size)
	if !reached() {
		t.Error("the test did not reach what it is for")
	}
}

// TestCommitterNeverLosesAWakeUp: callers without a deadline, a sink that
// sleeps at once and whose every wait would be long.
func TestCommitterNeverLosesAWakeUp(t *testing.T) {
	log := newTestLog(t, 1024*Align, 0)
	sink := newFakeSink(log, 3)
	c := openCommitter(t, log, sink, 0)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 300 {
				r := NewRequest()
				r.Add(int64(g), []byte{byte(i), 1})
				if _, err := c.Commit(context.Background(), r); err != nil {
					t.Error(err)
				}
			}
		})
	}
	finished := make(chan struct{})
	go func() {
		wg.Wait()
		close(finished)
	}()
	select {
	case <-finished:
	case <-time.After(60 * time.Second):
		t.Fatal("a caller waits for ever")
	}
	if p := sink.problem.Load(); p != nil {
		t.Error(*p)
	}
}

// TestCommitterBuffersAfterReturn: the acknowledgement never comes, the caller
// gives up, and gets its buffer back: what is in the log is what it held.
func TestCommitterBuffersAfterReturn(t *testing.T) {
	log := newTestLog(t, 1024*Align, 0)
	sink := newFakeSink(log, 4)
	sink.stuck.Store(true)
	c := openCommitter(t, log, sink, 0)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Millisecond)
	defer cancel()
	p := bytes.Repeat([]byte("before"), 1000)
	r := NewRequest()
	r.Add(0, p)
	lsn, err := c.Commit(ctx, r)
	if !errors.Is(err, ErrOutcomeUnknown) || !errors.Is(err, context.DeadlineExceeded) || lsn != log.End() {
		t.Fatal(lsn, err)
	}
	copy(p, "after")
	sink.stuck.Store(false)
	for LSN(sink.applied.Load()) < lsn {
		c.Tick()
	}
	if got := sink.content[0]; !bytes.HasPrefix(got, []byte("before")) {
		t.Fatalf("%q", got[:10])
	}
}

// TestCommitterGathers: while two segments wait for acknowledgement, short
// transactions gather for the next, and a long one does not wait.
func TestCommitterGathers(t *testing.T) {
	log := newTestLog(t, 8192*Align, 0)
	sink := newFakeSink(log, 9)
	sink.stuck.Store(true)
	c := openCommitter(t, log, sink, 0)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer sink.stuck.Store(false)
	commit := func(n int) {
		wg.Go(func() {
			r := NewRequest()
			r.Add(0, make([]byte, n))
			if _, err := c.Commit(context.Background(), r); err != nil {
				t.Error(err)
			}
		})
	}
	until := func(what string, f func() bool) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); !f(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal(what)
			}
		}
	}
	for n := range 2 {
		commit(8)
		until("a segment is not written", func() bool { return c.Waiting() == n+1 })
	}
	size := int64(recordSize(8))
	end := log.End()
	for range 30 {
		commit(8)
	}
	until("they are not queued", func() bool { return c.pending.Load() == 30*size })
	if log.End() != end {
		t.Fatal("a third segment was written")
	}
	commit(gather)
	until("a long one waits for others", func() bool { return c.Waiting() == 33 })
	if got, want := log.End()-end, LSN(roundUp(HeaderSize+30*int(size)+recordSize(gather))); got != want {
		t.Errorf("the queue took %d bytes of log, %d as one segment", got, want)
	}
}

// TestCommitterClose: what is queued is refused, what waits is unknown, or
// goes on waiting where the caller says so.
func TestCommitterClose(t *testing.T) {
	log := newTestLog(t, 1024*Align, 0)
	sink := newFakeSink(log, 5)
	sink.stuck.Store(true)
	c := openCommitter(t, log, sink, 0)
	results := make(chan error, 2)
	for g := range 2 {
		go func() {
			r := NewRequest()
			r.Add(int64(g), []byte("x"))
			_, err := c.Commit(context.Background(), r)
			results <- err
		}()
	}
	for deadline := time.Now().Add(10 * time.Second); c.Waiting() < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("they are not written")
		}
	}
	ctx := context.Background()
	refuse, cause := errors.New("refused"), errors.New("the cause")
	if err := c.Acquire(ctx); err != nil {
		t.Fatal(err)
	}
	c.Close(refuse, nil)
	if c.Waiting() != 2 {
		t.Error("they do not wait any more")
	}
	c.Close(refuse, cause)
	c.Release()
	for range 2 {
		if err := <-results; !errors.Is(err, ErrOutcomeUnknown) || !errors.Is(err, cause) {
			t.Error(err)
		}
	}
	r := NewRequest()
	r.Add(0, []byte("x"))
	if _, err := c.Commit(ctx, r); err != refuse {
		t.Error(err)
	}
	if err := c.Acquire(ctx); err != nil { // the role is free
		t.Fatal(err)
	}
	c.Release()
}

// TestCommitterEnd: after its last holder nobody gets the role, whether he has
// waited for it or comes later.
func TestCommitterEnd(t *testing.T) {
	log := newTestLog(t, 1024*Align, 0)
	sink := newFakeSink(log, 6)
	c := openCommitter(t, log, sink, 0)
	ctx, ended := context.Background(), errors.New("ended")
	if err := c.Acquire(ctx); err != nil {
		t.Fatal(err)
	}
	waiting := make(chan error, 2)
	for range 2 {
		go func() { waiting <- c.Acquire(ctx) }()
	}
	for c.claims.Load() < 2 {
		runtime.Gosched()
	}
	c.End(ended)
	for range 2 {
		if err := <-waiting; err != ended {
			t.Errorf("who has waited: %v", err)
		}
	}
	if err := c.Acquire(ctx); err != ended {
		t.Errorf("who comes later: %v", err)
	}
	sink.driving.Store(1) // whoever drives now complains
	c.Tick()
	r := NewRequest()
	r.Add(0, []byte("x"))
	if _, err := c.Commit(ctx, r); err != ended {
		t.Errorf("a transaction: %v", err)
	}
	if p := sink.problem.Load(); p != nil {
		t.Error(*p)
	}
}

func TestCommitterRefusesTooLarge(t *testing.T) {
	log := newTestLog(t, 1024*Align, 0)
	c := openCommitter(t, log, newFakeSink(log, 6), 0)
	most := log.MaxTransaction() - RecordHeaderSize
	for n, want := range map[int]error{most: nil, most + 1: ErrTooLarge} {
		r := NewRequest()
		r.Add(0, make([]byte, n))
		if _, err := c.Commit(context.Background(), r); !errors.Is(err, want) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

// TestCommitterApplyFails: the failure ends the committer; nobody is told that
// his transaction is there.
func TestCommitterApplyFails(t *testing.T) {
	log := newTestLog(t, 1024*Align, 0)
	sink := newFakeSink(log, 7)
	sink.fail = errors.New("poison")
	c := openCommitter(t, log, sink, 0)
	r := NewRequest()
	r.Add(0, []byte("x"))
	if _, err := c.Commit(context.Background(), r); !errors.Is(err, ErrOutcomeUnknown) || !errors.Is(err, sink.fail) {
		t.Error(err)
	}
	r = NewRequest()
	r.Add(0, []byte("x"))
	if _, err := c.Commit(context.Background(), r); err != sink.fail {
		t.Error(err)
	}
}
