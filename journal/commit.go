package journal

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Sink is where a committed segment goes from the journal.
type Sink interface {
	// Progress sends what was appended and takes acknowledgements in,
	// without blocking. acked is what all required nodes hold; the log may
	// be written below limit.
	Progress() (acked, limit LSN)
	// Apply makes the log visible up to a position. An error ends the
	// committer.
	Apply(upTo LSN) error
	// Failed: a segment could not be made durable. The committer has ended;
	// only a new recovery may begin again.
	Failed(err error)
	// Wait returns when Progress may have something, or after d, or after a
	// Wake, also one that came before.
	Wait(d time.Duration)
	Wake()
}

// Committer is group commit. Callers enqueue transactions; one of them at a
// time is the driver and does everything for all of them:
//
//	append all that is queued as one segment, one fence
//	send it, take acknowledgements in (Sink.Progress)
//	make visible what is acknowledged (Sink.Apply), complete its callers
//	no progress: poll for a bounded time, then sleep (Sink.Wait)
//
// until its own transaction is done; then it hands the role to another caller
// that still waits. So a lone committer changes neither goroutine nor thread,
// and under load each caller is woken once.
//
// Short transactions gather while two segments wait for acknowledgement: one
// is on the wire while the other is being made durable, and more of them would
// only be shorter. Callers that were woken run before the next segment is
// made, so that what they bring comes along.
//
// Invariants:
//   - At most one driver. The log, the sink's sending side and applying are
//     the driver's alone; no lock guards them.
//   - Where a transaction is queued or waits, there is a driver, or the role
//     is on its way to one, or the owner's Tick will take it.
//   - A caller's buffers are read only while its request is taken.
//   - Transactions complete in LSN order, after they are visible.
type Committer struct {
	log  *Log
	sink Sink
	poll time.Duration

	sleeping atomic.Bool  // the driver is in Sink.Wait: Wake it
	pending  atomic.Int64 // bytes of queued requests
	claims   atomic.Int32 // goroutines in Acquire

	mu      sync.Mutex
	driving bool
	queue   []*Request // not written, in order of arrival
	waiting []*Request // written, in LSN order
	claim   []chan struct{}
	closed  error // why no transaction is taken
	ended   error // why nobody gets the role any more

	// The driver's.
	batch          []*Request
	woken          bool // callers were, and may not have run yet
	singly         int  // requests that are written one by one, since memory of one of them cannot be read
	acked, applied LSN
	limit          LSN
	latest         LSN // where the latest segment, or the padding before it, starts
}

const (
	maxBatch = 256 << 10 // bytes of records that one segment gathers
	gather   = 32 << 10  // bytes that do not wait for more
	nap      = 5 * time.Millisecond
	// With more log than this on its way, the answer is not worth polling for.
	pollBelow = 128 << 10
)

// NewCommitter is closed with err until Open. poll is how long the driver
// polls before it sleeps.
func NewCommitter(log *Log, sink Sink, poll time.Duration, err error) *Committer {
	return &Committer{log: log, sink: sink, poll: poll, closed: err}
}

// Commit makes r durable on every required node and visible, and returns the
// LSN after it. On an error other than ErrOutcomeUnknown nothing of it will
// ever be visible. r belongs to the committer from now on.
func (c *Committer) Commit(ctx context.Context, r *Request) (LSN, error) {
	r.gen.Add(1) // no handle is good any more, whatever comes of it
	if r.size > c.log.MaxTransaction() {
		n := r.size
		r.Free()
		return 0, fmt.Errorf("%w: %d bytes with its record headers, at most %d here; split it or use a larger journal", ErrTooLarge, n, c.log.MaxTransaction())
	}
	c.mu.Lock()
	if c.closed != nil {
		err := c.closed
		c.mu.Unlock()
		r.Free()
		return 0, err
	}
	c.queue = append(c.queue, r)
	c.pending.Add(int64(r.size))
	if c.driving {
		c.mu.Unlock()
		if c.sleeping.Load() {
			c.sink.Wake()
		}
		return c.park(ctx, r)
	}
	c.driving = true
	r.driver = true
	c.mu.Unlock()
	return c.drive(ctx, r)
}

// park waits until r is done or has the role.
func (c *Committer) park(ctx context.Context, r *Request) (LSN, error) {
	if done := ctx.Done(); done == nil {
		<-r.wake // a select would be a tenth of all that 64 committers do
	} else {
		select {
		case <-r.wake:
		case <-done:
			if gone, end, err := c.withdraw(ctx, r); gone {
				return end, err
			}
		}
	}
	if r.driver {
		runtime.Gosched() // to those who were woken before
		return c.drive(ctx, r)
	}
	return finish(r)
}

// withdraw ends the wait of a parked caller. gone is false where r has been
// woken meanwhile: its wake-up is then consumed.
func (c *Committer) withdraw(ctx context.Context, r *Request) (gone bool, end LSN, err error) {
	c.mu.Lock()
	if r.driver || r.state == done {
		c.mu.Unlock()
		<-r.wake
		return false, 0, nil
	}
	if r.state == taken {
		// The driver is reading the caller's buffers. It will not be long,
		// and the caller may not have them back before.
		r.leaving = true
		c.mu.Unlock()
		<-r.wake
		return true, r.end, unknown(ctx.Err())
	}
	defer c.mu.Unlock()
	if r.state == queued {
		c.dequeue(r)
		r.Free()
		return true, 0, ctx.Err()
	}
	r.state = abandoned
	return true, r.end, unknown(ctx.Err())
}

