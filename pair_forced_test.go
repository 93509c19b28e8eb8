package nvmmirror

import (
	"bytes"
	"context"
	"testing"

	"github.com/nvmmirror/nvmmirror/journal"
)

// A lone primary whose journal is damaged does not go on by itself. Forced, it
// gives the damaged log up, and no later recovery misses it.
func TestForcedLoss(t *testing.T) {
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
	b.close()
	a.until("alone", func(s Status) bool { return s.Serving && !a.pair.Required() })
	var ends []LSN
	for i := range 6 {
		ends = append(ends, commit(t, a, int64(i)*5000, bytes.Repeat([]byte{byte(i + 1)}, 100)))
	}
	a.crash()
	a.change(func(region []byte) {
		m := metadataOf(t, region)
		ring := journal.Ring{Bytes: region[m.Journal.Off:m.Journal.end():m.Journal.end()], Base: m.RingBase}
		ring.Raw(ends[2], 80)[70] ^= 4
	})
	a.open()
	if s := a.Status(); s.Serving || s.Recovery.Damage == "" {
		t.Fatalf("serves with a damaged journal: %+v", s)
	}
	ctx := context.Background()
	refused(t, "continue-alone with a damaged journal", a.ContinueAlone(ctx, false))
	if err := a.ContinueAlone(ctx, true); err != nil {
		t.Fatal(err)
	}
	for i := range 3 { // what was acknowledged below the damage
		p := make([]byte, 100)
		if _, err := a.ReadAt(p, int64(i)*5000); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{byte(i + 1)}, 100)) {
			t.Fatalf("write %d: %v %v", i, p[:4], err)
		}
	}
	commit(t, a, 100000, []byte("after"))
	a.crash()
	a.open()
	a.until("serving", func(s Status) bool { return s.Serving })
	if s := a.Status(); s.Recovery.Damage != "" {
		t.Fatalf("the log that was given up is missed: %s", s.Recovery.Damage)
	}
	p := make([]byte, 5)
	if _, err := a.ReadAt(p, 100000); err != nil || string(p) != "after" {
		t.Fatalf("%q %v", p, err)
	}
	b.open()
	a.inSync()
	if r := a.Status().Rule; r != "full-copy" {
		t.Fatalf("rule %s: the peer cannot reach this data by the log", r)
	}
	identical(t, a, b)
}
