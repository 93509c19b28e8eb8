package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	tlsHeader = 5
	tlsData   = 23 // the type of encrypted records
	// tlsSealed is what a TLS 1.3 record adds to its plaintext: header,
	// type and tag.
	tlsSealed = tlsHeader + 1 + 16
	// A record of more is refused by its header alone. During the handshake
	// crypto/tls takes more than TLS 1.3 allows.
	tlsMaxRecord = tlsHeader + 16<<10 + 2048
	tlsStage     = 64 << 10
	// tlsMaxWrite bounds the plaintext that one TryWrite takes: a frame of
	// the mirror with its header, so that it is encrypted and sent in one go.
	tlsMaxWrite = 64<<10 + 4096
	// tlsMaxUnsent bounds the ciphertext that waits, in bytes: that of one
	// TryWrite, and the few alerts and key updates of a sound peer.
	tlsMaxUnsent = 2 * tlsMaxWrite
)

// A tlsConn is TLS 1.3 over a tcpConn, without a goroutine of its own:
// crypto/tls encrypts and decrypts in memory (see tlsWire), in the calls of
// whoever reads and writes.
type tlsConn struct {
	wire *tlsWire
	tls  *tls.Conn

	readErr error // ended the reader's side; the reader's
	// ready: the reader has something without the socket.
	ready atomic.Bool
}

var _ Conn = (*tlsConn)(nil)

// newTLSConn shakes hands on a new connection, as its server or its client,
// until ctx ends, and takes the connection over, on failure too. The client
// is told that the server took its key: without that, TLS 1.3 lets a client
// begin before it is refused.
func newTLSConn(ctx context.Context, tcp *tcpConn, cfg *tls.Config, server bool) (*tlsConn, error) {
	w := &tlsWire{tcp: tcp, ctx: ctx, stage: make([]byte, tlsStage)}
	c := &tlsConn{wire: w}
	if server {
		c.tls = tls.Server(w, cfg)
	} else {
		c.tls = tls.Client(w, cfg)
	}
	stop := context.AfterFunc(ctx, tcp.Wake)
	defer stop()
	err := c.tls.Handshake()
	taken := [1]byte{1}
	switch {
	case err != nil:
	case server:
		_, err = c.tls.Write(taken[:])
	default:
		_, err = c.tls.Read(taken[:])
	}
	// What crypto/tls had to say last, such as an alert.
	if e := w.flush(); err == nil {
		err = e
	}
	if err != nil {
		_ = tcp.Close()
		return nil, err
	}
	w.ctx, w.left = nil, 0
	c.ready.Store(w.whole())
	return c, nil
}

// TryRead decrypts what has arrived. A record is decrypted when all of it is
// there. A panic ends the connection, as in TryWrite.
func (c *tlsConn) TryRead(p []byte) (n int, err error) {
	returned := false
	defer func() {
		if !returned {
			_ = c.Close()
		}
	}()
	n, err = c.read(p)
	returned = true
	return n, err
}

func (c *tlsConn) read(p []byte) (total int, err error) {
	w := c.wire
	if w.tcp.fd.closed() {
		return 0, net.ErrClosed
	}
	if len(p) == 0 {
		return 0, nil
	}
	_ = w.flush() // the writer is told, and the reader by the socket
	for total < len(p) && c.readErr == nil {
		if w.left == 0 && !w.whole() {
			if total > 0 {
				break // the next call asks the socket again
			}
			n, err := w.receive()
			if n == 0 {
				c.ready.Store(false)
				return 0, err
			}
			continue
		}
		n, err := c.tls.Read(p[total:])
		total += n
		w.left -= min(n, w.left)
		switch err {
		case nil:
		case errNothingYet:
			w.left = 0
		case io.EOF:
			c.readErr = io.EOF
		default:
			_ = w.flush() // the alert that tells the peer
			c.readErr = w.tcp.failed("read", err)
		}
	}
	c.ready.Store(w.left > 0 || w.whole() || c.readErr != nil)
	if total == 0 {
		return 0, c.readErr
	}
	return total, nil
}

// TryWrite takes nothing while ciphertext of an earlier call waits.
//
// Buffers are parts of a mapping whose memory can be gone, and the caller may
// have made that a panic. Nobody then knows how much of the call is on its
// way, so that the connection ends.
func (c *tlsConn) TryWrite(bufs [][]byte) (n int, err error) {
	returned := false
	defer func() {
		if !returned {
			_ = c.Close()
		}
	}()
	n, err = c.write(bufs)
	returned = true
	return n, err
}

func (c *tlsConn) write(bufs [][]byte) (total int, err error) {
	w := c.wire
	if w.tcp.fd.closed() {
		return 0, net.ErrClosed
	}
	if err := w.flush(); err != nil {
		return 0, err
	}
	if w.unsent.Load() {
		return 0, nil
	}
	for _, b := range bufs {
		n := min(len(b), tlsMaxWrite-total)
		if n == 0 {
			continue
		}
		if _, err := c.tls.Write(b[:n]); err != nil {
			return 0, w.tcp.failed("write", err)
		}
		total += n
	}
	if err := w.flush(); err != nil {
		return 0, err
	}
	if w.unsent.Load() {
		w.tcp.Wake() // whoever sleeps until bytes arrive is to send it
	}
	return total, nil
}

func (c *tlsConn) Wait(write bool, d time.Duration) error { return c.wait(write, d, false) }

