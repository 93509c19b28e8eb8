package pmem

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// BenchmarkPersist copies and fences at successive offsets of a 64 MiB region
// on tmpfs, as hack/pmembench/persist.c does with libpmem.
func BenchmarkPersist(b *testing.B) {
	for _, size := range []int{64, 256, 4096, 65536, 1 << 20} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			r := benchRegion(b)
			benchPersist(b, r, size)
		})
	}
}

// BenchmarkPrimitives is BenchmarkPersist for every choice that this CPU has.
func BenchmarkPrimitives(b *testing.B) {
	for _, pr := range choices() {
		for _, size := range []int{64, 128, 256, 512, 1024, 4096, 65536, 1 << 20} {
			b.Run(fmt.Sprintf("%v+nt%d/%d", pr.flush, pr.width, size), func(b *testing.B) {
				r := benchRegion(b)
				r.prim = pr
				benchPersist(b, r, size)
			})
		}
	}
}

func benchRegion(b *testing.B) *Region {
	r, err := NewEmulated(64 << 20)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { r.Close() })
	return r
}

func benchPersist(b *testing.B, r *Region, size int) {
	src := make([]byte, size)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range src {
		src[i] = byte(rng.Uint32())
	}
	for off := int64(0); off < r.Size(); off += AreaAlign { // as the C program does: fresh memory of a virtual machine is slow once
		r.Zero(off, AreaAlign)
	}
	b.SetBytes(int64(size))
	b.ReportAllocs()
	off := int64(0)
	for b.Loop() {
		r.Copy(off, src)
		if err := r.Fence(); err != nil {
			b.Fatal(err)
		}
		off += int64(size)
		if off+int64(size) > r.Size() {
			off = 0
		}
	}
}
