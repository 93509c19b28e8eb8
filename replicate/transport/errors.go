package transport

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"syscall"
)

// UnsupportedError: this kernel cannot run the transport at all. Retrying is
// pointless until the machine is changed.
type UnsupportedError struct {
	Transport string
	Missing   string // what the kernel lacks
	Remedy    string
	Err       error // what the kernel answered
}

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("transport %s: %s (%v); %s", e.Transport, e.Missing, e.Err, e.Remedy)
}

func (e *UnsupportedError) Unwrap() error { return e.Err }

// ConfigError: what the transport was asked for makes no sense. Retrying is
// pointless until the configuration is changed.
type ConfigError struct {
	Transport string
	Problem   string
	Remedy    string
}

func (e *ConfigError) Error() string {
	return fmt.Sprintf("transport %s: %s; %s", e.Transport, e.Problem, e.Remedy)
}

// SetupError: a socket could not be made, bound or given its options. It may
// pass (descriptors, memory, an address not yet up), so it may be retried
// after a pause.
type SetupError struct {
	Transport string
	Op        string // the step, such as "listen" or "set TCP_MD5SIG key"
	Addr      netip.AddrPort
	Err       error
}

func (e *SetupError) Error() string {
	s := fmt.Sprintf("transport %s: %s %s: %v", e.Transport, e.Op, e.Addr, e.Err)
	switch {
	case errors.Is(e.Err, syscall.EADDRINUSE):
		s += "; another process listens there: stop it or choose another port"
	case errors.Is(e.Err, syscall.EADDRNOTAVAIL):
		s += "; the address is not on this machine: check the listen address and that its interface is up"
	case errors.Is(e.Err, syscall.EMFILE), errors.Is(e.Err, syscall.ENFILE):
		s += "; raise the limit of open files"
	case errors.Is(e.Err, syscall.EACCES):
		s += "; choose a port above 1023 or grant CAP_NET_BIND_SERVICE"
	}
	return s
}

func (e *SetupError) Unwrap() error { return e.Err }

// DialError: the peer was not reached. The normal answer is to try again.
type DialError struct {
	Transport string
	Local     netip.Addr
	Peer      netip.AddrPort
	// Rose is by how much this machine's kernel counters rose during the
	// dial. Other connections of the machine count too: it is a hint.
	Rose Counters
	Err  error
}

func (e *DialError) Error() string {
	s := fmt.Sprintf("transport %s: dial %s from %s: %v", e.Transport, e.Peer, e.Local, e.Err)
	if d := e.Rose.Diagnose(); d != "" {
		return s + "; " + d
	}
	var shake *HandshakeError
	if e.Timeout() && !errors.As(e.Err, &shake) {
		s += "; no answer: check that the peer runs, its address and port, firewalls, and that it has the same transport"
		if e.Transport == NameMD5Sig {
			s += ", and that both key files are equal (a peer drops what is signed with another key in silence: its counter TCPMD5Failure rises)"
		}
	}
	return s
}

func (e *DialError) Unwrap() error { return e.Err }

// Timeout reports whether the peer did not answer, as opposed to refused.
func (e *DialError) Timeout() bool { return isTimeout(e.Err) }

// ConnError: an established connection failed. It stays failed, unless it was the
// memory of a caller's buffer (EFAULT).
type ConnError struct {
	Transport string
	Op        string // "read", "write" or "wait"
	Local     netip.AddrPort
	Peer      netip.AddrPort
	Err       error
}

func (e *ConnError) Error() string {
	s := fmt.Sprintf("transport %s: %s %s->%s: %v", e.Transport, e.Op, e.Local, e.Peer, e.Err)
	switch {
	case errors.Is(e.Err, syscall.ECONNRESET), errors.Is(e.Err, syscall.EPIPE):
		s += "; the peer closed the connection or was restarted: reconnect, its log says why"
	case e.Timeout():
		s += "; the peer's kernel acknowledged nothing within the user timeout: check the link and the peer"
	case e.Transport == NameTLS && errors.Is(e.Err, io.ErrUnexpectedEOF):
		s += "; the peer closed the connection within a record: reconnect, its log says why"
	case isTLSDamage(e.Err):
		s += "; a record was damaged on the way, or forged, and is not used: reconnect; check NICs and cables if it goes on"
	case errors.Is(e.Err, syscall.EFAULT):
		s += "; the memory of the buffer is gone: check the mapped region"
	}
	return s
}

func (e *ConnError) Unwrap() error { return e.Err }

// Timeout reports whether the peer or the path to it fell silent.
func (e *ConnError) Timeout() bool {
	return isTimeout(e.Err) ||
		errors.Is(e.Err, syscall.EHOSTUNREACH) || errors.Is(e.Err, syscall.ENETUNREACH)
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}