func (c *tlsConn) Park(write bool, d time.Duration) error { return c.wait(write, d, true) }

// wait also sends ciphertext that waits.
func (c *tlsConn) wait(write bool, d time.Duration, park bool) error {
	w := c.wire
	if c.ready.Load() && !w.tcp.fd.closed() {
		return nil
	}
	if err := w.tcp.wait(write || w.unsent.Load(), d, park); err != nil {
		return err
	}
	_ = w.flush() // the writer is told, and the reader by the socket
	return nil
}

func (c *tlsConn) Wake() { c.wire.tcp.Wake() }

func (c *tlsConn) RemoteAddr() netip.AddrPort { return c.wire.tcp.RemoteAddr() }

// Close sends no close_notify: the mirror's own messages say how a session
// ends, and a cut connection loses nothing that they do not know of.
func (c *tlsConn) Close() error { return c.wire.tcp.Close() }

// tlsWire is what crypto/tls takes for the network. It hands over whole
// records only, so that crypto/tls never holds a part of one, and a read of
// nothing never gets as far as crypto/tls, which would allocate.
type tlsWire struct {
	tcp *tcpConn
	ctx context.Context // during the handshake, which waits; then nil

	// The reader's: bytes [r, w) have arrived, of which crypto/tls may take
	// the next avail. At most left bytes of plaintext are in there and in
	// crypto/tls together.
	stage       []byte
	r, w, avail int
	left        int

	mu     sync.Mutex // reader and writer both write: alerts, key updates
	out    []byte     // ciphertext
	sent   int        // of out
	unsent atomic.Bool
}

// errTLSFlood ends a connection: an alert or a key update for the peer would
// have to wait, behind more than one TryWrite takes.
var errTLSFlood = errors.New("the peer makes this node answer, and does not take the answers")

// errNothingYet is what crypto/tls hears where there is no whole record. It
// goes on after an error that is temporary.
var errNothingYet error = nothingYet{}

type nothingYet struct{}

func (nothingYet) Error() string   { return "no whole TLS record has arrived" }
func (nothingYet) Timeout() bool   { return false }
func (nothingYet) Temporary() bool { return true }

// whole reports whether crypto/tls can take something.
func (w *tlsWire) whole() bool {
	if w.avail > 0 {
		return true
	}
	p := w.stage[w.r:w.w]
	if len(p) < tlsHeader {
		return false
	}
	n := tlsHeader + (int(p[3])<<8 | int(p[4]))
	switch {
	case p[1] != 3 || n > tlsMaxRecord:
		w.avail = tlsHeader // not TLS: its header is enough to be refused
	case n > len(p):
		return false
	default:
		w.avail, w.left = n, 0
		if p[0] == tlsData {
			w.left = max(n-tlsSealed, 0)
		}
	}
	return true
}

// receive reads from the socket into the stage, which has room: there is less
// than a record in it.
func (w *tlsWire) receive() (int, error) {
	if w.r == w.w {
		w.r, w.w = 0, 0
	} else if w.w > len(w.stage)/2 {
		w.w = copy(w.stage, w.stage[w.r:w.w])
		w.r = 0
	}
	n, err := w.tcp.TryRead(w.stage[w.w:])
	w.w += n
	if err == io.EOF && w.r < w.w {
		err = w.tcp.failed("read", io.ErrUnexpectedEOF)
	}
	return n, err
}

// Read implements net.Conn, for crypto/tls.
func (w *tlsWire) Read(p []byte) (int, error) {
	for !w.whole() {
		if w.ctx == nil {
			return 0, errNothingYet
		}
		if err := w.flush(); err != nil {
			return 0, err
		}
		n, err := w.receive()
		if err != nil {
			return 0, err
		}
		if n > 0 {
			continue
		}
		if w.ctx.Err() != nil {
			return 0, context.Cause(w.ctx)
		}
		if err := w.tcp.Wait(w.unsent.Load(), time.Second); err != nil {
			return 0, err
		}
	}
	n := copy(p, w.stage[w.r:w.r+w.avail])
	w.r += n
	w.avail -= n
	return n, nil
}

// Write implements net.Conn, for crypto/tls: it only collects.
func (w *tlsWire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.out)+len(p) > tlsMaxUnsent {
		return 0, errTLSFlood
	}
	w.out = append(w.out, p...)
	w.unsent.Store(true)
	return len(p), nil
}

// flush sends collected ciphertext as far as it goes without blocking.
func (w *tlsWire) flush() error {
	if !w.unsent.Load() {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.sent < len(w.out) {
		n, err := w.tcp.TryWrite([][]byte{w.out[w.sent:]})
		if n == 0 && err == nil {
			return nil
		}
		w.sent += n
		if err != nil {
			w.sent = len(w.out) // nothing more will leave
			w.drained()
			return err
		}
	}
	w.drained()
	return nil
}

func (w *tlsWire) drained() {
	w.out, w.sent = w.out[:0], 0
	w.unsent.Store(false)
}

// The rest of net.Conn, which crypto/tls does not use here.

func (w *tlsWire) Close() error                     { return w.tcp.Close() }
func (w *tlsWire) LocalAddr() net.Addr              { return net.TCPAddrFromAddrPort(w.tcp.local) }
func (w *tlsWire) RemoteAddr() net.Addr             { return net.TCPAddrFromAddrPort(w.tcp.remote) }
func (w *tlsWire) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (w *tlsWire) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (w *tlsWire) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }
