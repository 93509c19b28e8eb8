package faultwire

import (
	"errors"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// reorderHold is how long a packet is held back where nothing follows that
	// could overtake it: less than TCP's shortest retransmission time (200 ms).
	reorderHold = 5 * time.Millisecond
	// yieldAfter is how many packets are relayed before other goroutines get a
	// turn. A relay that never waits would keep its processor for the
	// scheduler's 10 ms, and with it the other direction's acknowledgements.
	yieldAfter = 64
)

// Direction is one way of the wire.
//
// One goroutine, started by newDirection and ended by stop, reads the sender's
// device. Everything below mu is touched under mu only; a packet's whole way
// from the decision to the receiving kernel is under it, so that a change of
// plan falls between two packets.
type Direction struct {
	name    string
	in, out *port
	done    chan struct{} // closed when the goroutine has ended
	scratch []byte        // the packet being relayed; the goroutine's own

	mu      sync.Mutex
	plan    Plan
	rules   [faultCount]schedule
	active  []*schedule // rules that are on, delay apart, by precedence
	stats   Stats
	cut     bool
	stopped bool
	timed   bool // the goroutine has a deadline set
	held    heldPacket
	hold    time.Duration // how long held waits to be overtaken
	line    delayLine
	ring    captureRing
	readErr error // what ended the goroutine before stop
	waiters []*waiter
}

// heldPacket is a packet that others are to overtake.
type heldPacket struct {
	buf    []byte // capacity of a packet; empty when nothing is held
	data   bool   // it has payload
	behind int    // packets still to overtake it
	until  time.Time
}

func newDirection(name string, in, out *port, mtu int, seed uint64, index uint64) *Direction {
	d := &Direction{
		name:    name,
		in:      in,
		out:     out,
		done:    make(chan struct{}),
		scratch: make([]byte, mtu),
		held:    heldPacket{buf: make([]byte, 0, mtu)},
		hold:    reorderHold,
		line:    delayLine{mtu: mtu},
		ring:    captureRing{mtu: mtu},
	}
	for f := range faultCount {
		d.rules[f] = schedule{fault: f, rng: rand.New(rand.NewPCG(seed, index<<8|uint64(f)))}
	}
	go d.run()
	return d
}

// SetPlan replaces the plan from the next packet on. A packet held for
// reordering goes out; delayed ones keep their time.
func (d *Direction) SetPlan(p Plan) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.releaseHeld()
	d.plan = p
	d.active = d.active[:0]
	for f := range faultCount {
		d.rules[f].set(p.rule(f))
		if f != Delay && d.rules[f].active() {
			d.active = append(d.active, &d.rules[f])
		}
	}
}

// SetCut cuts the direction, with whatever is on its way, or heals it. The
// plan stays.
func (d *Direction) SetCut(cut bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cut = cut
	if !cut {
		return
	}
	if len(d.held.buf) > 0 {
		d.held.buf = d.held.buf[:0]
		d.stats.Cut++
	}
	d.stats.Cut += uint64(d.line.clear())
	d.notify()
}

// Stats returns the counters.
func (d *Direction) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stats
}

// Err is what ended the relay before the wire was closed; nil while it runs.
func (d *Direction) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.readErr
}

func (d *Direction) String() string { return d.name }

// stop ends the goroutine and waits for its end.
func (d *Direction) stop() {
	d.mu.Lock()
	d.stopped = true
	d.notify()
	err := d.in.file.SetReadDeadline(time.Unix(1, 0))
	d.mu.Unlock()
	if err == nil { // always: newPort has made sure that deadlines work
		<-d.done
	}
}

// run waits for packets in the netpoller: a goroutine that waits holds neither
// a thread nor a processor.
func (d *Direction) run() {
	defer close(d.done)
	drain := d.drain // one closure for the whole run
	for {
		err := d.in.raw.Read(drain)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if d.tick() {
				return
			}
		case err != nil:
			d.fail(err)
			return
		case d.ended():
			return
		default:
			runtime.Gosched()
		}
	}
}

// drain relays what the device holds. It returns false when the device is
// empty, which makes raw.Read wait for more, and true to get control back.
func (d *Direction) drain(uintptr) bool {
	for range yieldAfter {
		n, err := d.in.read(d.scratch[:cap(d.scratch)])
		switch {
		case err == unix.EAGAIN:
			return d.tick()
		case err != nil:
			d.fail(err)
			return true
		case n > 0:
			d.mu.Lock()
			d.relay(n)
			d.notify()
			d.mu.Unlock()
		}
	}
	return true
}

