package transport

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A tcpConn is a TCP socket that Go's network poller knows nothing about. A
// socket registered with epoll wakes an idle thread for every packet, also
// when somebody else is already polling it, and waking a sleeping thread is
// the dearest part of a small commit. So the socket is driven by system calls
// that never block, and Wait sleeps in ppoll in the caller's own thread before
// it parks.
type tcpConn struct {
	fd        *descriptor
	transport string
	local     netip.AddrPort
	remote    netip.AddrPort

	// failure is the first error of the connection. The kernel reports it
	// once, to reader or writer, and a plain end of file afterwards.
	failure atomic.Pointer[ConnError]

	// The writer's scratch, so that TryWrite allocates nothing.
	iov [maxIovecs]unix.Iovec
	msg unix.Msghdr
}

const (
	// maxIovecs bounds the buffers of one TryWrite; more are a prefix.
	maxIovecs = 64
	// A call that moves at most so many bytes is quick enough to be made
	// without telling the scheduler, which saves tens of nanoseconds per
	// poll; above it the garbage collector would wait for us. Writing is
	// slower than reading: it hashes.
	// The longest write is a piece of a long segment: a quarter of a
	// millisecond of hashing, in which the scheduler would take the processor
	// away and look for another twice.
	rawReadMax  = 64 << 10
	rawWriteMax = 72 << 10
)

var _ Conn = (*tcpConn)(nil)

// newConn takes over the connected, non-blocking socket, on failure too.
func newConn(transport string, sock int, local, remote netip.AddrPort) (*tcpConn, error) {
	fd, err := newDescriptor(sock)
	if err != nil {
		return nil, os.NewSyscallError("eventfd2", err)
	}
	return &tcpConn{fd: fd, transport: transport, local: local, remote: remote}, nil
}

func (c *tcpConn) TryRead(p []byte) (int, error) {
	if !c.fd.acquire() {
		return 0, net.ErrClosed
	}
	if len(p) == 0 {
		c.fd.release()
		return 0, nil
	}
	n, errno := recv(c.fd.sock, p)
	c.fd.release()
	switch {
	case errno == unix.EAGAIN:
		return 0, nil
	case errno != 0:
		return 0, c.failed("read", os.NewSyscallError("recvfrom", errno))
	case n > 0:
		return n, nil
	}
	if c.fd.closed() {
		return 0, net.ErrClosed
	}
	if e := c.failure.Load(); e != nil {
		return 0, e
	}
	return 0, io.EOF
}

func (c *tcpConn) TryWrite(bufs [][]byte) (int, error) {
	if !c.fd.acquire() {
		return 0, net.ErrClosed
	}
	k, total := 0, 0
	for _, b := range bufs {
		if len(b) == 0 {
			continue
		}
		if k == maxIovecs {
			break
		}
		c.iov[k].Base = &b[0]
		c.iov[k].SetLen(len(b))
		total += len(b)
		k++
	}
	var n int
	var errno syscall.Errno
	if k > 0 {
		n, errno = send(c.fd.sock, &c.msg, c.iov[:k], total)
		clear(c.iov[:k]) // keep no one's buffers alive
	}
	c.fd.release()
	switch errno {
	case 0:
		return n, nil
	case unix.EAGAIN:
		return 0, nil
	}
	return 0, c.failed("write", os.NewSyscallError("sendmsg", errno))
}

func (c *tcpConn) Wait(write bool, d time.Duration) error { return c.wait(write, d, false) }

func (c *tcpConn) Park(write bool, d time.Duration) error { return c.wait(write, d, true) }

func (c *tcpConn) wait(write bool, d time.Duration, park bool) error {
	if !c.fd.acquire() {
		return net.ErrClosed
	}
	events := int16(unix.POLLIN) // also at end of file and on errors
	if write {
		events |= unix.POLLOUT
	}
	err := c.fd.wait(events, int64(d), park)
	c.fd.release()
	if c.fd.closed() {
		return net.ErrClosed
	}
	if err != nil {
		return c.failed("wait", os.NewSyscallError("poll", err))
	}
	return nil
}

func (c *tcpConn) Wake() { c.fd.wake() }

func (c *tcpConn) RemoteAddr() netip.AddrPort { return c.remote }

func (c *tcpConn) Close() error { return c.fd.close() }

// failed names the connection in err, and remembers the first that ended it.
func (c *tcpConn) failed(op string, err error) error {
	if c.fd.closed() {
		return net.ErrClosed
	}
	e := &ConnError{Transport: c.transport, Op: op, Local: c.local, Peer: c.remote, Err: err}
	// Bad memory is the caller's; a writer told EPIPE after the reader was
	// told why learns the reason.
	if errors.Is(err, unix.EFAULT) {
		return e
	}
	if !c.failure.CompareAndSwap(nil, e) && errors.Is(err, unix.EPIPE) {
		return c.failure.Load()
	}
	return e
}

func recv(sock int, p []byte) (int, syscall.Errno) {
	for {
		var r uintptr
		var errno syscall.Errno
		if len(p) <= rawReadMax {
			r, _, errno = unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(sock),
				uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
		} else {
			r, _, errno = unix.Syscall6(unix.SYS_RECVFROM, uintptr(sock),
				uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
		}
		if errno != unix.EINTR {
			return int(r), errno
		}
	}
}

func send(sock int, msg *unix.Msghdr, iov []unix.Iovec, total int) (int, syscall.Errno) {
	const flags = unix.MSG_DONTWAIT | unix.MSG_NOSIGNAL
	for {
		var r uintptr
		var errno syscall.Errno
		switch {
		case len(iov) == 1 && total <= rawWriteMax:
			r, _, errno = unix.RawSyscall6(unix.SYS_SENDTO, uintptr(sock),
				uintptr(unsafe.Pointer(iov[0].Base)), uintptr(total), flags, 0, 0)
		case len(iov) == 1:
			r, _, errno = unix.Syscall6(unix.SYS_SENDTO, uintptr(sock),
				uintptr(unsafe.Pointer(iov[0].Base)), uintptr(total), flags, 0, 0)
		default:
			msg.Iov = &iov[0]
			msg.SetIovlen(len(iov))
			if total <= rawWriteMax {
				r, _, errno = unix.RawSyscall(unix.SYS_SENDMSG, uintptr(sock),
					uintptr(unsafe.Pointer(msg)), flags)
			} else {
				r, _, errno = unix.Syscall(unix.SYS_SENDMSG, uintptr(sock),
					uintptr(unsafe.Pointer(msg)), flags)
			}
		}
		if errno != unix.EINTR {
			return int(r), errno
		}
	}
}
