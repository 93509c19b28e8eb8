package pmem

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// What the platform knows about the persistent memory under a path, from
// sysfs, as PMDK's libpmem2 reads it with libndctl:
//
//	dev/block/MAJ:MIN -> devices/.../ndbusB/regionR/namespaceR.N/block/pmemR
//	dev/char/MAJ:MIN  -> devices/.../ndbusB/regionR/daxR.N/daxR.M
//	devices/.../regionR/mappingI    "nmemD,start,length,position"
//	bus/nd/devices/nmemD/nfit/dirty_shutdown

// maxStack bounds how deep block devices may be stacked (LVM, RAID) over
// persistent memory.
const maxStack = 8

var regionName = regexp.MustCompile(`^region[0-9]+$`)

// deviceDir is the sysfs directory of the block device that holds a file, or
// of a character device; "" where there is none.
func deviceDir(path string) (dir string, device bool, err error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", false, fmt.Errorf("pmem: stat %s: %w", path, err)
	}
	kind, dev := "block", uint64(st.Dev)
	if device = st.Mode&unix.S_IFMT == unix.S_IFCHR; device {
		kind, dev = "char", uint64(st.Rdev)
	}
	dir, err = filepath.EvalSymlinks(filepath.Join(sysfs, "dev", kind, fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev))))
	if errors.Is(err, fs.ErrNotExist) {
		return "", device, nil // tmpfs, btrfs, network filesystems
	}
	if err != nil {
		return "", device, fmt.Errorf("pmem: device of %s: %w", path, err)
	}
	return dir, device, nil
}

// regionsOf are the directories of the NVDIMM regions under a device, none
// where it is not persistent memory.
func regionsOf(dir string, depth int) ([]string, error) {
	for up := dir; up != "/" && up != "."; up = filepath.Dir(up) {
		if regionName.MatchString(filepath.Base(up)) {
			return []string{up}, nil
		}
	}
	slaves, err := filepath.Glob(filepath.Join(dir, "slaves", "*"))
	if err != nil || depth == maxStack {
		return nil, err
	}
	var regions []string
	for _, slave := range slaves {
		lower, err := filepath.EvalSymlinks(slave)
		if err != nil {
			return nil, fmt.Errorf("pmem: %w", err)
		}
		more, err := regionsOf(lower, depth+1)
		if err != nil {
			return nil, err
		}
		if more == nil {
			return nil, nil // in part on another medium
		}
		regions = append(regions, more...)
	}
	slices.Sort(regions)
	return slices.Compact(regions), nil
}

// ShutdownCount is the number of times that the NVDIMMs under path lost power
// without having saved everything. A region that was open when it changed may
// have lost stores that were fenced: it is inconsistent. ok is false where the
// platform does not count.
func ShutdownCount(path string) (count uint64, ok bool, err error) {
	dir, _, err := deviceDir(path)
	if err != nil || dir == "" {
		return 0, false, err
	}
	regions, err := regionsOf(dir, 0)
	if err != nil {
		return 0, false, err
	}
	var modules []string
	for _, region := range regions {
		names, err := modulesOf(region)
		if err != nil {
			return 0, false, err
		}
		modules = append(modules, names...)
	}
	slices.Sort(modules)
	for _, module := range slices.Compact(modules) {
		n, ok, err := dirtyShutdowns(module)
		if err != nil || !ok {
			return 0, false, err
		}
		count += n
	}
	return count, len(modules) > 0, nil
}

// modulesOf are the names (nmem0) of the NVDIMMs that a region is made of.
func modulesOf(region string) ([]string, error) {
	count, ok, err := readUint(filepath.Join(region, "mappings"))
	if err != nil || !ok {
		return nil, err
	}
	var names []string
	for i := range count {
		text, err := os.ReadFile(filepath.Join(region, fmt.Sprintf("mapping%d", i)))
		if err != nil {
			return nil, fmt.Errorf("pmem: NVDIMMs of %s: %w", filepath.Base(region), err)
		}
		name, _, found := strings.Cut(string(text), ",")
		if !found || name != filepath.Base(name) {
			return nil, fmt.Errorf("pmem: mapping%d of %s reads %q", i, filepath.Base(region), text)
		}
		names = append(names, name)
	}
	return names, nil
}

func dirtyShutdowns(module string) (count uint64, ok bool, err error) {
	for _, bus := range []string{"nfit", "papr", "cxl"} {
		count, ok, err = readUint(filepath.Join(sysfs, "bus/nd/devices", module, bus, "dirty_shutdown"))
		if ok || err != nil {
			return count, ok, err
		}
	}
	return 0, false, nil
}

// DeepFlush pushes what was fenced beyond the platform's power-fail-safe
// buffers to the medium itself, where the platform can, so that it survives
// even where the flush on power failure does not work. On a file it is an
// fsync.
func (r *Region) DeepFlush() error {
	if !r.device {
		if err := r.file.Sync(); err != nil {
			return fmt.Errorf("pmem: deep flush of %s: %w", r.path, err)
		}
		return nil
	}
	return deepFlushDevice(r.path)
}

func deepFlushDevice(path string) error {
	dir, _, err := deviceDir(path)
	if err != nil || dir == "" {
		return err
	}
	regions, err := regionsOf(dir, 0)
	if err != nil {
		return err
	}
	for _, region := range regions {
		name := filepath.Join(region, "deep_flush")
		needed, ok, err := readUint(name)
		if err != nil {
			return err
		}
		if !ok || needed == 0 {
			continue
		}
		if err := os.WriteFile(name, []byte("1"), 0); err != nil {
			return fmt.Errorf("pmem: deep flush of %s: %w (it needs root)", path, err)
		}
	}
	return nil
}

// readUint reads a number from a file of sysfs; ok is false where the file
// does not exist.
func readUint(name string) (value uint64, ok bool, err error) {
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("pmem: %w", err)
	}
	value, err = strconv.ParseUint(strings.TrimSpace(string(text)), 0, 64)
	if err != nil {
		return 0, false, fmt.Errorf("pmem: %s reads %q, not a number", name, text)
	}
	return value, true, nil
}
