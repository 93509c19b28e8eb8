package bench

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// usage is what a process has used so far, or in between.
type usage struct {
	User     time.Duration
	System   time.Duration
	Softirq  time.Duration // of the whole machine
	Switches int64         // of context, of both kinds
	Calls    uint64        // system calls on links, which count themselves
	Allocs   uint64        // objects on the heap
}

func (u usage) cpu() time.Duration { return u.User + u.System }

func (u usage) sub(v usage) usage {
	return usage{u.User - v.User, u.System - v.System, u.Softirq - v.Softirq, u.Switches - v.Switches, u.Calls - v.Calls, u.Allocs - v.Allocs}
}

func (u usage) add(v usage) usage {
	return usage{u.User + v.User, u.System + v.System, u.Softirq + v.Softirq, u.Switches + v.Switches, u.Calls + v.Calls, u.Allocs + v.Allocs}
}

func used() (usage, error) {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		return usage{}, os.NewSyscallError("getrusage", err)
	}
	return usage{
		User: time.Duration(r.Utime.Nano()), System: time.Duration(r.Stime.Nano()),
		Switches: r.Nvcsw + r.Nivcsw, Softirq: softirq(), Allocs: allocs(),
	}, nil
}

func allocs() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:objects"}}
	metrics.Read(s)
	if s[0].Value.Kind() != metrics.KindUint64 {
		return 0
	}
	return s[0].Value.Uint64()
}

// softirq is the time that all processors have spent in softirqs, to the
// hundredth of a second that the kernel tells.
func softirq() time.Duration {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(b), "\n")
	f := strings.Fields(line) // cpu user nice system idle iowait irq softirq
	if len(f) < 8 {
		return 0
	}
	n, err := strconv.ParseInt(f[7], 10, 64)
	if err != nil {
		return 0
	}
	return time.Duration(n) * 10 * time.Millisecond
}

// residentBeside is the process's resident memory less that of its mapping of
// the file at path; "" for all of it.
func residentBeside(path string) (int64, error) {
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var sum int64
	var skip, found bool
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line := lines.Bytes()
		name, rest, _ := bytes.Cut(line, []byte(" "))
		if !bytes.HasSuffix(name, []byte(":")) {
			// The head of a mapping; its file is the rest from column 6 on.
			skip = path != "" && bytes.HasSuffix(line, []byte(" "+path))
			found = found || skip
			continue
		}
		if !skip && string(name) == "Rss:" {
			kib, err := strconv.ParseInt(string(bytes.Fields(rest)[0]), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("/proc/self/smaps: %q: %w", line, err)
			}
			sum += kib << 10
		}
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	if path != "" && !found {
		return 0, fmt.Errorf("/proc/self/smaps: no mapping of %s: was the file moved or removed?", path)
	}
	return sum, nil
}

// resetPeak starts the peak of resident memory over, without what the heap has
// kept of measurements before. It goes on where the kernel does not let it.
func resetPeak() {
	debug.FreeOSMemory()
	_ = os.WriteFile("/proc/self/clear_refs", []byte("5"), 0)
}

// peakResident is the most that was resident since resetPeak, in bytes.
func peakResident() int64 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			var kib int64
			if _, err := fmt.Sscan(v, &kib); err == nil {
				return kib << 10
			}
		}
	}
	return 0
}

// socketMemory is what the kernel holds for a socket, in bytes.
func socketMemory(fd int) int64 {
	const (
		rmem, fwd, queued = 0, 4, 5 // SK_MEMINFO_RMEM_ALLOC, _FWD_ALLOC, _WMEM_QUEUED
		words             = 9
	)
	var info [words]uint32
	n := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return 0
	}
	return int64(info[rmem]) + int64(info[fwd]) + int64(info[queued])
}
