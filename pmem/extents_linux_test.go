package pmem

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestGaps(t *testing.T) {
	whole := []extent{{logical: 0, length: 8}, {logical: 8, length: 8}}
	holed := []extent{{logical: 0, length: 8}, {logical: 12, length: 4}}
	for _, c := range []struct {
		extents []extent
		off, n  int64
		want    []Range
	}{
		{whole, 0, 16, nil}, {whole, 4, 8, nil}, {whole, 8, 9, []Range{{16, 1}}},
		{holed, 0, 16, []Range{{8, 4}}}, {holed, 0, 8, nil}, {holed, 12, 4, nil}, {holed, 10, 4, []Range{{10, 2}}}, {holed, 9, 2, []Range{{9, 2}}},
		{holed, 0, 20, []Range{{8, 4}, {16, 4}}}, {nil, 3, 1, []Range{{3, 1}}},
	} {
		if got := gaps(c.extents, c.off, c.n); !slices.Equal(got, c.want) {
			t.Errorf("%v leave in %d bytes from %d on: %v, not %v", c.extents, c.n, c.off, got, c.want)
		}
	}
}

// newXFS is a directory on an XFS of its own.
func newXFS(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: mount")
	}
	if _, err := exec.LookPath("mkfs.xfs"); err != nil {
		t.Skip("needs mkfs.xfs (xfsprogs)")
	}
	image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(320<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.xfs", "-q", "-m", "reflink=1", image).CombinedOutput(); err != nil {
		t.Skipf("mkfs.xfs: %v: %s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop", image, dir).CombinedOutput(); err != nil {
		t.Skipf("needs loop devices and XFS: mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// leave fills dir's filesystem until so many bytes are free. XFS gives back the room
// of what was removed in the background.
func leave(t *testing.T, dir string, bytes int64) (filler string) {
	t.Helper()
	var fs unix.Statfs_t
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if err := unix.Statfs(dir, &fs); err != nil {
			t.Fatal(err)
		}
		if int64(fs.Bavail)*int64(fs.Bsize) >= bytes {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no %d bytes are free", bytes)
		}
	}
	f, err := os.CreateTemp(dir, "filler")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(fs.Bavail)*int64(fs.Bsize)-bytes); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// TestOpenOnFilledXFS: XFS reserves room for the whole of an fallocate, also of
// what is allocated. A region that nearly fills its filesystem opens all the same;
// one with a hole for which there is no room does not.
func TestOpenOnFilledXFS(t *testing.T) {
	dir := newXFS(t)
	path := filepath.Join(dir, "region")
	r := createAt(t, path, 60<<20, Paged)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	leave(t, dir, 8<<20)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, 60<<20); !errors.Is(err, unix.ENOSPC) {
		t.Logf("this kernel's XFS does not ask for room that it has: %v", err)
	}
	if r, err = Open(path, Options{Accept: Paged}); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	const punch = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	if err := unix.Fallocate(int(f.Fd()), punch, 10<<20, 40<<20); err != nil {
		t.Fatal(err)
	}
	leave(t, dir, 8<<20)
	var full *AllocError
	if r, err := Open(path, Options{Accept: Paged}); !errors.As(err, &full) {
		r.Close()
		t.Errorf("a hole of 40 MiB, with 8 MiB free: %v", err)
	}
}

// TestCreateBeyondXFS: what is said to be free is what the region could have had,
// not what was left when the storage that it took did not suffice.
func TestCreateBeyondXFS(t *testing.T) {
	dir := newXFS(t)
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before := freeBytes(f)
	var full *AllocError
	if r, err := Create(filepath.Join(dir, "region"), 1<<30, Options{Accept: Paged}); !errors.As(err, &full) {
		r.Close()
		t.Fatalf("1 GiB on a filesystem of 320 MiB: %v", err)
	}
	if full.Free < before/2 {
		t.Errorf("%v, of %d that were free", full, before)
	}
}

// TestOpenFillsAHoleOnFilledXFS: room for what is missing is enough.
func TestOpenFillsAHoleOnFilledXFS(t *testing.T) {
	dir := newXFS(t)
	path := filepath.Join(dir, "region")
	r := createAt(t, path, 60<<20, Paged)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 10<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	leave(t, dir, 20<<20)
	if r, err = Open(path, Options{Accept: Paged}); err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	extents, err := extentsOf(f)
	if holes := gaps(extents, 0, 60<<20); err != nil || holes != nil {
		t.Errorf("holes %v, %v", holes, err)
	}
}

// TestOpenUnshares: a region whose storage a copy shares would need new storage
// for each first store, and fault where there is none.
func TestOpenUnshares(t *testing.T) {
	dir := newXFS(t)
	path := filepath.Join(dir, "copy")
	r := createAt(t, filepath.Join(dir, "region"), 60<<20, Paged)
	for off := 0; off < len(r.Bytes()); off += 4096 { // what was never written is not shared
		r.Store64(int64(off), 1)
		r.Flush(int64(off), 8)
	}
	if err := errors.Join(r.Fence(), r.Close()); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "--reflink=always", r.Path(), path).CombinedOutput(); err != nil {
		t.Skipf("cp: %v: %s", err, out)
	}
	shared := func() bool {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		extents, err := extentsOf(f)
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(extents, func(e extent) bool { return e.shared })
	}
	if !shared() {
		t.Skip("the copy shares nothing")
	}
	filler := leave(t, dir, 8<<20)
	var full *AllocError
	if r, err := Open(path, Options{Accept: Paged}); !errors.As(err, &full) {
		r.Close()
		t.Fatalf("60 MiB shared with a copy, and 8 MiB free: %v", err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	leave(t, dir, 80<<20) // less than twice as much as it takes
	r, err := Open(path, Options{Accept: Paged})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if shared() {
		t.Error("an open region shares storage")
	}
}
