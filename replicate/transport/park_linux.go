package transport

import (
	"errors"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A parkingLot is where a goroutine waits for a descriptor that has nothing to
// say for long, or between the pieces of long segments. A thread that blocks in
// ppoll keeps Go's monitor thread awake, which looks dozens of times whether the
// processor should be taken from it: most of what an idle pair would cost. So
// such a wait parks the goroutine in Go's network poller instead. It costs more
// calls per wait, and the poller must hear nothing while the pair is busy (see
// tcpConn), so what the poller watches is an epoll instance of the descriptor's
// own, whose two members are armed for one event each by the one who parks, and
// disarmed by him where that event has not come.
type parkingLot struct {
	file   *os.File // of the epoll instance, in Go's poller
	raw    syscall.RawConn
	look   func(fd uintptr) bool // d.lot.ready, made once
	events [2]unix.EpollEvent
	got    uint8 // by look; of the one who is parked
	fd     int   // file's
	sock   int32
}

// newParkingLot makes one of the two descriptors, none of them armed.
func newParkingLot(sock, event int) (*parkingLot, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	l := &parkingLot{fd: fd, sock: int32(sock)}
	err = unix.SetNonblock(fd, true) // or Go's poller would not have it
	for _, member := range [...]int{sock, event} {
		if err == nil {
			err = unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, member, &unix.EpollEvent{Events: unix.EPOLLONESHOT, Fd: int32(member)})
		}
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	l.file = os.NewFile(uintptr(fd), "parking lot")
	l.look = l.ready
	if l.raw, err = l.file.SyscallConn(); err != nil {
		_ = l.file.Close()
		return nil, err
	}
	return l, nil
}

// ready collects what has happened.
func (l *parkingLot) ready(fd uintptr) bool {
	// It does not block: the scheduler need not know (see boottime).
	n, _, err := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, fd, uintptr(unsafe.Pointer(&l.events)), uintptr(len(l.events)), 0, 0, 0)
	if err != 0 {
		return true // whoever waits looks for himself
	}
	for _, e := range l.events[:n] {
		if e.Fd == l.sock {
			l.got |= gotSocket
		} else {
			l.got |= gotEvent
		}
	}
	return n > 0
}

// arm makes the poller hear the next event of a member.
func (l *parkingLot) arm(member int, events uint32) error {
	return unix.EpollCtl(l.fd, unix.EPOLL_CTL_MOD, member, &unix.EpollEvent{Events: events | unix.EPOLLONESHOT, Fd: int32(member)})
}

// park is sleep that keeps no thread. Where another goroutine is parked
// already, or the system lacks descriptors for it, it is sleep.
func (d *descriptor) park(events int16, ns int64) (got uint8, err error) {
	if !d.parked.CompareAndSwap(false, true) {
		return d.sleep(events, ns)
	}
	defer d.parked.Store(false)
	if d.lot == nil {
		if d.lot, err = newParkingLot(d.sock, d.event); err != nil {
			return d.sleep(events, ns)
		}
	}
	l := d.lot
	l.got = 0
	if err := l.file.SetReadDeadline(time.Now().Add(time.Duration(ns))); err != nil {
		return d.sleep(events, ns)
	}
	if err := errors.Join(l.arm(d.sock, uint32(events)), l.arm(d.event, unix.EPOLLIN)); err != nil {
		return 0, err
	}
	err = l.raw.Read(l.look)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = nil
	}
	// What has not happened must not be heard later, when nobody is parked.
	if l.got&gotSocket == 0 {
		err = errors.Join(err, l.arm(d.sock, 0))
	}
	if l.got&gotEvent == 0 {
		err = errors.Join(err, l.arm(d.event, 0))
	}
	return l.got, err
}
