package transport

import (
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// descriptor owns a connection's socket and the eventfd that interrupts its
// Wait. Both numbers are closed together, by whoever leaves last after close:
// a number in use is never closed, so it can never name a stranger's file.
//
// Every use is bracketed:
//
//	if !d.acquire() { return net.ErrClosed }
//	... d.sock, d.event ...
//	d.release()
type descriptor struct {
	sock  int
	event int

	// state is the number of users, and descriptorClosed once close was
	// called; from then on the number only falls.
	state atomic.Uint64
	// woken is set from a wake until a waiter takes it.
	woken atomic.Bool
	// waiters counts those who may sleep. A wake sets woken, then reads
	// waiters; a waiter counts itself, then reads woken: one sees the other.
	waiters atomic.Int32

	// quiet: the last wait outlasted parkAfter, so the next one parks at once.
	quiet atomic.Bool
	// parked is held by the one waiter that uses lot, made by the first.
	parked atomic.Bool
	lot    *parkingLot
}

const descriptorClosed = 1 << 63

// newDescriptor takes over sock, on failure too.
func newDescriptor(sock int) (*descriptor, error) {
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		_ = unix.Close(sock)
		return nil, err
	}
	return &descriptor{sock: sock, event: event}, nil
}

func (d *descriptor) acquire() bool {
	for {
		s := d.state.Load()
		if s&descriptorClosed != 0 {
			return false
		}
		if d.state.CompareAndSwap(s, s+1) {
			return true
		}
	}
}

func (d *descriptor) release() {
	if d.state.Add(^uint64(0)) == descriptorClosed {
		// Errors of close(2) cannot be acted upon: the numbers are gone.
		_ = unix.Close(d.sock)
		_ = unix.Close(d.event)
		if d.lot != nil {
			_ = d.lot.file.Close()
		}
	}
}

func (d *descriptor) closed() bool { return d.state.Load()&descriptorClosed != 0 }

// close lets no new user in and wakes those who sleep. It does not wait.
func (d *descriptor) close() error {
	for {
		s := d.state.Load()
		if s&descriptorClosed != 0 {
			return net.ErrClosed
		}
		// Closed and one user more, this one, in a single step.
		if d.state.CompareAndSwap(s, (s+1)|descriptorClosed) {
			break
		}
	}
	// A connection that the peer already reset answers ENOTCONN: as good.
	_ = unix.Shutdown(d.sock, unix.SHUT_RDWR)
	d.signal()
	d.release()
	return nil
}

// wake makes one waiter of now, or the next one, return. Without a waiter it
// costs two atomic operations and no system call.
func (d *descriptor) wake() {
	if d.woken.Swap(true) || d.waiters.Load() == 0 {
		return
	}
	if d.acquire() {
		d.signal()
		d.release()
	}
}

// signal makes the eventfd readable. It never blocks: the only failure is a
// full counter, which is readable.
func (d *descriptor) signal() {
	one := [8]byte{0: 1, 7: 1} // not 0 and not all ones, in either byte order
	_, _ = unix.Write(d.event, one[:])
}

// parkAfter is how long a wait sleeps in the caller's thread before it parks, in
// nanoseconds: longer than a tick of the kernel's clock, since a shorter timeout
// makes each sleep set the processor's timer, which in a virtual machine costs
// more than the sleep's other work.
const parkAfter = int64(10 * time.Millisecond)

// wait sleeps until the socket has one of events, until a wake, a close, or
// for at most ns nanoseconds. Spurious returns are allowed: a wake that found
// its waiter gone already leaves the eventfd readable for the next. park: it
// keeps no thread.
func (d *descriptor) wait(events int16, ns int64, park bool) error {
	d.waiters.Add(1)
	defer d.waiters.Add(-1)
	if d.woken.Swap(false) {
		return nil
	}
	var got uint8
	var err error
	if park {
		got, err = d.park(events, ns)
	} else if d.quiet.Load() && ns > parkAfter {
		begin := time.Now()
		got, err = d.park(events, ns)
		d.quiet.Store(int64(time.Since(begin)) > parkAfter)
	} else if got, err = d.sleep(events, min(ns, parkAfter)); got == 0 && err == nil && ns > parkAfter {
		d.quiet.Store(true)
		got, err = d.park(events, ns-parkAfter)
	}
	if err != nil {
		return err
	}
	// After a close the eventfd stays readable: each waiter must see it.
	if got&gotEvent != 0 && !d.closed() {
		var count [8]byte
		_, _ = unix.Read(d.event, count[:])
	}
	// Whoever woke did so before this line; the caller looks after it. A
	// swap, not a store, so that it also sees what the waker wrote before.
	d.woken.Swap(false)
	return nil
}

// What ended a sleep; neither: its time was over.
const (
	gotSocket = 1 << iota
	gotEvent
)

// sleep blocks in the calling thread: the shortest way from packet to
// goroutine.
func (d *descriptor) sleep(events int16, ns int64) (got uint8, err error) {
	fds := [2]unix.PollFd{
		{Fd: int32(d.sock), Events: events},
		{Fd: int32(d.event), Events: unix.POLLIN},
	}
	left := unix.NsecToTimespec(max(ns, 0))
	for {
		// ppoll(2) itself subtracts the time slept from left, so an
		// interrupted call goes on for the rest.
		_, err := unix.Ppoll(fds[:], &left, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, err
		}
		break
	}
	if fds[0].Revents != 0 {
		got |= gotSocket
	}
	if fds[1].Revents != 0 {
		got |= gotEvent
	}
	return got, nil
}
