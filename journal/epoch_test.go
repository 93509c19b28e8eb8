package journal

import (
	"testing"

	"pgregory.net/rapid"
)

// TestHistory compares a history, built as a node does, with the plain list of
// what was in force at each position.
func TestHistory(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var h History
		var list []Entry // as they came
		lsn, counter := LSN(0), uint64(0)
		for range rapid.OneOf(rapid.IntRange(1, 20), rapid.IntRange(MaxHistory-3, MaxHistory+20)).Draw(t, "entries") {
			lsn += LSN(rapid.IntRange(0, 2).Draw(t, "written")) * Align
			counter += rapid.Uint64Range(1, 3).Draw(t, "counter")
			e := Entry{Epoch: Epoch{counter, rapid.Uint64Range(1, 2).Draw(t, "node")}, Start: lsn, PeerIn: rapid.Bool().Draw(t, "in")}
			before := h
			keep := append(History(nil), before...)
			h = h.Append(e)
			for i := range keep {
				if before[i] != keep[i] {
					t.Fatal("Append changed its receiver")
				}
			}
			list = append(list, e)
			if err := h.Validate(); err != nil {
				t.Fatal(err)
			}
			if h.Last() != e {
				t.Fatal("the last entry is not the last")
			}
		}
		for at := h[0].Start; at < lsn+3*Align; at += Align / 2 {
			var want Entry
			for _, e := range list {
				if e.Start <= at {
					want = e
				}
			}
			if got, ok := h.At(at); !ok || got != want {
				t.Fatalf("at %d: %+v, not %+v", at, got, want)
			}
		}
		if h[0].Start > 0 {
			if _, ok := h.At(h[0].Start - 1); ok {
				t.Fatal("an entry in force before the first")
			}
		}
	})
}

func TestHistoryValidate(t *testing.T) {
	good := History{{Epoch: Epoch{1, 1}, Start: 0}, {Epoch: Epoch{2, 1}, Start: 64}, {Epoch: Epoch{5, 2}, Start: 128}}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	if err := (History{}).Validate(); err != nil {
		t.Error(err)
	}
	for name, h := range map[string]History{
		"same start":   {good[0], {Epoch: Epoch{2, 1}, Start: 0}},
		"start back":   {good[1], {Epoch: Epoch{3, 1}, Start: 0}},
		"same counter": {good[0], {Epoch: Epoch{1, 2}, Start: 64}},
		"counter back": {good[1], {Epoch: Epoch{1, 1}, Start: 640}},
		"too long":     make(History, MaxHistory+1),
	} {
		if h.Validate() == nil {
			t.Errorf("%s: valid", name)
		}
	}
}

// TestLastCounter: a history after which no epoch could follow is refused.
func TestLastCounter(t *testing.T) {
	h := History{{Epoch: Epoch{Counter: 1}}, {Epoch: Epoch{Counter: maxCounter - 1}, Start: 64}}
	if err := h.Validate(); err != nil {
		t.Error(err)
	}
	h[1].Epoch.Counter++
	if h.Validate() == nil {
		t.Error("the largest counter of all is accepted")
	}
}
