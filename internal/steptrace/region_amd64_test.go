package steptrace

import (
	"bytes"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// region is the child's mapping of the region's file, as its parent sees it.
type region struct {
	tr   *trace
	path string
	addr uint64 // in the child; 0 while it is not mapped
	size uint64
	mem  []byte // our own mapping, for reading
}

func (r *region) holds(a uint64) bool { return a-r.addr < r.size }

func (r *region) offset(a uint64) int64 { return int64(a - r.addr) }

// syscall follows the mapping.
func (r *region) syscall(pid int, before *unix.PtraceRegs, result uint64) error {
	switch before.Rax {
	case unix.SYS_MMAP:
		if before.R10&unix.MAP_SHARED != 0 && int64(before.Rsi) == r.tr.size && int64(result) > 0 {
			return r.mapped(pid, int(before.R8), result)
		}
	case unix.SYS_MUNMAP:
		if before.Rdi == r.addr && before.Rsi == r.size {
			err := r.compare(before.Rip)
			r.close()
			return err
		}
	}
	return nil
}

// mapped begins to look at the child's mapping of its file fd.
func (r *region) mapped(pid, fd int, addr uint64) error {
	if r.addr != 0 {
		return fmt.Errorf("the child maps the region twice")
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
	if err != nil {
		return err
	}
	defer f.Close()
	mem, err := unix.Mmap(int(f.Fd()), 0, int(r.tr.size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mapping the child's region: %w", err)
	}
	r.mem, r.addr, r.size = mem, addr, uint64(len(mem))
	if r.tr.shadow == nil || r.tr.untraced {
		r.tr.untraced = false
		r.tr.shadow = slices.Clone(mem)
		r.tr.ops = append(r.tr.ops, op{kind: opReset, data: slices.Clone(mem)})
		return nil
	}
	return r.compare(0)
}

// stored is what the child has just stored.
func (r *region) stored(a uint64, n int, pc uint64) ([]byte, error) {
	off := r.offset(a)
	end := off + int64(n)
	if end > int64(r.size) {
		return nil, fmt.Errorf("%s stores beyond the region's end", function(pc))
	}
	p := slices.Clone(r.mem[off:end])
	copy(r.tr.shadow[off:], p)
	from, to := off&^63, min((end+63)&^63, int64(r.size))
	if !bytes.Equal(r.mem[from:to], r.tr.shadow[from:to]) {
		return nil, fmt.Errorf("%s stored %d bytes at offset %d, but the lines around changed as well", function(pc), n, off)
	}
	return p, nil
}

// compare compares the region with the stores that were noted.
func (r *region) compare(pc uint64) error {
	if r.addr == 0 || bytes.Equal(r.mem, r.tr.shadow) {
		return nil
	}
	for off := range r.mem {
		if r.mem[off] != r.tr.shadow[off] {
			return fmt.Errorf("before %s: the region's byte %d is %#x, the stores that were seen make it %#x: a store went unseen", function(pc), off, r.mem[off], r.tr.shadow[off])
		}
	}
	return nil
}

func (r *region) outside(in *inst, a uint64, pc uint64) error {
	if r.holds(a) {
		return fmt.Errorf("%s at %s runs backwards through the region: teach the tracer to follow it", in.name, function(pc))
	}
	return nil
}

func (r *region) close() {
	if r.addr != 0 {
		unix.Munmap(r.mem)
		r.addr, r.size, r.mem = 0, 0, nil
	}
}
