package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/nvmmirror/nvmmirror"
)

const whole = `region = "/mnt/pmem0/vol0.nvm"
ack = "async"
on_peer_loss = "alone"
[peer]
listen = "10.0.0.1:7447"
address = "10.0.0.2:7448"
key_file = "/etc/nvmmirror/vol0.key"
timeout = "2s"
busy_poll = "70us"
connections = 3
[admin]
socket = "/run/nvmmirror/x.sock"
`

func TestParseWhole(t *testing.T) {
	c, err := Parse("f", []byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	if c.Socket != "/run/nvmmirror/x.sock" {
		t.Errorf("socket %q", c.Socket)
	}
	want := nvmmirror.Options{
		Ack: nvmmirror.AckAsync, OnPeerLoss: nvmmirror.Alone,
		Peer: &nvmmirror.Peer{Listen: "10.0.0.1:7447", Address: "10.0.0.2:7448", Timeout: 2 * time.Second, BusyPoll: 70 * time.Microsecond, Connections: 3},
	}
	if d := cmp.Diff(want, c.Options(nil), cmpopts.IgnoreUnexported(want)); d != "" {
		t.Error(d)
	}
}

func TestParseDefaults(t *testing.T) {
	c, err := Parse("f", []byte(`region = "/mnt/vol0.nvm"`))
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{Region: "/mnt/vol0.nvm", Ack: nvmmirror.AckBoth, OnPeerLoss: nvmmirror.Block, Socket: "/run/nvmmirror/vol0.sock"}
	if d := cmp.Diff(want, c); d != "" {
		t.Error(d)
	}
	c, err = Parse("f", []byte(strings.NewReplacer("timeout", "#", "busy_poll", "#").Replace(whole)))
	if err != nil || c.Peer.Timeout != nvmmirror.DefaultTimeout || c.Peer.BusyPoll != nvmmirror.DefaultBusyPoll {
		t.Errorf("%+v, %v", c, err)
	}
	c, err = Parse("f", []byte(strings.ReplaceAll(whole, "70us", "0s")))
	if err != nil || c.Options(nil).Peer.BusyPoll >= 0 {
		t.Errorf("a busy_poll of 0 is not none: %+v, %v", c, err)
	}
}

// Each message says where, which key, and what.
func TestParseErrors(t *testing.T) {
	change := func(old, new string) string {
		if !strings.Contains(whole, old) {
			t.Fatalf("no %q in the sample", old)
		}
		return strings.Replace(whole, old, new, 1)
	}
	for _, c := range []struct{ name, text, want string }{
		{"empty", "", `f: region: is missing`},
		{"unknown key", change("ack =", "akc ="), `f:2:1: akc: unknown key; known here: region, ack, on_peer_loss, [peer], [admin]`},
		{"role", "role = \"primary\"\n" + whole, `f:1:1: role: unknown key; known here: region, ack, on_peer_loss, [peer], [admin]`},
		{"unknown in a table", change("timeout", "tiemout"), `f:8:1: peer.tiemout: unknown key; known here: listen, address, transport, key_file, tls_key, tls_peer, timeout, busy_poll, connections`},
		{"two unknown", change("timeout", "x = 1\ny"), `f:8:1: peer.x: unknown key; known here: listen, address, transport, key_file, tls_key, tls_peer, timeout, busy_poll, connections (and 1 more unknown keys)`},
		{"unknown table", whole + "[arbiter]\nx = 1", `f:13:2: arbiter: unknown key; known here: region, ack, on_peer_loss, [peer], [admin]`},
		{"case", change("ack =", "Ack ="), `f:2:1: Ack: unknown key; write ack: case counts`},
		{"both cases", change("ack =", "ack = \"both\"\nACK ="), `f:3:1: ACK: unknown key; write ack: case counts`},
		{"the right case last", change("ack =", "ACK = \"both\"\nack ="), `f:2:1: ACK: unknown key; write ack: case counts`},
		{"case of a table", change("[admin]", "[Peer]\ntimeout = \"3s\"\n[admin]"), `f:11:2: Peer: unknown key; write peer: case counts`},
		{"case in a table", change("timeout", "TimeOut"), `f:8:1: peer.TimeOut: unknown key; write timeout: case counts`},
		{"case in a dotted key", change("[peer]", "Peer.Connections = 1\n[peer]"), `f:4:1: Peer.Connections: unknown key; write peer.connections: case counts`},
		{"case in quotes", change("connections", "\"Connections\""), `f:10:1: peer.Connections: unknown key; write connections: case counts`},
		{"case beyond ASCII", change("listen", "\"l\u0130sten\""), "f:5:1: peer.l\u0130sten: unknown key; write listen: case counts"},
		{"case inline", "region = \"/a\"\nadmin = {Socket = \"/s\"}", `f:2:1: admin.Socket: unknown key; write socket: case counts`},
		{"syntax", change(`"async"`, `async`), `f:2:7: unexpected character U+0061 'a' at start of value`},
		{"twice", whole + "socket = \"/x\"", `f:13:1: socket: key socket is already defined`},
		{"region number", change(`"/mnt/pmem0/vol0.nvm"`, "7"), `f:1:1: region: is 7, not a path in quotes`},
		{"region empty", change(`"/mnt/pmem0/vol0.nvm"`, `""`), `f:1:1: region: is empty`},
		{"region relative", change(`"/mnt`, `"mnt`), `f:1:1: region: is "mnt/pmem0/vol0.nvm", not an absolute path`},
		{"ack", change(`"async"`, `"none"`), `f:2:1: ack: is "none", not "both" or "async"`},
		{"on_peer_loss", change(`"alone"`, `true`), `f:3:1: on_peer_loss: is true, not a word in quotes`},
		{"listen missing", change(`listen`, `# listen`), `f:4:2: peer.listen: is missing`},
		{"listen name", change(`"10.0.0.1:7447"`, `"node-a:7447"`), `f:5:1: peer.listen: is "node-a:7447", not an IP address with a port, such as "10.0.0.1:7447" or "[fd00::1]:7447"`},
		{"listen wildcard", change(`"10.0.0.1:7447"`, `"0.0.0.0:7447"`), `f:5:1: peer.listen: is "0.0.0.0:7447": connections are made from this node's address to the peer's, so both must be definite`},
		{"listen wildcard, mapped", change(`"10.0.0.1:7447"`, `"[::ffff:0.0.0.0]:7447"`), `f:5:1: peer.listen: is "[::ffff:0.0.0.0]:7447": connections are made from this node's address to the peer's, so both must be definite`},
		{"peer is itself, mapped", change(`"10.0.0.2:7448"`, `"[::ffff:10.0.0.1]:7447"`), `f:6:1: peer.address: is 10.0.0.1:7447, as peer.listen: a node cannot be its own peer`},
		{"listen link-local", change(`"10.0.0.1:7447"`, `"[fe80::1]:7447"`), `f:5:1: peer.listen: is [fe80::1]:7447, which each interface may have: name one, as in "[fe80::1%eth0]:7447"`},
		{"listen multicast", change(`"10.0.0.1:7447"`, `"224.0.0.1:7447"`), `f:5:1: peer.listen: is "224.0.0.1:7447": connections are made from this node's address to the peer's, so both must be definite`},
		{"no port", change(`"10.0.0.2:7448"`, `"10.0.0.2"`), `f:6:1: peer.address: is "10.0.0.2", not an IP address with a port, such as "10.0.0.1:7447" or "[fd00::1]:7447"`},
		{"own peer", change(`"10.0.0.2:7448"`, `"10.0.0.1:7447"`), `f:6:1: peer.address: is 10.0.0.1:7447, as peer.listen: a node cannot be its own peer`},
		{"families", change(`"10.0.0.2:7448"`, `"[fd00::2]:7448"`), `f:6:1: peer.address: is [fd00::2]:7448, and peer.listen is 10.0.0.1:7447: both must be IPv4, or both IPv6`},
		{"key file missing", change(`key_file`, `# key_file`), `f:4:2: peer.key_file: is missing`},
		{"duration number", change(`"2s"`, `2`), `f:8:1: peer.timeout: is 2, not a duration such as "1s" or "50us" in quotes`},
		{"duration unit", change(`"2s"`, `"2"`), `f:8:1: peer.timeout: is "2", not a duration such as "1s" or "50us"`},
		{"duration negative", change(`"2s"`, `"-2s"`), `f:8:1: peer.timeout: is -2s, not from 50ms to 10m0s`},
		{"duration short", change(`"2s"`, `"49ms"`), `f:8:1: peer.timeout: is 49ms, not from 50ms to 10m0s`},
		{"connections", change("connections = 3", "connections = 17"), `f:10:1: peer.connections: is 17, not from 1 to 16`},
		{"connections in words", change("connections = 3", `connections = "3"`), `f:10:1: peer.connections: is "3", not a whole number`},
		{"busy_poll", change(`"70us"`, `"2s"`), `f:9:1: peer.busy_poll: is 2s, not from 0s to 1s`},
		{"socket long", change(`/run/nvmmirror/x`, "/"+strings.Repeat("x", 120)), `f:12:1: admin.socket: has 126 bytes, the kernel takes 107 in a socket's path`},
		{"peer is no table", strings.Split(whole, "[peer]")[0] + "peer = 3", `f:4:8: peer: is one table: write [peer] and its keys under it`},
		{"peer is many", change("[peer]", "[[peer]]"), `f:4:3: peer: is one table: write [peer] and its keys under it`},
		{"inline", "region = \"/a\"\npeer = {listen = 5, address = \"10.0.0.1:1\", key_file = \"/k\"}", `f:2:1: peer.listen: is 5, not an address such as "10.0.0.1:7447" in quotes`},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := Parse("f", []byte(c.text))
			if err == nil {
				t.Fatalf("accepted: %+v", got)
			}
			var e *Error
			if !errors.As(err, &e) {
				t.Errorf("a %T", err)
			}
			if err.Error() != c.want {
				t.Errorf("\n got %s\nwant %s", err, c.want)
			}
		})
	}
}

