package chaos

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// outcome is what a client knows of its operation.
type outcome string

const (
	done    outcome = "done"
	failed  outcome = "failed"  // it never takes effect, says the daemon
	unknown outcome = "unknown" // it may have, or may yet
)

// operation is a read or a write of one register, as its client saw it.
type operation struct {
	Client   int     `json:"client"`
	Node     string  `json:"node"`
	Register int     `json:"register"`
	Write    bool    `json:"write"`
	Value    uint64  `json:"value"` // written, or read; each is written once, 0 never
	Call     int64   `json:"call"`  // ns since the history began
	Return   int64   `json:"return"`
	Outcome  outcome `json:"outcome"`
	Error    string  `json:"error,omitempty"`
}

func (o *operation) String() string {
	what := "read"
	if o.Write {
		what = "write"
	}
	return fmt.Sprintf("client %d at %s: %s r%d = %d, %s, %.3f to %.3f s %s", o.Client, o.Node, what, o.Register, o.Value, o.Outcome, seconds(o.Call), seconds(o.Return), o.Error)
}

func seconds(ns int64) float64 { return float64(ns) / 1e9 }

// tenure is a time that began with a promotion of a node, which was asked for
// at Call. From Proof on, if that is not 0, the promotion is known to have come
// about: it was answered, or the node acknowledged something.
type tenure struct {
	node        string
	call, proof int64
}

// historyPage is porcupine's picture of a history that was not as promised.
const historyPage = "history.html"

// history is what all clients saw, on one clock.
type history struct {
	start   time.Time
	checked bool

	mu      sync.Mutex
	ops     []operation
	tenures []tenure
	notes   []porcupine.Annotation
}

func newHistory() *history { return &history{start: time.Now()} }

func (h *history) now() int64 { return int64(time.Since(h.start)) }

func (h *history) add(o operation) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, o)
}

// note says what was done to the pair.
func (h *history) note(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.notes = append(h.notes, porcupine.Annotation{Tag: "faults", Start: h.now(), Description: text})
}

// begin notes a promotion that is asked for now; proven that it came about.
// Promotions are asked for one after the other.
func (h *history) begin(node string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tenures = append(h.tenures, tenure{node: node, call: h.now()})
}

func (h *history) proven() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tenures[len(h.tenures)-1].proof = h.now()
}

// primaryIs: so a promotion whose answer was lost has come about.
func (h *history) primaryIs(node string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if last := &h.tenures[len(h.tenures)-1]; last.node == node && last.proof == 0 {
		last.proof = h.now()
	}
}

// withdrawn: it was refused.
func (h *history) withdrawn() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tenures = h.tenures[:len(h.tenures)-1]
}

// check fails the test where the history breaks a promise.
func (h *history) check(t *testing.T, dir string) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.checked = true
	result, info := h.linearizable()
	t.Logf("%d operations: linearizable: %s", len(h.ops), result)
	for _, err := range append(h.dishonest(), h.twoAcknowledgers()...) {
		t.Error(err)
	}
	if result != porcupine.Ok {
		t.Errorf("the history is not linearizable: %s", result)
	}
	if t.Failed() {
		info.AddAnnotations(h.notes)
		if err := porcupine.VisualizePath(registers, info, filepath.Join(dir, historyPage)); err != nil {
			t.Error(err)
		}
		h.write(t, dir)
	}
}

// dishonest finds what was read although a daemon said that it had failed, or
// although nobody wrote it.
func (h *history) dishonest() (found []error) {
	written := map[uint64]*operation{}
	for i := range h.ops {
		if o := &h.ops[i]; o.Write {
			written[o.Value] = o
		}
	}
	for i := range h.ops {
		o := &h.ops[i]
		if o.Write || o.Outcome != done || o.Value == 0 {
			continue
		}
		switch w := written[o.Value]; {
		case w == nil || w.Register != o.Register:
			found = append(found, fmt.Errorf("nobody wrote what was read: %v", o))
		case w.Outcome == failed:
			found = append(found, fmt.Errorf("was said to have failed, and was read: %v; %v", w, o))
		}
	}
	return found
}

// twoAcknowledgers finds operations that a node answered although they were
// called after a promotion of the other had come about, and before its own next
// one.
func (h *history) twoAcknowledgers() (found []error) {
	for i := range h.ops {
		o := &h.ops[i]
		if o.Outcome != done {
			continue
		}
		// The latest tenure that it may belong to.
		mine := -1
		for k := range h.tenures {
			if h.tenures[k].node == o.Node && h.tenures[k].call < o.Return {
				mine = k
			}
		}
		if mine < 0 {
			found = append(found, fmt.Errorf("acknowledged by a node that was never promoted: %v", o))
			continue
		}
		for _, later := range h.tenures[mine+1:] {
			if later.node != o.Node && later.proof != 0 && later.proof < o.Call {
				found = append(found, fmt.Errorf("acknowledged by %s, but %s was promoted at %.3f s: %v", o.Node, later.node, seconds(later.call), o))
				break
			}
		}
	}
	return found
}

// linearizable checks each register with porcupine.
//
// Writes of unknown outcome stay open until the end, where they matter. Values
// are written once each, so that two simplifications change no verdict: one
// that nobody read may as well have come last, or not at all, and is left out;
// one that was read took effect before the first such read returned.
func (h *history) linearizable() (porcupine.CheckResult, porcupine.LinearizationInfo) {
	firstRead := map[uint64]int64{}
	for i := range h.ops {
		if o := &h.ops[i]; !o.Write && o.Outcome == done {
			if at, ok := firstRead[o.Value]; !ok || o.Return < at {
				firstRead[o.Value] = o.Return
			}
		}
	}
	var ops []porcupine.Operation
	for i := range h.ops {
		o := &h.ops[i]
		returned := o.Return
		if o.Outcome == failed || !o.Write && o.Outcome != done {
			continue // had no effect
		}
		if o.Outcome == unknown {
			at, seen := firstRead[o.Value]
			if !seen {
				continue
			}
			returned = max(at, o.Call)
		}
		ops = append(ops, porcupine.Operation{ClientId: o.Client, Input: o, Output: o, Call: o.Call, Return: returned})
	}
	// It takes a second for minutes of history; a bound, since it may take for
	// ever where something is wrong.
	return porcupine.CheckOperationsVerbose(registers, ops, time.Minute+time.Duration(h.now())/2)
}

// write keeps the history beside the daemons' logs.
func (h *history) write(t *testing.T, dir string) {
	f, err := os.Create(filepath.Join(dir, "history.log"))
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	e := json.NewEncoder(f)
	for i := range h.ops {
		if err := e.Encode(&h.ops[i]); err != nil {
			t.Error(err)
			return
		}
	}
	for _, n := range h.notes {
		fmt.Fprintf(f, "%.3f s: %s\n", seconds(n.Start), n.Description)
	}
}

// registers is the sequential specification: registers that hold the value
// written last, 0 before any.
var registers = porcupine.Model{
	Partition: func(all []porcupine.Operation) [][]porcupine.Operation {
		parts := make([][]porcupine.Operation, registerCount)
		for _, o := range all {
			r := o.Input.(*operation).Register
			parts[r] = append(parts[r], o)
		}
		return parts
	},
	Init: func() any { return uint64(0) },
	Step: func(state, in, _ any) (bool, any) {
		o := in.(*operation)
		if o.Write {
			return true, o.Value
		}
		return state == o.Value, state
	},
	DescribeOperation: func(in, _ any) string { return in.(*operation).String() },
	DescribeState:     func(state any) string { return fmt.Sprint(state) },
}
