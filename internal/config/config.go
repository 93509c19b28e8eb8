// Package config reads the daemon's configuration: a TOML file in which every
// key is known, and every value is judged before anything is touched.
//
// Nothing in it says who is primary: that the region remembers.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// SocketDir is where sockets are by default, and where the admin commands look
// for them.
const SocketDir = "/run/nvmmirror"

const (
	maxFile   = 1 << 20
	maxSocket = 107 // bytes of path that the kernel takes
)

// Config is a daemon's configuration.
type Config struct {
	Region     string
	Ack        nvmmirror.Ack
	OnPeerLoss nvmmirror.OnPeerLoss
	Peer       *Peer // nil: standalone
	Socket     string
}

// Peer is the other node of the pair.
type Peer struct {
	Listen, Address netip.AddrPort
	Transport       string // md5sig, tls or plain
	KeyFile         string // of md5sig
	TLSKey, TLSPeer string // of tls: the own private key, the peer's public one
	Timeout         time.Duration
	BusyPoll        time.Duration // 0: none
	Connections     int           // as nvmmirror.Peer.Connections
}

// Error is what is wrong with a configuration file, or with a file that it
// names. It does not go away by itself.
type Error struct {
	File         string
	Line, Column int    // from 1; 0: of the file as a whole
	Key          string // dotted; "" where it is not about one
	Problem      string
	Err          error // what Problem says, where it came from elsewhere
}

func (e *Error) Error() string {
	s := e.File
	if e.Line > 0 {
		s += fmt.Sprintf(":%d:%d", e.Line, e.Column)
	}
	if e.Key != "" {
		s += ": " + e.Key
	}
	return s + ": " + e.Problem
}

func (e *Error) Unwrap() error { return e.Err }

// Load reads a configuration file.
func Load(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, notRead(path, err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, notRead(path, err)
	}
	if len(text) > maxFile {
		return nil, &Error{File: path, Problem: fmt.Sprintf("is larger than %d bytes: not a configuration", maxFile)}
	}
	return Parse(path, text)
}

func notRead(path string, err error) error {
	why := err
	var p *fs.PathError
	if errors.As(err, &p) {
		why = p.Err // the Error names the file
	}
	return &Error{File: path, Problem: fmt.Sprintf("not read: %v; name a TOML file that this user can read, such as /etc/nvmmirror/vol0.toml", why), Err: err}
}

// document is the file. The values are judged by reader, which can say where
// they stand.
type document struct {
	Region     any      `toml:"region"`
	Ack        any      `toml:"ack"`
	OnPeerLoss any      `toml:"on_peer_loss"`
	Peer       *peerDoc `toml:"peer"`
	Admin      adminDoc `toml:"admin"`
}

type peerDoc struct {
	Listen      any `toml:"listen"`
	Address     any `toml:"address"`
	Transport   any `toml:"transport"`
	KeyFile     any `toml:"key_file"`
	TLSKey      any `toml:"tls_key"`
	TLSPeer     any `toml:"tls_peer"`
	Timeout     any `toml:"timeout"`
	BusyPoll    any `toml:"busy_poll"`
	Connections any `toml:"connections"`
}

type adminDoc struct {
	Socket any `toml:"socket"`
}

// knownKeys is shown where a key is not one of them.
var knownKeys = map[string]string{
	"":      "region, ack, on_peer_loss, [peer], [admin]",
	"peer":  "listen, address, transport, key_file, tls_key, tls_peer, timeout, busy_poll, connections",
	"admin": "socket",
}

