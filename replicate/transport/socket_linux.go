package transport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// endpoint is what md5sig and plain share: sockets of one peer, made through
// package net and then taken away from its poller.
type endpoint struct {
	name string
	peer netip.Addr // unmapped, never the zero Addr
	opt  Options

	// beforeUse prepares a socket before connect or listen; nil: nothing.
	beforeUse func(fd int, s socketKind) error

	// rejected counts connections closed because they were not the peer's.
	rejected atomic.Uint64

	mu      sync.Mutex
	refused error // why the listener refused a connection, last
	at      time.Time
}

// socketKind says what beforeUse is given.
type socketKind struct {
	ipv6   bool // AF_INET6, where an IPv4 peer is ::ffff:a.b.c.d
	listen bool
}

func newEndpoint(name string, peer netip.Addr, opt Options) (*endpoint, error) {
	peer = peer.Unmap()
	switch {
	case !peer.IsValid():
		return nil, &ConfigError{name, "no peer address", "set the peer's IP address"}
	case peer.IsUnspecified(), peer.IsMulticast():
		return nil, &ConfigError{name, fmt.Sprintf("peer address %s is nobody's", peer), "set the peer's own IP address"}
	}
	return &endpoint{name: name, peer: peer, opt: opt.withDefaults()}, nil
}

// Name implements Transport.
func (e *endpoint) Name() string { return e.name }

// Dial implements Transport. The context alone bounds how long it takes.
func (e *endpoint) Dial(ctx context.Context, local netip.Addr, peer netip.AddrPort) (Conn, error) {
	peer = netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())
	local = local.Unmap()
	if !e.isPeer(peer.Addr()) {
		return nil, &ConfigError{e.name, fmt.Sprintf("dial of %s, but the peer is %s", peer, e.peer), "dial the peer's address only"}
	}
	if local.IsValid() && local.Is4() != peer.Addr().Is4() && !local.IsUnspecified() {
		return nil, &ConfigError{e.name, fmt.Sprintf("dial of %s from %s mixes IPv4 and IPv6", peer, local), "use one family for listen and peer address"}
	}
	before, _ := ReadCounters()
	d := net.Dialer{KeepAlive: -1, Control: e.control(false, peer)}
	if local.IsValid() && !local.IsUnspecified() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(local, 0))
	}
	d.SetMultipathTCP(false)
	nc, err := d.DialContext(ctx, family(peer.Addr()), peer.String())
	if err != nil {
		var setup *SetupError
		if errors.As(err, &setup) {
			return nil, setup
		}
		switch err = cause(err); {
		case ctx.Err() != nil:
			err = context.Cause(ctx)
		case errors.Is(err, os.ErrDeadlineExceeded):
			err = context.DeadlineExceeded // net looks at the clock itself, and may be first
		}
		after, _ := ReadCounters()
		return nil, &DialError{Transport: e.name, Local: local, Peer: peer, Rose: after.Sub(before), Err: err}
	}
	c, err := e.adopt(nc.(*net.TCPConn))
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Listen implements Transport.
func (e *endpoint) Listen(local netip.AddrPort) (Listener, error) {
	local = netip.AddrPortFrom(local.Addr().Unmap(), local.Port())
	if !local.IsValid() {
		return nil, &ConfigError{e.name, "no listen address", "set this node's own IP address and port"}
	}
	network := family(local.Addr())
	if local.Addr().Is4() != e.peer.Is4() {
		if local.Addr() != netip.IPv6Unspecified() {
			return nil, &ConfigError{e.name, fmt.Sprintf("listening on %s cannot receive from %s", local, e.peer), "use one family for listen and peer address"}
		}
		network = "tcp" // [::] for an IPv4 peer: dual-stack
	}
	lc := net.ListenConfig{KeepAlive: -1, Control: e.control(true, local)}
	lc.SetMultipathTCP(false)
	nl, err := lc.Listen(context.Background(), network, local.String())
	if err != nil {
		var setup *SetupError
		if errors.As(err, &setup) {
			return nil, setup
		}
		return nil, &SetupError{e.name, "listen on", local, cause(err)}
	}
	return &listener{endpoint: e, tcp: nl.(*net.TCPListener)}, nil
}

// control runs between socket(2) and connect(2) or bind(2).
func (e *endpoint) control(listen bool, addr netip.AddrPort) func(network, address string, rc syscall.RawConn) error {
	return func(network, _ string, rc syscall.RawConn) error {
		var err error
		cerr := rc.Control(func(fd uintptr) {
			if err = setCongestion(int(fd)); err != nil {
				return
			}
			if e.beforeUse != nil {
				err = e.beforeUse(int(fd), socketKind{ipv6: network == "tcp6", listen: listen})
			}
		})
		if err == nil {
			err = cerr
		}
		if err != nil {
			return &SetupError{e.name, "prepare a socket for", addr, err}
		}
		return nil
	}
}

