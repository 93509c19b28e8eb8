package nvmmirror

import (
	"bytes"
	"context"
	"testing"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// A lone primary whose journal is damaged does not go on by itself. Forced, it
// gives the damaged log up, and no later recovery misses it.
func TestForcedLoss(t *testing.T) {
	t.Parallel()
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

// A primary that was made to go on without a peer that holds the title takes it
// by force. Once the peer is back the title is with one of them, as if it had
// never left: the next failover needs no force.
func TestTitleAfterGoingAloneByForce(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		count int
		rule  replicate.Rule
	}{
		{"nothing written", 0, replicate.RuleInSync},
		{"catch-up", 5, replicate.RuleCatchUp},
		{"full copy", 500, replicate.RuleFull},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := pairInSync(t, testConfig{})
			b.until("title", func(s Status) bool { return s.Title })
			b.crash()
			a.peerIs("lost")
			ctx := context.Background()
			refused(t, "continue-alone without the title", a.ContinueAlone(ctx, false))
			if err := a.ContinueAlone(ctx, true); err != nil {
				t.Fatal(err)
			}
			fill(t, a, 1, c.count, 20000)
			b.open()
			b.ruleIs(c.rule)
			identical(t, a, b)
			if x, y := a.Status().Title, b.Status().Title; x || !y {
				t.Fatalf("title here %v, at the peer %v", x, y)
			}
			want := content(t, a)
			a.crash()
			b.peerIs("lost")
			b.promote(false)
			if !bytes.Equal(content(t, b), want) {
				t.Fatal("content differs after the failover")
			}
		})
	}
}

// Both were primary, the second one by force, and neither is: the title that
// was not used last is void.
func TestTwoTitles(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
	fill(t, a, 1, 10, 5000)
	quiesce(t, a, b)
	a.until("title", func(s Status) bool { return s.Title })
	a.close()
	b.peerIs("lost")
	b.promote(true)
	fill(t, b, 2, 10, 5000)
	want := content(t, b)
	b.demote()
	a.open()
	a.until("without the title", func(s Status) bool { return !s.Title })
	refused(t, "promotion of the one that stayed behind", a.Promote(context.Background(), false))
	if s := b.Status(); !s.Title {
		t.Fatalf("nobody holds the title: %+v", s)
	}
	b.promote(false)
	a.inSync()
	if !bytes.Equal(content(t, b), want) {
		t.Fatal("content differs")
	}
	identical(t, b, a)
}

// The node whose title was taken by force elsewhere was promoted once more,
// alone, and wrote nothing: its epoch is the later one, its log the shorter. The
// title stays with the log.
func TestTwoTitlesGoByTheLog(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{})
	b.until("title", func(s Status) bool { return s.Title })
	b.crash()
	a.peerIs("lost")
	if err := a.ContinueAlone(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	fill(t, a, 1, 5, 20000)
	want := content(t, a)
	a.demote()
	a.close()
	b.open()
	b.promote(false)
	b.close()
	b.open() // begins one more epoch
	b.demote()
	a.open()
	b.until("without the title", func(s Status) bool { return !s.Title })
	refused(t, "promotion of the one that holds less", b.Promote(context.Background(), false))
	a.promote(false)
	b.inSync()
	if !bytes.Equal(content(t, a), want) {
		t.Fatal("content differs")
	}
	identical(t, a, b)
}
