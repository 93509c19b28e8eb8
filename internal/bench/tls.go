package bench

import (
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// newTLSLink shakes hands as the mirror does: each end takes the other's key
// and no other.
func newTLSLink(raw *rawLink, key *transport.TLSKey, peer []byte, server bool) (link, error) {
	var pin transport.Pin
	if copy(pin[:], peer) != len(pin) || len(peer) != len(pin) {
		raw.close()
		return nil, fmt.Errorf("the other end sent a pin of %d bytes", len(peer))
	}
	raw.wait = parked
	l := &tlsLink{rawLink: raw}
	if server {
		l.conn = tls.Server(socketConn{raw}, key.Config(pin))
	} else {
		l.conn = tls.Client(socketConn{raw}, key.Config(pin))
	}
	if err := l.conn.Handshake(); err != nil {
		raw.close()
		return nil, fmt.Errorf("TLS handshake: %w", err)
	}
	return l, nil
}

type tlsLink struct {
	*rawLink
	conn *tls.Conn
}

func (l *tlsLink) send(p []byte) error {
	_, err := l.conn.Write(p)
	return err
}

func (l *tlsLink) some(p []byte) (int, error) { return l.conn.Read(p) }

// socketConn is the socket as crypto/tls wants it. A limit of time is on the
// socket itself.
type socketConn struct{ l *rawLink }

func (c socketConn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	return c.l.some(p)
}

func (c socketConn) Write(p []byte) (int, error) {
	if err := c.l.send(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c socketConn) Close() error                     { c.l.interrupt(); return nil }
func (c socketConn) LocalAddr() net.Addr              { return nil }
func (c socketConn) RemoteAddr() net.Addr             { return nil }
func (c socketConn) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (c socketConn) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (c socketConn) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }
