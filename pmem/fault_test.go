package pmem

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// guarded runs f with faults of m turned into errors.
func guarded(m interface{ Bytes() []byte }, f func()) (err error) {
	defer Recover(m, Arm(), &err)
	f()
	return nil
}

// needsFaultAddress skips where the kernel does not say which address faulted.
// Then a fault stays a panic.
func needsFaultAddress(t testing.TB) {
	t.Helper()
	if runtime.GOARCH == "amd64" {
		return // never without
	}
	r := emulated(t, pageSize)
	if err := unix.Ftruncate(int(r.file.Fd()), 0); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if recover() != nil {
			t.Skip("SIGBUS comes without its address: qemu-user does not pass it on")
		}
	}()
	if err := guarded(r, func() { r.Store64(0, 1) }); err == nil {
		t.Fatal("a truncated mapping does not fault")
	}
}

func createAt(t testing.TB, path string, size int64, accept Class) *Region {
	t.Helper()
	r, err := Create(path, size, Options{Accept: accept})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	if err := r.Publish(); err != nil {
		t.Fatal(err)
	}
	return r
}

// Each primitive that meets a truncated file gives the offset, for every
// flush instruction and copy width.
func TestTruncatedFileIsAnError(t *testing.T) {
	needsFaultAddress(t)
	size := 16 * pageSize
	for _, pr := range choices() {
		path := filepath.Join(t.TempDir(), "region")
		r := createAt(t, path, size, Emulated)
		if r.paged == nil {
			r.prim = pr
		}
		v, err := OpenReadOnly(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { v.Close() })
		cut := 4 * pageSize
		if err := os.Truncate(path, cut); err != nil {
			t.Fatal(err)
		}
		big := make([]byte, 4*pageSize)
		for name, c := range map[string]struct {
			m    interface{ Bytes() []byte }
			f    func()
			page int64
		}{
			"copy small":     {r, func() { r.Copy(9*pageSize+100, big[:100]) }, 9},
			"copy large":     {r, func() { r.Copy(cut-pageSize, big) }, 4},
			"zero":           {r, func() { r.Zero(cut-pageSize, 2*pageSize) }, 4},
			"write":          {r, func() { r.Write(15*pageSize, big[:64]) }, 15},
			"store64":        {r, func() { r.Store64(5*pageSize+8, 1) }, 5},
			"read":           {r, func() { big[0] = r.Bytes()[cut] }, 4},
			"read of a view": {v, func() { big[0] = v.Bytes()[cut] }, 4},
		} {
			err := guarded(c.m, c.f)
			var fe *FaultError
			if !errors.As(err, &fe) {
				t.Fatalf("%v %s: error %v", pr, name, err)
			}
			if fe.Path != path || fe.Offset/pageSize != c.page {
				t.Errorf("%v %s: fault in %q at offset %d, want page %d", pr, name, fe.Path, fe.Offset, c.page)
			}
			if !strings.Contains(err.Error(), "truncated") {
				t.Errorf("the error does not name the reason: %v", err)
			}
		}
		if err := guarded(r, func() { r.Copy(0, big[:64]) }); err != nil {
			t.Errorf("store below the cut: %v", err)
		}
	}
}

// Poison reaches the reader as an error with the offset.
func TestPoisonedPageIsAnError(t *testing.T) {
	needsFaultAddress(t)
	r := emulated(t, 64*pageSize)
	const page = 37
	err := unix.Madvise(r.mem[page*pageSize:(page+1)*pageSize], unix.MADV_HWPOISON)
	if err != nil {
		t.Skipf("madvise(MADV_HWPOISON): %v: it needs root and a kernel with CONFIG_MEMORY_FAILURE", err)
	}
	var got byte // the compiler drops a load that nobody uses
	for name, f := range map[string]func(){
		"read":  func() { got = r.Bytes()[page*pageSize+5] },
		"store": func() { r.Copy(page*pageSize+64, make([]byte, 512)) },
	} {
		err = guarded(r, func() { f() })
		var fe *FaultError
		if !errors.As(err, &fe) || fe.Offset/pageSize != page {
			t.Errorf("%s: error %v (read %d)", name, err, got)
		}
	}
}

func TestOtherPanicsPass(t *testing.T) {
	r := emulated(t, 4096)
	other := emulated(t, 4096)
	if err := unix.Ftruncate(int(other.file.Fd()), 0); err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func(){
		"a panic":                  func() { panic("mine") },
		"a wrong index":            func() { _ = make([]byte, 1)[len(os.Args)] },
		"a nil pointer":            func() { _ = (*plain)(nil).Bytes() },
		"a fault of other mapping": func() { other.Store64(0, 1) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s was swallowed", name)
				}
			}()
			err := guarded(r, f)
			t.Errorf("%s became %v", name, err)
		}()
	}
}

func TestRecoverRestoresTheSetting(t *testing.T) {
	r := emulated(t, 4096)
	for _, was := range []bool{true, false} {
		debug.SetPanicOnFault(was)
		if err := guarded(r, func() {}); err != nil {
			t.Fatal(err)
		}
		if got := debug.SetPanicOnFault(false); got != was {
			t.Errorf("setting is %v after Recover, was %v", got, was)
		}
	}
}
