package pmem

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// tmpfsDir is a directory on tmpfs.
func tmpfsDir(t testing.TB) string {
	t.Helper()
	const shm = "/dev/shm"
	var fs unix.Statfs_t
	if err := unix.Statfs(shm, &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		t.Skipf("%s is not a tmpfs (%v)", shm, err)
	}
	dir, err := os.MkdirTemp(shm, "nvmmirror-test-")
	if err != nil {
		t.Skipf("no directory on tmpfs: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func entries(t testing.TB, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

func TestCreatePublishOpen(t *testing.T) {
	for name, c := range map[string]struct {
		dir   func(testing.TB) string
		class Class
	}{
		"tmpfs": {tmpfsDir, Emulated},
		"paged": {pagedDir, Paged},
	} {
		t.Run(name, func(t *testing.T) {
			dir := c.dir(t)
			path := filepath.Join(dir, "region")
			size := 3*pageSize + 5
			r, err := Create(path, size, Options{Accept: c.class})
			if err != nil {
				t.Fatal(err)
			}
			if r.Class() != c.class || r.Size() != size || r.Path() != path || r.Device() {
				t.Fatalf("created %v, %d bytes, path %s", r.Class(), r.Size(), r.Path())
			}
			if !bytes.Equal(r.Bytes(), make([]byte, size)) {
				t.Fatal("a new region is not zero")
			}
			if got := entries(t, dir); len(got) != 0 {
				t.Fatalf("visible before Publish: %v", got)
			}
			r.Copy(size-3, []byte("end"))
			if err := r.Fence(); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := r.Publish(); err != nil {
					t.Fatal(err)
				}
			}
			if got := entries(t, dir); len(got) != 1 || got[0] != "region" {
				t.Fatalf("after Publish: %v", got)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			if err := r.Close(); err != nil {
				t.Fatalf("second close: %v", err)
			}
			r, err = Open(path, Options{Accept: c.class})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if r.Size() != size || string(r.Bytes()[size-3:]) != "end" {
				t.Fatalf("reopened %d bytes ending in %q", r.Size(), r.Bytes()[size-3:])
			}
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
				t.Fatalf("mode %v (%v)", info.Mode(), err)
			}
		})
	}
}

func TestUnpublishedLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	r, err := Create(filepath.Join(dir, "region"), 1<<20, Options{Accept: Emulated})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if got := entries(t, dir); len(got) != 0 {
		t.Fatalf("left behind: %v", got)
	}
}

// The way of filesystems without unnamed files.
func TestTemporaryName(t *testing.T) {
	for _, publish := range []bool{true, false} {
		dir := t.TempDir()
		path := filepath.Join(dir, "region")
		temporary := filepath.Join(dir, ".region.tmp")
		f, err := os.OpenFile(temporary, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		r := &Region{path: path, file: f, temporary: temporary, unpublished: true}
		want := 0
		if publish {
			if err := r.Publish(); err != nil {
				t.Fatal(err)
			}
			want = 1
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if got := entries(t, dir); len(got) != want || want == 1 && got[0] != "region" {
			t.Fatalf("publish %v: %v", publish, got)
		}
	}
}

func TestNeverOverwrites(t *testing.T) {
	for name, occupy := range map[string]func(path string) error{
		"file":         func(p string) error { return os.WriteFile(p, []byte("precious"), 0o600) },
		"empty file":   func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"directory":    func(p string) error { return os.Mkdir(p, 0o700) },
		"fifo":         func(p string) error { return syscall.Mkfifo(p, 0o600) },
		"dangling":     func(p string) error { return os.Symlink("nowhere", p) },
		"link to file": func(p string) error { return os.Symlink(os.Args[0], p) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			before, after := filepath.Join(dir, "before"), filepath.Join(dir, "after")
			if err := occupy(before); err != nil {
				t.Fatal(err)
			}
			_, err := Create(before, 1<<20, Options{Accept: Emulated})
			refused := errors.Is(err, fs.ErrExist)
			if name == "directory" || name == "fifo" {
				refused = errors.As(err, new(*FileTypeError))
			}
			if !refused || !strings.Contains(err.Error(), before) {
				t.Fatalf("create over a %s: %v", name, err)
			}
			r, err := Create(after, 1<<20, Options{Accept: Emulated})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if err := occupy(after); err != nil {
				t.Fatal(err)
			}
			if err := r.Publish(); !errors.Is(err, fs.ErrExist) {
				t.Fatalf("publish over a %s: %v", name, err)
			}
			if name == "file" {
				if got, err := os.ReadFile(after); string(got) != "precious" {
					t.Fatalf("overwritten: %q (%v)", got, err)
				}
			}
		})
	}
}

func TestBadArguments(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	any := Options{Accept: Emulated}
	for name, c := range map[string]struct {
		err  error
		want string
	}{
		"create in no directory":   {second(Create(filepath.Join(dir, "no", "region"), 1<<20, any)), "no such file"},
		"create of size 0":         {second(Create(filepath.Join(dir, "zero"), 0, any)), "size 0"},
		"create of negative size":  {second(Create(filepath.Join(dir, "neg"), -1, any)), "size -1"},
		"create on other device":   {second(Create("/dev/null", 0, any)), "not a devdax"},
		"emulated of size 0":       {second(NewEmulated(0)), "size 0"},
		"open of nothing":          {second(Open(filepath.Join(dir, "nothing"), any)), "nothing"},
		"open of a directory":      {second(Open(dir, any)), "is a directory"},
		"a block device":           {wrongType("/dev/pmem0", os.ModeDevice), "is a block device"},
		"create on a fifo":         {second(Create(fifo, 1<<20, any)), "neither a file nor a devdax"},
		"open of a fifo":           {second(Open(fifo, any)), "neither a file nor a devdax"},
		"open of another device":   {second(Open("/dev/null", any)), "not a devdax"},
		"inspect a fifo":           {second(OpenReadOnly(fifo)), "neither a file nor a devdax"},
		"inspect of other device":  {second(OpenReadOnly("/dev/null")), "not a devdax"},
		"inspect of nothing at it": {second(OpenReadOnly(filepath.Join(dir, "nothing"))), "nothing"},
	} {
		if c.err == nil || !strings.Contains(c.err.Error(), c.want) {
			t.Errorf("%s: error %v, want one with %q", name, c.err, c.want)
		}
	}
	if got := entries(t, dir); len(got) != 1 {
		t.Errorf("left behind: %v", got)
	}
}

func second[T any](_ T, err error) error { return err }

func TestWeakerClassIsRefused(t *testing.T) {
	for _, c := range []struct {
		dir          func(testing.TB) string
		accept, have Class
		ok           bool
	}{
		{tmpfsDir, 0, Emulated, false},
		{tmpfsDir, Byte, Emulated, false},
		{tmpfsDir, Paged, Emulated, false},
		{tmpfsDir, Emulated, Emulated, true},
		{pagedDir, 0, Paged, false},
		{pagedDir, Cacheline, Paged, false},
		{pagedDir, Paged, Paged, true},
		{pagedDir, Emulated, Paged, true},
	} {
		t.Run(fmt.Sprintf("%v on %v", c.accept, c.have), func(t *testing.T) {
			dir := c.dir(t)
			check := func(what string, r *Region, err error) {
				t.Helper()
				if r != nil {
					defer r.Close()
				}
				if c.ok {
					if err != nil || r.Class() != c.have {
						t.Fatalf("%s: %v", what, err)
					}
					return
				}
				want := c.accept
				if want == 0 {
					want = Cacheline
				}
				var ce *ClassError
				if !errors.As(err, &ce) || ce.Have != c.have || ce.Want != want || !strings.HasPrefix(ce.Path, dir) {
					t.Fatalf("%s: %v", what, err)
				}
			}
			r, err := Create(filepath.Join(dir, "new"), 1<<20, Options{Accept: c.accept})
			check("create", r, err)
			if got := entries(t, dir); len(got) != 0 {
				t.Fatalf("left behind: %v", got)
			}
			path := filepath.Join(dir, "old")
			if err := os.WriteFile(path, make([]byte, 8192), 0o600); err != nil {
				t.Fatal(err)
			}
			r, err = Open(path, Options{Accept: c.accept})
			check("open", r, err)
		})
	}
}

// Any length can be mapped; holes are filled.
func TestOpenAnyLength(t *testing.T) {
	for name, dir := range map[string]string{"tmpfs": tmpfsDir(t), "temporary": t.TempDir()} {
		for _, size := range []int64{0, 1, 4095, 4096, AreaAlign - 1, AreaAlign + 1} {
			path := filepath.Join(dir, fmt.Sprint(size))
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
				t.Fatal(err)
			}
			v, err := OpenReadOnly(path)
			if err != nil {
				t.Fatal(err)
			}
			if int64(len(v.Bytes())) != size || v.InUse() {
				t.Fatalf("%s %d: view of %d bytes, in use %v", name, size, len(v.Bytes()), v.InUse())
			}
			if blocks(t, path) != 0 {
				t.Fatalf("%s %d: a view allocated %d blocks", name, size, blocks(t, path))
			}
			r, err := Open(path, Options{Accept: Emulated})
			if err != nil {
				t.Fatal(err)
			}
			if r.Size() != size || blocks(t, path)*512 < size {
				t.Fatalf("%s %d: mapped %d bytes, %d blocks allocated", name, size, r.Size(), blocks(t, path))
			}
			if v.InUse() != true || v.Class() != r.Class() {
				t.Fatalf("%s %d: view says in use %v, class %v", name, size, v.InUse(), v.Class())
			}
			if err := errors.Join(r.Close(), v.Close(), v.Close()); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func blocks(t testing.TB, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks
}

// lockHolder, in the environment, makes this test binary a second process
// that holds the region named there until its standard input ends.
const lockHolder = "NVMMIRROR_TEST_HOLD"

func TestMain(m *testing.M) {
	if path := os.Getenv(lockHolder); path != "" {
		os.Exit(hold(path))
	}
	os.Exit(m.Run())
}

func hold(path string) int {
	r, err := Open(path, Options{Accept: Emulated})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer r.Close()
	fmt.Println("held")
	var one [1]byte
	_, _ = os.Stdin.Read(one[:]) // ends with the parent's pipe
	return 0
}

func TestSecondProcessIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "region")
	if err := createAt(t, path, 1<<20, Emulated).Close(); err != nil {
		t.Fatal(err)
	}
	child := exec.Command("/proc/self/exe")
	child.Env = append(os.Environ(), lockHolder+"="+path)
	stdin, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); errors.Is(err, unix.ENOEXEC) {
		t.Skipf("a second process cannot be started (%v): under qemu-user this needs binfmt_misc", err)
	} else if err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 256)
	n, err := stdout.Read(line)
	if got := string(line[:n]); got != "held\n" {
		t.Fatalf("second process: %q (%v)", got, err)
	}
	_, err = Open(path, Options{Accept: Emulated})
	var inUse *InUseError
	if !errors.Is(err, ErrInUse) || !errors.As(err, &inUse) || inUse.Path != path {
		t.Fatalf("open of a held region: %v", err)
	}
	if inUse.PID != 0 && inUse.PID != child.Process.Pid {
		t.Errorf("the holder is process %d, the error says %d", child.Process.Pid, inUse.PID)
	}
	if inUse.PID == 0 {
		t.Log("the holder's pid is not known here")
	}
	v, err := OpenReadOnly(path)
	if err != nil {
		t.Fatalf("inspection of a held region: %v", err)
	}
	defer v.Close()
	if !v.InUse() {
		t.Error("the view does not see the holder")
	}
	if err := errors.Join(stdin.Close(), child.Wait()); err != nil {
		t.Fatal(err)
	}
	if v.InUse() {
		t.Error("the view still sees the holder")
	}
	r, err := Open(path, Options{Accept: Emulated})
	if err != nil {
		t.Fatalf("open after the holder ended: %v", err)
	}
	defer r.Close()
	if _, err := Open(path, Options{Accept: Emulated}); !errors.Is(err, ErrInUse) {
		t.Fatalf("second open in one process: %v", err)
	}
	if !bytes.Equal(r.Bytes(), make([]byte, 1<<20)) {
		t.Error("a refused open changed the region")
	}
}

func TestCreatedRegionIsLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "region")
	createAt(t, path, 1<<20, Emulated)
	if _, err := Open(path, Options{Accept: Emulated}); !errors.Is(err, ErrInUse) {
		t.Fatalf("open of a region that is being created: %v", err)
	}
}

func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("no small tmpfs can be mounted: %v (it needs root)", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	free := func() uint64 {
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err != nil {
			t.Fatal(err)
		}
		return fs.Bfree
	}
	before := free()
	path := filepath.Join(dir, "region")
	_, err := Create(path, 8<<20, Options{Accept: Emulated})
	var ae *AllocError
	if !errors.Is(err, unix.ENOSPC) || !errors.As(err, &ae) || ae.Size != 8<<20 || ae.Path != path {
		t.Fatalf("create on a full disk: %v", err)
	}
	if got := entries(t, dir); len(got) != 0 || free() != before {
		t.Fatalf("left behind: %v, %d of %d blocks free", got, free(), before)
	}
	// A file with holes that the disk has no room for.
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 8<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, Options{Accept: Emulated}); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("open of a sparse file on a full disk: %v", err)
	}
}

// What a filesystem without fallocate gets: data stays, holes become zeros.
func TestFillHoles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 3<<20 + 17
	want := make([]byte, size)
	for _, at := range []int{0, 1 << 20, 2<<20 + 5} {
		if _, err := f.WriteAt([]byte("data"), int64(at)); err != nil {
			t.Fatal(err)
		}
		copy(want[at:], "data")
	}
	if err := fillHoles(f, 0, size); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, differs at %d (%v)", len(got), differs(got, want), err)
	}
	if b := blocks(t, path); b*512 < size {
		t.Errorf("%d blocks allocated", b)
	}
}

// A process that starts another one has, between fork and exec, its regions'
// files open twice: what is closed meanwhile can be opened again all the same.
func TestCloseReleasesLocks(t *testing.T) {
	path := filepath.Join(tmpfsDir(t), "region")
	r, err := Create(path, pageSize, Options{Accept: Emulated})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Publish(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		child, err := unix.Dup(int(r.file.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(child)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if r, err = Open(path, Options{Accept: Emulated}); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}

// Another program's lock of bytes in the file excludes, and is not taken for this
// process's.
func TestOtherProgramsLock(t *testing.T) {
	path := filepath.Join(tmpfsDir(t), "region")
	createAt(t, path, pageSize, Emulated).Close()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lk := unix.Flock_t{Type: unix.F_WRLCK, Start: 100, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk); err != nil {
		t.Fatal(err)
	}
	var inUse *InUseError
	if _, err := Open(path, Options{Accept: Emulated}); !errors.As(err, &inUse) || inUse.PID != 0 {
		t.Errorf("%v", err)
	}
}
