package pmem

import (
	"unsafe"

	"golang.org/x/sys/cpu"
)

// Every flush ends with a DSB of its own. A DSB waits only for the cache
// maintenance of its own CPU, and the Go scheduler can move a goroutine to
// another CPU between its flush and its fence without one.
//
// Copies are cached stores and a flush: the assembler has no STNP. Without
// DCPOP there is no instruction to the point of persistence, so no class
// cacheline.

// ofEmulated is how bytes reach emulated memory: it needs no flush, because
// caches are coherent with it.
func ofEmulated() primitives { return primitives{} }

// hasFlush says whether the CPU can make a line durable.
func hasFlush() bool { return detected.flush != flushNone }

// ntMinWhole is for CPUs with non-temporal stores.
const ntMinWhole = ntMin

// virtual: nothing tells, so it may be.
const virtual = true

func detect() primitives {
	if !cpu.ARM64.HasDCPOP {
		return primitives{}
	}
	return primitives{flush: flushCVAP}
}

// cvapStep is the distance in bytes from one DC CVAP to the next: the smallest
// line of the caches, which DminLine gives as the log2 of its words of 4
// bytes, and at most a line of this package.
var cvapStep = min(uintptr(4)<<(cacheType()>>16&0xf), LineSize)

// flushLines writes back lines > 0 cache lines from p, which is line-aligned.
func flushLines(_ flushOp, p unsafe.Pointer, lines uintptr) {
	flushLinesCVAP(p, lines*LineSize, cvapStep)
}

// copyLines and zeroLines exist for the shape of the other platforms: detect
// never chooses a non-temporal width here.
func copyLines(_ ntWidth, dst, src unsafe.Pointer, n uintptr) {
	copy(unsafe.Slice((*byte)(dst), n), unsafe.Slice((*byte)(src), n))
}

func zeroLines(_ ntWidth, dst unsafe.Pointer, n uintptr) {
	clear(unsafe.Slice((*byte)(dst), n))
}

//go:noescape
func flushLinesCVAP(p unsafe.Pointer, n, step uintptr)

// storeFence waits for flushes and orders stores.
func storeFence()

// cacheType is CTR_EL0.
func cacheType() uintptr
