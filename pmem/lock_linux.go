package pmem

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A region that is open for storing holds two locks on its file. flock
// excludes, and /proc/locks names its holder. The open-file-description lock
// can be asked for without being taken: an inspection that tried flock could
// make an open fail that comes at the same moment.

// lock takes both locks, or returns an *InUseError.
func lock(f *os.File, path string) error {
	fd := int(f.Fd())
	err := retry(func() error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if err == nil {
		lk := wholeFile(unix.F_WRLCK)
		if err = retry(func() error { return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk) }); err != nil {
			retry(func() error { return unix.Flock(fd, unix.LOCK_UN) }) // else this process is found to hold it
		}
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EWOULDBLOCK), errors.Is(err, unix.EACCES):
		return &InUseError{Path: path, PID: holder(f)}
	}
	return fmt.Errorf("pmem: lock %s: %w: the filesystem must support flock and fcntl locks", path, err)
}

// release gives both locks back and closes f. Closing alone would do only once
// no process has f open: a child between fork and exec does.
func release(f *os.File) error {
	lk := wholeFile(unix.F_UNLCK)
	retry(func() error { return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk) })
	retry(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_UN) })
	return f.Close()
}

// locked says whether an open for storing exists; it takes no lock.
func locked(f *os.File) bool {
	lk := wholeFile(unix.F_WRLCK)
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lk); err != nil {
		return false
	}
	return lk.Type != unix.F_UNLCK
}

func wholeFile(kind int16) unix.Flock_t { return unix.Flock_t{Type: kind} }

// holder is the process that holds the flock of f, 0 where it is not known:
// in another PID namespace, or without /proc.
func holder(f *os.File) int {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return 0
	}
	locks, err := os.Open("/proc/locks")
	if err != nil {
		return 0
	}
	defer locks.Close()
	inode := fmt.Sprintf("%02x:%02x:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)), st.Ino)
	for lines := bufio.NewScanner(locks); lines.Scan(); {
		// 1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || fields[1] != "FLOCK" || fields[5] != inode {
			continue
		}
		if pid, err := strconv.Atoi(fields[4]); err == nil && pid > 0 {
			return pid
		}
	}
	return 0
}

// retry repeats a system call that a signal interrupted: the Go runtime
// preempts goroutines with signals.
func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}
