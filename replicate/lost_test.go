package replicate_test

import (
	"strings"
	"testing"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// What a peer's hello says of log that was lost here: to a primary all that the peer
// holds beyond it, to who holds the title what was acknowledged, to others nothing.
func TestLostLog(t *testing.T) {
	theirs := enemy()
	theirs.Lineage, theirs.Role, theirs.End, theirs.Acked = replicate.UUID{9}, replicate.Secondary, 640, 320
	theirs.History = journal.History{{Epoch: enemyEpoch, PeerIn: true}}
	for _, c := range []struct {
		role  replicate.Role
		title bool
		end   journal.LSN
		want  journal.LSN
	}{
		{replicate.Primary, false, 384, 640},
		{replicate.Primary, false, 640, 0},
		{replicate.Secondary, true, 128, 320},
		{replicate.Secondary, true, 384, 0},
		{replicate.Secondary, false, 128, 0},
	} {
		mine := theirs
		mine.Node, mine.Role, mine.Title, mine.End, mine.Acked = 0xd, c.role, c.title, c.end, min(c.end, 128)
		if got := replicate.LostLog(mine, theirs); got != c.want {
			t.Errorf("%v, title %v, up to %d: %d, want %d", c.role, c.title, c.end, got, c.want)
		}
	}
}

// What a damaged node had acknowledged is lost with it: a refusal does not call that one
// that loses nothing.
func TestDamagedNodeLosesSomething(t *testing.T) {
	a := enemy()
	a.Lineage, a.Role, a.End, a.Acked, a.Applied = replicate.UUID{9}, replicate.Secondary, 320, 320, 320
	a.History = journal.History{{Epoch: enemyEpoch, PeerIn: true}}
	b := a
	b.Node, b.End, b.Acked, b.Applied, b.Damaged = 0xd, 128, 640, 128, true
	b.History = a.History.Append(journal.Entry{Epoch: journal.Epoch{Counter: enemyEpoch.Counter + 1, Node: b.Node}, Start: 320})
	v := replicate.Decide(a, b)
	if v.Rule != replicate.RuleSplitBrain || !strings.Contains(v.Why, "this node would lose 192 bytes of log, the peer 512;") || strings.Contains(v.Why, "nothing") {
		t.Errorf("%+v", v)
	}
}

// Whoever is told to promote the other node hears that it may need force: the title is
// mostly with the primary that cannot go on. A node that is not whole is no way out.
func TestWayOutOfDamage(t *testing.T) {
	a := enemy()
	a.Lineage, a.Role, a.End, a.Acked, a.Damaged = replicate.UUID{9}, replicate.Primary, 128, 640, true
	a.History = journal.History{{Epoch: enemyEpoch, PeerIn: true}}
	behind, ahead, copied := a, a, a
	for _, s := range []*replicate.Side{&behind, &ahead, &copied} {
		s.Node, s.Role, s.Damaged, s.Acked = 0xd, replicate.Secondary, false, 128
	}
	ahead.End, copied.Inconsistent = 320, true
	const other = "by force where it does not hold the title"
	for _, c := range []struct {
		b    replicate.Side
		says bool
	}{{behind, true}, {ahead, true}, {copied, false}} {
		v := replicate.Decide(a, c.b)
		if v.Rule != replicate.RuleUnrepairable || strings.Contains(v.Why, other) != c.says {
			t.Errorf("%+v", v)
		}
	}
}
