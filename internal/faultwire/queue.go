package faultwire

import "time"

// delayCap is how many packets a direction can delay at once. More are lost
// and counted, as on a wire whose buffers are full.
const delayCap = 1 << 14

// delayedPacket is a packet with the time at which it goes on.
type delayedPacket struct {
	buf   []byte
	fault Fault
	due   time.Time
}

// delayLine is a first-in-first-out queue whose slots keep their buffers: once
// it has grown to what a plan needs, it allocates no more.
type delayLine struct {
	mtu   int
	slots []delayedPacket // a ring; its length is a power of two
	first int
	count int
}

func (q *delayLine) empty() bool { return q.count == 0 }

// head is the oldest packet, valid until pop.
func (q *delayLine) head() *delayedPacket { return &q.slots[q.first] }

func (q *delayLine) pop() {
	q.first = (q.first + 1) & (len(q.slots) - 1)
	q.count--
}

// push copies the packet; it is false when the line is full.
func (q *delayLine) push(p []byte, f Fault, due time.Time) bool {
	if q.count == len(q.slots) {
		if q.count == delayCap {
			return false
		}
		q.grow()
	}
	s := &q.slots[(q.first+q.count)&(len(q.slots)-1)]
	if s.buf == nil {
		s.buf = make([]byte, 0, q.mtu)
	}
	s.buf, s.fault, s.due = append(s.buf[:0], p...), f, due
	q.count++
	return true
}

func (q *delayLine) grow() {
	grown := make([]delayedPacket, max(2*len(q.slots), 64))
	n := copy(grown, q.slots[q.first:])
	copy(grown[n:], q.slots[:q.first])
	q.slots, q.first = grown, 0
}

// clear forgets all packets and says how many.
func (q *delayLine) clear() int {
	n := q.count
	q.first, q.count = 0, 0
	return n
}

// captureRing keeps copies of the newest packets.
type captureRing struct {
	mtu   int
	slots [][]byte
	next  int
	full  bool
}

func (r *captureRing) resize(n int) {
	*r = captureRing{mtu: r.mtu, slots: make([][]byte, n)}
	arena := make([]byte, n*r.mtu)
	for i := range r.slots {
		r.slots[i] = arena[i*r.mtu : i*r.mtu : (i+1)*r.mtu]
	}
}

func (r *captureRing) add(p []byte) {
	if len(r.slots) == 0 {
		return
	}
	r.slots[r.next] = append(r.slots[r.next][:0], p...)
	if r.next++; r.next == len(r.slots) {
		r.next, r.full = 0, true
	}
}

// each calls f with the packets, oldest first; f must not keep them.
func (r *captureRing) each(f func([]byte)) {
	if r.full {
		for _, p := range r.slots[r.next:] {
			f(p)
		}
	}
	for _, p := range r.slots[:r.next] {
		f(p)
	}
}
