package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// peerWith is a configuration whose [peer] has these further lines.
func peerWith(lines string) []byte {
	return []byte("region = \"/r\"\n[peer]\nlisten = \"127.0.0.1:1\"\naddress = \"127.0.0.1:2\"\n" + lines)
}

// Each transport takes its own keys and no other's.
func TestParseTransport(t *testing.T) {
	const md5, tlsKeys = "key_file = \"/k\"\n", "tls_key = \"/a.key\"\ntls_peer = \"/b.pub\"\n"
	for _, c := range []struct{ lines, want string }{
		{md5, ""},
		{"transport = \"md5sig\"\n" + md5, ""},
		{"transport = \"tls\"\n" + tlsKeys, ""},
		{"transport = \"plain\"\n", ""},
		{"transport = \"ipsec\"\n", `f:5:1: peer.transport: is "ipsec", not "md5sig", "tls" or "plain"`},
		{"", `f:2:2: peer.key_file: is missing`},
		{"transport = \"tls\"\n", `f:2:2: peer.tls_key: is missing`},
		{"transport = \"tls\"\ntls_key = \"/a.key\"\n", `f:2:2: peer.tls_peer: is missing`},
		{"transport = \"tls\"\n" + md5 + tlsKeys, `f:6:1: peer.key_file: is for transport = "md5sig", and transport is "tls": take one of the two out`},
		{tlsKeys + md5, `f:5:1: peer.tls_key: is for transport = "tls", and transport is "md5sig": take one of the two out`},
		{"transport = \"plain\"\n" + md5, `f:6:1: peer.key_file: is for transport = "md5sig", and transport is "plain": take one of the two out`},
		{"transport = \"tls\"\ntls_key = \"a.key\"\n", `f:6:1: peer.tls_key: is "a.key", not an absolute path`},
	} {
		got, err := Parse("f", peerWith(c.lines))
		switch {
		case c.want != "" && (err == nil || err.Error() != c.want):
			t.Errorf("%q:\n got %v\nwant %s", c.lines, err, c.want)
		case c.want == "" && err != nil:
			t.Errorf("%q: %v", c.lines, err)
		case c.want == "" && !strings.Contains(c.lines, got.Peer.Transport) && got.Peer.Transport != "md5sig":
			t.Errorf("%q is %s", c.lines, got.Peer.Transport)
		}
	}
}

func TestNewTransport(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"a", "b"} {
		if _, _, _, err := transport.GenerateTLSKey(at(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := transport.GenerateKey(at("md5.key")); err != nil {
		t.Fatal(err)
	}
	public, err := os.ReadFile(at("a.pub"))
	if err == nil {
		err = os.WriteFile(at("public"), public, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	both := func(key, peer string) string {
		return "transport = \"tls\"\ntls_key = \"" + at(key) + "\"\ntls_peer = \"" + at(peer) + "\"\n"
	}
	for _, c := range []struct{ lines, want, says string }{
		{both("a.key", "b.pub"), "tls", ""},
		{"transport = \"plain\"\n", "plain", ""},
		{"key_file = \"" + at("md5.key") + "\"\n", "md5sig", ""},
		{both("none.key", "b.pub"), "", "f: peer.tls_key: key file " + at("none.key") + ": does not exist"},
		{both("a.key", "none.pub"), "", "f: peer.tls_peer: key file " + at("none.pub") + ": does not exist"},
		{both("md5.key", "b.pub"), "", "holds a key of md5sig"},
		{both("public", "b.pub"), "", "tls_key is this node's .key file"},
		{both("a.key", "b.key"), "", "a private key does not leave its node"},
		{both("b.pub", "a.pub"), "", "has mode 0644: others than its owner have access"},
		{both("a.key", "a.pub"), "", "f: peer.tls_peer: transport tls: the peer's public key is this node's own"},
		{"key_file = \"" + at("a.key") + "\"\n", "", "holds a key of TLS, not of md5sig"},
	} {
		cfg, err := Parse("f", peerWith(c.lines))
		if err != nil {
			t.Fatal(err)
		}
		tr, err := cfg.Peer.NewTransport("f")
		var un *transport.UnsupportedError
		switch {
		case errors.As(err, &un):
			t.Logf("needs TCP_MD5SIG: %v", err) // qemu-user
		case c.says == "" && (err != nil || tr.Name() != c.want):
			t.Errorf("%q: %v", c.lines, err)
		case c.says != "" && (!errors.As(err, new(*Error)) || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%q: %v does not say %q", c.lines, err, c.says)
		}
	}
}

// The sample that is shipped is good for each transport that it describes.
func TestSampleTransports(t *testing.T) {
	sample, err := os.ReadFile("../../hack/nvmmirrord.toml")
	if err != nil {
		t.Fatal(err)
	}
	text := string(sample)
	if _, err := Parse("sample", sample); err != nil {
		t.Fatal(err)
	}
	text = strings.NewReplacer("\ntransport = \"md5sig\"", "\ntransport = \"tls\"", "\nkey_file", "\n# key_file", "\n# tls_", "\ntls_").Replace(text)
	c, err := Parse("sample", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if c.Peer.Transport != "tls" || c.Peer.TLSKey == "" || c.Peer.TLSPeer == "" {
		t.Errorf("%+v", c.Peer)
	}
}
