package chaos

import (
	"bytes"
	"net/netip"

	"github.com/nvmmirror/nvmmirror/internal/faultwire"
)

// forgeries is how many packets of each kind the third party sends each way.
const forgeries = 50

// thirdParty is somebody on the path without the key: he forges resets and
// data with the right sequence numbers, unsigned and wrongly signed, and plays
// back what he has recorded. The pair goes on in one session.
func (r *rig) thirdParty() {
	r.t.Helper()
	before := r.read()
	wrong := bytes.Repeat([]byte{0x5a}, 16)
	lie := bytes.Repeat([]byte("not from the peer "), 20)
	sent := map[*faultwire.Direction]uint64{}
	for _, d := range []*faultwire.Direction{r.wire.AtoB, r.wire.BtoA} {
		d.Capture(512)
		r.load.more(2 * writers)
		src, dst := r.connection(d)
		for range forgeries {
			for _, digest := range [][]byte{nil, wrong} {
				for _, build := range []func(faultwire.Segment) []byte{
					func(s faultwire.Segment) []byte { return faultwire.ForgeRST(s, digest) },
					func(s faultwire.Segment) []byte { return faultwire.ForgeData(s, lie, digest) },
				} {
					if err := d.Forge(src, dst, build); err != nil {
						r.t.Fatalf("%v: %v", d, err)
					}
					sent[d]++
				}
			}
		}
		recorded := d.Captured()
		for _, s := range recorded {
			if err := d.Inject(s.Raw); err != nil {
				r.t.Fatalf("%v: %v", d, err)
			}
		}
		r.load.more(writers)
		d.Capture(0)
		r.t.Logf("third party, %v: %d forged, %d played back", d, sent[d], len(recorded))
	}
	after := r.read()
	for _, s := range []*suffered{
		since("a", after.toA, before.toA, after.atA, before.atA),
		since("b", after.toB, before.toB, after.atB, before.atB),
	} {
		// Half of what was forged was unsigned; what was played back was signed
		// rightly, once.
		if want := uint64(2 * forgeries); s.md5 != want || s.absent != want || s.checksum != 0 {
			r.t.Errorf("%s: %d wrongly signed and %d unsigned were counted, want %d each", s.node, s.md5, s.absent, want)
		}
	}
	if after.reconnects != before.reconnects {
		r.t.Errorf("%d reconnects: the third party reached the pair", after.reconnects-before.reconnects)
	}
}

// connection is the ends of the pair's connection, as seen in a capture.
func (r *rig) connection(d *faultwire.Direction) (src, dst netip.AddrPort) {
	r.t.Helper()
	for _, s := range d.Captured() {
		if len(s.Payload) > 0 && s.Digest != nil {
			return s.Src, s.Dst
		}
	}
	r.t.Fatalf("%v: no signed data captured", d)
	return src, dst
}
