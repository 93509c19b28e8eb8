package replicate

import (
	"fmt"
	"math"

	"github.com/nvmmirror/nvmmirror/journal"
)

// Side is one node as the handshake presents it.
type Side struct {
	Node     uint64          `json:"node,string"`
	Lineage  UUID            `json:"lineage"`
	Geometry Geometry        `json:"geometry"`
	Role     Role            `json:"role"`
	Title    bool            `json:"title"`
	History  journal.History `json:"history"`
	End      journal.LSN     `json:"end"`     // after the last valid segment
	Acked    journal.LSN     `json:"acked"`   // known to be acknowledged by all required; above End where damaged
	Applied  journal.LSN     `json:"applied"` // in the data
	// Inconsistent: a full copy onto this node has not finished.
	Inconsistent bool `json:"inconsistent"`
	// Damaged: recovery found valid log missing below Acked.
	Damaged bool `json:"damaged"`

	// Of the second exchange, at the common LSN:
	Chain uint32 `json:"-"` // checksum of the segment before it
	Known bool   `json:"-"` // the ring still tells: it can be caught up from here
}

// Rule names a handshake decision. The name is logged and shown.
type Rule string

const (
	// RuleSameNode: both ends carry one node id: a region was copied, or the
	// node talks to itself.
	RuleSameNode Rule = "refuse-same-node"
	// RuleGeometry: the regions differ in size, journal size or block size.
	RuleGeometry Rule = "refuse-other-geometry"
	// RuleLineage: the regions hold different volumes.
	RuleLineage Rule = "refuse-other-lineage"
	// RuleNoCommonEpoch: one lineage, but no epoch in common: pruned.
	RuleNoCommonEpoch Rule = "refuse-no-common-epoch"
	// RuleChain: the logs differ within one epoch. It does not happen
	// without damage, or an older copy of a region put back.
	RuleChain Rule = "refuse-chain-mismatch"
	// RuleSplitBrain: both may have acknowledged after the fork.
	RuleSplitBrain Rule = "refuse-split-brain"
	// RuleBothInconsistent: neither side holds the whole.
	RuleBothInconsistent Rule = "refuse-both-inconsistent"
	// RuleUnrepairable: the primary lost log that the secondary does not
	// hold, or no longer holds.
	RuleUnrepairable Rule = "refuse-unrepairable"
	// RuleBothBlank: nothing to mirror until one is promoted.
	RuleBothBlank Rule = "both-blank"
	// RuleNoPrimary: two secondaries; one must be promoted.
	RuleNoPrimary Rule = "no-primary"
	// RuleAdopt: a blank node takes the lineage and the log from its start.
	RuleAdopt Rule = "adopt-lineage"
	// RuleAdoptFull: a blank node takes the lineage and a full copy.
	RuleAdoptFull Rule = "adopt-lineage-full-copy"
	// RuleInSync: both logs end at the same place.
	RuleInSync Rule = "in-sync"
	// RuleCatchUp: the secondary is behind, the journal reaches.
	RuleCatchUp Rule = "catch-up"
	// RuleRepair: the secondary lost log that it had acknowledged; the
	// journal reaches.
	RuleRepair Rule = "repair-from-primary"
	// RuleFull: the secondary is behind what the journal holds, or its last
	// full copy did not finish.
	RuleFull Rule = "full-copy"
	// RuleDropTail: one side, mostly a former primary, drops what nobody
	// acknowledged.
	RuleDropTail Rule = "drop-unacknowledged-tail"
	// RuleTakeLog: a restarted primary takes what the secondary holds
	// beyond its own log.
	RuleTakeLog Rule = "take-log-from-secondary"
	// RuleStepDown: a former primary whose peer went on and then gave up
	// the role: it becomes a secondary.
	RuleStepDown Rule = "step-down"
)

// Action is what the two nodes do next.
type Action uint8

const (
	// Refuse: end the session; an operator has to look.
	Refuse Action = iota
	// Idle: stay connected, ship nothing.
	Idle
	// Follow: the other side follows the source's log.
	Follow
	// Fetch: the source only hands over its log; then decide again.
	Fetch
	// StepDown: the side that is not the source stops being primary; then
	// decide again.
	StepDown
)

// Verdict is the outcome of a handshake.
type Verdict struct {
	Rule   Rule
	Action Action
	// Mine: the source is the first argument's side.
	Mine bool
	// From: the log is common up to here, and shipped from here.
	From journal.LSN
	// Full: blocks are copied first.
	Full bool
	// Why says more, for a person.
	Why string
}

