package bench

import (
	"errors"
	"io"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// How a thread waits for its socket.
type waiting uint8

const (
	// sleeping blocks in recv, the fastest bare wait: with ppoll before it a
	// round trip in C took 1 to 11 % longer where both ends share a
	// processor, and the same where they do not.
	sleeping waiting = iota
	// polling asks again and again, with MSG_DONTWAIT.
	polling
	// parked blocks as sleeping does, and lets the Go scheduler know. With
	// several connections it must be this: a thread that the scheduler waits
	// for could wait for one at the other end that waits in the same way.
	parked
)

// A link carries messages over a connection. It is for one thread.
type link interface {
	// send sends all of p.
	send(p []byte) error
	// some receives at least one byte of a message, and nothing of the next
	// one unless messages have no bounds on the wire.
	some(p []byte) (int, error)
	socket() *rawLink
	close()
}

// full receives all of p.
func full(l link, p []byte) error {
	for len(p) > 0 {
		n, err := l.some(p)
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// rawLink is the socket and nothing else: the floor.
type rawLink struct {
	fd    int
	wait  waiting
	calls uint64 // system calls so far
}

var errNoAnswer = errors.New("the other end did not answer within " + setupTime.String())

var errSilent = errors.New("the other end has been silent for " + silentTime.String())

func (l *rawLink) socket() *rawLink { return l }
func (l *rawLink) close()           { unix.Close(l.fd) }

// interrupt makes calls of other threads fail.
func (l *rawLink) interrupt() { _ = unix.Shutdown(l.fd, unix.SHUT_RDWR) }

func (l *rawLink) send(p []byte) error {
	for len(p) > 0 {
		n, err := l.call(unix.SYS_SENDTO, uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), unix.MSG_NOSIGNAL)
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

func (l *rawLink) some(p []byte) (int, error) {
	n, err := l.call(unix.SYS_RECVFROM, uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), 0)
	if err == nil && n == 0 {
		return 0, io.ErrUnexpectedEOF
	}
	return n, err
}

// call makes a system call until it moves something.
//
//go:uintptrescapes
func (l *rawLink) call(trap, p, n, flags uintptr) (int, error) {
	if l.wait == polling {
		flags |= unix.MSG_DONTWAIT
	}
	// sendmsg and recvmsg have their flags in the place of the length.
	flags4 := flags
	if trap == unix.SYS_SENDMSG || trap == unix.SYS_RECVMSG {
		n, flags4 = flags, 0
	}
	var since time.Time
	for tries := 1; ; tries++ {
		l.calls++
		var r uintptr
		var errno syscall.Errno
		if l.wait == parked {
			r, _, errno = unix.Syscall6(trap, uintptr(l.fd), p, n, flags4, 0, 0)
		} else {
			r, _, errno = unix.RawSyscall6(trap, uintptr(l.fd), p, n, flags4, 0, 0)
		}
		switch {
		case errno == 0:
			return int(r), nil
		case errno == unix.EINTR:
		case errno == unix.EAGAIN && l.wait != polling:
			return 0, errNoAnswer // the socket has a limit
		case errno != unix.EAGAIN:
			return 0, os.NewSyscallError("send or receive", errno)
		case tries&(1<<20-1) == 0:
			if since.IsZero() {
				since = time.Now()
			} else if time.Since(since) > silentTime {
				return 0, errSilent
			}
		}
	}
}
