package pmem

import (
	"unsafe"

	"golang.org/x/sys/cpu"
)

// A goroutine may move to another CPU between a flush and its fence. The
// flushes stay covered: moving it takes locked instructions on the first CPU
// (the run queue, or the kernel's context switch), and those order CLWB,
// CLFLUSHOPT and non-temporal stores as SFENCE does.

// ofEmulated is how bytes reach emulated memory. It needs no flush, but costs
// what persistent memory costs, so that what is measured on it means something.
func ofEmulated() primitives { return detected }

// hasFlush says whether the CPU can make a line durable.
func hasFlush() bool { return detected.flush != flushNone }

// ntMinWhole is ntMin where no line is stored in part: nobody fetches what is
// overwritten, which AMD's CPUs reward from the first line on (64 bytes and a
// fence: 127 ns beside 199), and Intel's do not (212 ns beside 171).
var ntMinWhole = func() int64 {
	if _, b, c, d := cpuid(0, 0); b == 0x68747541 && d == 0x69746e65 && c == 0x444d4163 { // AuthenticAMD
		return LineSize
	}
	return ntMin
}()

// virtual: the bit of CPUID that hypervisors set.
var virtual = func() bool {
	_, _, ecx, _ := cpuid(1, 0)
	return ecx>>31 != 0
}()

func detect() primitives {
	var pr primitives
	const (
		clfsh      = 1 << 19 // leaf 1 EDX
		clflushopt = 1 << 23 // leaf 7 EBX
		clwb       = 1 << 24 // leaf 7 EBX
	)
	maxLeaf, _, _, _ := cpuid(0, 0)
	_, ebx1, _, edx1 := cpuid(1, 0)
	// The loops step by LineSize. No x86 CPU is known with another line.
	if edx1&clfsh != 0 && ebx1>>8&0xff*8 == LineSize {
		pr.flush = flushCLFLUSH
		if maxLeaf >= 7 {
			_, ebx7, _, _ := cpuid(7, 0)
			switch {
			case ebx7&clwb != 0:
				pr.flush = flushCLWB
			case ebx7&clflushopt != 0:
				pr.flush = flushCLFLUSHOPT
			}
		}
	}
	// cpu sets these only where the operating system saves the registers.
	switch {
	case cpu.X86.HasAVX512F:
		pr.width = nt64
	case cpu.X86.HasAVX2:
		pr.width = nt32
	default:
		pr.width = nt8
	}
	return pr
}

// flushLines writes back lines > 0 cache lines from p, which is line-aligned.
//
//go:noescape
func flushLines(op flushOp, p unsafe.Pointer, lines uintptr)

// copyLines copies n > 0 bytes, a multiple of LineSize, to the line-aligned dst.
func copyLines(w ntWidth, dst, src unsafe.Pointer, n uintptr) {
	switch w {
	case nt64:
		copyLines64(dst, src, n)
	case nt32:
		copyLines32(dst, src, n)
	default:
		copyLines8(dst, src, n)
	}
}

// zeroLines is copyLines of zero bytes.
func zeroLines(w ntWidth, dst unsafe.Pointer, n uintptr) {
	switch w {
	case nt64:
		zeroLines64(dst, n)
	case nt32:
		zeroLines32(dst, n)
	default:
		zeroLines8(dst, n)
	}
}

//go:noescape
func copyLines64(dst, src unsafe.Pointer, n uintptr)

//go:noescape
func copyLines32(dst, src unsafe.Pointer, n uintptr)

//go:noescape
func copyLines8(dst, src unsafe.Pointer, n uintptr)

//go:noescape
func zeroLines64(dst unsafe.Pointer, n uintptr)

//go:noescape
func zeroLines32(dst unsafe.Pointer, n uintptr)

//go:noescape
func zeroLines8(dst unsafe.Pointer, n uintptr)

// storeFence waits for flushes and non-temporal stores.
func storeFence()

func cpuid(leaf, subleaf uint32) (eax, ebx, ecx, edx uint32)