// fork is what two histories have in common.
type fork struct {
	ok     bool        // there is a common entry
	common journal.LSN // both logs are equal below
	newerA bool        // a has entries that b does not have
	newerB bool
	at     journal.LSN // where the first entry begins that one of them lacks
}

// Common is the LSN up to which two nodes of one lineage have the same log,
// as far as their histories and log ends tell; 0 where nothing is common.
func Common(a, b Side) journal.LSN { return findFork(a, b).common }

func same(x, y journal.Entry) bool { return x.Epoch == y.Epoch && x.Start == y.Start }

func findFork(a, b Side) fork {
	ha, hb := a.History, b.History
	// One of them may have pruned old entries that the other still has.
	for i := range hb {
		if len(ha) > 0 && same(ha[0], hb[i]) {
			hb = hb[i:]
			break
		}
	}
	for i := range ha {
		if len(hb) > 0 && same(hb[0], ha[i]) {
			ha = ha[i:]
			break
		}
	}
	n := 0
	for n < len(ha) && n < len(hb) && same(ha[n], hb[n]) {
		n++
	}
	if n == 0 {
		// Each log of a lineage begins at 0, with nothing. Where both
		// histories still do, that is common: an entry under which nothing
		// was written has given way on one side.
		begun := len(ha) > 0 && len(hb) > 0 && ha[0].Start == 0 && hb[0].Start == 0
		return fork{ok: begun, newerA: begun, newerB: begun}
	}
	reach := func(h journal.History, end journal.LSN) journal.LSN {
		if n < len(h) {
			return min(h[n].Start, end)
		}
		return end
	}
	at := journal.LSN(math.MaxUint64)
	for _, h := range []journal.History{ha, hb} {
		if n < len(h) {
			at = min(at, h[n].Start)
		}
	}
	return fork{ok: true, at: at, common: min(reach(ha, a.End), reach(hb, b.End)), newerA: len(ha) > n, newerB: len(hb) > n}
}

// droppable reports whether nothing of s from lsn on can have been
// acknowledged without the peer: each entry in force there, and each later one
// even if nothing was written under it, required both.
func droppable(s Side, lsn journal.LSN) bool {
	if s.Applied > lsn || s.Acked > lsn {
		return false
	}
	for i, e := range s.History {
		last := i == len(s.History)-1
		if (last || s.History[i+1].Start > lsn) && !e.BothIn() {
			return false
		}
	}
	return len(s.History) > 0
}

// expendable reports whether s can go on from lsn as if it had never gone
// beyond: its tail is droppable, or it is a secondary, which acknowledges
// nothing, without a tail. Its epochs gave way at the peer, where nothing was
// written under them either.
func expendable(s Side, lsn journal.LSN) bool {
	return droppable(s, lsn) || s.Role != Primary && !s.Damaged && s.End <= lsn && s.Acked <= lsn
}

// lostLog is up to where the peer's log, or what it knows to be acknowledged, says
// that there was log here which this node has lost since, else 0. A primary held all
// that the peer holds of their common epochs, also while it was copied to, and whoever
// holds the title all that was acknowledged. A node without either may only be behind.
func lostLog(mine, theirs Side) journal.LSN {
	theirs.Inconsistent = false // its log came from here
	upTo := theirs.Acked
	if mine.Role == Primary {
		upTo = max(upTo, theirs.End)
	}
	switch f := findFork(mine, theirs); {
	case !related(mine, theirs),
		mine.Role != Primary && !mine.Title,
		!f.ok || f.newerA || f.newerB,
		upTo <= max(mine.End, mine.Acked):
		return 0
	}
	return upTo
}

// related reports whether both nodes hold states of one volume, so that their logs
// say something of each other.
func related(a, b Side) bool {
	return a.Node != b.Node && a.Geometry == b.Geometry && a.Lineage != UUID{} && a.Lineage == b.Lineage && !a.Inconsistent && !b.Inconsistent
}

// outdated reports whether the peer may have acknowledged log, under an epoch that this
// node does not know, which is not here, and nothing of this node's stands against it.
// Whoever holds the title holds all that was acknowledged: this node's is one that was
// taken over by force, or of an older copy of its region.
func outdated(mine, theirs Side) bool {
	if !related(mine, theirs) || !mine.Title || mine.Damaged {
		return false
	}
	theirs.End = max(theirs.End, theirs.Acked) // also where that is damaged there
	f := findFork(mine, theirs)
	return f.ok && f.newerB && theirs.End > f.common && !droppable(theirs, f.common) && (mine.End <= f.common || droppable(mine, f.common))
}

