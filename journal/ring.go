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

// pos is the place of lsn in the ring.
func (r Ring) pos(lsn LSN) int { return int(uint64(lsn-r.Base) % uint64(len(r.Bytes))) }

// contiguous is how many bytes from lsn on lie before the ring's end.
func (r Ring) contiguous(lsn LSN) int { return len(r.Bytes) - r.pos(lsn) }

// MaxSegment is the longest segment that a ring of size bytes takes.
func MaxSegment(size int64) int { return int(min(size/ringToSegment, maxSegment)) }

// Header decodes the header at lsn and judges what the header alone tells:
// magic, checksum, version, and that it was written for this place.
func (r Ring) Header(lsn LSN, h *Header) error {
	p := r.pos(lsn)
	if err := DecodeHeader(r.Bytes[p:p+HeaderSize], h); err != nil {
		return at(lsn, err)
	}
	switch {
	case h.LSN != lsn:
		return &FormatError{Kind: Stale, LSN: lsn, Detail: fmt.Sprintf("segment of LSN %d", h.LSN)}
	case int(h.Length) > r.contiguous(lsn), h.Pad && int(h.Length) != r.contiguous(lsn),
		!h.Pad && int(h.Length) > MaxSegment(int64(len(r.Bytes))):
		return &FormatError{Kind: BadField, LSN: lsn, Detail: fmt.Sprintf("length %d where %d bytes are left in the ring", h.Length, r.contiguous(lsn))}
	}
	return nil
}

// Segment decodes the segment at lsn and verifies header and body. The body
// is the ring's own memory.
func (r Ring) Segment(lsn LSN, h *Header) (body []byte, err error) {
	if err := r.Header(lsn, h); err != nil {
		return nil, err
	}
	p := r.pos(lsn)
	body = r.Bytes[p+HeaderSize : p+int(h.Length)]
	if h.Pad {
		return nil, nil
	}
	if err := CheckBody(h, body); err != nil {
		return nil, err
	}
	return body, nil
}

// CheckBody verifies the body of the data segment with header h.
func CheckBody(h *Header, body []byte) error {
	if crc32c.Sum(body) != h.BodyCRC {
		return &FormatError{Kind: BadCRC, LSN: h.LSN, Detail: fmt.Sprintf("body of %d bytes", len(body))}
	}
	return nil
}

// Raw is n bytes from lsn on, which must not cross the ring's end.
func (r Ring) Raw(lsn LSN, n int) []byte {
	p := r.pos(lsn)
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

// Scanner steps through the valid segments of a ring.
type Scanner struct {
	ring    Ring
	history History
	next    LSN
	chain   uint32
	until   LSN
}

// NewScanner starts at from, behind a segment whose header had checksum chain
// (0 at the start of a log). It ends one lap further.
func NewScanner(ring Ring, history History, from LSN, chain uint32) *Scanner {
	return &Scanner{ring: ring, history: history, next: from, chain: chain, until: from + LSN(len(ring.Bytes))}
}

// Position is the LSN of the next segment and the checksum that it must be
// chained to.
func (s *Scanner) Position() (LSN, uint32) { return s.next, s.chain }

// Next reads the next segment. The error says why it is not valid; the
// scanner then stays where it is.
func (s *Scanner) Next(h *Header) (body []byte, err error) {
	if s.next >= s.until {
		return nil, &FormatError{Kind: NoSegment, LSN: s.next, Detail: "the ring is full"}
	}
	body, err = s.ring.Segment(s.next, h)
	if err != nil {
		return nil, err
	}
	if h.End() > s.until {
		return nil, &FormatError{Kind: BadField, LSN: s.next, Detail: "overlaps the start of the scan"}
	}
	if e, ok := s.history.At(s.next); !ok || e.Epoch != h.Epoch {
		return nil, &FormatError{Kind: WrongEpoch, LSN: s.next, Detail: fmt.Sprintf("segment of %v, the history says %v", h.Epoch, e.Epoch)}
	}
	if h.Prev != s.chain {
		return nil, &FormatError{Kind: WrongChain, LSN: s.next, Detail: fmt.Sprintf("chained to %#08x, the segment before it has %#08x", h.Prev, s.chain)}
	}
	s.next, s.chain = h.End(), h.CRC
	return body, nil
}

// Scan is what a scan from a checkpoint to the first invalid segment found.
type Scan struct {
	From         LSN
	End          LSN    // the LSN of the first invalid segment
	Chain        uint32 // checksum of the last valid header
	Acked        LSN    // highest position known to be acknowledged
	Segments     int
	Transactions int
	Stop         error        // why the segment at End is not valid
	Damage       *DamageError // End lies below Acked
}

// ScanFrom scans ring from a checkpoint. acked is what is known to be
// acknowledged from elsewhere. It never writes. A segment of a newer format
// where the log should go on is an error: this program cannot tell where the
// log ends.
//
// The first invalid segment is a torn tail, unless something proves that the
// log went on: acked, or a hint in a valid segment before or behind it.
func ScanFrom(ring Ring, history History, from LSN, chain uint32, acked LSN) (Scan, error) {
	s := NewScanner(ring, history, from, chain)
	res := Scan{From: from, Acked: acked}
	var h Header
	for {
		_, err := s.Next(&h)
		if err != nil {
			res.Stop = err
			break
		}
		res.Acked = max(res.Acked, min(h.Acked, h.LSN))
		res.Segments++
		res.Transactions += int(h.Count)
	}
	res.End, res.Chain = s.Position()
	if IsNewer(res.Stop) {
		return res, res.Stop
	}
	if a := hintBeyond(ring, history, res.End, s.until); a > res.End {
		res.Acked = max(res.Acked, a)
	}
	if res.Acked > res.End {
		res.Damage = &DamageError{At: res.End, Acked: res.Acked, Why: res.Stop}
	}
	return res, nil
}

// hintBeyond is the highest acknowledged-up-to hint of valid segments of this
// lap behind the one at end.
func hintBeyond(ring Ring, history History, end, until LSN) (acked LSN) {
	var h Header
	for from := end + Align; ; from = h.End() {
		if _, ok := ring.Find(history, from, until, &h); !ok {
			return acked
		}
		if h.Acked <= h.LSN {
			acked = max(acked, h.Acked)
		}
	}
}

// Find is the first valid segment of this lap that starts in [from, until): a
// scan that has stopped before it cannot reach it. It is verified but for its
// chain. The search reads a word or two of each line.
func (r Ring) Find(history History, from, until LSN, h *Header) (body []byte, ok bool) {
	p := r.pos(from) - Align
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

// Fits reports whether a segment with header h lies in the ring as it must: in
// one piece, and padding up to the ring's end.
func (r Ring) Fits(h *Header) bool {
	c := r.contiguous(h.LSN)
	return int(h.Length) <= c && (!h.Pad || int(h.Length) == c)
}

// Position is the place of lsn in the ring, in bytes from its start.
func (r Ring) Position(lsn LSN) int { return r.pos(lsn) }

// Contiguous is how many bytes from lsn on lie before the ring's end.
func (r Ring) Contiguous(lsn LSN) int { return r.contiguous(lsn) }
