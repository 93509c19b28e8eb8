package chaos

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// nodeSpace is the size of a node's file system: room for its region, and for
// logs.
const nodeSpace = 64 << 20

// tmpfs is a file system of one node. It is mounted nowhere: it lives on a
// descriptor of this process and goes with it, after a kill -9 too.
type tmpfs struct {
	t       *testing.T
	fd      int
	dir     string // as every process of this machine can name it
	ballast *os.File
}

func newTmpfs(t *testing.T, size int64) *tmpfs {
	t.Helper()
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatalf("fsopen: %v", err)
	}
	defer unix.Close(fs)
	for key, value := range map[string]string{"size": fmt.Sprint(size), "mode": "0700"} {
		if err := unix.FsconfigSetString(fs, key, value); err != nil {
			t.Fatalf("tmpfs of %s %s: %v", key, value, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		t.Fatalf("tmpfs: %v", err)
	}
	f := &tmpfs{t: t}
	if f.fd, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0); err != nil {
		t.Fatalf("fsmount: %v", err)
	}
	t.Cleanup(func() {
		if err := errors.Join(f.ballast.Close(), unix.Close(f.fd)); err != nil {
			t.Error(err)
		}
	})
	f.dir = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.fd)
	if f.ballast, err = os.OpenFile(f.dir, unix.O_TMPFILE|os.O_RDWR, 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

// fill takes all space that is left.
func (f *tmpfs) fill() {
	f.t.Helper()
	info, err := f.ballast.Stat()
	if err != nil {
		f.t.Fatal(err)
	}
	at := info.Size()
	for piece := int64(nodeSpace); piece >= 4096; {
		err := unix.Fallocate(int(f.ballast.Fd()), 0, at, piece)
		switch {
		case err == nil:
			at += piece
		case errors.Is(err, unix.ENOSPC):
			piece /= 2
		case !errors.Is(err, unix.EINTR):
			f.t.Fatalf("fill: %v", err)
		}
	}
	if free := f.free(); free != 0 {
		f.t.Fatalf("%d bytes are free on a full file system", free)
	}
}

// drain gives back what fill took.
func (f *tmpfs) drain() {
	f.t.Helper()
	if err := f.ballast.Truncate(0); err != nil {
		f.t.Fatal(err)
	}
}

func (f *tmpfs) free() int64 {
	f.t.Helper()
	var s unix.Statfs_t
	if err := unix.Fstatfs(f.fd, &s); err != nil {
		f.t.Fatal(err)
	}
	return int64(s.Bavail) * s.Bsize
}
