package transport

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"
)

// TLS is TLS 1.3. Both ends show a key and each takes exactly one key of the
// other, its pin: there are no authorities, no names and no dates, and a
// pinned key is good until the configuration names another. What was changed
// on the way breaks a record's tag, and the connection ends.
type TLS struct {
	*endpoint
	cfg       *tls.Config
	own, peer Pin
}

var _ Transport = (*TLS)(nil)

// NewTLS makes the transport to the peer that holds the private key of pin.
func NewTLS(peer netip.Addr, key *TLSKey, pin Pin, opt Options) (*TLS, error) {
	e, err := newEndpoint(NameTLS, peer, opt)
	if err != nil {
		return nil, err
	}
	if pin == key.Pin() {
		return nil, &ConfigError{NameTLS, "the peer's public key is this node's own", "name the .pub file that was generated on the other node"}
	}
	return &TLS{endpoint: e, cfg: key.Config(pin), own: key.Pin(), peer: pin}, nil
}

// Pins are those of the two ends.
func (t *TLS) Pins() (own, peer Pin) { return t.own, t.peer }

// Dial implements Transport. It returns when both ends have taken each
// other's key. The context alone bounds how long it takes.
func (t *TLS) Dial(ctx context.Context, local netip.Addr, peer netip.AddrPort) (Conn, error) {
	conn, err := t.endpoint.Dial(ctx, local, peer)
	if err != nil {
		return nil, err
	}
	c, err := newTLSConn(ctx, conn.(*tcpConn), t.cfg, false)
	if err != nil {
		return nil, &DialError{Transport: NameTLS, Local: local.Unmap(), Peer: peer, Err: explainTLS(err)}
	}
	return c, nil
}

// PinError: the other end showed a key that is not the pinned one.
type PinError struct{ Got, Want Pin }

func (e *PinError) Error() string {
	return fmt.Sprintf("the other end showed the key %v, and %v is pinned", e.Got, e.Want)
}

// HandshakeError is why no TLS connection came about, and what to do.
type HandshakeError struct {
	Problem string
	Remedy  string
	Err     error
}

func (e *HandshakeError) Error() string {
	return fmt.Sprintf("TLS handshake: %s (%v); %s", e.Problem, e.Err, e.Remedy)
}

func (e *HandshakeError) Unwrap() error { return e.Err }

// explainTLS names the cause of a failed handshake. What it has no words for
// is left as it is.
func explainTLS(err error) error {
	var pin *PinError
	var header tls.RecordHeaderError
	const sameTransport = "set the same transport on both nodes"
	switch {
	case errors.As(err, &pin):
		return &HandshakeError{"the peer has another key than the one pinned here",
			"copy the .pub file of the peer's tls_key to this node's tls_peer; if nobody exchanged a key, find out who answers there", err}
	case isAlert(err, "remote error", badCertificate):
		return &HandshakeError{"the peer refused this node's key",
			"copy the .pub file of this node's tls_key to the peer's tls_peer", err}
	case isAlert(err, "remote error", protocolVersion), strings.Contains(err.Error(), "unsupported protocol version"), strings.Contains(err.Error(), "unsupported versions"):
		return &HandshakeError{"one of the ends has no TLS 1.3", "run the same release on both nodes", err}
	case errors.As(err, &header):
		return &HandshakeError{"the other end does not speak TLS", sameTransport, err}
	case errors.Is(err, context.DeadlineExceeded):
		return &HandshakeError{"connected, and no answer in time", "check the peer's load and the link, and " + sameTransport, err}
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return &HandshakeError{"the peer closed the connection", sameTransport + "; the peer's status says more", err}
	}
	return err
}

// Alerts of RFC 8446, section 6.
const (
	badRecordMAC    = 20
	badCertificate  = 42
	protocolVersion = 70
)

// isAlert reports whether err is a TLS alert, sent by one of the ends.
func isAlert(err error, from string, alert uint8) bool {
	var op *net.OpError
	// crypto/tls does not export its alerts, but for their text.
	return errors.As(err, &op) && op.Op == from && op.Err.Error() == tls.AlertError(alert).Error()
}

