package pmem

import (
	"fmt"
	"os"

	mmap "github.com/edsrzf/mmap-go"
	"golang.org/x/sys/unix"
)

// View is a region's file mapped for reading, without a lock. It never writes
// and allocates nothing. While another process stores to the region, its
// content changes: a reader has to be ready for anything.
type View struct {
	mem   mmap.MMap
	file  *os.File
	path  string
	class Class
}

// OpenReadOnly maps a region's file, a copy of one, or a devdax device.
func OpenReadOnly(path string) (*View, error) {
	f, err := openPath(path, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	v := &View{path: path, file: f}
	if err := v.open(); err != nil {
		f.Close()
		return nil, err
	}
	return v, nil
}

func (v *View) open() error {
	found, err := classify(v.file, unix.PROT_READ)
	if err != nil {
		return err
	}
	v.class = found.class
	size, err := fileSize(v.file)
	if err != nil || size == 0 {
		// An empty file cannot be mapped; its length is for the caller to judge.
		return err
	}
	if int64(int(size)) != size {
		return fmt.Errorf("pmem: %s has %d bytes, more than this platform can address", v.path, size)
	}
	v.mem, err = mmap.MapRegion(v.file, int(size), mmap.RDONLY, 0, 0)
	if err != nil {
		return fmt.Errorf("pmem: map %d bytes of %s read-only: %w", size, v.path, err)
	}
	return nil
}

// Bytes is the whole file. Storing there ends the process.
func (v *View) Bytes() []byte { return v.mem }

// Path is the path that was opened.
func (v *View) Path() string { return v.path }

// Class is the class that an Open of the same file would find.
func (v *View) Class() Class { return v.class }

// InUse says whether the region is open for storing at this moment.
func (v *View) InUse() bool { return v.file != nil && locked(v.file) }

// Close unmaps the file. No slice of it may be used any more.
func (v *View) Close() error {
	if v.file == nil {
		return nil
	}
	var err error
	if v.mem != nil {
		err = v.mem.Unmap()
	}
	if e := v.file.Close(); err == nil {
		err = e
	}
	v.file = nil
	if err != nil {
		return fmt.Errorf("pmem: close %s: %w", v.path, err)
	}
	return nil
}
