package pmem

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"os"
	"runtime"
	"sync/atomic"
	"unsafe"
)

// Region is persistent memory, mapped for storing and locked against every
// other open. It implements [Memory].
type Region struct {
	mem    []byte     // the mapping; nil after Close
	prim   primitives // how bytes reach memory; without flush on Byte and Paged
	paged  *dirty     // on Paged only
	class  Class
	path   string
	file   *os.File // holds the lock
	device bool     // a devdax device, used in place

	// Of a created region until Publish: the name that it will take, and its
	// temporary one, "" where it has none.
	unpublished bool
	temporary   string
}

var _ Memory = (*Region)(nil)

// littleEndian says whether the CPU stores integers as the format has them.
var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// Path is the path that the region was opened or created at.
func (r *Region) Path() string { return r.path }

// Size is the size of the mapping in bytes: the file's length at open, or what
// Create was asked for.
func (r *Region) Size() int64 { return int64(len(r.mem)) }

// Device says whether the region is on a devdax device. Such a region is used in
// place: Create neither zeroes it nor hides it until Publish.
func (r *Region) Device() bool { return r.device }

// Class implements [Memory].
func (r *Region) Class() Class { return r.class }

// Bytes implements [Memory].
func (r *Region) Bytes() []byte { return r.mem }

// Window implements [Memory].
func (r *Region) Window(off, n int64) []byte {
	r.check(off, n)
	return r.mem[off : off+n : off+n]
}

// Store64 implements [Memory].
func (r *Region) Store64(off int64, v uint64) {
	r.check(off, 8)
	if off&7 != 0 {
		panic(fmt.Sprintf("pmem: Store64 at offset %d, which is not divisible by 8", off))
	}
	if !littleEndian {
		v = bits.ReverseBytes64(v)
	}
	p := (*uint64)(unsafe.Pointer(&r.mem[off]))
	if runtime.GOARCH == "amd64" {
		// One instruction too. An atomic store would be an exchange here, which
		// waits until all non-temporal stores before it have left the CPU.
		*p = v
		return
	}
	atomic.StoreUint64(p, v)
}

// Write implements [Memory].
func (r *Region) Write(off int64, p []byte) {
	r.check(off, int64(len(p)))
	dst := r.mem[off:]
	for len(p) > maxCall {
		copy(dst[:maxCall], p)
		dst, p = dst[maxCall:], p[maxCall:]
	}
	copy(dst, p)
}

// Copy implements [Memory].
func (r *Region) Copy(off int64, p []byte) {
	n := int64(len(p))
	r.check(off, n)
	if r.paged == nil {
		// The short ways of a small commit: 5 % of its time. The mapping is
		// page-aligned, so off is aligned as its address is.
		if r.prim.whole(off, n) {
			copyLines(r.prim.width, unsafe.Pointer(&r.mem[off]), unsafe.Pointer(&p[0]), uintptr(n))
			return
		}
		if n < ntMin {
			copy(r.mem[off:off+n], p)
			if n > 0 && r.prim.flush != flushNone {
				flushLines(r.prim.flush, unsafe.Pointer(&r.mem[off&^(LineSize-1)]), uintptr(off&(LineSize-1)+n+LineSize-1)/LineSize)
			}
			return
		}
	}
	r.prim.copyTo(r.mem[off:off+n], p)
	if r.paged != nil {
		r.paged.add(off, n)
	}
}

// Zero implements [Memory].
func (r *Region) Zero(off, n int64) {
	r.check(off, n)
	r.prim.zero(r.mem[off : off+n])
	if r.paged != nil {
		r.paged.add(off, n)
	}
}

// Flush implements [Memory].
func (r *Region) Flush(off, n int64) {
	r.check(off, n)
	if r.paged != nil {
		r.paged.add(off, n)
		return
	}
	r.prim.flushRange(r.mem[off : off+n])
}

// Fence implements [Memory]. Only class paged can fail, with an error that
// matches [ErrPersistence].
func (r *Region) Fence() error {
	if r.paged != nil {
		return r.syncPaged()
	}
	storeFence()
	return nil
}

// syncPaged is apart from Fence, so that Fence is small.
//
//go:noinline
func (r *Region) syncPaged() error { return r.paged.sync(r.mem, r.path) }

// check panics where [off, off+n) is not inside the mapping.
func (r *Region) check(off, n int64) {
	if off < 0 || n < 0 || off > int64(len(r.mem))-n {
		r.outside(off, n)
	}
}

// outside is apart from check, so that check is inlined.
//
//go:noinline
func (r *Region) outside(off, n int64) {
	panic(fmt.Sprintf("pmem: range of %d bytes at offset %d is outside of the %d bytes of %s", n, off, len(r.mem), r.path))
}