// isTLSDamage reports whether a record was not what the other end sent.
func isTLSDamage(err error) bool {
	var header tls.RecordHeaderError
	return errors.As(err, &header) || isAlert(err, "local error", badRecordMAC) || isAlert(err, "remote error", badRecordMAC)
}

// Config is that of a connection to the holder of pin, for either side.
func (k *TLSKey) Config(pin Pin) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{k.cert},
		MinVersion:   tls.VersionTLS13,
		ClientAuth:   tls.RequireAnyClientCert,
		// In place of a chain, a name and dates. It runs on both sides, in
		// each handshake; the handshake has proved that the other end holds
		// the private key.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return errors.New("no certificate")
			}
			if got := Pin(sha256.Sum256(s.PeerCertificates[0].RawSubjectPublicKeyInfo)); got != pin {
				return &PinError{got, pin}
			}
			return nil
		},
		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true, // no browser waits for the first bytes of a page
	}
}

const (
	// handshakeTime bounds a handshake that the listener was asked for.
	handshakeTime = 5 * time.Second
	// maxHandshakes bounds those under way and those that wait for Accept.
	// One more, and the oldest goes: who trickles cannot keep the peer out.
	maxHandshakes = 8
)

// Listen implements Transport.
func (t *TLS) Listen(local netip.AddrPort) (Listener, error) {
	inner, err := t.endpoint.Listen(local)
	if err != nil {
		return nil, err
	}
	l := &tlsListener{t: t, inner: inner, results: make(chan accepted)}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.wg.Go(l.serve)
	return l, nil
}

// A tlsListener shakes hands with those who connect: its goroutine accepts,
// and one per connection shakes hands. Close ends them all.
type tlsListener struct {
	t       *TLS
	inner   Listener
	results chan accepted
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
}

type accepted struct {
	conn Conn
	err  error
}

// serve accepts connections until the listener is closed.
func (l *tlsListener) serve() {
	type attempt struct {
		cancel context.CancelFunc
		done   <-chan struct{}
	}
	var under []attempt // in the order in which they began
	for {
		conn, err := l.inner.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) || !l.offer(l.ctx, accepted{nil, err}) {
				break
			}
			continue
		}
		still := under[:0]
		for _, a := range under {
			select {
			case <-a.done:
			default:
				still = append(still, a)
			}
		}
		under = still
		if len(under) == maxHandshakes {
			under[0].cancel()
			under = append(under[:0], under[1:]...)
		}
		ctx, cancel := context.WithCancel(l.ctx)
		done := make(chan struct{})
		under = append(under, attempt{cancel, done})
		l.wg.Go(func() {
			defer close(done)
			defer cancel()
			l.shake(ctx, conn.(*tcpConn))
		})
	}
	l.cancel()
}

func (l *tlsListener) shake(ctx context.Context, tcp *tcpConn) {
	limited, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	c, err := newTLSConn(limited, tcp, l.t.cfg, true)
	switch {
	case err == nil:
		if !l.offer(ctx, accepted{c, nil}) {
			_ = c.Close()
		}
	case ctx.Err() == nil:
		l.t.note(tcp.remote, explainTLS(err))
	}
}

// offer waits for an Accept. It is false where ctx ended first.
func (l *tlsListener) offer(ctx context.Context, a accepted) bool {
	select {
	case l.results <- a:
		return true
	case <-ctx.Done():
		return false
	}
}

// Accept returns connections in the order in which they shook hands. Those
// that do not are dropped; Diagnose of the transport says why.
func (l *tlsListener) Accept() (Conn, error) {
	select {
	case a := <-l.results:
		return a.conn, a.err
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (l *tlsListener) Addr() netip.AddrPort { return l.inner.Addr() }

// Close frees the port, ends a waiting Accept and handshakes; accepted
// connections live on.
func (l *tlsListener) Close() error {
	err := l.inner.Close()
	l.cancel()
	l.wg.Wait()
	return err
}
