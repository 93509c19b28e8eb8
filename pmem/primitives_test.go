package pmem

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// forEachChoice runs f on an emulated region for every flush instruction and
// copy width of this CPU.
func forEachChoice(t *testing.T, size int64, f func(t *testing.T, r *Region)) {
	for _, pr := range choices() {
		t.Run(fmt.Sprintf("%v+nt%d", pr.flush, pr.width), func(t *testing.T) {
			r := emulated(t, size)
			r.prim = pr
			f(t, r)
		})
	}
}

func emulated(t testing.TB, size int64) *Region {
	t.Helper()
	r, err := NewEmulated(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// seeded is a source of randomness whose seed a failure shows.
func seeded(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func fill(rng *rand.Rand, p []byte) {
	for len(p) >= 8 {
		binary.LittleEndian.PutUint64(p, rng.Uint64())
		p = p[8:]
	}
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
}

// Every alignment of destination and source and every length around the
// thresholds: what is stored is exact, and nothing beside it changes.
func TestCopyZeroAlignments(t *testing.T) {
	lengths := []int{0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 191, 192, 255, 256, 257, 319, 320, 321, 511, 512, 513, 575, 576, 577, 1023, 1024, 1025, 1087}
	forEachChoice(t, 8192, func(t *testing.T, r *Region) {
		rng := seeded(t)
		src := make([]byte, 2048)
		fill(rng, src)
		model := make([]byte, r.Size())
		fill(rng, model)
		r.Copy(0, model)
		for dst := range 130 {
			for _, n := range lengths {
				from := rng.IntN(130)
				off := 1024 + dst
				r.Copy(int64(off), src[from:from+n])
				copy(model[off:], src[from:from+n])
				if !bytes.Equal(r.Bytes(), model) {
					t.Fatalf("Copy of %d bytes to %d from %d: differs at %d", n, off, from, differs(r.Bytes(), model))
				}
				off += rng.IntN(64)
				r.Zero(int64(off), int64(n))
				clear(model[off : off+n])
				if !bytes.Equal(r.Bytes(), model) {
					t.Fatalf("Zero of %d bytes at %d: differs at %d", n, off, differs(r.Bytes(), model))
				}
			}
		}
	})
}

func differs(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// Lengths around one assembly call and beyond.
func TestCopyZeroLarge(t *testing.T) {
	forEachChoice(t, 1<<20, func(t *testing.T, r *Region) {
		rng := seeded(t)
		model := make([]byte, r.Size())
		src := make([]byte, r.Size())
		for range 12 {
			fill(rng, src)
			n := rng.IntN(4 * maxCall)
			switch rng.IntN(3) {
			case 0:
				n = maxCall + rng.IntN(257) - 128
			case 1:
				n = 2*maxCall + rng.IntN(257) - 128
			}
			off := rng.IntN(len(model) - n)
			r.Copy(int64(off), src[:n])
			copy(model[off:], src[:n])
			woff, wn := rng.IntN(len(model)/2), rng.IntN(len(model)/2)
			r.Write(int64(woff), src[:wn])
			copy(model[woff:], src[:wn])
			r.Flush(int64(woff), int64(wn))
			zoff, zn := rng.IntN(len(model)-maxCall-256), maxCall+rng.IntN(256)
			r.Zero(int64(zoff), int64(zn))
			clear(model[zoff : zoff+zn])
			if err := r.Fence(); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(r.Bytes(), model) {
				t.Fatalf("copy %d@%d, write %d@%d, zero %d@%d: differs at %d", n, off, wn, woff, zn, zoff, differs(r.Bytes(), model))
			}
		}
	})
}

// Any sequence of operations equals the same on a plain slice.
func TestModel(t *testing.T) {
	const size = 16 << 10
	forEachChoice(t, size, func(t *testing.T, r *Region) {
		model := make([]byte, size)
		rapid.Check(t, func(t *rapid.T) {
			for range rapid.IntRange(1, 20).Draw(t, "operations") {
				off := rapid.IntRange(0, size-8).Draw(t, "off")
				n := rapid.IntRange(0, min(size-off, 1100)).Draw(t, "n")
				p := bytes.Repeat([]byte{rapid.Byte().Draw(t, "b"), 1, 2, 3, 4}, n/5+1)[:n]
				switch rapid.IntRange(0, 4).Draw(t, "what") {
				case 0:
					r.Copy(int64(off), p)
					copy(model[off:], p)
				case 1:
					r.Write(int64(off), p)
					copy(model[off:], p)
					r.Flush(int64(off), int64(n))
				case 2:
					r.Zero(int64(off), int64(n))
					clear(model[off : off+n])
				case 3:
					v := rapid.Uint64().Draw(t, "v")
					off &^= 7
					r.Store64(int64(off), v)
					for i := range 8 {
						model[off+i] = byte(v >> (8 * i))
					}
					r.Flush(int64(off), 8)
				case 4:
					copy(r.Window(int64(off), int64(n)), p)
					copy(model[off:], p)
					r.Flush(int64(off), int64(n))
				}
				if err := r.Fence(); err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(r.Bytes(), model) {
				t.Fatalf("differs at %d", differs(r.Bytes(), model))
			}
		})
	})
}

func TestOutsideOfRegionPanics(t *testing.T) {
	r := emulated(t, 4096)
	const huge = int64(^uint64(0) >> 1)
	for name, f := range map[string]func(){
		"copy past the end":    func() { r.Copy(4090, make([]byte, 7)) },
		"negative offset":      func() { r.Zero(-1, 1) },
		"negative length":      func() { r.Flush(0, -1) },
		"smallest length":      func() { r.Flush(0, -huge-1) },
		"sum overflows":        func() { r.Window(huge, huge) },
		"offset past the end":  func() { r.Window(4097, 0) },
		"store64 past the end": func() { r.Store64(4096, 1) },
		"store64 unaligned":    func() { r.Store64(4, 1) },
		"write past the end":   func() { r.Write(4096, []byte{1}) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			f()
		})
	}
}

func TestWindowIsInsideTheMapping(t *testing.T) {
	r := emulated(t, 4096)
	w := r.Window(64, 128)
	if len(w) != 128 || cap(w) != 128 || &w[0] != &r.Bytes()[64] {
		t.Fatalf("window has length %d, capacity %d", len(w), cap(w))
	}
	if w := r.Window(4096, 0); len(w) != 0 {
		t.Fatalf("window at the end has length %d", len(w))
	}
}

func TestNoAllocations(t *testing.T) {
	r := emulated(t, 1<<20)
	for _, n := range []int{64, 4096, 1 << 20} {
		src := make([]byte, n)
		got := testing.AllocsPerRun(10, func() {
			var err error
			func() {
				defer Recover(r, Arm(), &err)
				r.Copy(0, src)
				r.Zero(0, int64(n))
				r.Store64(0, 1)
				r.Flush(0, 8)
				err = r.Fence()
			}()
			if err != nil {
				t.Fatal(err)
			}
		})
		if got != 0 {
			t.Errorf("%d bytes: %v allocations", n, got)
		}
	}
}

// What is announced and does not run is left out of the other tests: say so.
func TestDetectedFlushRuns(t *testing.T) {
	if detected.flush == flushNone {
		t.Skip("this CPU announces no flush instruction")
	}
	if len(availableFlushes()) == 0 {
		t.Skipf("the CPU announces %v, but it raises SIGILL (qemu-user before 8.1): not tested here", detected.flush)
	}
	t.Logf("flush %v, copies %d bytes wide, all choices %v", detected.flush, detected.width, choices())
}

// TestPrefetch: it takes any address.
func TestPrefetch(t *testing.T) {
	Prefetch(nil)
	Prefetch(new(byte))
}
