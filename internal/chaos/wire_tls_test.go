package chaos

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// transportLines are n's part of a configuration that says how it is connected
// to the other node. Keys are made as an administrator would.
func (p *pair) transportLines(n, other *node, c pairConfig) string {
	p.t.Helper()
	at := func(n *node, name string) string { return filepath.Join(n.fs.dir, name) }
	var err error
	defer func() {
		if err != nil {
			p.t.Fatal(err)
		}
	}()
	switch c.transport {
	case transport.NamePlain:
		return `transport = "plain"`
	case transport.NameTLS:
		var key, pub string
		var public []byte
		if key, pub, _, err = transport.GenerateTLSKey(at(n, n.name)); err != nil {
			return ""
		}
		if public, err = os.ReadFile(pub); err == nil {
			err = os.WriteFile(at(other, "peer.pub"), public, 0o644)
		}
		return fmt.Sprintf("transport = \"tls\"\ntls_key = %q\ntls_peer = %q", key, at(n, "peer.pub"))
	}
	key := at(n, "pair.key")
	err = os.WriteFile(key, fmt.Appendf(nil, "key-of-seed-%d\n", c.seed), 0o600)
	return fmt.Sprintf("key_file = %q", key)
}

// The same pair over TLS: what TCP's checksum lets pass breaks a record's tag.
// The connection ends, the session begins anew; not one damaged byte comes as
// far as the pair's own checksums, and nothing acknowledged is lost.
func TestWireTLS(t *testing.T) {
	r := newRig(t, pairConfig{timeout: 2 * time.Second, seed: seedOf(t), transport: transport.NameTLS})
	corrupted, reconnects := r.unseen(sized(20, 10))
	t.Logf("%d packets corrupted, %d new sessions at both nodes together, in %.0f s", corrupted, reconnects, time.Since(r.start).Seconds())
	if reconnects == 0 {
		t.Error("no corruption arrived, or none was found")
	}
	named := 0
	for _, n := range []*node{r.a, r.b} {
		text, err := os.ReadFile(n.log)
		if err != nil {
			t.Fatal(err)
		}
		named += strings.Count(string(text), "a record was damaged on the way")
		c := n.status().Counters
		if c.CRCFailures+c.Resends+c.BadBlocks+c.RepairedBlocks+c.Refused != 0 {
			t.Errorf("%s: damage got behind TLS: %+v", n.name, c)
		}
	}
	if named == 0 {
		t.Error("no log names the damage")
	}
	r.load.end()
	r.identical()
	t.Logf("%d transactions of %d MB acknowledged and verified on both nodes; the damage is in the logs %d times", r.load.commits.Load(), r.load.bytes.Load()>>20, named)
}
