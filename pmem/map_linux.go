package pmem

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	mmap "github.com/edsrzf/mmap-go"
	"golang.org/x/sys/unix"
)

const (
	// allocStep bounds one fallocate: tmpfs gives up and undoes the whole
	// call when a signal arrives, and the Go runtime sends signals.
	allocStep = 128 << 20
	// faultStep is the piece in which prefaulting steps over bad pages.
	faultStep = 2 << 20
)

// mapShared maps the first size bytes of f as its class needs it. DAX classes
// need flags that mmap-go cannot pass.
func mapShared(f *os.File, size int64, found finding) ([]byte, error) {
	if size == 0 {
		return nil, nil
	}
	if int64(int(size)) != size {
		return nil, fmt.Errorf("pmem: %s has %d bytes, more than this platform can address", f.Name(), size)
	}
	var mem []byte
	var err error
	switch {
	case found.device:
		// devdax is synchronous by nature; older kernels know no MAP_SYNC there.
		mem, err = unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	case found.class >= Cacheline:
		mem, err = unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED_VALIDATE|mapSync)
	default:
		mem, err = mmap.MapRegion(f, int(size), mmap.RDWR, 0, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("pmem: map %d bytes of %s: %w", size, f.Name(), err)
	}
	return mem, nil
}

// allocate backs [0, size) of f with storage of its own, holes included, and makes
// f at least size long. What is there already stays.
func allocate(f *os.File, path string, size int64) error {
	if err := room(f, path, size); err != nil {
		return err
	}
	free := freeBytes(f) // before what does not suffice is taken
	if err := unshare(f, size); err != nil {
		return &AllocError{Path: path, Size: size, Free: free, Err: err}
	}
	for off := int64(0); off < size; off += allocStep {
		n := min(allocStep, size-off)
		err := fallocate(f, 0, off, n)
		switch {
		case err == nil:
			continue
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			if err = fillHoles(f, off, size); err == nil {
				return nil
			}
		case noRoom(err):
			// XFS wants room for all of the range, also where most of it is there.
			if err = allocateGaps(f, off, n, err); err == nil {
				continue
			}
		}
		return &AllocError{Path: path, Size: size, Free: free, Err: err}
	}
	return nil
}

func fallocate(f *os.File, mode uint32, off, n int64) error {
	return retry(func() error { return unix.Fallocate(int(f.Fd()), mode, off, n) })
}

func noRoom(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// allocateGaps is fallocate where that has found no room: of what is not there yet.
func allocateGaps(f *os.File, off, n int64, full error) error {
	extents, err := extentsOf(f)
	if err != nil {
		return full
	}
	for _, hole := range gaps(extents, off, n) {
		if err := fallocate(f, 0, hole.Offset, hole.Length); err != nil {
			return err
		}
	}
	if have, err := fileSize(f); err != nil || have < off+n {
		return full
	}
	return nil
}

// freeBytes is what the filesystem of f has left, -1 where that is unknown.
func freeBytes(f *os.File) int64 {
	var fs unix.Statfs_t
	if unix.Fstatfs(int(f.Fd()), &fs) != nil {
		return -1
	}
	return int64(fs.Bavail) * int64(fs.Bsize)
}

// unshare gives f storage of its own for what a copy of it, or of which it is one,
// shares (cp on XFS and btrfs): a store there would have to find room, and where
// there is none it faults.
func unshare(f *os.File, size int64) error {
	extents, err := extentsOf(f)
	if err != nil {
		return nil // a filesystem without extents shares none
	}
	const unshareRange = 0x40 // FALLOC_FL_UNSHARE_RANGE
	for _, e := range extents {
		for end := min(e.logical+e.length, size); e.shared && e.logical < end; e.logical += allocStep {
			n := min(allocStep, end-e.logical)
			err := fallocate(f, unshareRange, e.logical, n)
			if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
				return nil
			}
			if noRoom(err) { // XFS wants room for the range once more when it is done
				if now, e2 := extentsOf(f); e2 == nil && !shares(now, e.logical, n) {
					err = nil
				}
			}
			if err != nil {
				return fmt.Errorf("%w: it shares storage with a copy, and needs as much of its own", err)
			}
		}
	}
	return nil
}

