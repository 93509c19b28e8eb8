package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// connected replaces what a node's configuration says of its transport.
func (n *node) connected(lines string) {
	n.t.Helper()
	text, err := os.ReadFile(n.config)
	if err == nil {
		now := regexp.MustCompile(`(?m)^(transport|key_file|tls_key|tls_peer) = .*\n`).ReplaceAllString(string(text), "")
		err = os.WriteFile(n.config, []byte(strings.Replace(now, "[peer]\n", "[peer]\n"+lines, 1)), 0o600)
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// tlsLines are the configuration of a node whose keys are own and peer, as
// prefixes.
func tlsLines(own, peer string) string {
	return fmt.Sprintf("transport = \"tls\"\ntls_key = %q\ntls_peer = %q\n", own+".key", peer+".pub")
}

func TestKeyGenerateTLS(t *testing.T) {
	t.Parallel()
	prefix := filepath.Join(t.TempDir(), "node")
	out := must(t, "key", "generate", "--tls", prefix)
	pin, err := transport.LoadPin(prefix + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{prefix + ".key, which stays", prefix + ".pub, to be copied", pin.String()} {
		if !strings.Contains(out, want) {
			t.Errorf("%q does not say %q", out, want)
		}
	}
	if _, err := transport.LoadTLSKey(prefix + ".key"); err != nil {
		t.Error(err)
	}
	fails(t, exitFailed, []string{"key", "generate", "--tls", prefix}, prefix+".pub", "exists and is not overwritten")
	fails(t, exitUsage, []string{"key", "generate", "--tls"}, "accepts 1 arg(s), received 0")
}

// Daemons over each transport that needs more than the key of both.
func TestServeTransports(t *testing.T) {
	t.Parallel()
	for _, name := range []string{transport.NameTLS, transport.NamePlain} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := pairOf(t, "", "500ms", sameKey)
			keys := t.TempDir()
			for i, n := range []*node{a, b} {
				lines := "transport = \"plain\"\n"
				if name == transport.NameTLS {
					must(t, "key", "generate", "--tls", filepath.Join(keys, n.name))
					lines = tlsLines(filepath.Join(keys, n.name), filepath.Join(keys, []string{"b", "a"}[i]))
				}
				n.connected(lines)
			}
			a.start()
			b.start()
			a.must("promote")
			for _, n := range []*node{a, b} {
				n.must("wait", "--for", "in-sync", "--timeout", "20s")
				if s := n.status(); s.Transport != name {
					t.Errorf("%s: %s is %q in status", n.name, name, s.Transport)
				}
				if out := n.must("status"); !regexp.MustCompile(`(?m)^transport +` + name).MatchString(out) {
					t.Errorf("%s", out)
				}
				if out := scrape(t, n.socket); !strings.Contains(out, fmt.Sprintf("nvmmirror_transport_info{transport=%q} 1\n", name)) {
					t.Errorf("metrics: %s", out)
				}
				log := n.log.String()
				if warned := strings.Contains(log, `"level":"warn"`) && strings.Contains(log, "transport plain: nothing but its address tells the peer"); warned != (name == transport.NamePlain) {
					t.Errorf("%s: warned of plain: %v", n.name, warned)
				}
				if pins := strings.Contains(log, "TLS keys"); pins != (name == transport.NameTLS) {
					t.Errorf("%s: pins in the log: %v", n.name, pins)
				}
			}
			data := random(t, 1<<20)
			if r := a.write(0, data, "--chunk", "200KiB"); r.code != exitDone {
				t.Fatalf("%+v", r)
			}
			a.kill()
			b.must("promote")
			a.start()
			b.must("wait", "--for", "in-sync", "--timeout", "20s")
			if !bytes.Equal(b.read(0, len(data)), data) {
				t.Error("the new primary has other data")
			}
		})
	}
}

func scrape(t *testing.T, socket string) string {
	t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	r, err := c.Get("http://node/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// The wrong public key at one of two daemons: both say so in status, and what
// to do. A file that is not fit is refused at start, by the name of its key.
func TestServeWrongPin(t *testing.T) {
	t.Parallel()
	a, b := pairOf(t, "", "500ms", sameKey)
	keys := t.TempDir()
	at := func(name string) string { return filepath.Join(keys, name) }
	for _, name := range []string{"a", "b", "other"} {
		must(t, "key", "generate", "--tls", at(name))
	}
	a.connected(tlsLines(at("a"), at("other")))
	b.connected(tlsLines(at("b"), at("a")))
	a.start()
	b.start()
	for n, want := range map[*node]string{a: "another key than the one pinned here", b: "the peer refused this node's key"} {
		n.eventually("saying "+want, func() bool { return strings.Contains(n.now().Reason, want) })
		if out := n.must("status"); !strings.Contains(out, want) || !strings.Contains(out, "tls_peer") {
			t.Errorf("%s: %s", n.name, out)
		}
	}
	serve := []string{"serve", "--config"}
	if err := os.Chmod(at("other.key"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		lines, key, want string
	}{
		{tlsLines(at("other"), at("b")), "peer.tls_key", "has mode 0644: others than its owner have access; chmod 600"},
		{tlsLines(at("none"), at("b")), "peer.tls_key", "does not exist; make a pair with: nvmmirrord key generate --tls"},
		{tlsLines(at("a"), at("none")), "peer.tls_peer", "does not exist; copy the .pub file"},
		{tlsLines(at("a"), at("a")), "peer.tls_peer", "this node's own"},
		{fmt.Sprintf("key_file = %q\n", at("a.key")), "peer.key_file", "holds a key of TLS, not of md5sig"},
		{tlsLines(at("a"), at("b")) + fmt.Sprintf("key_file = %q\n", at("a.key")), "peer.key_file", `is for transport = "md5sig", and transport is "tls"`},
	} {
		n := newNode(t, directory(t), "c", "", "[peer]\nlisten = \"127.0.0.1:1\"\naddress = \"127.0.0.1:2\"\n")
		n.connected(c.lines)
		fails(t, exitUsage, append(serve, n.config), n.config, c.key, c.want)
	}
}
