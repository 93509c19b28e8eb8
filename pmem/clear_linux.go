package pmem

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Clear gives the 4 KiB blocks of the file that hold [off, off+n), n > 0, new storage,
// which reads as zeros. What they held is gone, so it is for blocks that cannot be
// read (an uncorrectable media error) and whose content the caller has from elsewhere.
// Nobody may store to their pages meanwhile. Where a longer page stays unreadable
// because of its other blocks, that is an error.
//
// As PMDK does for a file (libpmem2's pmem2_badblock_clear), it punches a hole and
// allocates it anew. The range is mapped anew as well: the kernel remembers of what
// a process had mapped that it was poisoned. An error leaves the pages unreadable:
// a file that was cut off, a device or a filesystem that cannot do it.
func (r *Region) Clear(off, n int64) error {
	r.check(off, n)
	const block = 4096
	from := off &^ (block - 1)
	n = (off + n - from + block - 1) &^ (block - 1)
	if err := r.clear(from, n); err != nil {
		return fmt.Errorf("pmem: clear %d bytes at offset %d of %s: %w", n, from, r.path, err)
	}
	return nil
}

func (r *Region) clear(off, n int64) error {
	if r.device {
		return errors.New("it is a device: ndctl clear-errors does it")
	}
	size, err := fileSize(r.file)
	if err != nil {
		return err
	}
	if size < off+n {
		return fmt.Errorf("the file has %d bytes: it was cut off", size)
	}
	const keepSize, punchHole = unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE
	if err := fallocate(r.file, keepSize|punchHole, off, n); err != nil {
		return os.NewSyscallError("fallocate", err)
	}
	if err := fallocate(r.file, 0, off, n); err != nil {
		return os.NewSyscallError("fallocate", err)
	}
	n += off & (pageSize - 1)
	off &^= pageSize - 1
	n = (n + pageSize - 1) &^ (pageSize - 1)
	flags := unix.MAP_SHARED
	if r.class >= Cacheline {
		flags = unix.MAP_SHARED_VALIDATE | mapSync
	}
	at := unsafe.Pointer(&r.mem[off])
	if _, err := unix.MmapPtr(int(r.file.Fd()), off, at, uintptr(n), unix.PROT_READ|unix.PROT_WRITE, flags|unix.MAP_FIXED); err != nil {
		return os.NewSyscallError("mmap", err)
	}
	if touch(r.mem[off:off+n], true) != nil {
		return errors.New("it cannot be read after that either")
	}
	return nil
}
