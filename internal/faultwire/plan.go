package faultwire

import (
	"math/rand/v2"
	"time"
)

// Fault is one way to mistreat a packet.
type Fault int

// In order of precedence: where several are due at one packet, the first is
// done and the others wait for the next packet. One that still waits when it is
// due again strikes once for both.
const (
	// Drop loses the packet.
	Drop Fault = iota
	// Duplicate delivers the packet twice.
	Duplicate
	// Reorder holds the packet back until Plan.ReorderBy later ones have passed.
	Reorder
	// Truncate cuts off the end of the packet, at least one byte of payload.
	Truncate
	// Flip inverts one bit of the payload.
	Flip
	// Swap exchanges two neighbouring 16-bit words of the payload that differ.
	Swap
	// Add adds 1 to one 16-bit word of the payload and takes 1 from another.
	Add
	// Delay keeps the packet for Plan.DelayFor; it comes on top of any other.
	Delay

	faultCount
	noFault Fault = -1
)

var faultNames = [faultCount]string{"drop", "duplicate", "reorder", "truncate", "flip", "swap", "add", "delay"}

func (f Fault) String() string {
	if f < 0 || f >= faultCount {
		return "none"
	}
	return faultNames[f]
}

// corrupts reports whether the fault delivers other bytes than were sent.
func (f Fault) corrupts() bool { return f >= Truncate && f <= Add }

// Rule says how often a fault strikes.
type Rule struct {
	// Every strikes one packet of every so many, which one is drawn from the
	// seed; 1 is each of them, 0 never. Counted are TCP segments with payload.
	Every int
	// Limit ends the rule after so many; 0 is without end.
	Limit uint64
	// Any counts and strikes segments without payload too. A Flip may then hit
	// the TCP header and its options. Truncate, Swap and Add need payload.
	Any bool
}

// Plan is what a direction does to its packets. The zero Plan is a good wire.
type Plan struct {
	Drop, Duplicate, Reorder, Truncate, Flip, Swap, Add, Delay Rule

	// ReorderBy is how many packets overtake the held one; 0 means 1.
	ReorderBy int
	// DelayFor is how long Delay keeps a packet.
	DelayFor time.Duration
	// FixLength makes a truncated packet's IP header agree with what is left of
	// it, so that TCP's checksum has to find it and not the IP layer.
	FixLength bool
}

func (p *Plan) rule(f Fault) Rule {
	return [faultCount]Rule{p.Drop, p.Duplicate, p.Reorder, p.Truncate, p.Flip, p.Swap, p.Add, p.Delay}[f]
}

// Stats counts one direction since the wire was made.
type Stats struct {
	Packets, Bytes uint64 // taken from the sender
	Data           uint64 // of those, TCP segments with payload
	Delivered      uint64 // handed to the receiver, injected ones included

	Dropped, Duplicated, Reordered, Truncated, Flipped, Swapped, Added, Delayed uint64

	Cut      uint64 // lost because the direction was cut
	Overflow uint64 // lost because too many were delayed at once
	Injected uint64 // put in by the third party
	Refused  uint64 // the receiving device took no packet; 0 on a sound wire
}

// Corrupted is how many packets were delivered with other bytes than were sent.
func (s *Stats) Corrupted() uint64 { return s.Truncated + s.Flipped + s.Swapped + s.Added }

// Of is the count of one fault.
func (s *Stats) Of(f Fault) uint64 {
	if c := s.counter(f); c != nil {
		return *c
	}
	return 0
}

func (s *Stats) counter(f Fault) *uint64 {
	switch f {
	case Drop:
		return &s.Dropped
	case Duplicate:
		return &s.Duplicated
	case Reorder:
		return &s.Reordered
	case Truncate:
		return &s.Truncated
	case Flip:
		return &s.Flipped
	case Swap:
		return &s.Swapped
	case Add:
		return &s.Added
	case Delay:
		return &s.Delayed
	}
	return nil
}

// schedule decides at which packets one fault strikes. Each has a random
// source of its own, so that one rule does not move another's choices.
type schedule struct {
	fault   Fault
	rule    Rule
	rng     *rand.Rand
	pos     int    // of the present packet in its run of Every
	target  int    // position in the run that is struck
	pending bool   // struck, and no packet could take it yet
	taken   uint64 // against rule.Limit
}

func (s *schedule) set(r Rule) {
	s.rule, s.pos, s.pending, s.taken = r, 0, false, 0
}

func (s *schedule) active() bool { return s.rule.Every > 0 }

// due is asked once for every packet that the rule counts.
func (s *schedule) due() bool {
	if s.rule.Limit > 0 && s.taken >= s.rule.Limit {
		return false
	}
	if s.pos == 0 {
		s.target = s.rng.IntN(s.rule.Every)
	}
	if s.pos == s.target {
		s.pending = true
	}
	if s.pos++; s.pos == s.rule.Every {
		s.pos = 0
	}
	return s.pending
}

// took says that a packet has suffered what was due.
func (s *schedule) took() {
	s.pending = false
	s.taken++
}
