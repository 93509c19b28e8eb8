package config

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2/unstable"
)

// position is where a key stands in the file, from 1.
type position struct{ line, column int }

// positions finds the keys of a document that the decoder has accepted. Those
// of inline tables have the position of the table's key.
func positions(text []byte) map[string]position {
	at := map[string]position{}
	var p unstable.Parser
	p.Reset(text)
	var table string
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind != unstable.Table && e.Kind != unstable.KeyValue {
			continue
		}
		var name []string
		var first *unstable.Node
		for k := e.Key(); k.Next(); {
			if first == nil {
				first = k.Node()
			}
			name = append(name, string(k.Node().Data))
		}
		key := strings.Join(name, ".")
		if e.Kind == unstable.Table {
			table = key
		} else if table != "" {
			key = table + "." + key
		}
		start := p.Shape(first.Raw).Start
		at[key] = position{start.Line, start.Column}
	}
	return at
}

// reader judges values. It keeps the first error.
type reader struct {
	file string
	at   map[string]position
	err  error
}

func (r *reader) fail(key, format string, args ...any) {
	if r.err != nil {
		return
	}
	e := &Error{File: r.file, Key: key, Problem: fmt.Sprintf(format, args...)}
	for k, ok := key, true; ok; {
		if p, found := r.at[k]; found {
			e.Line, e.Column = p.line, p.column
			break
		}
		i := strings.LastIndexByte(k, '.')
		if ok = i >= 0; ok {
			k = k[:i]
		}
	}
	r.err = e
}

// text is a string's value. ok is false where the key is not there, or is no
// string.
func (r *reader) text(key string, v any, want string) (s string, ok bool) {
	switch v := v.(type) {
	case nil:
		return "", false
	case string:
		return v, true
	default:
		r.fail(key, "is %v, not %s in quotes", v, want)
		return "", false
	}
}

func (r *reader) path(key string, v any, required bool) string {
	s, ok := r.text(key, v, "a path")
	switch {
	case !ok && required && v == nil:
		r.fail(key, "is missing")
	case ok && s == "":
		r.fail(key, "is empty")
	case strings.IndexByte(s, 0) >= 0:
		r.fail(key, "holds a zero byte")
	case ok && !filepath.IsAbs(s):
		r.fail(key, "is %q, not an absolute path", s)
	}
	return s
}

func oneOf[T ~string](r *reader, key string, v any, first, second T) T {
	s, ok := r.text(key, v, "a word")
	switch {
	case !ok:
		return first
	case T(s) != first && T(s) != second:
		r.fail(key, "is %q, not %q or %q", s, first, second)
	}
	return T(s)
}

func (r *reader) duration(key string, v any, otherwise, least, most time.Duration) time.Duration {
	s, ok := r.text(key, v, `a duration such as "1s" or "50us"`)
	if !ok {
		return otherwise
	}
	d, err := time.ParseDuration(s)
	switch {
	case err != nil:
		r.fail(key, `is %q, not a duration such as "1s" or "50us"`, s)
	case d < least || d > most:
		r.fail(key, "is %v, not from %v to %v", d, least, most)
	}
	return d
}

func (r *reader) addr(key string, v any) netip.AddrPort {
	s, ok := r.text(key, v, `an address such as "10.0.0.1:7447"`)
	if !ok {
		if v == nil {
			r.fail(key, "is missing")
		}
		return netip.AddrPort{}
	}
	a, err := netip.ParseAddrPort(s)
	switch {
	case err != nil:
		r.fail(key, `is %q, not an IP address with a port, such as "10.0.0.1:7447" or "[fd00::1]:7447"`, s)
	case a.Addr().IsUnspecified() || a.Port() == 0:
		r.fail(key, "is %q: connections are made from this node's address to the peer's, so both must be definite", s)
	}
	return a
}

// checkPair checks what holds between the two addresses.
func (r *reader) checkPair(p *Peer) {
	switch {
	case r.err != nil:
	case p.Listen == p.Address:
		r.fail("peer.address", "is %v, as peer.listen: a node cannot be its own peer", p.Address)
	case p.Listen.Addr().Is4() != p.Address.Addr().Is4():
		r.fail("peer.address", "is %v, and peer.listen is %v: both must be IPv4, or both IPv6", p.Address, p.Listen)
	}
}