// Parse reads the text of a configuration file. Key files are not looked at. The
// library's bounds are judged here as well, so that the error can say where in the
// file.
func Parse(file string, text []byte) (*Config, error) {
	var d document
	if err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(&d); err != nil {
		return nil, located(file, err)
	}
	r := &reader{file: file}
	r.find(text)
	c := &Config{
		Region:     r.path("region", d.Region, true),
		Ack:        oneOf(r, "ack", d.Ack, nvmmirror.AckBoth, nvmmirror.AckAsync),
		OnPeerLoss: oneOf(r, "on_peer_loss", d.OnPeerLoss, nvmmirror.Block, nvmmirror.Alone),
		Socket:     r.path("admin.socket", d.Admin.Socket, false),
	}
	if d.Peer != nil {
		c.Peer = &Peer{
			Listen:      r.addr("peer.listen", d.Peer.Listen),
			Address:     r.addr("peer.address", d.Peer.Address),
			Transport:   oneOf(r, "peer.transport", d.Peer.Transport, transport.NameMD5Sig, transport.NameTLS, transport.NamePlain),
			Timeout:     r.duration("peer.timeout", d.Peer.Timeout, nvmmirror.DefaultTimeout, nvmmirror.MinTimeout, nvmmirror.MaxTimeout),
			BusyPoll:    r.duration("peer.busy_poll", d.Peer.BusyPoll, nvmmirror.DefaultBusyPoll, 0, time.Second),
			Connections: r.number("peer.connections", d.Peer.Connections, 1, 1, nvmmirror.MaxConnections),
		}
		r.keys(c.Peer, d.Peer)
		r.checkPair(c.Peer)
	}
	if c.Socket == "" {
		name := strings.TrimSuffix(filepath.Base(c.Region), filepath.Ext(c.Region))
		c.Socket = filepath.Join(SocketDir, name+".sock")
	}
	if len(c.Socket) > maxSocket {
		r.fail("admin.socket", "has %d bytes, the kernel takes %d in a socket's path", len(c.Socket), maxSocket)
	}
	if r.err != nil {
		return nil, r.err
	}
	return c, nil
}

// located turns the decoder's error into one that says where.
func located(file string, err error) error {
	var unknown *toml.StrictMissingError
	var bad *toml.DecodeError
	e := &Error{File: file, Problem: err.Error()}
	switch {
	case errors.As(err, &unknown) && len(unknown.Errors) > 0:
		first := &unknown.Errors[0]
		e.Line, e.Column = first.Position()
		key := first.Key()
		e.Key = strings.Join(key, ".")
		parent := strings.Join(key[:max(0, len(key)-1)], ".")
		e.Problem = "unknown key"
		if known, ok := knownKeys[parent]; ok {
			e.Problem += "; known here: " + known
		}
		if more := len(unknown.Errors) - 1; more > 0 {
			e.Problem += fmt.Sprintf(" (and %d more unknown keys)", more)
		}
	case errors.As(err, &bad):
		e.Line, e.Column = bad.Position()
		e.Key = strings.Join(bad.Key(), ".")
		e.Problem = strings.TrimPrefix(bad.Error(), "toml: ")
		if _, table := knownKeys[e.Key]; table && strings.HasPrefix(e.Problem, "cannot ") {
			e.Problem = "is one table: write [" + e.Key + "] and its keys under it"
		}
	}
	return e
}

// NewTransport reads the key files, which are judged, and makes the transport.
func (p *Peer) NewTransport(file string) (transport.Transport, error) {
	o := transport.Options{UserTimeout: p.Timeout}
	in := func(key string, err error) error {
		return &Error{File: file, Key: "peer." + key, Problem: err.Error(), Err: err}
	}
	switch p.Transport {
	case transport.NameTLS:
		key, err := transport.LoadTLSKey(p.TLSKey)
		if err != nil {
			return nil, in("tls_key", err)
		}
		pin, err := transport.LoadPin(p.TLSPeer)
		if err != nil {
			return nil, in("tls_peer", err)
		}
		t, err := transport.NewTLS(p.Address.Addr(), key, pin, o)
		if err != nil {
			return nil, in("tls_peer", err)
		}
		return t, nil
	case transport.NamePlain:
		t, err := transport.NewPlain(p.Address.Addr(), o)
		if err != nil {
			return nil, in("transport", err)
		}
		return t, nil
	}
	key, err := transport.LoadKey(p.KeyFile)
	if err != nil {
		return nil, in("key_file", err)
	}
	t, err := transport.NewMD5Sig(p.Address.Addr(), key, o)
	if err != nil {
		return nil, in("transport", err)
	}
	return t, nil
}

// Options are those to open the volume with. t is the way to the peer.
func (c *Config) Options(t transport.Transport) nvmmirror.Options {
	o := nvmmirror.Options{Ack: c.Ack, OnPeerLoss: c.OnPeerLoss}
	if p := c.Peer; p != nil {
		o.Peer = &nvmmirror.Peer{
			Listen: p.Listen.String(), Address: p.Address.String(), Transport: t,
			Timeout: p.Timeout, BusyPoll: p.BusyPoll, Connections: p.Connections,
		}
		if p.BusyPoll == 0 {
			o.Peer.BusyPoll = -1 // there, 0 is the default
		}
	}
	return o
}
