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

// Find is the first valid segment of this lap that starts in [from, until): a
// scan that has stopped before it cannot reach it. It is verified but for its
// chain. The search reads a word or two of each line.
func (r Ring) Find(history History, from, until LSN, h *Header) (body []byte, ok bool) {
	p := r.Position(from) - Align
	for lsn := from; lsn < until; lsn += Align {
		if p += Align; p == len(r.Bytes) {
			p = 0
		}
		if line := r.Bytes[p : p+HeaderSize]; binary.LittleEndian.Uint32(line) != Magic || LSN(binary.LittleEndian.Uint64(line[8:])) != lsn {
			continue // also segments of an earlier lap
		}
		if r.Header(lsn, h) != nil || h.End() > until {
			continue
		}
		if e, ok := history.At(lsn); !ok || e.Epoch != h.Epoch {
			continue
		}
		if body, err := r.Segment(lsn, h); err == nil {
			return body, true
		}
	}
	return nil, false
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