func (c *Committer) dequeue(r *Request) {
	c.queue = slices.DeleteFunc(c.queue, func(q *Request) bool { return q == r })
	c.pending.Add(-int64(r.size))
}

func unknown(cause error) error { return fmt.Errorf("%w (%w)", ErrOutcomeUnknown, cause) }

func finish(r *Request) (LSN, error) {
	end, err := r.end, r.err
	r.Free()
	return end, err
}

// drive is the driver's loop, until r is done.
func (c *Committer) drive(ctx context.Context, r *Request) (LSN, error) {
	var idle time.Time
	for spins := 0; ; {
		moved := c.step()
		if r.state == done {
			c.release(r)
			return finish(r)
		}
		if c.claims.Load() > 0 {
			c.release(r)
			return c.park(ctx, r)
		}
		if err := ctx.Err(); err != nil {
			return c.leave(r, err)
		}
		if moved {
			spins = 0
			if c.woken {
				c.woken = false
				runtime.Gosched()
			}
			continue
		}
		switch spins++; {
		case c.poll <= 0 || c.log.End()-c.acked > pollBelow:
			c.sleep(nap)
		case spins == 1:
			idle = time.Now()
		case time.Since(idle) >= c.poll:
			c.sleep(nap)
		case spins%8 == 0:
			runtime.Gosched()
		}
	}
}

// leave gives the driver's own transaction up, and the role.
func (c *Committer) leave(r *Request, cause error) (LSN, error) {
	c.mu.Lock()
	if r.state == queued {
		c.dequeue(r)
		c.mu.Unlock()
		c.release(nil)
		r.Free()
		return 0, cause
	}
	r.state = abandoned
	end := r.end
	c.mu.Unlock()
	c.release(nil)
	return end, unknown(cause)
}

// sleep blocks until there may be progress. sleeping is set before the queue
// is looked at for the last time, and a caller looks at it after it enqueued:
// one of the two sees the other.
func (c *Committer) sleep(d time.Duration) {
	c.sleeping.Store(true)
	if !c.canAppend() && c.claims.Load() == 0 {
		c.sink.Wait(d)
	}
	c.sleeping.Store(false)
}

// due reports whether what is queued should be written now.
func (c *Committer) due() bool {
	n := c.pending.Load()
	return n >= gather || n > 0 && c.acked >= c.latest
}

// canAppend reports whether the oldest queued transaction fits into the ring.
func (c *Committer) canAppend() bool {
	if !c.due() {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.queue) > 0 && c.fits(c.queue[0].size)
}

func (c *Committer) fits(size int) bool { return c.log.End()+c.log.room(size) <= c.limit }

// step does one round of the driver's work and reports whether anything moved.
func (c *Committer) step() (moved bool) {
	if c.due() && c.append() {
		moved = true
	}
	acked, limit := c.sink.Progress()
	c.limit = limit
	c.acked = max(c.acked, acked)
	if c.acked > c.applied {
		if err := c.sink.Apply(c.acked); err != nil {
			c.Close(err, err)
			return false // nothing moves any more
		}
		c.applied = c.acked
		c.complete()
		moved = true
	}
	return moved
}

// append writes one segment of what is queued and fits.
func (c *Committer) append() bool {
	c.mu.Lock()
	size := 0
	c.batch = c.batch[:0]
	for _, r := range c.queue {
		if len(c.batch) > 0 && size+r.size > min(maxBatch, c.log.MaxTransaction()) || !c.fits(size+r.size) {
			break
		}
		size += r.size
		r.state = taken
		c.batch = append(c.batch, r)
		if c.singly > 0 {
			c.singly--
			break
		}
	}
	c.queue = slices.Delete(c.queue, 0, len(c.batch))
	c.pending.Add(-int64(size))
	c.mu.Unlock()
	if len(c.batch) == 0 {
		return false
	}
	before := c.latest
	c.latest = c.log.End()
	end, err := c.log.Append(c.batch, size, c.acked)
	if errors.Is(err, ErrUnreadable) {
		c.latest = before
		c.refuse(err)
		return true
	}
	c.mu.Lock()
	for _, r := range c.batch {
		r.end = end
		r.state = written
		clear(r.writes)
		if r.leaving {
			r.state = abandoned
			r.wake <- struct{}{}
		}
	}
	c.waiting = append(c.waiting, c.batch...)
	c.mu.Unlock()
	if err != nil {
		c.sink.Failed(err)
		c.Close(err, err)
	}
	return true
}

