package pmem

import (
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// extent is a piece of a file: length bytes at logical in the file lie at physical
// on the device. Where shared, they lie there for other files as well.
type extent struct {
	logical, physical, length int64
	shared                    bool
}

// fiemap is struct fiemap of linux/fiemap.h with room for some extents.
type fiemap struct {
	start, length        uint64
	flags, mapped, count uint32
	_                    uint32
	extents              [64]struct {
		logical, physical, length uint64
		_                         [2]uint64
		flags                     uint32
		_                         [3]uint32
	}
}

const (
	fsIocFiemap        = 0xc020660b
	fiemapExtentLast   = 1
	fiemapExtentShared = 0x2000
)

// extentsOf says where a file lies on its device, in ascending order. What was
// allocated and never written counts. A filesystem without extents is an error.
func extentsOf(f *os.File) ([]extent, error) {
	var out []extent
	for start := uint64(0); ; {
		m := fiemap{start: start, length: ^uint64(0) - start}
		m.count = uint32(len(m.extents))
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&m))); errno != 0 {
			return nil, errno
		}
		for _, e := range m.extents[:m.mapped] {
			out = append(out, extent{int64(e.logical), int64(e.physical), int64(e.length), e.flags&fiemapExtentShared != 0})
			start = e.logical + e.length
			if e.flags&fiemapExtentLast != 0 {
				return out, nil
			}
		}
		if m.mapped == 0 {
			return out, nil
		}
	}
}

// gaps are the holes that extents leave in [off, off+n).
func gaps(extents []extent, off, n int64) (holes []Range) {
	end := off + n
	for _, e := range slices.Concat(extents, []extent{{logical: end}}) {
		if next := min(e.logical, end); next > off {
			holes = append(holes, Range{off, next - off})
		}
		off = max(off, e.logical+e.length)
	}
	return holes
}

// shares reports whether other files share anything in [off, off+n).
func shares(extents []extent, off, n int64) bool {
	return slices.ContainsFunc(extents, func(e extent) bool {
		return e.shared && e.logical < off+n && off < e.logical+e.length
	})
}
