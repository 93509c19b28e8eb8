package pmem

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// unreadable makes a page of a region's mapping one that cannot be read, as a
// poisoned one: a mapped hole that nothing fills raises the same signal.
func unreadable(t *testing.T, r *Region, page int64) {
	t.Helper()
	fd, err := unix.MemfdCreate("hole", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	at := unsafe.Pointer(&r.mem[page*pageSize])
	if _, err := unix.MmapPtr(fd, 0, at, uintptr(pageSize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED); err != nil {
		t.Fatal(err)
	}
}

// Pages that cannot be read can be again, as zeros; those beside them are what
// they were; what is stored there then is in the file.
func TestClear(t *testing.T) {
	needsFaultAddress(t)
	for name, dir := range map[string]func(testing.TB) string{"tmpfs": tmpfsDir, "paged": pagedDir} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir(t), "region")
			r := createAt(t, path, 16*pageSize, Emulated)
			full := bytes.Repeat([]byte{7}, int(16*pageSize))
			r.Copy(0, full)
			unreadable(t, r, 4)
			unreadable(t, r, 5)
			if guarded(r, func() { r.Store64(5*pageSize, 1) }) == nil {
				t.Fatal("the page is readable")
			}
			// From within the one page to within the other.
			if err := r.Clear(5*pageSize-10, 20); err != nil {
				t.Fatal(err)
			}
			want := bytes.Clone(full)
			clear(want[4*pageSize : 6*pageSize])
			if !bytes.Equal(r.Bytes(), want) {
				t.Error("not zeros in pages 4 and 5 alone")
			}
			r.Copy(5*pageSize-100, full[:200])
			copy(want[5*pageSize-100:], full[:200])
			if err := r.Fence(); err != nil {
				t.Fatal(err)
			}
			r.Close()
			v, err := OpenReadOnly(path)
			if err != nil {
				t.Fatal(err)
			}
			defer v.Close()
			if !bytes.Equal(v.Bytes(), want) {
				t.Error("what was stored is not in the file")
			}
		})
	}
}

// A page that is gone since the file was cut off is not made up.
func TestClearCutOff(t *testing.T) {
	r := createAt(t, filepath.Join(t.TempDir(), "region"), 16*pageSize, Emulated)
	if err := unix.Ftruncate(int(r.file.Fd()), 8*pageSize); err != nil {
		t.Fatal(err)
	}
	if err := r.Clear(9*pageSize, 64); err == nil || !strings.Contains(err.Error(), "cut off") {
		t.Errorf("%v", err)
	}
	if size, err := fileSize(r.file); err != nil || size != 8*pageSize {
		t.Errorf("the file has %d bytes now, %v", size, err)
	}
}

// Of a longer page only the block that was meant is given up.
func TestClearInALongPage(t *testing.T) {
	defer func(n int64) { pageSize = n }(pageSize)
	pageSize = 64 << 10
	r := createAt(t, filepath.Join(t.TempDir(), "region"), 4*pageSize, Emulated)
	want := bytes.Repeat([]byte{7}, int(4*pageSize))
	r.Copy(0, want)
	off := pageSize + 5*4096
	if err := r.Clear(off+1, 4095); err != nil {
		t.Fatal(err)
	}
	clear(want[off : off+4096])
	if !bytes.Equal(r.Bytes(), want) {
		t.Error("not zeros in that block alone")
	}
}
