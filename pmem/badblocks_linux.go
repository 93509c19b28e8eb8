package pmem

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
)

// Range is [Offset, Offset+Length) of a region, in bytes.
type Range struct{ Offset, Length int64 }

// sector is the unit of sysfs's lists of bad blocks.
const sector = 512

// maxSector is beyond any device that can be mapped.
const maxSector = math.MaxInt64 / sector

// BadBlocks are the ranges of a region's file or devdax device that the kernel
// knows to be unreadable, in ascending order. They say which accesses will
// fault before one does. ok is false where the platform keeps no list, or the
// caller may not read it (devdax: root only).
func BadBlocks(path string) (bad []Range, ok bool, err error) {
	dir, device, err := deviceDir(path)
	if err != nil || dir == "" {
		return nil, false, err
	}
	if device {
		return deviceBadBlocks(dir)
	}
	list, ok, err := blockBadBlocks(dir)
	if err != nil || !ok || len(list) == 0 {
		return nil, ok, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, false, fmt.Errorf("pmem: %w", err)
	}
	defer f.Close()
	extents, err := extentsOf(f)
	if err != nil {
		return nil, false, fmt.Errorf("pmem: extents of %s: %w", path, err)
	}
	return inFile(list, extents), true, nil
}

// blockBadBlocks lists those of a block device, relative to it. A partition
// has no list of its own: it is cut out of its disk's.
func blockBadBlocks(dir string) ([]Range, bool, error) {
	list, ok, err := readBadBlocks(filepath.Join(dir, "badblocks"))
	if ok || err != nil {
		return list, ok, err
	}
	start, ok, err := readUint(filepath.Join(dir, "start"))
	if err != nil || !ok {
		return nil, false, err
	}
	size, ok, err := readUint(filepath.Join(dir, "size"))
	if err != nil || !ok {
		return nil, false, err
	}
	list, ok, err = readBadBlocks(filepath.Join(filepath.Dir(dir), "badblocks"))
	return cut(list, int64(start)*sector, int64(size)*sector), ok, err
}

// deviceBadBlocks lists those of a devdax device, which only its region has,
// relative to the region.
func deviceBadBlocks(dir string) ([]Range, bool, error) {
	regions, err := regionsOf(dir, 0)
	if err != nil || len(regions) != 1 {
		return nil, false, err
	}
	list, ok, err := readBadBlocks(filepath.Join(regions[0], "badblocks"))
	if err != nil || !ok {
		return nil, false, err
	}
	begin, ok, err := readAddress(filepath.Join(regions[0], "resource"))
	if err != nil || !ok {
		return nil, false, err
	}
	own, ok, err := readAddress(filepath.Join(dir, "resource"))
	if err == nil && !ok {
		own, ok, err = readAddress(filepath.Join(filepath.Dir(dir), "resource"))
	}
	if err != nil || !ok || own < begin {
		return nil, false, err
	}
	size, ok, err := readUint(filepath.Join(dir, "size"))
	if err != nil || !ok {
		return nil, false, err
	}
	return cut(list, int64(own-begin), int64(size)), true, nil
}

// readAddress is readUint of a file that only root may read.
func readAddress(name string) (uint64, bool, error) {
	v, ok, err := readUint(name)
	if errors.Is(err, fs.ErrPermission) {
		return 0, false, nil
	}
	return v, ok, err
}

// readBadBlocks parses "first-sector count" lines.
func readBadBlocks(name string) (list []Range, ok bool, err error) {
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("pmem: %w", err)
	}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		var first, count int64
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		if _, err := fmt.Sscan(lines.Text(), &first, &count); err != nil || first < 0 || count <= 0 || count > maxSector || first > maxSector-count {
			return nil, false, fmt.Errorf("pmem: %s has the line %q, not a sector and a count", name, lines.Text())
		}
		list = append(list, Range{first * sector, count * sector})
	}
	return list, true, nil
}

// cut keeps what lies in [from, from+size), relative to from.
func cut(list []Range, from, size int64) []Range {
	var out []Range
	for _, r := range list {
		lo, hi := max(r.Offset, from), min(r.Offset+r.Length, from+size)
		if lo < hi {
			out = append(out, Range{lo - from, hi - lo})
		}
	}
	return out
}

// inFile maps ranges of a device to those of a file.
func inFile(list []Range, extents []extent) []Range {
	var out []Range
	for _, e := range extents {
		for _, r := range cut(list, e.physical, e.length) {
			out = append(out, Range{e.logical + r.Offset, r.Length})
		}
	}
	slices.SortFunc(out, func(a, b Range) int { return int(min(max(a.Offset-b.Offset, -1), 1)) })
	return out
}
