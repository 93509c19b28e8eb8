package journal

import (
	"math/rand/v2"
	"testing"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
)

// What only looks like log may begin a body in each line: their sums are running
// ones, and say what sums one by one would.
func TestFinder(t *testing.T) {
	const size = 1 << 17
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		base := LSN(rng.IntN(1<<20)) * Align
		ring := Ring{Bytes: make([]byte, size), Base: base}
		for i := range ring.Bytes {
			ring.Bytes[i] = byte(rng.Uint32())
		}
		from := base + LSN(rng.IntN(3*size/Align))*Align
		until := from + size
		history := History{{Epoch: Epoch{1, 1}}}
		for lsn := until - Align; ; lsn -= Align { // from the last on, so that a body may hold others
			if rng.Uint64N(2+seed) == 0 {
				n := min(ring.Contiguous(lsn), MaxSegment(size), int(until-lsn))
				n = (rng.IntN(n/Align) + 1) * Align
				h := Header{LSN: lsn, Epoch: Epoch{1, 1}, Length: uint32(n), BodyCRC: crc32c.Sum(ring.Raw(lsn, n)[HeaderSize:])}
				if rng.IntN(8) != 0 {
					h.BodyCRC ^= 1
				}
				h.encode(ring.Raw(lsn, HeaderSize))
			}
			if lsn == from {
				break
			}
		}
		for _, budget := range []int{size, size / 10, 0} {
			want, got := NewFinder(ring, history, until), NewFinder(ring, history, until)
			want.left, got.left = 1<<60, budget
			var x, y Header
			for at := from; ; {
				p, found := want.Next(at, &x)
				q, also := got.Next(at, &y)
				if found != also || found && (x != y || len(p) != len(q)) {
					t.Fatalf("seed %d, %d bytes one by one, from %d: %v %+v, want %v %+v", seed, budget, at, also, y, found, x)
				}
				if !found {
					break
				}
				if at = x.End(); rng.IntN(2) == 0 {
					at = x.LSN + Align
				}
			}
			if want.sums.at != nil || budget == 0 && got.sums.at == nil {
				t.Fatalf("seed %d: sums of the wrong kind", seed)
			}
		}
	}
}

// hostileRing holds the header of a segment of the greatest length in each line.
func hostileRing(size int) (Ring, History) {
	ring := Ring{Bytes: make([]byte, size)}
	for p := size - Align; p >= 0; p -= Align {
		h := Header{LSN: LSN(p), Epoch: Epoch{1, 1}, Length: uint32(min(size-p, MaxSegment(int64(size)))), BodyCRC: uint32(p)}
		h.encode(ring.Bytes[p:])
	}
	return ring, History{{Epoch: Epoch{1, 1}}}
}

// It reads no more than a ring's length of bodies one by one.
func TestFinderOfAHostileRing(t *testing.T) {
	ring, history := hostileRing(1 << 20)
	f := NewFinder(ring, history, LSN(ring.Size()))
	var h Header
	if _, ok := f.Next(Align, &h); ok || f.left != 0 || f.sums.at == nil {
		t.Errorf("found %v, %d bytes left, running sums %v", ok, f.left, f.sums.at != nil)
	}
}

func BenchmarkFindInAHostileRing(b *testing.B) {
	ring, history := hostileRing(8 << 20)
	b.SetBytes(int64(ring.Size()))
	for b.Loop() {
		NewFinder(ring, history, LSN(ring.Size())).Next(Align, new(Header))
	}
}
