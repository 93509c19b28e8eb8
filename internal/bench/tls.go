package bench

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"time"
)

// identity is one end's key, made for one run.
type identity struct {
	key *ecdsa.PrivateKey
	der []byte
}

func newIdentity() (*identity, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	return &identity{key, der}, nil
}

// link shakes hands; each end takes the other's certificate and no other.
func (i *identity) link(raw *rawLink, peer []byte, server bool) (link, error) {
	raw.wait = parked
	cfg := &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{i.der}, PrivateKey: i.key}},
		MinVersion:   tls.VersionTLS13,
		ClientAuth:   tls.RequireAnyClientCert,
		// Pinned, in place of a chain and a name.
		InsecureSkipVerify: true,
		VerifyPeerCertificate: func(got [][]byte, _ [][]*x509.Certificate) error {
			if len(got) != 1 || !bytes.Equal(got[0], peer) {
				return errors.New("not the certificate of the other end")
			}
			return nil
		},
		SessionTicketsDisabled: true,
	}
	l := &tlsLink{rawLink: raw}
	if server {
		l.conn = tls.Server(socketConn{raw}, cfg)
	} else {
		l.conn = tls.Client(socketConn{raw}, cfg)
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