// The bounds are the library's.
func TestTimeoutBounds(t *testing.T) {
	for _, d := range []time.Duration{nvmmirror.MinTimeout - 1, nvmmirror.MaxTimeout + 1} {
		_, err := nvmmirror.Open(filepath.Join(t.TempDir(), "none"), nvmmirror.Options{Peer: &nvmmirror.Peer{Timeout: d}})
		if err == nil || !strings.Contains(err.Error(), "peer timeout") {
			t.Errorf("%v: %v", d, err)
		}
	}
	for _, d := range []time.Duration{nvmmirror.MinTimeout, nvmmirror.MaxTimeout} {
		_, err := nvmmirror.Open(filepath.Join(t.TempDir(), "none"), nvmmirror.Options{Peer: &nvmmirror.Peer{Timeout: d}})
		if err == nil || strings.Contains(err.Error(), "peer timeout") {
			t.Errorf("%v: %v", d, err)
		}
	}
}

// The commented example is a configuration, and its values are the defaults.
func TestExample(t *testing.T) {
	const file = "../../hack/nvmmirrord.toml"
	c, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	if c.Peer.Timeout != nvmmirror.DefaultTimeout || c.Peer.BusyPoll != nvmmirror.DefaultBusyPoll || c.Ack != nvmmirror.AckBoth || c.OnPeerLoss != nvmmirror.Block {
		t.Errorf("%+v %+v", c, c.Peer)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for table, keys := range knownKeys {
		for key := range strings.SplitSeq(keys, ", ") {
			if !strings.Contains(string(text), "\n"+key) && !strings.Contains(string(text), "\n# "+key+" = ") {
				t.Errorf("%s of table %q is not in the example", key, table)
			}
		}
	}
}

func TestLoadErrors(t *testing.T) {
	dir := t.TempDir()
	for path, want := range map[string]string{filepath.Join(dir, "none.toml"): ": not read: no such file or directory; name a ", dir: ": not read: is a directory; name a "} {
		var e *Error
		if _, err := Load(path); !errors.As(err, &e) || !strings.HasPrefix(err.Error(), path+want) {
			t.Errorf("%v is not %q", err, path+want)
		}
	}
	big := filepath.Join(dir, "big.toml")
	if err := os.WriteFile(big, make([]byte, maxFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(big); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("big file: %v", err)
	}
}

// FuzzParse: no text makes it panic, and what it accepts can be run.
func FuzzParse(f *testing.F) {
	f.Add(whole)
	f.Add(`region = "/a"`)
	f.Add("region = \"/a\"\npeer = {listen = '[::1]:1', address = \"[::2]:1\", key_file = '''/k'''}")
	f.Add(string(peerWith("transport = 'tls'\ntls_key = '/a'\ntls_peer = '/b'")))
	f.Add("[peer]\n[peer.listen]\nx = 1979-05-27T07:32:00Z\n[[admin]]\n")
	f.Add("\"region\" = \"\\u0000\"\nadmin.socket = '/x'")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := Parse("f", []byte(text))
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || e.Problem == "" || strings.Count(text, "\n")+1 < e.Line {
				t.Fatalf("%T: %v", err, err)
			}
			return
		}
		if !filepath.IsAbs(c.Region) || !filepath.IsAbs(c.Socket) || len(c.Socket) > maxSocket {
			t.Fatalf("%+v", c)
		}
		if p := c.Peer; p != nil {
			if p.Timeout < nvmmirror.MinTimeout || p.Timeout > nvmmirror.MaxTimeout || p.BusyPoll < 0 ||
				(p.Transport == "md5sig") == (p.KeyFile == "") || (p.Transport == "tls") == (p.TLSKey == "" || p.TLSPeer == "") ||
				p.Listen == p.Address || p.Listen.Addr().Is4() != p.Address.Addr().Is4() || p.Listen.Port() == 0 {
				t.Fatalf("%+v", p)
			}
		}
		c.Options(nil)
	})
}
