package chaos

import (
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/internal/faultwire"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// The same pair without signatures: TCP's checksum lets each swapped word and
// each +1/-1 pass, so corruption reaches the pair, and its own CRC must find
// it: asked for again where a segment's body is hit, a new session where a
// header is. Nothing wrong is applied, nothing acknowledged is lost.
func TestWirePlain(t *testing.T) {
	seed := seedOf(t)
	r := newRig(t, pairConfig{timeout: 2 * time.Second, seed: seed, transport: transport.NamePlain})
	const every = 400
	plan := faultwire.Plan{Swap: faultwire.Rule{Every: 2 * every}, Add: faultwire.Rule{Every: 2 * every}}
	before := r.read()
	r.wire.SetPlan(plan)
	want := uint64(sized(2_000, 60))
	poll(t, wireTime, "corrupted packets", func() (bool, string) {
		a, b := r.wire.BtoA.Stats(), r.wire.AtoB.Stats()
		return t.Failed() || a.Corrupted()+b.Corrupted() >= want, r.b.lastLines()
	})
	r.wire.SetPlan(faultwire.Plan{})
	r.load.more(writers)
	after := r.read()
	for _, s := range []*suffered{
		since("a", after.toA, before.toA, after.atA, before.atA),
		since("b", after.toB, before.toB, after.atB, before.atB),
	} {
		t.Logf("%v", s)
		if s.md5+s.checksum+s.short != 0 {
			t.Errorf("the kernel found damage that it cannot find: %v", s)
		}
	}
	a, b := r.a.status().Counters, r.b.status().Counters
	t.Logf("CRC failures %d and %d, resends %d, reconnects %d, in %.0f s", a.CRCFailures, b.CRCFailures, a.Resends, after.reconnects-before.reconnects, time.Since(r.start).Seconds())
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
