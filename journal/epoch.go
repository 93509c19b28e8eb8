package journal

import (
	"fmt"
	"strconv"
)

// LSN is a log sequence number: a byte position in the endless log. The
// journal's ring holds its latest stretch, position p at (p - base) mod size.
type LSN uint64

// String is the decimal position.
func (l LSN) String() string { return strconv.FormatUint(uint64(l), 10) }

// Epoch names a stretch of the log under one acknowledger. Counters of one
// node only grow; equal counters of different nodes are not ordered.
type Epoch struct {
	Counter uint64 `json:"counter"`
	Node    uint64 `json:"node,string"` // a JSON number would lose digits
}

func (e Epoch) String() string { return fmt.Sprintf("%d@%016x", e.Counter, e.Node) }

// Entry is one entry of the epoch history: from Start on, until the next
// entry's Start, segments carry Epoch and were acknowledged by whom it says.
type Entry struct {
	Epoch Epoch `json:"epoch"`
	Start LSN   `json:"start"`
	// PeerIn: the peer was required (or, with Async, followed). Without it
	// the node was alone, and that was durable before it acknowledged.
	PeerIn bool `json:"peer_in"`
	// Async: acknowledged after local persistence alone.
	Async bool `json:"async"`
}

// BothIn reports whether each acknowledgement under the entry had to wait for
// both nodes.
func (e Entry) BothIn() bool { return e.PeerIn && !e.Async }

// Binds reports whether what a segment under the entry says of acknowledged log
// is a promise of this node: it was required then, or it acknowledged itself.
// Of a peer that went on alone, or did not wait, it says nothing about what is
// durable here.
func (e Entry) Binds(node uint64) bool { return e.BothIn() || e.Epoch.Node == node }

// History is the epoch history, oldest first, with strictly growing starts.
type History []Entry

// MaxHistory is how many entries a history keeps. Older ones are pruned: a
// peer that parted before them can only be copied to in full.
const MaxHistory = 512

// At is the entry in force at lsn; ok is false before the first.
func (h History) At(lsn LSN) (e Entry, ok bool) {
	for i := len(h) - 1; i >= 0; i-- {
		if h[i].Start <= lsn {
			return h[i], true
		}
	}
	return Entry{}, false
}

// Last is the newest entry, zero where there is none.
func (h History) Last() Entry {
	if len(h) == 0 {
		return Entry{}
	}
	return h[len(h)-1]
}

// Append returns the history with e at its end. Entries under which nothing
// was written (they start where e does, or above) give way to it, since no
// segment carries their epoch.
func (h History) Append(e Entry) History {
	n := len(h)
	for n > 0 && h[n-1].Start >= e.Start {
		n--
	}
	out := append(append(make(History, 0, n+1), h[:n]...), e)
	if len(out) > MaxHistory {
		out = out[len(out)-MaxHistory:]
	}
	return out
}

// maxCounter bounds what a history may hold. Counters rise by at most 2²⁴ an epoch: only
// a forged history comes near it, and what follows it is refused.
const maxCounter = 1 << 63

// Validate checks that the entries are in order, and that others can follow.
func (h History) Validate() error {
	if len(h) > MaxHistory {
		return fmt.Errorf("epoch history has %d entries, at most %d are allowed", len(h), MaxHistory)
	}
	if last := h.Last(); last.Epoch.Counter >= maxCounter {
		return fmt.Errorf("epoch history ends with counter %d, out of range", last.Epoch.Counter)
	}
	for i := 1; i < len(h); i++ {
		if h[i].Start <= h[i-1].Start {
			return fmt.Errorf("epoch history is out of order: entry %d starts at %d, the one before it at %d", i, h[i].Start, h[i-1].Start)
		}
		if h[i].Epoch.Counter <= h[i-1].Epoch.Counter {
			return fmt.Errorf("epoch history is out of order: entry %d has epoch %v after %v", i, h[i].Epoch, h[i-1].Epoch)
		}
	}
	return nil
}
