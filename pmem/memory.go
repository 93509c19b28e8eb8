// Package pmem maps persistent memory and makes stores to it durable.
//
// Everything above this package stores to a region only through [Memory].
// [Region] implements it on a mapped file with the CPU's flush instructions;
// a simulator can implement it on modelled memory.
//
// Two rules hold for every implementation:
//
//   - A store is visible at once and durable only after a [Memory.Fence] that
//     follows its flush. [Memory.Copy], [Memory.Zero] flush what they store;
//     [Memory.Store64], [Memory.Write] and bytes written into a
//     [Memory.Window] need a [Memory.Flush].
//   - A Fence covers what the calling goroutine flushed before it, whoever
//     else stores at the same time.
package pmem

import "fmt"

// LineSize is the unit of a flush in bytes. It is not a unit of atomicity: a
// power failure before the fence can keep part of a line. Only an aligned
// 8-byte store is kept or lost as a whole.
const LineSize = 64

// AreaAlign is the alignment in bytes of every area in a region: the size of
// a huge page, so that areas do not share one.
const AreaAlign = 2 << 20

// Class says what makes a store durable, weakest to strongest.
type Class uint8

const (
	// Emulated is volatile memory (tmpfs, memfd): nothing survives a reboot.
	Emulated Class = iota + 1
	// Paged is an ordinary file or virtio-pmem: durable after msync.
	Paged
	// Cacheline is fsdax mapped with MAP_SYNC, or devdax: durable after a
	// cache line write-back and a fence.
	Cacheline
	// Byte is Cacheline where the CPU caches are in the persistence domain
	// (eADR): durable after a fence.
	Byte
)

func (c Class) String() string {
	switch c {
	case Emulated:
		return "emulated"
	case Paged:
		return "paged"
	case Cacheline:
		return "cacheline"
	case Byte:
		return "byte"
	}
	return fmt.Sprintf("class(%d)", uint8(c))
}

// Memory is the set of primitives that every persistent store goes through.
// Offsets and lengths are in bytes from the start of the region; a range
// outside of it is a programming error and panics. Concurrent use is safe as
// far as the ranges do not overlap.
type Memory interface {
	// Bytes is the whole region, for reading. Storing through it is a bug:
	// such a store is never flushed and the simulator does not see it.
	Bytes() []byte
	// Class is the region's device class.
	Class() Class
	// Store64 stores v, little-endian, at an offset divisible by 8. The
	// store is not torn. It needs a Flush.
	Store64(off int64, v uint64)
	// Write stores p with ordinary cached stores. It needs a Flush.
	Write(off int64, p []byte)
	// Copy stores p and flushes it: durable after the next Fence.
	Copy(off int64, p []byte)
	// Zero stores n zero bytes and flushes them, as Copy does.
	Zero(off, n int64)
	// Window is [off, off+n) for the kernel to read into. What was written
	// there needs a Flush.
	Window(off, n int64) []byte
	// Flush starts to write back the cache lines of [off, off+n).
	Flush(off, n int64)
	// Fence returns when everything that the calling goroutine flushed is
	// durable. An error is final: the region takes no further stores as
	// durable, and every later Fence returns it too.
	Fence() error
}
