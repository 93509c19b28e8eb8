package bench

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	setupTime  = 10 * time.Second // for a connection to come about
	silentTime = 20 * time.Second // after which what does not move has failed
)

// newSocket makes a TCP socket as the mirror's transport does: no delay, a
// congestion control that does not pace, signed if there is a key.
func newSocket(local, peer netip.Addr, key []byte) (fd int, err error) {
	family := unix.AF_INET
	if local.Is6() {
		family = unix.AF_INET6
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err = prepare(fd); err == nil {
		err = limit(fd, setupTime)
	}
	if err == nil && key != nil {
		err = sign(fd, peer, key)
	}
	if err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, sockaddr(netip.AddrPortFrom(local, 0))))
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// prepare sets the options that an accepted socket needs too.
func prepare(fd int) error {
	var err error
	for _, name := range []string{"cubic", "reno"} {
		if err = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name); err == nil {
			break
		}
	}
	if err != nil {
		return os.NewSyscallError("setsockopt TCP_CONGESTION", err)
	}
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	return impatient(fd)
}

// impatient makes a call that waits for a host that is gone end after silentTime.
func impatient(fd int) error {
	for _, o := range []struct{ level, option, value int }{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 5},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 5},
		{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(silentTime.Milliseconds())},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.option, o.value); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return nil
}

// limit bounds what makes a link: connect, accept and a handshake's calls. With 0
// nothing is bounded any more: a call that has a limit sets a timer each time that
// it sleeps, which a round trip shows.
func limit(fd int, d time.Duration) error {
	tv := unix.NsecToTimeval(d.Nanoseconds())
	for _, o := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, o, &tv); err != nil {
			return os.NewSyscallError("setsockopt SO_RCVTIMEO", err)
		}
	}
	return nil
}

func sign(fd int, peer netip.Addr, key []byte) error {
	var s unix.TCPMD5Sig
	if peer.Is4() {
		s.Addr.Family = unix.AF_INET
		a := peer.As4()
		copy(s.Addr.Data[2:], a[:])
	} else {
		s.Addr.Family = unix.AF_INET6
		a := peer.As16()
		copy(s.Addr.Data[6:], a[:])
	}
	s.Keylen = uint16(copy(s.Key[:], key))
	return os.NewSyscallError("setsockopt TCP_MD5SIG", unix.SetsockoptTCPMD5Sig(fd, unix.IPPROTO_TCP, unix.TCP_MD5SIG, &s))
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16(), ZoneId: zone(a.Addr().Zone())}
}

// zone is the number of a link-local address's zone: an interface's, or 0.
func zone(name string) uint32 {
	if n, err := strconv.ParseUint(name, 10, 32); err == nil {
		return uint32(n)
	}
	if i, err := net.InterfaceByName(name); err == nil {
		return uint32(i.Index)
	}
	return 0
}

// listen returns a listening socket on a port that the kernel chose.
func listen(local, peer netip.Addr, key []byte) (fd int, port uint16, err error) {
	fd, err = newSocket(local, peer, key)
	if err != nil {
		return -1, 0, fmt.Errorf("listen on %v: %w", local, err)
	}
	if err = os.NewSyscallError("listen", unix.Listen(fd, 64)); err == nil {
		var sa unix.Sockaddr
		sa, err = unix.Getsockname(fd)
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			port = uint16(sa.Port)
		case *unix.SockaddrInet6:
			port = uint16(sa.Port)
		}
	}
	if err != nil {
		unix.Close(fd)
		return -1, 0, fmt.Errorf("listen on %v: %w", local, err)
	}
	return fd, port, nil
}

// accept waits for one connection.
func accept(listener int) (fd int, err error) {
	for {
		fd, _, err = unix.Accept4(listener, unix.SOCK_CLOEXEC)
		if err != unix.EINTR {
			break
		}
	}
	if err == unix.EAGAIN {
		return -1, fmt.Errorf("no connection came within %v: a firewall between, or another key at the other end", setupTime)
	}
	if err != nil {
		return -1, os.NewSyscallError("accept", err)
	}
	// The key is inherited, the options need not be.
	if err := errors.Join(prepare(fd), limit(fd, setupTime)); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func dial(local netip.Addr, to netip.AddrPort, key []byte) (fd int, err error) {
	fd, err = newSocket(local, to.Addr(), key)
	if err != nil {
		return -1, fmt.Errorf("connect to %v: %w", to, err)
	}
	err = unix.Connect(fd, sockaddr(to))
	if err == unix.EINPROGRESS { // SO_SNDTIMEO ran out
		err = unix.ETIMEDOUT
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connect to %v: %w", to, err)
	}
	return fd, nil
}

// pathOf is what a connected socket sends by: the path's MTU and the congestion
// control.
func pathOf(fd int) (mtu int, congestion string, err error) {
	const ipMTU = 14 // IP_MTU of <linux/in.h>
	level, option := unix.IPPROTO_IP, ipMTU
	if family, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil && family == unix.AF_INET6 {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU
	}
	if mtu, err = unix.GetsockoptInt(fd, level, option); err != nil {
		return 0, "", os.NewSyscallError("getsockopt IP_MTU", err)
	}
	congestion, err = unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	return mtu, congestion, os.NewSyscallError("getsockopt TCP_CONGESTION", err)
}