// refuse ends the transaction of the batch that cannot be read. Where it has company,
// they are queued again, to be written one by one.
func (c *Committer) refuse(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	again := len(c.batch) > 1
	n := 0
	for _, r := range c.batch {
		switch {
		case r.leaving:
			r.state = abandoned
			r.wake <- struct{}{}
		case again:
			r.state = queued
			c.batch[n] = r
			n++
			c.pending.Add(int64(r.size))
		default:
			c.settle(r, err)
		}
	}
	c.queue = slices.Insert(c.queue, 0, c.batch[:n]...)
	c.singly = max(c.singly, n)
}

// complete wakes the callers of what is visible.
func (c *Committer) complete() {
	c.mu.Lock()
	n := 0
	for ; n < len(c.waiting) && c.waiting[n].end <= c.applied; n++ {
		c.settle(c.waiting[n], nil)
	}
	c.waiting = slices.Delete(c.waiting, 0, n)
	c.mu.Unlock()
}

// settle ends one request. Its caller is parked, gone, or the driver, who
// looks for itself.
func (c *Committer) settle(r *Request, err error) {
	if r.state == abandoned {
		return
	}
	r.err = err
	r.state = done
	if !r.driver {
		c.woken = true
		r.wake <- struct{}{}
	}
}

// Release gives the role to a goroutine in Acquire, else to the caller that
// has longest to wait, else to nobody.
func (c *Committer) Release() { c.release(nil) }

// release is Release by the driver with request r.
func (c *Committer) release(r *Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r != nil {
		r.driver = false
	}
	if len(c.claim) > 0 {
		ch := c.claim[0]
		c.claim = c.claim[1:]
		c.claims.Add(-1)
		close(ch)
		return
	}
	if n := len(c.queue); n > 0 {
		c.grant(c.queue[n-1])
		return
	}
	for i := len(c.waiting) - 1; i >= 0; i-- {
		if c.waiting[i].state == written {
			c.grant(c.waiting[i])
			return
		}
	}
	c.driving = false
}

func (c *Committer) grant(r *Request) {
	r.driver = true
	r.wake <- struct{}{}
}

// Acquire takes the role for itself: nothing is appended, sent or applied by
// anyone else until Release. It has priority over transactions.
func (c *Committer) Acquire(ctx context.Context) error {
	c.mu.Lock()
	if err := c.ended; err != nil {
		c.mu.Unlock()
		return err
	}
	if !c.driving {
		c.driving = true
		c.mu.Unlock()
		c.limit = 0 // it may be lowered meanwhile: the next driver asks before it appends
		return nil
	}
	ch := make(chan struct{})
	c.claim = append(c.claim, ch)
	c.claims.Add(1)
	c.mu.Unlock()
	if c.sleeping.Load() {
		c.sink.Wake()
	}
	select {
	case <-ch:
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.ended == nil {
			c.limit = 0
		}
		return c.ended // nil, where the role came with it
	case <-ctx.Done():
	}
	c.mu.Lock()
	i := slices.Index(c.claim, ch)
	if i >= 0 {
		c.claim = slices.Delete(c.claim, i, i+1)
		c.claims.Add(-1)
	}
	ended := c.ended
	c.mu.Unlock()
	if i < 0 && ended == nil { // the role came at the same moment
		c.Release()
	}
	return ctx.Err()
}

// End is what the last holder of the role does in place of Release: nobody gets it
// any more. Transactions are refused with err, and so is Acquire; Tick does nothing.
func (c *Committer) End(err error) {
	c.Close(err, err)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = err
	c.claims.Add(-int32(len(c.claim)))
	for _, ch := range c.claim {
		close(ch)
	}
	c.claim = nil
}

// Tick drives for as long as something moves, if nobody does. What is left to do
// then, is the owner's to come back for.
func (c *Committer) Tick() {
	c.mu.Lock()
	if c.driving {
		c.mu.Unlock()
		return
	}
	c.driving = true
	c.mu.Unlock()
	for c.claims.Load() == 0 && c.step() {
	}
	c.Release()
}

// Open takes transactions from now on. acked and applied are where the log
// stands. The caller has the role.
func (c *Committer) Open(acked, applied LSN) {
	c.acked, c.applied = acked, applied
	c.latest = min(c.latest, c.log.End()) // it may have been dropped meanwhile
	_, c.limit = c.sink.Progress()
	c.mu.Lock()
	c.closed = nil
	c.mu.Unlock()
	c.complete()
}

// Close takes no more transactions: they get refuse. Queued ones get it too;
// those that wait for acknowledgements get ErrOutcomeUnknown with cause, or go
// on waiting where cause is nil. The caller has the role.
func (c *Committer) Close(refuse, cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = refuse
	for _, r := range c.queue {
		c.settle(r, refuse)
	}
	c.queue = c.queue[:0]
	c.pending.Store(0)
	if cause == nil {
		return
	}
	for _, r := range c.waiting {
		c.settle(r, unknown(cause))
	}
	c.waiting = c.waiting[:0]
}

// Drain drives until no transaction waits for acknowledgements. The caller has
// the role.
func (c *Committer) Drain(ctx context.Context) error {
	for c.Waiting() > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !c.step() {
			c.sink.Wait(nap)
		}
	}
	return nil
}

// Waiting is how many transactions wait for acknowledgements.
func (c *Committer) Waiting() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.waiting)
}
