package faultwire

import (
	"context"
	"slices"
)

// waiter waits for a direction's counters to meet a condition.
type waiter struct {
	cond func(Stats) bool
	done chan error // takes one value
}

// Await returns nil as soon as cond holds for the counters, at once where it
// already does. It is called after every packet, so it is short and calls
// nothing of the wire. Await ends with the context's cause, or with ErrClosed.
func (d *Direction) Await(ctx context.Context, cond func(Stats) bool) error {
	w := &waiter{cond: cond, done: make(chan error, 1)}
	d.mu.Lock()
	d.waiters = append(d.waiters, w)
	d.notify()
	d.mu.Unlock()
	select {
	case err := <-w.done:
		return err
	case <-ctx.Done():
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.waiters = slices.DeleteFunc(d.waiters, func(o *waiter) bool { return o == w })
	return context.Cause(ctx)
}

// notify ends the waits that are over. It is called under mu, after whatever
// changes a counter or ends the relay.
func (d *Direction) notify() {
	if len(d.waiters) == 0 {
		return
	}
	d.waiters = slices.DeleteFunc(d.waiters, func(w *waiter) bool {
		switch {
		case w.cond(d.stats):
			w.done <- nil
		case d.stopped:
			w.done <- ErrClosed
		default:
			return false
		}
		return true
	})
}
