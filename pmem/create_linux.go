package pmem

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Create allocates a zeroed region of size bytes, which appears at path when
// Publish is called and is gone when the region is closed before that, or the
// process dies. A path that exists is an error that matches [fs.ErrExist], or, where it
// is no file either, a *FileTypeError; nothing is ever overwritten. Where there is no
// room, it is an *AllocError.
//
// A devdax device is opened in place: size 0 means the whole of it, Publish
// does nothing, and its content is what was there before. The caller must look
// at it before overwriting it.
func Create(path string, size int64, opt Options) (*Region, error) {
	info, err := os.Lstat(path)
	if err == nil && info.Mode()&os.ModeSymlink != 0 {
		// A link to a device is a way to name it; one to anything else, or
		// to nothing, occupies the path.
		if target, err := os.Stat(path); err == nil {
			info = target
		}
	}
	switch {
	case err == nil && info.Mode()&os.ModeCharDevice != 0:
		return createDevice(path, size, opt)
	case err == nil && !info.Mode().IsRegular() && info.Mode()&os.ModeSymlink == 0:
		return nil, wrongType(path, info.Mode())
	case err == nil:
		return nil, existsError(path)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("pmem: %w", err)
	case size <= 0:
		return nil, fmt.Errorf("pmem: create %s: size %d must be greater than 0", path, size)
	}
	return createFile(path, size, opt)
}

func existsError(path string) error {
	return fmt.Errorf("pmem: create %s: %w: it is never overwritten; choose another path, or remove it first", path, fs.ErrExist)
}

func createFile(path string, size int64, opt Options) (*Region, error) {
	f, temporary, err := unnamed(path)
	if err != nil {
		return nil, err
	}
	r := &Region{path: path, file: f, temporary: temporary, unpublished: true}
	err = lock(f, path)
	var found finding
	if err == nil {
		found, err = classify(f, unix.PROT_READ|unix.PROT_WRITE)
	}
	if err == nil {
		err = found.accept(path, opt)
	}
	if err == nil {
		err = allocate(f, path, size)
	}
	if err == nil {
		err = r.mapWhole(size, found)
	}
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// unnamed opens a new file in path's directory that has no name, or a
// temporary one where the filesystem has no unnamed files.
func unnamed(path string) (f *os.File, temporary string, err error) {
	dir := filepath.Dir(path)
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	switch {
	case err == nil:
		return os.NewFile(uintptr(fd), path), "", nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EISDIR), errors.Is(err, unix.EINVAL):
	default:
		return nil, "", fmt.Errorf("pmem: create a file in %s: %w", dir, err)
	}
	temporary = filepath.Join(dir, "."+filepath.Base(path)+".tmp-"+rand.Text()[:8])
	f, err = os.OpenFile(temporary, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, "", fmt.Errorf("pmem: %w", err)
	}
	return f, temporary, nil
}

func createDevice(path string, size int64, opt Options) (*Region, error) {
	f, err := openPath(path, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	r := &Region{path: path, file: f}
	if err := r.createDevice(size, opt); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r *Region) createDevice(size int64, opt Options) error {
	whole, err := fileSize(r.file)
	if err != nil {
		return err
	}
	switch {
	case size == 0:
		size = whole
	case size < 0 || size > whole:
		return fmt.Errorf("pmem: create %s: size %d is not within the device's %d bytes: 0 takes the whole device", r.path, size, whole)
	case size%AreaAlign != 0:
		return fmt.Errorf("pmem: create %s: size %d on a devdax device must be a multiple of %d", r.path, size, AreaAlign)
	}
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
	return r.mapWhole(size, found)
}

// Publish makes a created region appear at its path, complete and durable, or
// fails with an error that matches [fs.ErrExist] where something appeared
// there meanwhile. The region stays open. On a devdax device, and on a region
// that has its name already, it does nothing.
func (r *Region) Publish() error {
	if !r.unpublished {
		return nil
	}
	// The file's length and extents must not be younger than its name.
	if err := r.file.Sync(); err != nil {
		return fmt.Errorf("pmem: publish %s: %w", r.path, err)
	}
	dir, err := os.Open(filepath.Dir(r.path)) // before there is a name that could not be made durable
	if err != nil {
		return fmt.Errorf("pmem: publish %s: %w", r.path, err)
	}
	defer dir.Close()
	if err := r.link(); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return existsError(r.path)
		}
		return fmt.Errorf("pmem: publish %s: %w", r.path, err)
	}
	r.unpublished, r.temporary = false, ""
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("pmem: publish %s: it has its name, which may not outlast a power failure: %w", r.path, err)
	}
	return nil
}

// link gives the file its name and never replaces one.
func (r *Region) link() error {
	if r.temporary == "" {
		return linkUnnamed(r.file, r.path)
	}
	err := unix.Renameat2(unix.AT_FDCWD, r.temporary, unix.AT_FDCWD, r.path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// A filesystem without the flag: a hard link does not replace either.
		if err := os.Link(r.temporary, r.path); err != nil {
			return err
		}
		_ = os.Remove(r.temporary) // it has its name; a second one does no harm
		return nil
	}
	return err
}

func linkUnnamed(f *os.File, path string) error {
	proc := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	err := unix.Linkat(unix.AT_FDCWD, proc, unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	if errors.Is(err, unix.ENOENT) {
		// Without /proc; needs CAP_DAC_READ_SEARCH.
		return unix.Linkat(int(f.Fd()), "", unix.AT_FDCWD, path, unix.AT_EMPTY_PATH)
	}
	return err
}
