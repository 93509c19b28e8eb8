package pmem

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Options say what the caller of Create or Open accepts.
type Options struct {
	// Accept is the weakest class that is accepted; zero means Cacheline. A
	// weaker one is a *ClassError.
	Accept Class
}

// Open maps the whole of a region's file, or of a devdax device, for storing.
// It takes an exclusive lock, which Close releases; where another open holds
// it, the error is an *InUseError. Holes in the file are allocated, what it shares
// with a copy gets storage of its own (where there is no room, an *AllocError), and
// every page that can be read is made present. The length of the file is not
// judged.
func Open(path string, opt Options) (*Region, error) {
	f, err := openPath(path, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	r := &Region{path: path, file: f}
	if err := r.open(opt); err != nil {
		release(f)
		return nil, err
	}
	return r, nil
}

func (r *Region) open(opt Options) error {
	if err := lock(r.file, r.path); err != nil {
		return err
	}
	found, err := classify(r.file, unix.PROT_READ|unix.PROT_WRITE)
	if err != nil {
		return err
	}
	if err := found.accept(r.path, opt); err != nil {
		return err
	}
	size, err := fileSize(r.file)
	if err != nil {
		return err
	}
	if !found.device {
		if err := allocate(r.file, r.path, size); err != nil {
			return err
		}
	}
	return r.mapWhole(size, found)
}

// NewEmulated is a region of volatile memory without a name, zeroed.
func NewEmulated(size int64) (*Region, error) {
	if size <= 0 {
		return nil, fmt.Errorf("pmem: size %d of a region must be greater than 0", size)
	}
	const name = "nvmmirror"
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("pmem: memfd_create: %w", err)
	}
	r := &Region{path: "memfd:" + name, file: os.NewFile(uintptr(fd), name)}
	err = allocate(r.file, r.path, size)
	if err == nil {
		err = r.mapWhole(size, finding{class: Emulated})
	}
	if err != nil {
		r.file.Close()
		return nil, err
	}
	return r, nil
}

// mapWhole maps and prefaults, and settles how stores become durable.
func (r *Region) mapWhole(size int64, found finding) error {
	mem, err := mapShared(r.file, size, found)
	if err != nil {
		return err
	}
	if size > 0 {
		if err := prefault(mem, found.class); err != nil {
			return errors.Join(err, unix.Munmap(mem))
		}
	}
	r.mem, r.class, r.device = mem, found.class, found.device
	switch found.class {
	case Paged:
		// msync works from the page cache: nothing else has a use.
		r.paged = newDirty()
	case Byte:
		// Caches are persistent: passing them by would only be slower.
	case Emulated:
		r.prim = ofEmulated()
	default:
		r.prim = detected
	}
	return nil
}

// Close unmaps the region and releases its lock. What was fenced is durable,
// what was not may be. A created region that was not published is gone. No
// slice of the region may be used any more.
func (r *Region) Close() error {
	if r.file == nil {
		return nil
	}
	var errs []error
	if r.mem != nil {
		if err := unix.Munmap(r.mem); err != nil {
			errs = append(errs, fmt.Errorf("pmem: unmap %s: %w", r.path, err))
		}
		r.mem = nil
	}
	if r.temporary != "" {
		if err := os.Remove(r.temporary); err != nil {
			errs = append(errs, fmt.Errorf("pmem: remove unpublished region: %w", err))
		}
		r.temporary = ""
	}
	if err := release(r.file); err != nil {
		errs = append(errs, fmt.Errorf("pmem: close %s: %w", r.path, err))
	}
	r.file = nil
	return errors.Join(errs...)
}

// wrongType says of what is neither a file nor a character device what to name.
func wrongType(path string, mode os.FileMode) error {
	problem := fmt.Sprintf("is neither a file nor a devdax device (mode %s): name a file in a directory on persistent memory", mode)
	switch {
	case mode.IsDir():
		problem = "is a directory: name a file in it"
	case mode&os.ModeDevice != 0:
		problem = "is a block device: name a file on a file system with DAX on it, or a devdax device"
	}
	return &FileTypeError{path, problem}
}

// openPath opens a regular file or a devdax device. Anything else is refused
// before it is opened: opening a FIFO blocks, and opening some devices acts.
func openPath(path string, flag int) (*os.File, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("pmem: %w", err)
	}
	switch mode := info.Mode(); {
	case mode&os.ModeCharDevice != 0:
		if _, err := deviceSize(path, info); err != nil {
			return nil, err
		}
	case !mode.IsRegular():
		return nil, wrongType(path, mode)
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return nil, fmt.Errorf("pmem: %w", err)
	}
	return f, nil
}

// fileSize is the length of a file or the size of a devdax device.
func fileSize(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, fmt.Errorf("pmem: %w", err)
	}
	if info.Mode()&os.ModeCharDevice != 0 {
		return deviceSize(f.Name(), info)
	}
	return info.Size(), nil
}
