package nvmmirror

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/internal/parts"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// processors has recovery use so many goroutines where there is work for them.
func processors(t testing.TB, n int) {
	t.Helper()
	old := runtime.GOMAXPROCS(n)
	t.Cleanup(func() { runtime.GOMAXPROCS(old) })
}

// killedRegion is the image of a node that was killed with more than 16 MiB of
// log above its checkpoint: any part of what it had changed is there.
func killedRegion(t *testing.T, rng *rand.Rand) []byte {
	t.Helper()
	mem := newImage(t, 16<<20, 32<<20)
	v := openQuiet(t, mem)
	commit := func(tx transaction) {
		if _, err := tx.commit(v); err != nil {
			t.Fatal(err)
		}
	}
	const edge = 1 << 20 // of the volume: no long writes there, few blocks change as a whole
	long := func(n int) {
		commit(transaction{{rng.Int64N(v.size - edge - int64(n)), randomBytes(rng, n)}})
	}
	for v.journal.End() < 10<<20 { // a run that several sum
		long(blockSize + rng.IntN(64<<10))
	}
	var half []byte
	for v.journal.End() < 17<<20 { // parts.Of: 4
		if half == nil && v.journal.End() >= 12<<20 {
			half = bytes.Clone(mem.b)
		}
		switch k := rng.IntN(20); {
		case k == 0:
			long(512 << 10)
		case k < 4:
			commit(transaction{{rng.Int64N((v.size-edge)/blockSize) * blockSize, bytes.Repeat([]byte{byte(rng.Uint32())}, blockSize)}})
		default:
			commit(append(randomTransaction(rng, v.size, 6, 20<<10), store{v.size - 1 - rng.Int64N(edge), []byte{byte(k)}}))
		}
	}
	image := bytes.Clone(mem.b)
	m := v.meta
	for b := range m.Size / blockSize {
		for _, area := range [][2]int64{{m.Data.Off + b*blockSize, blockSize}, {m.Table.Off + b*tableEntry, tableEntry}} {
			if rng.IntN(4) == 0 {
				copy(image[area[0]:][:area[1]], half[area[0]:])
			}
		}
	}
	return image
}

// TestRedoInParts: however many goroutines recover a region, it becomes the
// same.
func TestRedoInParts(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	image := killedRegion(t, rng)
	recovered := func(n int) (*Volume, []byte) {
		processors(t, n)
		mem := newHeapMemory(bytes.Clone(image))
		v, err := openMemory("heap", mem, Options{Logger: nopLogger})
		if err != nil {
			t.Fatal(err)
		}
		if got := parts.Of(int64(v.Applied())); got != n {
			t.Fatalf("%d parts, not %d", got, n)
		}
		return v, mem.b
	}
	want, wantBytes := recovered(1)
	for n := 2; n <= 4; n++ {
		v, b := recovered(n)
		switch {
		case v.Applied() != want.Applied() || v.chain != want.chain || v.recovery != want.recovery:
			t.Fatalf("%d parts: %+v, of one %+v", n, v.recovery, want.recovery)
		case !slices.Equal(v.dirty, want.dirty), !slices.Equal(v.unverified.blockSet, want.unverified.blockSet),
			v.unverified.n.Load() != want.unverified.n.Load(), v.bad.n.Load() != want.bad.n.Load():
			t.Fatalf("%d parts: other blocks are changed or unverified than with one", n)
		case !bytes.Equal(b, wantBytes):
			t.Fatalf("%d parts: another region than with one", n)
		}
	}
	if want.unverified.n.Load() == 0 {
		t.Error("no block was found in part: the image does not show much")
	}
}

// TestRedoFindsWhatChanged: a segment that changes between scan and redo keeps
// the region from opening, whichever goroutine verifies it.
func TestRedoFindsWhatChanged(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	image := killedRegion(t, rng)
	processors(t, 4)
	for range 8 {
		v, err := openMemory("heap", newHeapMemory(bytes.Clone(image)), Options{Logger: nopLogger})
		if err != nil {
			t.Fatal(err)
		}
		upTo := v.Applied()
		v.applied.Store(0)
		v.chain = 0
		at := v.ring.Off + rng.Int64N(int64(upTo))
		v.mem.Bytes()[at] ^= 1 << rng.IntN(8)
		if err := v.redo(upTo, nil); err == nil {
			t.Fatalf("a flip at offset %d of the ring was not found", at-v.ring.Off)
		}
		if v.Applied() != 0 || v.failed.Load() == nil {
			t.Fatal("the volume goes on")
		}
	}
}