// fillHoles is allocate on a filesystem without fallocate: it writes zeros
// where the file has no data yet.
func fillHoles(f *os.File, off, size int64) error {
	zeros := make([]byte, 1<<20)
	for off < size {
		hole, err := seek(f, off, unix.SEEK_HOLE, off) // past the end of a file that is shorter: all of the rest
		if err != nil {
			return err
		}
		if hole >= size {
			return nil
		}
		end, err := seek(f, hole, unix.SEEK_DATA, size)
		if err != nil {
			return err
		}
		end = min(end, size)
		for hole < end {
			n, err := f.WriteAt(zeros[:min(int64(len(zeros)), end-hole)], hole)
			if err != nil {
				return err
			}
			hole += int64(n)
		}
		off = end
	}
	return nil
}

// seek is where the next hole, or data, begins from off on; none where there is no
// more of it. Any other error tells nothing about what the file holds.
func seek(f *os.File, off int64, whence int, none int64) (at int64, err error) {
	err = retry(func() (err error) {
		at, err = unix.Seek(int(f.Fd()), off, whence)
		return err
	})
	if errors.Is(err, unix.ENXIO) {
		return none, nil
	}
	return at, err
}

// prefault makes every page of mem present, so that no store waits for a
// page fault, during which the goroutine's P is held. A paged mapping is only
// read in: a write fault would make every page dirty.
//
// Pages that cannot be made present (poison) are left out: the access that
// meets one becomes a *FaultError, and what is stored there can be repaired.
func prefault(mem []byte, class Class) error {
	if err := populate(mem, class); err != nil {
		return err
	}
	// A page that is present in a virtual machine may not be so in its host,
	// until it is used: 5 µs a page, seen on Firecracker's.
	for virtual && len(mem) > 0 {
		n := min(len(mem), faultStep)
		touch(mem[:n], false)
		mem = mem[n:]
	}
	return nil
}

func populate(mem []byte, class Class) error {
	advice := unix.MADV_POPULATE_WRITE
	if class == Paged {
		advice = unix.MADV_POPULATE_READ
	}
	err := retry(func() error { return unix.Madvise(mem, advice) })
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EINVAL): // Linux before 5.14
		for len(mem) > 0 {
			n := min(len(mem), faultStep)
			touch(mem[:n], class != Paged)
			mem = mem[n:]
		}
		return nil
	case !errors.Is(err, unix.EFAULT) && !errors.Is(err, unix.EHWPOISON):
		return fmt.Errorf("pmem: prefault of %d bytes: %w", len(mem), err)
	}
	for len(mem) > 0 {
		n := min(len(mem), faultStep)
		err := retry(func() error { return unix.Madvise(mem[:n], advice) })
		if err != nil && !errors.Is(err, unix.EFAULT) && !errors.Is(err, unix.EHWPOISON) {
			return fmt.Errorf("pmem: prefault of %d bytes: %w", n, err)
		}
		mem = mem[n:]
	}
	return nil
}

// touch reads, or writes without a change, one word of every page of mem. It
// stops at a page that faults.
func touch(mem []byte, write bool) (err error) {
	defer Recover(plain(mem), Arm(), &err)
	for off := 0; off+4 <= len(mem); off += int(pageSize) {
		word := (*uint32)(unsafe.Pointer(&mem[off]))
		if write {
			atomic.AddUint32(word, 0)
		} else {
			atomic.LoadUint32(word)
		}
	}
	return nil
}

// plain is a mapping without a region.
type plain []byte

func (p plain) Bytes() []byte { return p }