// adopt takes the socket away from package net and its poller, and closes nc
// in any case.
func (e *endpoint) adopt(nc *net.TCPConn) (*tcpConn, error) {
	defer func() { _ = nc.Close() }() // deregisters it from epoll
	local, remote := addrPort(nc.LocalAddr()), addrPort(nc.RemoteAddr())
	rc, err := nc.SyscallConn()
	if err != nil {
		return nil, &SetupError{e.name, "take over the connection with", remote, err}
	}
	sock := -1
	cerr := rc.Control(func(fd uintptr) {
		if err = setConnOptions(int(fd), e.opt); err != nil {
			return
		}
		// The new number shares O_NONBLOCK, which net has set.
		sock, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
		err = os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	})
	if err == nil {
		err = cerr
	}
	if err != nil {
		return nil, &SetupError{e.name, "take over the connection with", remote, err}
	}
	c, err := newConn(e.name, sock, local, remote)
	if err != nil {
		return nil, &SetupError{e.name, "take over the connection with", remote, err}
	}
	return c, nil
}

// refusedFor is how long a refused connection is news.
const refusedFor = 15 * time.Second

func (e *endpoint) note(from netip.AddrPort, why error) {
	why = fmt.Errorf("a connection from %s was refused: %w", from.Addr(), why)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.refused, e.at = why, time.Now()
}

func (e *endpoint) notThePeer() error {
	return fmt.Errorf("the peer's address here is %s; if it came from the peer, set that to the address that the peer sends from, its own listen address", e.peer)
}

// Diagnose says why a connection was refused, where that happened just now.
func (e *endpoint) Diagnose() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.refused == nil || time.Since(e.at) > refusedFor {
		return ""
	}
	return e.refused.Error()
}

// isPeer compares addresses without zones: a zone names this machine's link.
func (e *endpoint) isPeer(a netip.Addr) bool {
	return a.Unmap().WithZone("") == e.peer.WithZone("")
}

type listener struct {
	endpoint *endpoint
	tcp      *net.TCPListener
	closed   atomic.Bool
}

// Accept returns connections in the order in which the kernel completed them;
// it reads nothing, so a silent one delays nobody. A *SetupError may pass;
// net.ErrClosed does not.
func (l *listener) Accept() (Conn, error) {
	for {
		nc, err := l.tcp.AcceptTCP()
		if errors.Is(err, net.ErrClosed) || err != nil && l.closed.Load() {
			return nil, net.ErrClosed
		}
		if err != nil {
			return nil, &SetupError{l.endpoint.name, "accept on", l.Addr(), cause(err)}
		}
		// Signatures have shut strangers out already; without them this is
		// all that does.
		if remote := addrPort(nc.RemoteAddr()); !l.endpoint.isPeer(remote.Addr()) {
			l.endpoint.rejected.Add(1)
			l.endpoint.note(remote, l.endpoint.notThePeer())
			_ = nc.Close()
			continue
		}
		c, err := l.endpoint.adopt(nc)
		if err != nil {
			return nil, err
		}
		return c, nil
	}
}

func (l *listener) Addr() netip.AddrPort { return addrPort(l.tcp.Addr()) }

// Close frees the port. It ends a waiting Accept; accepted connections live on.
func (l *listener) Close() error {
	l.closed.Store(true)
	// A process that starts another one has the socket open twice between fork
	// and exec: closing alone would leave it listening for as long.
	if raw, err := l.tcp.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RD) })
	}
	if err := l.tcp.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "tcp4"
	}
	return "tcp6"
}

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok || t == nil {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// cause strips package net's own naming of the connection.
func cause(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

func setConnOptions(fd int, opt Options) error {
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return os.NewSyscallError("setsockopt TCP_NODELAY", err)
	}
	// Only now: before connect it would bound the dial, which is the
	// context's to do.
	ms := max(int(opt.UserTimeout/time.Millisecond), 1)
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, ms); err != nil {
		return os.NewSyscallError("setsockopt TCP_USER_TIMEOUT", err)
	}
	if err := setKeepAlive(fd); err != nil {
		return err
	}
	return setCongestion(fd)
}

// keepIdle is after how many seconds of silence the kernel asks whether the other
// end is there. With no answer for the user timeout the connection fails.
const keepIdle = 30

// setKeepAlive is for connections that carry nothing for long, as those for long
// segments: a firewall on the way forgets them, and the next long segment would be
// the one that finds out.
func setKeepAlive(fd int) error {
	for _, o := range []struct {
		name              string
		level, opt, value int
	}{
		{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepIdle},
		{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 1},
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.opt, o.value); err != nil {
			return os.NewSyscallError("setsockopt "+o.name, err)
		}
	}
	return nil
}

// setCongestion chooses an algorithm that does not pace. BBR paces, and with
// segments that MD5 keeps small that makes a stream 2 to 3 times slower. Reno
// is in every kernel and open to every user.
func setCongestion(fd int) error {
	var err error
	for _, name := range []string{"cubic", "reno"} {
		// The kernel's answer for the one in use is also success.
		if err = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name); err == nil {
			return nil
		}
	}
	return os.NewSyscallError("setsockopt TCP_CONGESTION", err)
}
