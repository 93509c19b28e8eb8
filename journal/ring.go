package journal

import (
	"encoding/binary"
	"fmt"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
)

// Ring is a read-only view of a journal ring: its bytes, and the LSN at its
// start. Size must be a multiple of 64.
type Ring struct {
	Bytes []byte
	Base  LSN
}

// Size is the ring's size in bytes.
func (r Ring) Size() int { return len(r.Bytes) }

// Position is the place of lsn in the ring, in bytes from its start.
func (r Ring) Position(lsn LSN) int { return int(uint64(lsn-r.Base) % uint64(len(r.Bytes))) }

// Contiguous is how many bytes from lsn on lie before the ring's end.
func (r Ring) Contiguous(lsn LSN) int { return len(r.Bytes) - r.Position(lsn) }

// MaxSegment is the longest segment that a ring of size bytes takes.
func MaxSegment(size int64) int { return int(min(size/ringToSegment, maxSegment)) }

// Header decodes the header at lsn and judges what the header alone tells:
// magic, checksum, version, and that it was written for this place.
func (r Ring) Header(lsn LSN, h *Header) error {
	if lsn%Align != 0 {
		return &FormatError{Kind: BadField, LSN: lsn, Detail: "no segment starts there"}
	}
	p := r.Position(lsn)
	if err := DecodeHeader(r.Bytes[p:p+HeaderSize], h); err != nil {
		return at(lsn, err)
	}
	switch {
	case h.LSN != lsn:
		return &FormatError{Kind: Stale, LSN: lsn, Detail: fmt.Sprintf("segment of LSN %d", h.LSN)}
	case !r.Fits(h):
		return &FormatError{Kind: BadField, LSN: lsn, Detail: fmt.Sprintf("length %d where %d bytes are left in the ring", h.Length, r.Contiguous(lsn))}
	}
	return nil
}

// Segment decodes the segment at lsn and verifies header and body. The body
// is the ring's own memory.
func (r Ring) Segment(lsn LSN, h *Header) (body []byte, err error) {
	if err := r.Header(lsn, h); err != nil {
		return nil, err
	}
	if h.Pad {
		return nil, nil
	}
	body = r.body(h)
	if err := CheckBody(h, body); err != nil {
		return nil, err
	}
	return body, nil
}

// body is the body of the data segment with header h.
func (r Ring) body(h *Header) []byte {
	p := r.Position(h.LSN)
	return r.Bytes[p+HeaderSize : p+int(h.Length)]
}

// CheckBody verifies the body of the data segment with header h.
func CheckBody(h *Header, body []byte) error { return CheckSum(h, crc32c.Sum(body)) }

// CheckSum is CheckBody where the body's checksum is known.
func CheckSum(h *Header, crc uint32) error {
	if crc != h.BodyCRC {
		return &FormatError{Kind: BadCRC, LSN: h.LSN, Detail: fmt.Sprintf("body of %d bytes", h.Length-HeaderSize)}
	}
	return nil
}

// Raw is n bytes from lsn on, which must not cross the ring's end.
func (r Ring) Raw(lsn LSN, n int) []byte {
	p := r.Position(lsn)
	return r.Bytes[p : p+n : p+n]
}

func at(lsn LSN, err error) error {
	if f, ok := err.(*FormatError); ok {
		c := *f
		c.LSN = lsn
		return &c
	}
	return err
}

// Finder finds valid segments where no scan reaches them.
type Finder struct {
	ring    Ring
	history History
	until   LSN
	left    int // bytes of bodies that are still summed one by one
	sums    lineSums
}

// NewFinder finds segments that end by until.
//
// Of a log, no two bodies overlap, so that they are summed one by one. Of what only
// looks like one, each line may begin a body of the greatest length: what is more
// than a ring comes from running sums, so that it takes as long as a few rings.
func NewFinder(ring Ring, history History, until LSN) *Finder {
	return &Finder{ring: ring, history: history, until: until, left: ring.Size(), sums: lineSums{ring: ring}}
}

// Next is the first valid segment of this lap that starts at from or behind it:
// a scan that has stopped before it cannot reach it. It is verified but for its
// chain. The search reads a word or two of each line. from must not be below an
// earlier one.
func (f *Finder) Next(from LSN, h *Header) (body []byte, ok bool) {
	r := f.ring
	p := r.Position(from) - Align
	for lsn := from; lsn < f.until; lsn += Align {
		if p += Align; p == len(r.Bytes) {
			p = 0
		}
		if line := r.Bytes[p : p+HeaderSize]; binary.LittleEndian.Uint32(line) != Magic || LSN(binary.LittleEndian.Uint64(line[8:])) != lsn {
			continue // also segments of an earlier lap
		}
		if r.Header(lsn, h) != nil || h.End() > f.until {
			continue
		}
		if e, ok := f.history.At(lsn); !ok || e.Epoch != h.Epoch {
			continue
		}
		if h.Pad {
			return nil, true
		}
		if body = r.body(h); f.sum(h, body) == h.BodyCRC {
			return body, true
		}
	}
	return nil, false
}

func (f *Finder) sum(h *Header, body []byte) uint32 {
	if f.left -= len(body); f.left >= 0 {
		return crc32c.Sum(body)
	}
	f.left = 0
	return f.sums.between(h.LSN+HeaderSize, h.End())
}

// lineSums is the checksum of the log from some LSN up to each line of a window
// that is as long as a segment may be. Of any piece in the window they give the
// checksum, and read each line once.
type lineSums struct {
	ring Ring
	to   LSN      // the window's end
	sum  uint32   // up to there
	at   []uint32 // by line, modulo the window's length
}

func (s *lineSums) slot(lsn LSN) *uint32 { return &s.at[uint64(lsn)/Align%uint64(len(s.at))] }

// between is the checksum of [lo, hi), at most a segment. lo must not be below an
// earlier one.
func (s *lineSums) between(lo, hi LSN) uint32 {
	if s.at == nil {
		s.at = make([]uint32, MaxSegment(int64(s.ring.Size()))/Align+1)
	}
	if lo >= s.to {
		s.to, s.sum = lo, 0
		*s.slot(lo) = 0
	}
	for ; s.to < hi; *s.slot(s.to) = s.sum {
		s.sum = crc32c.Update(s.sum, s.ring.Raw(s.to, Align))
		s.to += Align
	}
	return crc32c.Combine(*s.slot(lo), *s.slot(hi), int64(hi-lo))
}

// Fits reports whether a segment with header h lies in the ring as it must: data
// in one piece, and none that is too long; padding up to the ring's end.
func (r Ring) Fits(h *Header) bool {
	n, c := int(h.Length), r.Contiguous(h.LSN)
	if h.Pad {
		return n == c
	}
	return n <= min(c, MaxSegment(int64(len(r.Bytes))))
}
