package chaos

import (
	"testing"

	"github.com/anishathalye/porcupine"
)

// The checks find what they are for, in histories made by hand.
func TestHistoryChecks(t *testing.T) {
	write := func(node string, value uint64, call, ret int64, how outcome) operation {
		return operation{Node: node, Write: true, Value: value, Call: call, Return: ret, Outcome: how}
	}
	read := func(node string, value uint64, call, ret int64) operation {
		return operation{Client: 1, Node: node, Value: value, Call: call, Return: ret, Outcome: done}
	}
	first := tenure{node: "a", call: 0, proof: 1}
	failover := []tenure{first, {node: "b", call: 50, proof: 60}}
	for _, c := range []struct {
		name                 string
		ops                  []operation
		tenures              []tenure
		linear, honest, lone bool
	}{
		{"sound", []operation{write("a", 1, 10, 20, done), read("b", 1, 70, 80)}, failover, true, true, true},
		{"lost acknowledgement", []operation{write("a", 1, 10, 20, done), read("b", 0, 70, 80)}, failover, false, true, true},
		{"unknown, and gone", []operation{write("a", 1, 10, 20, unknown), read("b", 0, 70, 80)}, failover, true, true, true},
		{"unknown, and there", []operation{write("a", 1, 10, 20, unknown), read("b", 0, 70, 80), read("b", 1, 90, 100)}, failover, true, true, true},
		{"unknown, there and gone again", []operation{write("a", 1, 10, 20, unknown), read("a", 1, 30, 40), read("b", 0, 70, 80)}, failover, false, true, true},
		{"failed, and there", []operation{write("a", 1, 10, 20, failed), read("b", 1, 70, 80)}, failover, false, false, true},
		{"never written", []operation{read("a", 7, 10, 20)}, failover, false, false, true},
		{"stale read at the old primary", []operation{write("b", 1, 65, 70, done), read("a", 0, 80, 90)}, failover, false, true, false},
		{"the old primary acknowledges", []operation{write("a", 1, 70, 80, done)}, failover, true, true, false},
		{"called before the promotion", []operation{write("a", 1, 40, 80, done)}, failover, true, true, true},
		{"the promotion may not have come about", []operation{write("a", 1, 70, 80, done)}, []tenure{first, {node: "b", call: 50}}, true, true, true},
		{"a secondary acknowledges", []operation{write("b", 1, 10, 20, done)}, []tenure{first}, true, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHistory()
			h.ops, h.tenures = c.ops, c.tenures
			if got, _ := h.linearizable(); (got == porcupine.Ok) != c.linear {
				t.Errorf("linearizable: %s", got)
			}
			if got := h.dishonest(); (got == nil) != c.honest {
				t.Errorf("dishonest: %v", got)
			}
			if got := h.twoAcknowledgers(); (got == nil) != c.lone {
				t.Errorf("two acknowledgers: %v", got)
			}
		})
	}
}
