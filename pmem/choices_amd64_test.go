package pmem

import "golang.org/x/sys/cpu"

// The better flush instructions are supersets in CPUs, so each implies those
// before it.
func availableFlushes() []flushOp {
	all := []flushOp{flushCLFLUSH, flushCLFLUSHOPT, flushCLWB}
	for i, f := range all {
		if f == detected.flush {
			return all[:i+1]
		}
	}
	return nil
}

func availableWidths() []ntWidth {
	widths := []ntWidth{ntNone, nt8}
	if cpu.X86.HasAVX2 {
		widths = append(widths, nt32)
	}
	if cpu.X86.HasAVX512F {
		widths = append(widths, nt64)
	}
	return widths
}