// replaces reports whether b lacks log that was acknowledged, lost or of a later epoch,
// and a holds that and what b still has, but for a tail that nobody acknowledged. What
// epochs b has begun since does not matter: it wrote nothing under them.
func replaces(a, b Side) bool {
	f := findFork(a, b)
	lost := b.Damaged && !f.newerB && b.End == f.common
	later := f.newerA && a.End > f.common && !droppable(a, f.common) && (b.End == f.common || droppable(b, f.common))
	return (lost || later) && !a.Damaged && !a.Inconsistent && !b.Inconsistent && f.ok && b.Acked <= a.End
}

// Decide is the handshake decision: a pure function of what both sides
// present. Decide(b, a) is the same verdict seen from the other side.
func Decide(a, b Side) Verdict {
	v := decide(a, b)
	if v.Action == Follow && (v.Mine && a.Damaged || !v.Mine && b.Damaged) {
		way := "promote the other, by force where it does not hold the title, or give it up"
		if a.Inconsistent || b.Inconsistent {
			way = "give it up"
		}
		return Verdict{Rule: RuleUnrepairable, From: v.From, Why: "the primary's journal is damaged below what was acknowledged, and the other node does not hold what is lost; " + way + " with continue-alone --force on the primary"}
	}
	return v
}

func decide(a, b Side) Verdict {
	switch {
	case a.Node == b.Node:
		return Verdict{Rule: RuleSameNode, Why: fmt.Sprintf("both ends are node %016x: one region is a copy of the other; create a new region on one of them", a.Node)}
	case a.Geometry != b.Geometry:
		return Verdict{Rule: RuleGeometry, Why: fmt.Sprintf("%d bytes with a journal of %d here, %d with %d at the peer; create the region that may go anew with the other's sizes", a.Geometry.Size, a.Geometry.Journal, b.Geometry.Size, b.Geometry.Journal)}
	}
	blankA, blankB := a.Lineage == UUID{}, b.Lineage == UUID{}
	switch {
	case blankA && blankB:
		return Verdict{Rule: RuleBothBlank, Action: Idle, Why: "promote one of them"}
	case blankA:
		return mirror(adopt(b))
	case blankB:
		return adopt(a)
	case a.Lineage != b.Lineage:
		return Verdict{Rule: RuleLineage, Why: fmt.Sprintf("lineage %v here, %v at the peer: different volumes; if the peer's may go, replace its region with a new one", a.Lineage, b.Lineage)}
	case a.Inconsistent && b.Inconsistent:
		return Verdict{Rule: RuleBothInconsistent, Why: "neither side holds a whole copy; restore one from elsewhere"}
	case b.Inconsistent:
		return full(a)
	case a.Inconsistent:
		return mirror(full(b))
	}

	f := findFork(a, b)
	if !f.ok {
		return Verdict{Rule: RuleNoCommonEpoch, Why: "the epoch histories share no entry; replace the region that may go"}
	}
	if a.Known && b.Known && a.Chain != b.Chain {
		return Verdict{Rule: RuleChain, From: f.common, Why: fmt.Sprintf("the logs differ below LSN %d within one epoch: one of them is damaged, or an older copy of a region was put back and went on; run check on both; where both are sound choose one, as after a split brain, and replace the other's region", f.common)}
	}
	// What a damaged node acknowledged beyond the fork is in its data, and no log of
	// the other's repairs it.
	if a.Damaged && f.newerB && a.Acked > f.at || b.Damaged && f.newerA && b.Acked > f.at {
		return Verdict{Rule: RuleSplitBrain, From: f.common, Why: fmt.Sprintf("the logs forked at LSN %d, and the node whose journal is damaged had acknowledged more by then: choose one of the two, and replace the other's region", f.at)}
	}
	beyondA := a.End > f.common || f.newerA
	beyondB := b.End > f.common || f.newerB
	switch {
	case beyondA && beyondB:
		return decideFork(a, b, f)
	case beyondB:
		return mirror(decidePrefix(b, a, f.common, f.newerB))
	case beyondA:
		return decidePrefix(a, b, f.common, f.newerA)
	}
	return decideEqual(a, b, f.common)
}

// mirror is v seen from the other side.
func mirror(v Verdict) Verdict {
	if v.Action >= Follow {
		v.Mine = !v.Mine
	}
	return v
}

// adopt: a has data or at least a lineage, the other is blank.
func adopt(a Side) Verdict {
	switch {
	case a.Role != Primary || a.Inconsistent:
		return Verdict{Rule: RuleNoPrimary, Action: Idle, Why: "promote the node that holds the data, by force where it does not hold the title"}
	case a.Known:
		return Verdict{Rule: RuleAdopt, Action: Follow, Mine: true}
	}
	return Verdict{Rule: RuleAdoptFull, Action: Follow, Mine: true, Full: true}
}

