package pmem

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// mapSync is MAP_SYNC, the same on every platform that has persistent memory.
const mapSync = 0x80000

// sysfs is the root of sysfs; tests point it at a tree of their own.
var sysfs = "/sys"

// finding is what a file offers, and why nothing stronger.
type finding struct {
	class  Class
	reason string
	device bool // devdax
}

// classify says what class f offers, without side effects on it. prot is that
// of the mapping to come.
//
// MAP_SYNC is asked for with MAP_SHARED_VALIDATE: with MAP_SHARED alone the
// kernel ignores it, and success means nothing.
func classify(f *os.File, prot int) (finding, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return finding{}, fmt.Errorf("pmem: stat %s: %w", f.Name(), err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFCHR {
		if !hasFlush() {
			return finding{}, fmt.Errorf("pmem: %s is a devdax device, but this CPU has no instruction that flushes to persistence: use a filesystem on a pmem block device instead", f.Name())
		}
		return classifyDevice(f)
	}
	var fs unix.Statfs_t
	if err := retry(func() error { return unix.Fstatfs(int(f.Fd()), &fs) }); err != nil {
		return finding{}, fmt.Errorf("pmem: statfs %s: %w", f.Name(), err)
	}
	switch uint32(fs.Type) { // its type differs by platform
	case unix.TMPFS_MAGIC:
		return finding{class: Emulated, reason: "tmpfs or memfd: volatile memory"}, nil
	case unix.RAMFS_MAGIC, unix.HUGETLBFS_MAGIC:
		return finding{class: Emulated, reason: "ramfs or hugetlbfs: volatile memory"}, nil
	}
	if !hasFlush() {
		return finding{class: Paged, reason: "this CPU has no instruction that flushes to persistence"}, nil
	}
	// One page is enough, and may lie beyond the end of an empty file: it is
	// never touched.
	probe, err := unix.Mmap(int(f.Fd()), 0, int(pageSize), prot, unix.MAP_SHARED_VALIDATE|mapSync)
	if err != nil {
		return finding{class: Paged, reason: fmt.Sprintf("mapping with MAP_SYNC: %v", err)}, nil
	}
	if err := unix.Munmap(probe); err != nil {
		return finding{}, fmt.Errorf("pmem: unmap %s: %w", f.Name(), err)
	}
	class, reason := strongest()
	return finding{class: class, reason: reason}, nil
}

// classifyDevice is classify of a devdax device. Such devices are made of other
// memory too (HBM, CXL, what firmware has put aside), which a power failure empties.
func classifyDevice(f *os.File) (finding, error) {
	dir, _, err := deviceDir(f.Name())
	if err != nil {
		return finding{}, err
	}
	regions, err := regionsOf(dir, 0)
	if err != nil {
		return finding{}, err
	}
	volatile := func(why string) (finding, error) { return finding{class: Emulated, reason: why, device: true}, nil }
	if len(regions) != 1 {
		return volatile("a device of memory that is no NVDIMM region: volatile")
	}
	bus := filepath.Dir(regions[0])
	provider, err := os.ReadFile(filepath.Join(bus, "provider"))
	switch {
	case !strings.HasPrefix(filepath.Base(bus), "ndbus"):
		return volatile("a device of " + filepath.Base(regions[0]) + ", which is no NVDIMM region: volatile")
	case err == nil && strings.TrimSpace(string(provider)) == "virtio-pmem":
		return volatile("a device of virtio-pmem, which a flush leaves in the host's page cache: put a filesystem on it")
	}
	class, reason := strongest()
	return finding{class: class, reason: reason, device: true}, nil
}

// accept checks a finding against the weakest class that the caller accepts.
func (f finding) accept(path string, opt Options) error {
	want := opt.Accept
	if want == 0 {
		want = Cacheline
	}
	if f.class < want {
		return &ClassError{Path: path, Have: f.class, Want: want, Reason: f.reason}
	}
	return nil
}

// strongest is Byte where every region of the platform says that power
// failure flushes the CPU caches, else Cacheline.
func strongest() (Class, string) {
	regions, err := filepath.Glob(filepath.Join(sysfs, "bus/nd/devices/region*"))
	if err != nil || len(regions) == 0 {
		return Cacheline, "no NVDIMM region says that the CPU caches are persistent"
	}
	for _, region := range regions {
		domain, err := os.ReadFile(filepath.Join(region, "persistence_domain"))
		if err != nil {
			return Cacheline, fmt.Sprintf("%s has no readable persistence_domain", filepath.Base(region))
		}
		if got := strings.TrimSpace(string(domain)); got != "cpu_cache" {
			return Cacheline, fmt.Sprintf("the persistence domain of %s is %q, not cpu_cache", filepath.Base(region), got)
		}
	}
	return Byte, ""
}

// deviceSize is the size in bytes of a devdax device. Another character device
// is an error.
func deviceSize(path string, info os.FileInfo) (int64, error) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, fmt.Errorf("pmem: stat %s has no device number", path)
	}
	rdev := uint64(st.Rdev)
	dir := filepath.Join(sysfs, "dev/char", fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev)))
	subsystem, err := filepath.EvalSymlinks(filepath.Join(dir, "subsystem"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("pmem: %s: %w", path, err)
	}
	if err != nil || filepath.Base(subsystem) != "dax" {
		return 0, &FileTypeError{path, "is a character device, but not a devdax one: name a file, or a device that ndctl lists with chardev"}
	}
	text, err := os.ReadFile(filepath.Join(dir, "size"))
	if err != nil {
		return 0, fmt.Errorf("pmem: size of devdax device %s: %w", path, err)
	}
	var size int64
	if _, err := fmt.Sscan(string(text), &size); err != nil || size <= 0 {
		return 0, fmt.Errorf("pmem: size of devdax device %s reads %q", path, text)
	}
	return size, nil
}
