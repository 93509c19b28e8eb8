package chaos

import (
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// The same pair without signatures: TCP's checksum lets each swapped word and
// each +1/-1 pass, so corruption reaches the pair, and its own CRC must find
// it: asked for again where a segment's body is hit, a new session where a
// header is. Nothing wrong is applied, nothing acknowledged is lost.
func TestWirePlain(t *testing.T) {
	seed := seedOf(t)
	r := newRig(t, pairConfig{timeout: 2 * time.Second, seed: seed, transport: transport.NamePlain})
	_, reconnects := r.unseen(sized(2_000, 60))
	a, b := r.a.status().Counters, r.b.status().Counters
	t.Logf("CRC failures %d and %d, resends %d, reconnects %d, in %.0f s", a.CRCFailures, b.CRCFailures, a.Resends, reconnects, time.Since(r.start).Seconds())
	if b.CRCFailures == 0 || a.Resends == 0 {
		t.Errorf("no corruption arrived, or none was found: a %+v, b %+v", a, b)
	}
	if n := a.BadBlocks + b.BadBlocks + a.RepairedBlocks + b.RepairedBlocks + a.Refused + b.Refused; n != 0 {
		t.Errorf("damage got behind the CRC: a %+v, b %+v", a, b)
	}
	r.load.end()
	r.identical()
	t.Logf("%d transactions of %d MB acknowledged and verified on both nodes", r.load.commits.Load(), r.load.bytes.Load()>>20)
}