func (d *Direction) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.stopped {
		d.readErr = err
	}
	d.stopped = true
	d.notify()
}

func (d *Direction) ended() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stopped
}

// tick lets go what is due and sets the deadline of the wait that follows. It
// is true when the relay is to end; the deadline that stop has set then stays.
func (d *Direction) tick() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped {
		return true
	}
	next := d.release()
	d.notify()
	if next.IsZero() && !d.timed {
		return false
	}
	d.timed = !next.IsZero()
	if err := d.in.file.SetReadDeadline(next); err != nil {
		d.readErr, d.stopped = err, true
		d.notify()
	}
	return d.stopped
}

// release hands on the packets whose time has come and returns when the next
// one's comes, zero for never.
func (d *Direction) release() (next time.Time) {
	if len(d.held.buf) == 0 && d.line.empty() {
		return next
	}
	now := time.Now()
	if len(d.held.buf) > 0 {
		if now.Before(d.held.until) {
			next = d.held.until
		} else {
			d.releaseHeld()
		}
	}
	for !d.line.empty() {
		s := d.line.head()
		if now.Before(s.due) {
			if next.IsZero() || s.due.Before(next) {
				next = s.due
			}
			break
		}
		d.deliver(s.buf, s.fault)
		d.line.pop()
	}
	return next
}

// relay decides over the packet in scratch and carries the decision out.
func (d *Direction) relay(n int) {
	p := d.scratch[:n]
	d.stats.Packets++
	d.stats.Bytes += uint64(n)
	l, isTCP := locate(p)
	data := isTCP && l.end > l.payload
	if data {
		d.stats.Data++
	}
	d.ring.add(p)
	if d.cut {
		d.stats.Cut++
		return
	}
	if !d.line.empty() {
		d.release()
	}
	if !isTCP {
		d.deliver(p, noFault)
		return
	}
	if d.strike(p, l, data) {
		return
	}
	if len(d.held.buf) > 0 {
		if d.held.behind--; d.held.behind <= 0 {
			d.releaseHeld()
		}
	}
}

// strike lets the packet suffer the first fault that is due and can be done,
// and sends it on. It is true when the packet is the one now held back.
func (d *Direction) strike(p []byte, l layout, data bool) (held bool) {
	var chosen *schedule
	for _, s := range d.active {
		// Every rule counts every packet, whichever is chosen.
		if !data && !s.rule.Any || !s.due() || chosen != nil {
			continue
		}
		switch {
		case s.fault == Reorder && len(d.held.buf) > 0:
			continue
		case s.fault.corrupts():
			q, ok := corrupt(s.fault, p, l, &d.plan, s.rng)
			if !ok {
				continue
			}
			p = q
		}
		chosen = s
		s.took()
	}
	if chosen == nil {
		d.forward(p, noFault, data)
		return false
	}
	switch chosen.fault {
	case Drop:
		d.stats.Dropped++
	case Reorder:
		// The packet's buffer is kept and the empty one takes its place.
		d.scratch, d.held.buf = d.held.buf[:cap(d.held.buf)], p
		d.held.data = data
		d.held.behind = max(d.plan.ReorderBy, 1)
		d.held.until = time.Now().Add(d.hold)
		return true
	case Duplicate:
		d.forward(p, noFault, data)
		d.forward(p, Duplicate, data)
	default:
		d.forward(p, chosen.fault, data)
	}
	return false
}

// releaseHeld sends the held packet on.
func (d *Direction) releaseHeld() {
	if len(d.held.buf) > 0 {
		d.forward(d.held.buf, Reorder, d.held.data)
		d.held.buf = d.held.buf[:0]
	}
}

// forward sends a packet through the delay line or past it.
func (d *Direction) forward(p []byte, f Fault, data bool) {
	if s := &d.rules[Delay]; s.active() && (data || s.rule.Any) && s.due() {
		s.took()
		if !d.line.push(p, f, time.Now().Add(d.plan.DelayFor)) {
			d.stats.Overflow++
			return
		}
		d.stats.Delayed++
		return
	}
	d.deliver(p, f)
}

// deliver hands a packet to the receiving kernel and counts its fault.
func (d *Direction) deliver(p []byte, f Fault) {
	if d.stopped {
		return // the descriptor may be closed, its number another file's
	}
	if d.out.write(p) != nil {
		d.stats.Refused++
		return
	}
	d.stats.Delivered++
	if c := d.stats.counter(f); c != nil {
		*c++
	}
}
