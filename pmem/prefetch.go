//go:build amd64 || arm64

package pmem

// Prefetch asks the CPU for the cache line that p lies in, without waiting for
// it. It never faults.
//
//go:noescape
func Prefetch(p *byte)
