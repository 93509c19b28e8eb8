//go:build !amd64 && !arm64

package pmem

import "unsafe"

// No flush instruction is known here: persistent memory is mapped as paged.
// Emulated memory needs none, because caches are coherent with it.

// ofEmulated is how bytes reach emulated memory.
func ofEmulated() primitives { return primitives{} }

// hasFlush says whether the CPU can make a line durable.
func hasFlush() bool { return false }

// ntMinWhole is for CPUs with non-temporal stores.
const ntMinWhole = ntMin

// virtual: nothing tells, so it may be.
const virtual = true

func detect() primitives { return primitives{} }

// flushLines, copyLines and zeroLines exist for the shape of the other
// platforms: detect never chooses a flush or a non-temporal width here.
func flushLines(flushOp, unsafe.Pointer, uintptr) {}

func copyLines(_ ntWidth, dst, src unsafe.Pointer, n uintptr) {
	copy(unsafe.Slice((*byte)(dst), n), unsafe.Slice((*byte)(src), n))
}

func zeroLines(_ ntWidth, dst unsafe.Pointer, n uintptr) {
	clear(unsafe.Slice((*byte)(dst), n))
}

// storeFence has nothing to wait for.
func storeFence() {}
