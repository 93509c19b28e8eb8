package faultwire

import (
	"errors"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	tunPath    = "/dev/net/tun"
	deviceName = "wire"
	// queueLen is how many packets a device holds for the relay. TUN drops what
	// exceeds it, a loss that no plan asked for: the queue takes a full receive
	// window (tcp_rmem's usual 32 MiB at the smallest MTU).
	queueLen = 32 << 10
)

// port is the relay's end of a TUN device: one read or write is one packet.
type port struct {
	fd   int
	file *os.File // owns fd; gives the relay the netpoller to wait in
	raw  syscall.RawConn
}

// newPort takes over a non-blocking descriptor that keeps packets apart.
func newPort(fd int, name string) (*port, error) {
	p := &port{fd: fd, file: os.NewFile(uintptr(fd), name)}
	// Without the netpoller there are no deadlines, and a relay could not be ended.
	err := p.file.SetReadDeadline(time.Time{})
	var raw syscall.RawConn
	if err == nil {
		raw, err = p.file.SyscallConn()
	}
	if err != nil {
		return nil, errors.Join(err, p.file.Close())
	}
	p.raw = raw
	return p, nil
}

func (p *port) read(b []byte) (int, error) {
	for {
		n, err := unix.Read(p.fd, b)
		if err != unix.EINTR {
			return n, err
		}
	}
}

func (p *port) write(b []byte) error {
	for {
		_, err := unix.Write(p.fd, b)
		if err != unix.EINTR {
			return err
		}
	}
}

func (p *port) close() error { return p.file.Close() }

// openTUN creates a device in the calling thread's namespace. The device lives
// as long as the descriptor.
func openTUN(name string) (*port, error) {
	fd, err := unix.Open(tunPath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, permission("open "+tunPath, err)
	}
	req, err := unix.NewIfreq(deviceName)
	if err == nil {
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		return nil, errors.Join(permission("create a TUN device", err), unix.Close(fd))
	}
	// Only now: the netpoller takes no TUN descriptor that has no device yet.
	return newPort(fd, tunPath+" ("+name+")")
}
