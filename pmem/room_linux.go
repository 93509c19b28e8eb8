package pmem

import (
	"bufio"
	"math"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// room says before anything is allocated whether [0, size) of a file on tmpfs
// can be backed by memory. Elsewhere the filesystem says so itself; tmpfs, whose
// own limit may be all of the memory or more, takes what there is until the
// kernel kills processes. The limit of a memory control group is not looked at.
func room(f *os.File, path string, size int64) error {
	var fs unix.Statfs_t
	var st unix.Stat_t
	fd := int(f.Fd())
	if unix.Fstatfs(fd, &fs) != nil || fs.Type != unix.TMPFS_MAGIC || unix.Fstat(fd, &st) != nil {
		return nil
	}
	need := size - st.Blocks*512
	if need <= 0 {
		return nil
	}
	free := int64(math.MaxInt64)
	if fs.Blocks > 0 { // it has a limit of its own
		free = int64(fs.Bavail) * int64(fs.Bsize)
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil || uint64(need) > uint64(info.Freeram)*uint64(info.Unit) {
		free = min(free, availableMemory()) // also what the page cache would give up
	}
	if need > free {
		return &AllocError{Path: path, Size: size, Free: free, Err: unix.ENOSPC}
	}
	return nil
}

// availableMemory is how many bytes of memory and swap processes could still
// get; more than there can be where the kernel does not say.
func availableMemory() int64 {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return math.MaxInt64
	}
	defer f.Close()
	var sum int64
	found := 0
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "MemAvailable:" && fields[0] != "SwapFree:" {
			continue
		}
		if kib, err := strconv.ParseInt(fields[1], 10, 64); err == nil {
			sum += kib << 10
			found++
		}
	}
	if found < 2 {
		return math.MaxInt64
	}
	return sum
}
