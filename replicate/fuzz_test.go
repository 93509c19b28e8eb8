package replicate_test

import (
	"context"
	"encoding/json"
	"math"
	"testing"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// A liar draws what it says of itself from the fuzzer's bytes, around what the
// node holds: that is where the rules are.
type liar struct {
	prog []byte
	node *nvmmirror.Inspection
	end  journal.LSN // of the node's log
}

func (l *liar) next() int {
	if len(l.prog) == 0 {
		return 0
	}
	b := l.prog[0]
	l.prog = l.prog[1:]
	return int(b)
}

func (l *liar) lsn() journal.LSN {
	switch n := l.next(); n % 8 {
	case 0:
		return l.end
	case 1:
		return 0
	case 2:
		return l.end + journal.LSN(n/8)*journal.Align
	case 3:
		return l.end - min(l.end, journal.LSN(n/8)*journal.Align)
	case 4:
		return l.end + 2*ringSize
	case 5:
		return math.MaxUint64 &^ (journal.Align - 1)
	case 6:
		return 1 << 63
	default:
		return l.end + 1 // no segment ends there
	}
}

func (l *liar) history() journal.History {
	h := append(journal.History{}, l.node.History...)
	h = h[:len(h)-min(len(h), l.next()%4)]
	for range l.next() % 3 {
		var last journal.Entry
		if len(h) > 0 {
			last = h[len(h)-1]
		}
		e := journal.Entry{Epoch: journal.Epoch{Counter: last.Epoch.Counter + uint64(l.next()%3), Node: 0xe}, Start: l.lsn()}
		flags := l.next()
		e.PeerIn, e.Async = flags&1 != 0, flags&2 != 0
		h = append(h, e)
	}
	return h
}

func (l *liar) side() replicate.Side {
	s := enemy()
	flags := l.next()
	switch flags % 4 {
	case 0, 1:
		s.Lineage = l.node.Lineage
	case 2:
		s.Lineage = replicate.UUID{9}
	}
	if flags&4 != 0 {
		s.Role = replicate.Primary
	}
	s.Title, s.Inconsistent, s.Damaged = flags&8 != 0, flags&48 == 48, flags&192 == 192
	s.History = l.history()
	s.End, s.Acked, s.Applied = l.lsn(), l.lsn(), l.lsn()
	return s
}

// FuzzHandshake lets a peer that has the key lie about itself, decide as an
// honest one would on such a state, and then do anything. The node neither
// panics nor hangs, and opens again.
func FuzzHandshake(f *testing.F) {
	f.Add(byte(0), []byte{})
	f.Add(byte(1), []byte{4 + 8, 0, 1, 1, 0, 1, 0, 0, 0, 1, 0})
	f.Add(byte(0x61), []byte{0, 1, 0, 3, 3, 3, 1, 0})
	f.Add(byte(2), []byte{6, 4, 1, 1, 1, 1, 4, 4, 4, 1, 0, 6, 4, 32, 0})
	f.Add(byte(0xe3), []byte{255, 3, 2, 2, 5, 3, 1, 6, 2, 7, 7, 7, 2, 3})
	f.Fuzz(func(t *testing.T, how byte, prog []byte) {
		v := newVictim(t, []nvmmirror.OnPeerLoss{nvmmirror.Alone, nvmmirror.Block}[how/2%2])
		if how%2 == 1 {
			if err := v.Promote(context.Background(), true); err != nil {
				t.Fatal(err)
			}
			for range how >> 5 { // alone, it waits for nobody
				if _, err := v.WriteAt([]byte("acknowledged"), 0); err != nil {
					t.Fatal(err)
				}
			}
		}
		ins, err := nvmmirror.Inspect(v.path)
		if err != nil {
			t.Fatal(err)
		}
		l := &liar{prog: prog, node: ins, end: v.Status().Committed}
		side := l.side()
		p := v.connect(1 << 20)
		body, err := json.Marshal(replicate.HelloBody{Side: side, Session: 5})
		if err != nil {
			t.Fatal(err)
		}
		p.send(replicate.Message{Type: replicate.TypeHello, Body: body}.Encode())
		var session uint64
		if m, ok := p.await(replicate.TypeHello); ok {
			var h replicate.HelloBody
			if err := json.Unmarshal(m.Body, &h); err != nil {
				t.Fatal(err)
			}
			session = 5 ^ h.Session | 1
			if m, ok = p.await(replicate.TypeChain); ok {
				theirs := h.Side
				theirs.Chain, theirs.Known = uint32(m.B), m.C == 1
				lies := l.next()
				chain := replicate.Message{Type: replicate.TypeChain, Session: session, A: m.A, B: m.B, C: 1}
				if lies&1 != 0 {
					chain.C = 0
				}
				if lies&6 == 6 {
					chain.B ^= 1
				}
				if lies&24 == 24 {
					chain.A = uint64(l.lsn())
				}
				side.Chain, side.Known = uint32(chain.B), chain.C == 1
				verdict := replicate.Decide(side, theirs)
				if lies&96 == 96 {
					verdict.From = l.lsn()
				}
				p.send(chain.Encode())
				p.send(replicate.Message{Type: replicate.TypeVerdict, Session: session, Body: replicate.VerdictBody(verdict)}.Encode())
			}
		}
		script(p, session, l.prog)
		p.hangUp()
		v.survives(false)
	})
}
