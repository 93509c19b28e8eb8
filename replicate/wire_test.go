package replicate

import (
	"bytes"
	"encoding/json"
	"slices"
	"testing"

	"github.com/nvmmirror/nvmmirror/journal"
)

func FuzzMessageHeader(f *testing.F) {
	f.Add(Message{Type: TypeHello, Session: 7, A: 1, B: 2, C: 3, D: 4}.Encode())
	f.Add(Message{Type: uint16(msgFrame), Body: []byte("x")}.Encode())
	f.Add(make([]byte, headerSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < headerSize {
			return
		}
		var m message
		if err := m.decode(b); err != nil {
			return
		}
		if m.length > maxBody || m.typ == 0 || m.typ > msgBye {
			t.Fatalf("took %+v", m)
		}
		again := make([]byte, headerSize)
		m.encode(again)
		clear(b[56:60]) // reserved
		var n message
		if err := n.decode(again); err != nil || n != m {
			t.Fatalf("%+v became %+v (%v)", m, n, err)
		}
	})
}

// A flipped bit anywhere in a header is seen.
func TestMessageHeaderFlips(t *testing.T) {
	b := Message{Type: TypeAck, Session: 0x1234, A: 1, B: 2, C: 3, D: 4}.Encode()
	for i := range len(b) * 8 {
		c := bytes.Clone(b)
		c[i/8] ^= 1 << (i % 8)
		var m message
		if m.decode(c) == nil {
			t.Errorf("bit %d flipped: decoded as %+v", i, m)
		}
	}
}

// fuzzBody checks that a body that was accepted means the same after it was
// sent on.
func fuzzBody[T any](f *testing.F, seeds ...T) {
	for _, s := range seeds {
		b, err := json.Marshal(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte("{}"))
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var v T
		if unmarshal(msgHello, b, &v) != nil {
			return
		}
		one, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		var w T
		if err := unmarshal(msgHello, one, &w); err != nil {
			t.Fatalf("%s: %v", one, err)
		}
		if two, _ := json.Marshal(w); !bytes.Equal(one, two) {
			t.Fatalf("%s became %s", one, two)
		}
	})
}

var seedHistory = journal.History{epoch(1, nodeA, 0, both), epoch(2, nodeB, 128, alone)}

func FuzzHello(f *testing.F) {
	fuzzBody(f, hello{Side: Side{Node: 1, Lineage: lineage, Geometry: geometry, Role: Primary, History: seedHistory, End: 128}, Session: 5})
}

func FuzzFollow(f *testing.F) {
	fuzzBody(f, follow{Lineage: lineage, History: seedHistory, From: 64, LeaseNS: 1e9})
}

func FuzzJoin(f *testing.F) { fuzzBody(f, join{History: seedHistory, Title: titleTake}) }

func FuzzVerdict(f *testing.F) { fuzzBody(f, verdict{Rule: RuleCatchUp, From: 128}) }

// FuzzDecide gives the decision whatever a peer can say of itself.
func FuzzDecide(f *testing.F) {
	b, _ := json.Marshal(Side{Node: 2, Lineage: lineage, Geometry: geometry, Role: Primary, History: seedHistory, End: 128})
	f.Add(b, uint32(0), true)
	f.Fuzz(func(t *testing.T, b []byte, chain uint32, known bool) {
		var theirs Side
		if json.Unmarshal(b, &theirs) != nil || theirs.History.Validate() != nil || theirs.Node == 0 {
			return
		}
		theirs.Chain, theirs.Known = chain, known
		for _, mine := range []Side{
			{Node: nodeA, Geometry: geometry},
			{Node: nodeA, Lineage: lineage, Geometry: geometry, Role: Primary, History: seedHistory, End: 320, Acked: 192, Applied: 192, Known: true},
			{Node: nodeA, Lineage: lineage, Geometry: geometry, History: seedHistory[:1], End: 64, Acked: 64, Applied: 64},
		} {
			v, w := Decide(mine, theirs), Decide(theirs, mine)
			if v.Rule != w.Rule || v.Action != w.Action || v.From != w.From {
				t.Fatalf("%+v and %+v", v, w)
			}
		}
	})
}

// TestCopyOfManyBlocks: a full copy counts all blocks of the largest volume.
func TestCopyOfManyBlocks(t *testing.T) {
	c := new(copier)
	if c.start(64 << 40); c.end != 1<<34 {
		t.Errorf("%d blocks in 64 TiB", c.end)
	}
}

// TestBlockIsAskedForOnce: what is on its way is not asked for again, or the
// answers would bury everything else.
func TestBlockIsAskedForOnce(t *testing.T) {
	p := &Pair{phase: PhaseInSync, kick: make(chan struct{}, 1), asked: []int64{3}}
	for _, b := range []int64{3, 7, 7, 8} {
		if err := p.RequestBlock(b); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(p.wanted, []int64{7, 8}) {
		t.Errorf("asked for are %v", p.wanted)
	}
}
