package pmem

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// Tests on real DAX, where the environment names it; hack/vm has it in a guest.
const (
	daxDirEnv = "NVMMIRROR_DAX_DIR" // directories on file systems mounted with -o dax=always, separated by ":"
	devdaxEnv = "NVMMIRROR_DEVDAX"  // a devdax device, whose content is lost
	// badBlockEnv is set where a bad block may be added to the device under the
	// first directory: it stays until the machine is restarted.
	badBlockEnv = "NVMMIRROR_DAX_BADBLOCK"
)

// daxDirs are directories of the test on real DAX, by the name of what they
// are on.
func daxDirs(t *testing.T) []string {
	t.Helper()
	var dirs []string
	for _, parent := range filepath.SplitList(os.Getenv(daxDirEnv)) {
		dir, err := os.MkdirTemp(parent, "pmem-test-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		dirs = append(dirs, dir)
	}
	if len(dirs) == 0 {
		t.Skipf("needs real DAX: name a directory on it in %s (make test-dax boots a machine that has it)", daxDirEnv)
	}
	return dirs
}

func devdax(t *testing.T) string {
	t.Helper()
	path := os.Getenv(devdaxEnv)
	if path == "" {
		t.Skipf("needs a devdax device, whose content is lost: name it in %s (make test-dax boots a machine that has one)", devdaxEnv)
	}
	return path
}

// needRealDAX checks that r is persistent memory, by what the kernel says of
// its mapping rather than by what this package says.
func needRealDAX(t *testing.T, r *Region) {
	t.Helper()
	if want, _ := strongest(); r.Class() != want || want < Cacheline {
		t.Fatalf("%s is of class %v, want %v", r.Path(), r.Class(), want)
	}
	if r.Class() == Cacheline && r.prim.flush != detected.flush {
		t.Fatalf("%s is flushed with %v, the CPU has %v", r.Path(), r.prim.flush, detected.flush)
	}
	// VmFlags of the mapping: sf is MAP_SYNC (synchronous faults).
	if flags := mappingFlags(t, r); !r.Device() && !slices.Contains(flags, "sf") {
		t.Fatalf("%s is mapped without MAP_SYNC: %v", r.Path(), flags)
	}
}

// mappingFlags are the kernel's flags of r's mapping.
func mappingFlags(t *testing.T, r *Region) []string {
	t.Helper()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	begins := fmt.Sprintf("%x-", uintptr(unsafe.Pointer(&r.mem[0])))
	inside := false
	for line := range strings.Lines(string(smaps)) {
		flags, is := strings.CutPrefix(line, "VmFlags:")
		if is && inside {
			return strings.Fields(flags)
		}
		if !is && strings.Contains(strings.Fields(line)[0], "-") {
			inside = strings.HasPrefix(line, begins)
		}
	}
	t.Fatalf("no mapping begins at %s", begins)
	return nil
}

func TestDAXFile(t *testing.T) {
	for _, dir := range daxDirs(t) {
		t.Run(filepath.Base(filepath.Dir(dir)), func(t *testing.T) {
			path := filepath.Join(dir, "region")
			size := int64(3*AreaAlign + 4096)
			r, err := Create(path, size, Options{}) // accepts Cacheline and better
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			needRealDAX(t, r)
			if !bytes.Equal(r.Bytes(), make([]byte, size)) || r.Size() != size || r.Device() {
				t.Fatalf("a new region of %d bytes is not zero", r.Size())
			}
			if got := entries(t, dir); len(got) != 0 {
				t.Fatalf("visible before Publish: %v", got)
			}
			r.Copy(size-300, bytes.Repeat([]byte("end"), 100))
			if err := errors.Join(r.Fence(), r.Publish()); err != nil {
				t.Fatal(err)
			}
			needInUse(t, path)
			if _, err := Create(path, size, Options{}); !errors.Is(err, fs.ErrExist) {
				t.Fatalf("created over a region: %v", err)
			}
			view, err := OpenReadOnly(path)
			if err != nil {
				t.Fatal(err)
			}
			defer view.Close()
			if view.Class() != r.Class() || !view.InUse() || string(view.Bytes()[size-3:]) != "end" {
				t.Fatalf("view of class %v, in use %v", view.Class(), view.InUse())
			}
			if err := errors.Join(r.DeepFlush(), r.Close()); err != nil {
				t.Fatal(err)
			}
			r, err = Open(path, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			needRealDAX(t, r)
			if view.InUse() != true || r.Size() != size || string(r.Bytes()[size-3:]) != "end" {
				t.Fatalf("reopened %d bytes ending in %q", r.Size(), r.Bytes()[size-3:])
			}
		})
	}
}

// needInUse checks that a second open of a region is refused, and names this
// process.
func needInUse(t *testing.T, path string) {
	t.Helper()
	_, err := Open(path, Options{})
	var held *InUseError
	if !errors.As(err, &held) || held.PID != os.Getpid() {
		t.Fatalf("second open: %v, want one that names process %d", err, os.Getpid())
	}
}

func TestDAXWeakerThanAccepted(t *testing.T) {
	if want, _ := strongest(); want == Byte {
		t.Skip("the platform has the strongest class")
	}
	for _, dir := range daxDirs(t) {
		_, err := Create(filepath.Join(dir, "region"), AreaAlign, Options{Accept: Byte})
		var weak *ClassError
		if !errors.As(err, &weak) || weak.Have != Cacheline || weak.Reason == "" {
			t.Errorf("%s: %v, want a class error with a reason", dir, err)
		}
		if got := entries(t, dir); len(got) != 0 {
			t.Errorf("left behind: %v", got)
		}
	}
}

func TestDAXDevice(t *testing.T) {
	path := devdax(t)
	if _, err := Create(path, AreaAlign+4096, Options{}); err == nil {
		t.Error("a size that is no multiple of 2 MiB was accepted")
	}
	if _, err := Create(path, 1<<50, Options{}); err == nil {
		t.Error("a size beyond the device was accepted")
	}
	r, err := Create(path, 0, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	needRealDAX(t, r)
	if !r.Device() || r.Size() < 64<<20 || r.Size()%AreaAlign != 0 {
		t.Fatalf("device %v of %d bytes", r.Device(), r.Size())
	}
	needInUse(t, path)
	word := []byte("the whole of the device")
	r.Copy(r.Size()-int64(len(word)), word)
	size := r.Size()
	if err := errors.Join(r.Fence(), r.DeepFlush(), r.Publish(), r.Close()); err != nil {
		t.Fatal(err)
	}
	view, err := OpenReadOnly(path)
	if err != nil {
		t.Fatal(err)
	}
	defer view.Close()
	if view.InUse() || int64(len(view.Bytes())) != size || !bytes.HasSuffix(view.Bytes(), word) {
		t.Errorf("view of %d bytes, in use %v", len(view.Bytes()), view.InUse())
	}
	r, err = Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	needRealDAX(t, r)
	if r.Size() != size || !bytes.HasSuffix(r.Bytes(), word) {
		t.Errorf("reopened %d bytes", r.Size())
	}
}

// Any sequence of stores, with every flush instruction and copy width, equals
// the same on a plain slice: through the mapping, and for a file also through
// read, and through a new mapping.
func TestDAXModel(t *testing.T) {
	const size = AreaAlign
	check := func(t *testing.T, path string, r *Region) {
		needRealDAX(t, r)
		model := make([]byte, size)
		r.Zero(0, size)
		for _, pr := range choices() {
			if pr.flush == flushNone {
				continue // not a choice on this class
			}
			r.prim = pr
			rapid.Check(t, func(rt *rapid.T) { storesAsModel(rt, r, model, size) })
		}
		if err := r.Fence(); err != nil {
			t.Fatal(err)
		}
		if !r.Device() {
			got, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(got, model) {
				t.Errorf("read: %v, differs at %d", err, differs(got, model))
			}
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		view, err := OpenReadOnly(path)
		if err != nil {
			t.Fatal(err)
		}
		defer view.Close()
		if got := view.Bytes()[:size]; !bytes.Equal(got, model) {
			t.Errorf("mapped again, it differs at %d", differs(got, model))
		}
	}
	for _, dir := range daxDirs(t) {
		t.Run(filepath.Base(filepath.Dir(dir)), func(t *testing.T) {
			path := filepath.Join(dir, "region")
			check(t, path, createAt(t, path, size, Cacheline))
		})
	}
	t.Run("devdax", func(t *testing.T) {
		path := devdax(t)
		check(t, path, createAt(t, path, size, Cacheline))
	})
}

// storesAsModel stores through each primitive, and the same to model.
func storesAsModel(t *rapid.T, r *Region, model []byte, size int) {
	for range rapid.IntRange(1, 10).Draw(t, "operations") {
		off := rapid.IntRange(0, size-8).Draw(t, "off")
		n := rapid.IntRange(0, min(size-off, 5000)).Draw(t, "n")
		p := bytes.Repeat([]byte{rapid.Byte().Draw(t, "b"), 1, 2, 3, 4}, n/5+1)[:n]
		at, length := int64(off), int64(n)
		switch rapid.IntRange(0, 4).Draw(t, "what") {
		case 0:
			r.Copy(at, p)
			copy(model[off:], p)
		case 1:
			r.Write(at, p)
			r.Flush(at, length)
			copy(model[off:], p)
		case 2:
			r.Zero(at, length)
			clear(model[off : off+n])
		case 3:
			v := rapid.Uint64().Draw(t, "v")
			at &^= 7
			r.Store64(at, v)
			r.Flush(at, 8)
			for i := range 8 {
				model[int(at)+i] = byte(v >> (8 * i))
			}
		case 4:
			copy(r.Window(at, length), p)
			r.Flush(at, length)
			copy(model[off:], p)
		}
	}
	if err := r.Fence(); err != nil {
		t.Fatal(err)
	}
	if got := r.Bytes()[:size]; !bytes.Equal(got, model) {
		t.Fatalf("%v, %d bytes wide: differs at %d", r.prim.flush, r.prim.width, differs(got, model))
	}
}

// A file that is cut off under its mapping faults with the offset, and what is
// left of it goes on.
func TestDAXTruncatedFileIsAnError(t *testing.T) {
	for _, dir := range daxDirs(t) {
		t.Run(filepath.Base(filepath.Dir(dir)), func(t *testing.T) {
			const size, cut = 4 * AreaAlign, AreaAlign + 4096
			path := filepath.Join(dir, "region")
			r := createAt(t, path, size, Cacheline)
			needRealDAX(t, r)
			if err := os.Truncate(path, cut); err != nil {
				t.Fatal(err)
			}
			big := make([]byte, 64<<10)
			for name, c := range map[string]struct {
				f    func()
				from int64 // the first byte that it touches beyond the cut
			}{
				"copy":    {func() { r.Copy(cut-100, big) }, cut},
				"store64": {func() { r.Store64(3*AreaAlign, 1) }, 3 * AreaAlign},
				"read":    {func() { big[0] = r.Bytes()[size-1] }, size - 1},
			} {
				var fault *FaultError
				if err := guarded(r, c.f); !errors.As(err, &fault) || fault.Path != path ||
					fault.Offset < c.from&^4095 || fault.Offset >= c.from+int64(len(big)) {
					t.Errorf("%s: %v, want a fault from offset %d on", name, err, c.from)
				}
			}
			if err := guarded(r, func() { r.Copy(cut-4096, big[:4096]) }); err != nil {
				t.Errorf("below the cut: %v", err)
			}
			if err := r.Fence(); err != nil {
				t.Error(err)
			}
		})
	}
}

// What sysfs says of real devices: of one that counts no dirty shutdowns, none.
func TestDAXPlatform(t *testing.T) {
	paths := []string{os.Getenv(devdaxEnv)}
	for _, dir := range daxDirs(t) {
		path := filepath.Join(dir, "region")
		createAt(t, path, AreaAlign, Cacheline)
		paths = append(paths, path)
	}
	for _, path := range paths {
		if path == "" {
			continue
		}
		dir, _, err := deviceDir(path)
		if err != nil {
			t.Fatal(err)
		}
		regions, err := regionsOf(dir, 0)
		if err != nil || len(regions) != 1 {
			t.Fatalf("%s is on the NVDIMM regions %v (%v), want one", path, regions, err)
		}
		modules, err := modulesOf(regions[0])
		if err != nil || len(modules) != 1 || !strings.HasPrefix(modules[0], "nmem") {
			t.Fatalf("%s is on the NVDIMMs %v (%v), want one", path, modules, err)
		}
		counters, err := filepath.Glob(filepath.Join(sysfs, "bus/nd/devices", modules[0], "*/dirty_shutdown"))
		if err != nil {
			t.Fatal(err)
		}
		count, ok, err := ShutdownCount(path)
		if err != nil || ok != (len(counters) > 0) {
			t.Errorf("%s: dirty shutdowns %d, %v, %v; counters %v", path, count, ok, err, counters)
		}
		bad, ok, err := BadBlocks(path)
		if err != nil || !ok || len(bad) != 0 {
			t.Errorf("%s: bad blocks %v, %v, %v", path, bad, ok, err)
		}
		t.Logf("%s: %s on %s, dirty shutdowns %d (counted: %v)", path, modules[0], filepath.Base(regions[0]), count, len(counters) > 0)
	}
}

// A bad block of the device is listed in the file that lies on it, is no
// obstacle to opening it, and faults where it is touched, and only there.
func TestDAXBadBlock(t *testing.T) {
	if os.Getenv(badBlockEnv) == "" {
		t.Skipf("adds a bad block to a device, until the machine is restarted: set %s where that may be", badBlockEnv)
	}
	parent := filepath.SplitList(os.Getenv(daxDirEnv))[0]
	// The file stays: its room must not become another's.
	path := filepath.Join(parent, fmt.Sprintf("on-a-bad-block-%d", os.Getpid()))
	const size, page = AreaAlign, 77
	r := createAt(t, path, size, Cacheline)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	dir, _, err := deviceDir(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	extents, err := extentsOf(f)
	if err != nil {
		t.Fatal(err)
	}
	at := int64(-1)
	for _, e := range extents {
		if e.logical <= page*4096 && page*4096 < e.logical+e.length {
			at = e.physical + page*4096 - e.logical
		}
	}
	if at < 0 {
		t.Fatalf("page %d is not in %v", page, extents)
	}
	if err := os.WriteFile(filepath.Join(dir, "badblocks"), fmt.Appendf(nil, "%d 1", at/sector), 0); err != nil {
		t.Fatal(err)
	}
	bad, ok, err := BadBlocks(path)
	if want := []Range{{page * 4096, sector}}; err != nil || !ok || !slices.Equal(bad, want) {
		t.Fatalf("bad blocks %v, %v, %v; want %v", bad, ok, err, want)
	}
	if unix.Access(path, unix.W_OK) != nil {
		t.Fatal("the file system went read-only")
	}
	r, err = Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	needRealDAX(t, r)
	var got byte // the compiler drops a load that nobody uses
	for name, f := range map[string]func(){
		"read":  func() { got = r.Bytes()[page*4096+5] },
		"store": func() { r.Store64(page*4096+64, 1) },
		"copy":  func() { r.Copy((page-1)*4096, make([]byte, 3*4096)) },
	} {
		var fault *FaultError
		if err := guarded(r, f); !errors.As(err, &fault) || fault.Offset/4096 != page {
			t.Errorf("%s: %v, want a fault in page %d (read %d)", name, err, page, got)
		}
	}
	if err := guarded(r, func() { r.Copy((page+1)*4096, make([]byte, 8192)) }); err != nil {
		t.Errorf("beside it: %v", err)
	}
	// Other storage takes the place of what is bad, and of nothing else.
	r.Copy((page-1)*4096, bytes.Repeat([]byte{1}, 4096))
	if err := r.Clear(page*4096+5, 1); err != nil {
		t.Fatal(err)
	}
	if bad, _, err := BadBlocks(path); err != nil || len(bad) > 0 {
		t.Errorf("bad blocks %v, %v", bad, err)
	}
	want := append(bytes.Repeat([]byte{1}, 4096), make([]byte, 4096)...)
	if err := guarded(r, func() { r.Store64(page*4096+64, 2) }); err != nil {
		t.Errorf("a store where it was bad: %v", err)
	}
	want[4096+64] = 2
	if !bytes.Equal(r.Bytes()[(page-1)*4096:][:8192], want) {
		t.Error("something else is there")
	}
}