// TestRedoAppliesNothingUnverified: a record whose place in the volume changes
// between scan and redo is applied by none of the goroutines: nothing would ever
// tell that it does not belong there.
func TestRedoAppliesNothingUnverified(t *testing.T) {
	processors(t, 4)
	const half = 8 << 20
	mem := newImage(t, 2*half, 32<<20)
	v := openQuiet(t, mem)
	rng := rand.New(rand.NewPCG(8, 8))
	for v.journal.End() < 17<<20 {
		if _, err := (transaction{{rng.Int64N(half - 60<<10), randomBytes(rng, 1+rng.IntN(60<<10))}}).commit(v); err != nil {
			t.Fatal(err)
		}
	}
	upTo := v.Applied()
	for range 8 {
		v, err := openMemory("heap", mem, Options{Logger: nopLogger})
		if err != nil {
			t.Fatal(err)
		}
		at := LSN(0)
		var h journal.Header
		for target := LSN(rng.Int64N(int64(upTo))); ; at = h.End() {
			if err := v.journal.Ring().Header(at, &h); err != nil {
				t.Fatal(err)
			}
			if h.End() > target {
				break
			}
		}
		off := v.journal.Ring().Raw(at+journal.HeaderSize, 8)
		off[2] ^= half >> 16
		v.applied.Store(0)
		v.chain = 0
		if err := v.redo(upTo, nil); err == nil {
			t.Fatal("a record's place changed, and it was not found")
		}
		off[2] ^= half >> 16
		if i := slices.IndexFunc(mem.b[v.data.Off+half:], func(b byte) bool { return b != 0 }); i >= 0 {
			t.Fatalf("a record of the segment at LSN %d was applied where it does not belong, at offset %d", at, half+i)
		}
	}
}

// TestRecoveryMeetsAFault: a page that cannot be read is an error with its
// offset, also where another goroutine than the caller's meets it.
func TestRecoveryMeetsAFault(t *testing.T) {
	processors(t, 4)
	log := func(part float64) func(v *Volume) int64 { // inside a body
		return func(v *Volume) int64 {
			return (v.ring.Off+int64(part*float64(v.journal.End())))&^(blockSize-1) + blockSize
		}
	}
	data := func(block int64) func(v *Volume) int64 {
		return func(v *Volume) int64 { return v.data.Off + block*blockSize }
	}
	for name, where := range map[string]func(v *Volume) int64{"log, first part": log(0.1), "log, third part": log(0.6), "data, first part": data(10), "data, second part": data(100)} {
		t.Run(name, func(t *testing.T) {
			mem := emulated(t, 2<<20, 32<<20)
			v := openQuiet(t, mem)
			for v.journal.End() < 17<<20 {
				if _, err := (transaction{{0, make([]byte, 512<<10)}}).commit(v); err != nil {
					t.Fatal(err)
				}
			}
			page := where(v)
			bad := mem.Bytes()[page:][:blockSize]
			if err := unix.Mprotect(bad, unix.PROT_NONE); err != nil {
				t.Fatal(err)
			}
			defer unix.Mprotect(bad, unix.PROT_READ|unix.PROT_WRITE)
			var fault *pmem.FaultError
			if _, err := openMemory("tmpfs", mem, Options{Logger: nopLogger}); !errors.As(err, &fault) || fault.Offset&^(blockSize-1) != page {
				t.Fatalf("page at offset %d: %v", page, err)
			}
		})
	}
}

// TestScanStopsBeforeAFault: a page that cannot be read behind the end of the
// log that a clean close noted, or behind what is damaged in it, keeps no region
// from opening.
func TestScanStopsBeforeAFault(t *testing.T) {
	processors(t, 4)
	mem := emulated(t, 2<<20, 32<<20)
	v := openQuiet(t, mem)
	const n = 512 << 10
	cleanTail(t, v, slices.Repeat([]journal.Write{{Off: 0, Data: make([]byte, n)}}, 24)...)
	flip := v.journal.Ring().Raw(0, 4*n)[3*n:] // in the third or the fourth segment
	flip[0] ^= 1
	page := mem.Bytes()[v.ring.Off+12*n:][:blockSize]
	if err := unix.Mprotect(page, unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	defer unix.Mprotect(page, unix.PROT_READ|unix.PROT_WRITE)
	again, err := openMemory("tmpfs", mem, Options{Logger: nopLogger})
	if err != nil {
		t.Fatal(err)
	}
	if end := again.recovery.End; end == 0 || end > 4*n {
		t.Errorf("%+v", again.recovery)
	}
}

// TestExtendMeetsAFault: log that a peer brought back lies beside a page that
// cannot be read: an error, and the node acknowledges nothing more.
func TestExtendMeetsAFault(t *testing.T) {
	mem := emulated(t, 2<<20, 2<<20)
	v := openQuiet(t, mem)
	if _, err := (transaction{{0, make([]byte, 64<<10)}}).commit(v); err != nil {
		t.Fatal(err)
	}
	page := (v.ring.Off + int64(v.journal.End())) &^ (blockSize - 1)
	bad := mem.Bytes()[page:][:blockSize]
	if err := unix.Mprotect(bad, unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	defer unix.Mprotect(bad, unix.PROT_READ|unix.PROT_WRITE)
	var fault *pmem.FaultError
	if err := (*node)(v).Extend(); !errors.As(err, &fault) || fault.Offset&^(blockSize-1) != page || v.failed.Load() == nil {
		t.Errorf("page at offset %d: %v", page, err)
	}
}
