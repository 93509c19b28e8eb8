package journal

import (
	"math/rand/v2"
	"testing"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
)

// TestPieceSums: Append remembers the checksum of each piece of a long
// segment, as it was written, until the log goes on elsewhere or the place is
// another's.
func TestPieceSums(t *testing.T) {
	log := newTestLog(t, 4<<20, 0)
	r := rand.New(rand.NewPCG(1, 2))
	check := func(start, end LSN) (known int) {
		t.Helper()
		for lsn := start; lsn < end; lsn += PieceSize {
			piece := log.Ring().Raw(lsn, int(min(end-lsn, PieceSize)))
			if lsn == start {
				piece = piece[HeaderSize:]
			}
			if sum, ok := log.PieceSum(lsn); ok {
				known++
				if sum != crc32c.Sum(piece) {
					t.Fatalf("segment of %d bytes: wrong sum of the piece at %d", end-start, lsn-start)
				}
			}
		}
		return known
	}
	for range 200 {
		var writes []Write
		total := HeaderSize
		for range 1 + r.IntN(4) {
			n := 1 + r.IntN(200<<10)
			if r.IntN(3) == 0 {
				n = PieceSize*(1+r.IntN(3)) - HeaderSize - RecordHeaderSize + r.IntN(3) - 1
			}
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(r.Uint32())
			}
			writes = append(writes, Write{0, p})
			total += recordSize(n)
		}
		end, err := appendTo(log, 0, writes)
		if err != nil {
			t.Fatal(err)
		}
		start := end - LSN(roundUp(total))
		var h Header
		if _, err := log.Ring().Segment(start, &h); err != nil || h.End() != end {
			t.Fatal(err, h.End(), end)
		}
		if got, want := check(start, end), (roundUp(total)+PieceSize-1)/PieceSize; want > 1 && got != want {
			t.Fatalf("segment of %d bytes: %d sums of %d", end-start, got, want)
		}
		log.Ring().Raw(start, 128)[100] ^= 1
		if sum, ok := log.PieceSum(start); ok && sum == crc32c.Sum(log.Ring().Raw(start, min(int(end-start), PieceSize))[HeaderSize:]) {
			t.Fatal("the sum is of what is in memory now")
		}
		log.Ring().Raw(start, 128)[100] ^= 1
		if r.IntN(20) == 0 {
			log.Reset(end, log.Chain())
			if n := check(start, end); n != 0 {
				t.Fatalf("%d sums after a reset", n)
			}
		}
	}
}