// full: the other side is inconsistent.
func full(a Side) Verdict {
	if a.Role != Primary {
		return Verdict{Rule: RuleNoPrimary, Action: Idle, Why: "the other node is inconsistent; promote the consistent one"}
	}
	return Verdict{Rule: RuleFull, Action: Follow, Mine: true, Full: true, Why: "an earlier full copy did not finish"}
}

// decideEqual: both logs and histories are equal.
func decideEqual(a, b Side, end journal.LSN) Verdict {
	v := Verdict{Rule: RuleInSync, Action: Follow, From: end}
	switch {
	case a.Role == Primary && b.Role == Primary:
		v.Mine = a.History.Last().Epoch.Node == a.Node
		if !v.Mine && b.History.Last().Epoch.Node != b.Node {
			return Verdict{Rule: RuleSplitBrain, From: end, Why: "both are primary, and neither began the last epoch"}
		}
	case a.Role == Primary:
		v.Mine = true
	case b.Role == Primary:
	default:
		return Verdict{Rule: RuleNoPrimary, Action: Idle, From: end, Why: "both are secondaries; promote the one that holds the title"}
	}
	return v
}

// decidePrefix: b's log is a prefix of a's, and a has more: log, or (newer)
// epochs.
func decidePrefix(a, b Side, common journal.LSN, newer bool) Verdict {
	switch {
	case a.Role == Primary:
		v := Verdict{Rule: RuleCatchUp, Action: Follow, Mine: true, From: common}
		switch {
		case !a.Known:
			v.Rule, v.Full = RuleFull, true
			v.Why = fmt.Sprintf("the journal no longer reaches back to LSN %d", common)
		case a.End == common:
			v.Rule = RuleInSync
		case b.Damaged:
			v.Rule = RuleRepair
		}
		return v
	case b.Role != Primary:
		return Verdict{Rule: RuleNoPrimary, Action: Idle, From: common, Why: "both are secondaries; promote the one that holds the title"}
	case newer:
		return Verdict{Rule: RuleStepDown, Action: StepDown, Mine: true, From: common, Why: "the other node went on in a later epoch"}
	case !a.Known:
		return Verdict{Rule: RuleUnrepairable, From: common, Why: fmt.Sprintf("the primary's log ends at LSN %d, and the secondary's ring no longer reaches back to it; promote the secondary, by force where it does not hold the title", common)}
	}
	return Verdict{Rule: RuleTakeLog, Action: Fetch, Mine: true, From: common}
}

// decideFork: both have something that the other does not have.
func decideFork(a, b Side, f fork) Verdict {
	dropA, dropB := expendable(a, f.common), expendable(b, f.common)
	if dropA && dropB {
		// Nobody acknowledged anything: the later epoch goes on; of two that
		// began beside each other, that of the higher node.
		x, y := a.History.Last().Epoch, b.History.Last().Epoch
		if x.Counter == y.Counter {
			dropA, dropB = x.Node < y.Node, y.Node < x.Node
		} else {
			dropA, dropB = x.Counter < y.Counter, y.Counter < x.Counter
		}
	}
	if dropA == dropB || !f.newerA && !f.newerB {
		loseA, loseB := max(a.End, a.Acked)-f.common, max(b.End, b.Acked)-f.common // what is damaged is lost with the rest
		way := "replace the region of the one that may go"
		if loseA == 0 || loseB == 0 {
			way = "demote the one that loses nothing"
		}
		return Verdict{Rule: RuleSplitBrain, From: f.common, Why: fmt.Sprintf(
			"the logs forked at LSN %d: this node would lose %d bytes of log, the peer %d; %s",
			f.common, loseA, loseB, way)}
	}
	if dropA {
		return mirror(drop(b, a, f.common))
	}
	return drop(a, b, f.common)
}

// drop: b's tail from common on goes.
func drop(a, b Side, common journal.LSN) Verdict {
	switch {
	case a.Role != Primary && b.Role != Primary:
		return Verdict{Rule: RuleNoPrimary, Action: Idle, From: common, Why: "both are secondaries; promote the one that holds the title"}
	case a.Role != Primary:
		return Verdict{Rule: RuleStepDown, Action: StepDown, Mine: true, From: common, Why: "the other node went on in a later epoch"}
	}
	v := Verdict{Rule: RuleDropTail, Action: Follow, Mine: true, From: common}
	if !a.Known {
		v.Full = true
		v.Why = fmt.Sprintf("the journal no longer reaches back to LSN %d", common)
	}
	return v
}
