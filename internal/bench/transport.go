package bench

import (
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// Transport is a way to carry messages that [Wire] measures.
type Transport string

const (
	Plain     Transport = "plain"
	MD5Sig    Transport = "md5sig"
	MD5User   Transport = "md5-userspace"
	MD5Kernel Transport = "md5-af_alg"
	CRC32C    Transport = "crc32c"
	TLS       Transport = "tls"

	frameLimit     = chunk // bytes under one digest
	maxConnections = 64
)

// Transports are all of them, in the order in which they are measured.
func Transports() []Transport {
	return []Transport{Plain, MD5Sig, MD5User, MD5Kernel, CRC32C, TLS}
}

// ParseTransport finds a transport by its name.
func ParseTransport(name string) (Transport, error) {
	t := Transport(name)
	if slices.Contains(Transports(), t) {
		return t, nil
	}
	var names []string
	for _, t := range Transports() {
		names = append(names, string(t))
	}
	return "", fmt.Errorf("no transport %q; there are %s", name, strings.Join(names, ", "))
}

// UnsupportedError: one of the ends does not have the transport.
type UnsupportedError struct {
	Transport Transport
	Reason    string
}

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("transport %s: %s", e.Transport, e.Reason)
}

func (s *setup) signingKey() []byte {
	if s.Transport == MD5Sig {
		return s.Key
	}
	return nil
}

// A maker makes links of connected sockets, at one end.
type maker struct {
	s   setup
	tls *transport.TLSKey
}

func newMaker(s setup) (*maker, error) {
	// A driver of another version may name one that would be plain here.
	if _, err := ParseTransport(string(s.Transport)); err != nil {
		return nil, fmt.Errorf("%w: run the same version of nvmmirrord at both ends", err)
	}
	m := &maker{s: s}
	var err error
	switch s.Transport {
	case MD5Sig:
		err = transport.Probe()
	case MD5Kernel:
		err = probeALG()
	case TLS:
		if m.tls, err = transport.NewTLSKey(); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, &UnsupportedError{s.Transport, err.Error()}
	}
	return m, nil
}

// pin is what the other end must know of this end's key, nil for none.
func (m *maker) pin() []byte {
	if m.tls == nil {
		return nil
	}
	pin := m.tls.Pin()
	return pin[:]
}

// link takes the socket over, on failure too.
func (m *maker) link(raw *rawLink, peer []byte, server bool) (link, error) {
	switch m.s.Transport {
	case MD5User:
		return newFramed(raw, newMD5(m.s.Key)), nil
	case CRC32C:
		return newFramed(raw, &crc{}), nil
	case MD5Kernel:
		d, err := newALG(m.s.Key, raw)
		if err != nil {
			raw.close()
			return nil, err
		}
		return newFramed(raw, d), nil
	case TLS:
		return newTLSLink(raw, m.tls, peer, server)
	}
	return raw, nil
}

// processors is how many threads should be able to run Go code at a time: with
// one per connection, each of which may be inside a system call, the kernel is
// to share out the processors, not the Go scheduler. One connection leaves the
// process as it is.
func (s *setup) processors() int {
	if s.Connections == 1 {
		return 0
	}
	return s.Connections + 1
}

func withProcessors(n int) (undo func()) {
	before := runtime.GOMAXPROCS(0)
	if n <= before {
		return func() {}
	}
	runtime.GOMAXPROCS(n)
	return func() { runtime.GOMAXPROCS(before) }
}
