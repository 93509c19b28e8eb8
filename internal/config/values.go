package config

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2/unstable"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// position is where a key stands in the file, from 1.
type position struct{ line, column int }

// find finds the keys of a document that the decoder has accepted, and refuses one
// that it accepted without regard to case: beside its other spelling, the last one
// would hold. Those of inline tables have the position of the table's key.
func (r *reader) find(text []byte) {
	r.at = map[string]position{}
	var p unstable.Parser
	p.Reset(text)
	var table string
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind != unstable.Table && e.Kind != unstable.KeyValue {
			continue
		}
		first := e.Key()
		first.Next()
		start := p.Shape(first.Node().Raw).Start
		in := table
		if e.Kind == unstable.Table {
			table, in = dotted("", e), ""
		}
		r.found(in, e, position{start.Line, start.Column})
	}
}

// found takes a table's key, or a key with its value, of the table in.
func (r *reader) found(in string, e *unstable.Node, at position) {
	key := dotted(in, e)
	r.at[key] = at
	if lower := strings.ToLower(key); lower != key && isKnown(lower) {
		write := lower
		if i := strings.LastIndexByte(key, '.'); i >= 0 {
			write = strings.TrimPrefix(write, key[:i+1])
		}
		r.fail(key, "unknown key; write %s: case counts", write)
	}
	if e.Kind != unstable.KeyValue || e.Value().Kind != unstable.InlineTable {
		return
	}
	for i := e.Value().Children(); i.Next(); {
		if i.Node().Kind == unstable.KeyValue {
			r.found(key, i.Node(), at)
		}
	}
}

// dotted is the whole key of e in a table.
func dotted(in string, e *unstable.Node) string {
	var name []string
	if in != "" {
		name = append(name, in)
	}
	for k := e.Key(); k.Next(); {
		name = append(name, string(k.Node().Data))
	}
	return strings.Join(name, ".")
}

// isKnown reports whether a key, or a table, is one of knownKeys.
func isKnown(key string) bool {
	table, name, ok := strings.Cut(key, ".")
	if !ok {
		table, name = "", key
	}
	for known := range strings.SplitSeq(knownKeys[table], ", ") {
		if strings.Trim(known, "[]") == name {
			return true
		}
	}
	return false
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

// oneOf is one of some words, the first where there is none.
func oneOf[T ~string](r *reader, key string, v any, words ...T) T {
	s, ok := r.text(key, v, "a word")
	if !ok {
		return words[0]
	}
	if !slices.Contains(words, T(s)) {
		last := len(words) - 1
		var list string
		for _, w := range words[:last] {
			list += fmt.Sprintf("%q, ", w)
		}
		r.fail(key, "is %q, not %s or %q", s, strings.TrimSuffix(list, ", "), words[last])
	}
	return T(s)
}

// keys are the files that the transport needs, and no other's: a key that is
// not used would look as if it protected something.
func (r *reader) keys(p *Peer, d *peerDoc) {
	for _, k := range []struct {
		name, of string
		value    any
		to       *string
	}{
		{"key_file", transport.NameMD5Sig, d.KeyFile, &p.KeyFile},
		{"tls_key", transport.NameTLS, d.TLSKey, &p.TLSKey},
		{"tls_peer", transport.NameTLS, d.TLSPeer, &p.TLSPeer},
	} {
		switch {
		case k.of == p.Transport:
			*k.to = r.path("peer."+k.name, k.value, true)
		case k.value != nil:
			r.fail("peer."+k.name, "is for transport = %q, and transport is %q: take one of the two out", k.of, p.Transport)
		}
	}
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

// number is a whole number from least to most.
func (r *reader) number(key string, v any, otherwise, least, most int) int {
	if v == nil {
		return otherwise
	}
	n, ok := v.(int64)
	if !ok {
		r.fail(key, "is %#v, not a whole number", v)
		return otherwise
	}
	if n < int64(least) || n > int64(most) {
		r.fail(key, "is %d, not from %d to %d", n, least, most)
	}
	return int(n)
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
	a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) // ::ffff:0.0.0.0 is 0.0.0.0
	switch {
	case err != nil:
		r.fail(key, `is %q, not an IP address with a port, such as "10.0.0.1:7447" or "[fd00::1]:7447"`, s)
	case a.Addr().IsUnspecified() || a.Addr().IsMulticast() || a.Port() == 0:
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
	case p.Listen.Addr().IsLinkLocalUnicast() && p.Listen.Addr().Is6() && p.Listen.Addr().Zone() == "":
		r.fail("peer.listen", "is %v, which each interface may have: name one, as in \"[%v%%eth0]:%d\"", p.Listen, p.Listen.Addr(), p.Listen.Port())
	case p.Listen.Addr().Is4() != p.Address.Addr().Is4():
		r.fail("peer.address", "is %v, and peer.listen is %v: both must be IPv4, or both IPv6", p.Address, p.Listen)
	}
}
