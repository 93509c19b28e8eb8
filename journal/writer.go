package journal

import (
	"sync/atomic"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// writer assembles a segment: small pieces in a buffer, so that a line is
// flushed once, large ones straight from the caller's memory. Its first
// HeaderSize bytes are the header's, written last.
type writer struct {
	mem  pmem.Memory
	head int64 // region offset of the segment
	pos  int64 // region offset of buf[0], on a line
	n    int   // bytes in buf
	sums int   // of them, those that are in the checksum, or the header's
	buf  [8 << 10]byte

	// The body's checksum is taken by pieces.
	cache *pieceSums
	lsn   LSN    // of the piece under way
	crc   uint32 // of the pieces before it
	piece uint32 // of the piece under way, so far
	len   int    // its bytes in the body, so far
	left  int    // those that are to come
}

// direct is the size from which bytes go straight to the ring; chunk is how
// much is checksummed and then copied while it is in the cache.
const (
	direct = 6 << 10
	chunk  = 64 << 10
)

func (w *writer) start(pos int64, lsn LSN) {
	w.head, w.pos, w.n, w.sums = pos, pos, HeaderSize, HeaderSize
	w.lsn, w.crc, w.piece, w.len, w.left = lsn, 0, 0, 0, PieceSize-HeaderSize
}

// sum takes p into the body's checksum.
func (w *writer) sum(p []byte) {
	for len(p) > w.left {
		k := w.left
		w.piece = crc32c.Update(w.piece, p[:k])
		w.len += k
		w.endPiece()
		w.lsn += PieceSize
		w.piece, w.len, w.left = 0, 0, PieceSize
		p = p[k:]
	}
	w.piece = crc32c.Update(w.piece, p)
	w.len += len(p)
	w.left -= len(p)
}

func (w *writer) endPiece() {
	w.cache.put(w.lsn, w.piece)
	w.crc = crc32c.Combine(w.crc, w.piece, int64(w.len))
}

// total is the body's checksum.
func (w *writer) total() uint32 {
	w.sumStaged()
	if w.len+w.left < PieceSize { // still in the first piece, beside the header
		return w.piece
	}
	w.endPiece()
	return w.crc
}

func (w *writer) record(wr *Write, last bool) {
	if w.n+RecordHeaderSize > len(w.buf) {
		w.spill()
	}
	putRecordHeader(w.buf[w.n:], wr, last)
	w.n += RecordHeaderSize
	w.write(wr.Data)
	w.zero(-len(wr.Data) & (recordAlign - 1))
}

func (w *writer) write(p []byte) {
	if len(p) < direct {
		w.stage(p)
		return
	}
	if k := -w.n & (pmem.LineSize - 1); k != 0 {
		w.stage(p[:k])
		p = p[k:]
	}
	w.spill()
	for len(p) >= pmem.LineSize {
		k := min(len(p)&^(pmem.LineSize-1), chunk)
		w.sum(p[:k])
		w.mem.Copy(w.pos, p[:k])
		w.pos += int64(k)
		p = p[k:]
	}
	w.stage(p)
}

var zeros [pmem.LineSize]byte

// zero appends n < 64 zero bytes.
func (w *writer) zero(n int) {
	if n != 0 {
		w.stage(zeros[:n])
	}
}

func (w *writer) stage(p []byte) {
	for {
		k := copy(w.buf[w.n:], p)
		w.n += k
		p = p[k:]
		if len(p) == 0 {
			return
		}
		w.spill()
	}
}

// spill copies the whole lines in buf to the ring; a part of a line stays.
func (w *writer) spill() {
	w.sumStaged()
	lines := w.n &^ (pmem.LineSize - 1)
	from := 0
	if w.pos == w.head {
		from = min(HeaderSize, lines)
	}
	if lines > from {
		w.mem.Copy(w.pos+int64(from), w.buf[from:lines])
	}
	w.n = copy(w.buf[:], w.buf[lines:w.n])
	w.sums = w.n
	w.pos += int64(lines)
}

// sumStaged takes what is in buf into the checksum: the copy, which the caller
// can no longer change, and in one piece.
func (w *writer) sumStaged() {
	w.sum(w.buf[w.sums:w.n])
	w.sums = w.n
}

// finish writes the rest and the header. The segment's length is in whole
// lines, so nothing stays behind.
func (w *writer) finish(h *Header) {
	if w.pos == w.head {
		h.encode(w.buf[:])
		w.mem.Copy(w.head, w.buf[:w.n])
		return
	}
	w.mem.Copy(w.pos, w.buf[:w.n])
	h.encode(w.buf[:])
	w.mem.Copy(w.head, w.buf[:HeaderSize])
}

// PieceSize is the longest piece of a segment that crosses the wire at once,
// in bytes: a longer segment has pieces of this size from its start on.
const PieceSize = 64 << 10

// pieceSums remembers the checksums that Append took of the pieces of long
// segments, so that sending does not read them once more. It is a cache with
// one place per PieceSize of ring: a piece that is not there is read. Anyone
// may look; only the log's owner changes it.
//
// An entry is the piece's checksum, below the low 31 bits of its LSN in lines
// and a bit that is always set.
type pieceSums []atomic.Uint64

func newPieceSums(ring int64) pieceSums { return make(pieceSums, ring/PieceSize+1) }

func (s pieceSums) at(lsn LSN) *atomic.Uint64 { return &s[uint64(lsn)/PieceSize%uint64(len(s))] }

func tag(lsn LSN) uint64 { return uint64(uint32(lsn/Align)|1<<31) << 32 }

func (s pieceSums) put(lsn LSN, crc uint32) { s.at(lsn).Store(tag(lsn) | uint64(crc)) }

func (s pieceSums) get(lsn LSN) (crc uint32, ok bool) {
	e := s.at(lsn).Load()
	return uint32(e), e&^(1<<32-1) == tag(lsn)
}

// forget empties the cache: the log goes on elsewhere, or is another's.
func (s pieceSums) forget() {
	for i := range s {
		s[i].Store(0)
	}
}
