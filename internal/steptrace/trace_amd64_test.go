package steptrace

import (
	"fmt"
	"runtime"
)

// opKind is what happened to the region, or to the child.
type opKind uint8

const (
	opStore  opKind = iota // through the cache
	opNT                   // past the cache
	opFlush                // of one line
	opFence                // SFENCE
	opMark                 // the child said something
	opReset                // untraced work is over: the region is data, all of it durable
	opKilled               // the child was killed
)

func (k opKind) String() string {
	return [...]string{"store", "non-temporal store", "flush", "fence", "mark", "reset", "kill"}[k]
}

// op is one event of a trace.
type op struct {
	kind opKind
	off  int64
	data []byte // stored
	name string // of the instruction
	pc   uint64
	mark mark
}

func (o op) String() string {
	switch o.kind {
	case opMark, opReset, opKilled:
		return fmt.Sprintf("a %s %v", o.kind, o.mark)
	case opFence:
		return fmt.Sprintf("%s in %s", o.name, function(o.pc))
	}
	return fmt.Sprintf("%s, a %s of %d bytes at offset %d, in %s", o.name, o.kind, len(o.data), o.off, function(o.pc))
}

// function names the code at pc. The child runs the same binary, so its
// addresses are ours.
func function(pc uint64) string {
	f, _ := runtime.CallersFrames([]uintptr{uintptr(pc) + 1}).Next()
	if f.Function == "" {
		return fmt.Sprintf("%#x", pc)
	}
	return fmt.Sprintf("%s:%d", f.Function, f.Line)
}

// markKind is what the child tells its parent, as the first argument of a
// system call that does not exist.
type markKind uint64

const (
	markOn      markKind = iota + 1 // trace the calling thread from here on
	markOff                         // stop tracing; the region is closed cleanly before it is traced again
	markGroup                       // a 1: from here on, goroutines give way at their fences; 0: no more
	markBegin                       // transaction a of kind b is about to be committed
	markEnd                         // transaction a was acknowledged; b is its LSN
	markCreated                     // the region was created
	markOpened                      // what a killed process left was recovered
	markKill                        // kill me in the next transaction, after a operations on the region; 0: before its fence
)

// markCall is no system call of Linux.
const markCall = 0x6e766d

type mark struct {
	kind markKind
	a, b uint64
}

// trace is what a child did.
type trace struct {
	size  int64 // of the region
	ops   []op
	steps int
	// shadow is what the stores that were noted make of the region.
	shadow []byte
	// untraced: what the child did since, with the region closed cleanly in
	// the end, was not noted.
	untraced bool
	// cachesLast: stores through the cache need a fence, but no flush.
	cachesLast bool
}
