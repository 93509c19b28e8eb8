package pmem

import "unsafe"

// flushOp is the instruction that writes a cache line back.
type flushOp uint8

const (
	flushNone    flushOp = iota // nothing to do: caches are persistent, or no instruction exists
	flushCLFLUSH                // amd64: evicts, serialised line by line
	flushCLFLUSHOPT
	flushCLWB
	flushCVAP // arm64: DC CVAP, to the point of persistence
)

func (f flushOp) String() string {
	return [...]string{"none", "clflush", "clflushopt", "clwb", "dc cvap"}[f]
}

// ntWidth is the width in bytes of the non-temporal stores of a copy.
type ntWidth uint8

const (
	ntNone ntWidth = 0 // cached stores and a flush for every length
	nt8    ntWidth = 8
	nt32   ntWidth = 32
	nt64   ntWidth = 64
)

// primitives is the one place that says how bytes reach memory. It is chosen
// once, at init, as detected; a region keeps its own copy of it, so that tests
// can force each choice that the CPU has.
//
// A switch over it calls the assembly directly. A table of function pointers
// would make every source buffer escape to the heap.
type primitives struct {
	flush flushOp
	width ntWidth
}

// detected is the best that this CPU and operating system have.
var detected = detect()

const (
	// maxCall bounds the bytes that one assembly call handles: the scheduler
	// cannot preempt a goroutine inside it.
	maxCall = 64 << 10
	// ntMin is the length from which non-temporal stores win over cached
	// stores and a flush, as in libpmem.
	ntMin = 256
)

// whole reports whether n bytes at off are whole lines, few enough for one call,
// and best stored past the cache.
func (pr primitives) whole(off, n int64) bool {
	return pr.width != ntNone && (off|n)&(LineSize-1) == 0 && ntMinWhole <= n && n <= maxCall
}

// copyTo stores src at dst, of the same length, and starts its way to
// persistence.
func (pr primitives) copyTo(dst, src []byte) {
	if len(src) < ntMin || pr.width == ntNone {
		for len(src) > maxCall {
			copy(dst[:maxCall], src)
			pr.flushRange(dst[:maxCall])
			dst, src = dst[maxCall:], src[maxCall:]
		}
		copy(dst, src)
		pr.flushRange(dst)
		return
	}
	if head := toLine(dst); head > 0 {
		copy(dst[:head], src)
		pr.flushRange(dst[:head])
		dst, src = dst[head:], src[head:]
	}
	lines := len(src) &^ (LineSize - 1)
	for done := 0; done < lines; done += maxCall {
		copyLines(pr.width, unsafe.Pointer(&dst[done]), unsafe.Pointer(&src[done]), uintptr(min(lines-done, maxCall)))
	}
	if lines < len(src) {
		copy(dst[lines:], src[lines:])
		pr.flushRange(dst[lines:])
	}
}

// zero is copyTo of zero bytes.
func (pr primitives) zero(dst []byte) {
	if len(dst) < ntMin || pr.width == ntNone {
		for len(dst) > maxCall {
			clear(dst[:maxCall])
			pr.flushRange(dst[:maxCall])
			dst = dst[maxCall:]
		}
		clear(dst)
		pr.flushRange(dst)
		return
	}
	if head := toLine(dst); head > 0 {
		clear(dst[:head])
		pr.flushRange(dst[:head])
		dst = dst[head:]
	}
	lines := len(dst) &^ (LineSize - 1)
	for done := 0; done < lines; done += maxCall {
		zeroLines(pr.width, unsafe.Pointer(&dst[done]), uintptr(min(lines-done, maxCall)))
	}
	if lines < len(dst) {
		clear(dst[lines:])
		pr.flushRange(dst[lines:])
	}
}

// flushRange starts to write back every line that b touches.
func (pr primitives) flushRange(b []byte) {
	if pr.flush == flushNone || len(b) == 0 {
		return
	}
	p := unsafe.Pointer(unsafe.SliceData(b))
	into := uintptr(p) & (LineSize - 1)
	p = unsafe.Add(p, -int(into))
	lines := (into + uintptr(len(b)) + LineSize - 1) / LineSize
	for ; lines > maxCall/LineSize; lines -= maxCall / LineSize {
		flushLines(pr.flush, p, maxCall/LineSize)
		p = unsafe.Add(p, maxCall)
	}
	flushLines(pr.flush, p, lines)
}

// toLine is the number of bytes from the start of b to the next line.
func toLine(b []byte) int {
	return int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (LineSize - 1))
}
