// Package transport carries bytes between the two nodes of a pair.
package transport

import (
	"context"
	"net/netip"
	"time"
)

// The names of this package's transports, in config and status.
const (
	NameMD5Sig = "md5sig"
	NameTLS    = "tls"
	NamePlain  = "plain"
)

// Transport makes connections to the one peer that it was made for.
type Transport interface {
	// Name is the transport's name in config and status, such as "md5sig".
	Name() string
	// Listen binds local and accepts connections of the peer only. The error
	// is a *ConfigError or a *SetupError.
	Listen(local netip.AddrPort) (Listener, error)
	// Dial connects from the address local (any port) to peer, within ctx. The
	// error is a *ConfigError, a *SetupError or a *DialError.
	Dial(ctx context.Context, local netip.Addr, peer netip.AddrPort) (Conn, error)
}

// Listener accepts connections of the peer.
type Listener interface {
	// Accept waits for one. A *SetupError may pass; net.ErrClosed does not.
	Accept() (Conn, error)
	Addr() netip.AddrPort
	Close() error
}

// Conn is a reliable, ordered stream of bytes that does not block unless it
// is asked to. One goroutine reads and one writes at a time; Wait, Park, Wake,
// Close and RemoteAddr are safe at any time. No buffer is kept beyond a call. An
// error is io.EOF, net.ErrClosed or a *ConnError.
type Conn interface {
	// TryRead reads what has arrived. (0, nil): nothing yet. io.EOF: the
	// peer closed its side.
	TryRead(p []byte) (int, error)
	// TryWrite writes a prefix of the concatenated buffers and returns its
	// length, 0 when no more fits for now. A transport that transforms bytes
	// may hold on to some of them, and sends those in later calls: as long as
	// they matter, somebody reads or waits.
	TryWrite(bufs [][]byte) (int, error)
	// Wait returns when the connection may be readable (or, if write is
	// set, readable or writable), when d has passed, or after Wake or Close.
	// It may also return for no reason: look, then wait again. A Wake that
	// came before is not lost. For some milliseconds it sleeps in the kernel,
	// in the calling thread: the shortest way from packet to goroutine.
	Wait(write bool, d time.Duration) error
	// Park is Wait between the pieces of long segments: it keeps no thread,
	// which Go's scheduler would watch at the expense of those that work. It
	// returns some microseconds later, and up to 10 ms later where each of
	// Go's processors has something else to do all the time.
	Park(write bool, d time.Duration) error
	// Wake makes a Wait of now, or the next one, return: at least one, if
	// several goroutines wait. Several Wakes may count as one.
	Wake()
	RemoteAddr() netip.AddrPort
	// Close ends the connection. It waits for no goroutine; a call on a
	// closed connection returns net.ErrClosed, and never touches another
	// connection's descriptor.
	Close() error
}
