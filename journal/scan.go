package journal

import (
	"fmt"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
)

// scanner steps through the valid segments of a ring.
type scanner struct {
	ring    Ring
	history History
	next    LSN
	chain   uint32
	until   LSN
	sum     func(h *Header, body []byte) uint32
	pads    []Header // the padding so far
}

// newScanner starts at from, behind a segment whose header had checksum chain
// (0 at the start of a log). It ends one lap further.
func newScanner(ring Ring, history History, from LSN, chain uint32) *scanner {
	return &scanner{ring: ring, history: history, next: from, chain: chain, until: from + LSN(len(ring.Bytes)), sum: bodySum}
}

func bodySum(_ *Header, body []byte) uint32 { return crc32c.Sum(body) }

// Position is the LSN of the next segment and the checksum that it must be
// chained to.
func (s *scanner) Position() (LSN, uint32) { return s.next, s.chain }

// Next reads the next segment. The error says why it is not valid; the
// scanner then stays where it is.
func (s *scanner) Next(h *Header) (body []byte, err error) {
	if s.next >= s.until {
		return nil, &FormatError{Kind: NoSegment, LSN: s.next, Detail: "the ring is full"}
	}
	if err := s.ring.Header(s.next, h); err != nil {
		return nil, err
	}
	if !h.Pad {
		body = s.ring.body(h)
		if err := CheckSum(h, s.sum(h, body)); err != nil {
			return nil, err
		}
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
	if h.Pad {
		s.pads = append(s.pads, *h)
	}
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

	pads []Header
}

// ScanFrom scans the ring of a node from a checkpoint. acked is what is known
// from elsewhere to be acknowledged, and was durable here. It never writes. A
// segment of a newer format where the log should go on is an error: this
// program cannot tell where the log ends. sum, where not nil, takes the CRC32C of
// the bodies, in the order of the log: whoever wants more of them on the way.
//
// The first invalid segment is a torn tail, unless something proves that the
// log went on, durably: acked, or a hint behind it in a segment whose entry
// binds this node. The hints of a peer that was alone prove nothing: a node
// that is sent such log makes it durable in any order until its next fence, so
// a power failure may leave a gap with whole segments behind it, in log that
// nobody ever heard from here about. Log of the peer's that was durable here
// and that this node answers for is below acked: see replicate.State. Where the
// log is damaged, what this node was sent or wrote alone counts as acknowledged
// up to the last segment.
func ScanFrom(ring Ring, history History, node uint64, from LSN, chain uint32, acked LSN, sum func(h *Header, body []byte) uint32) (Scan, error) {
	s := newScanner(ring, history, from, chain)
	if sum != nil {
		s.sum = sum
	}
	res := Scan{From: from, Acked: acked}
	if err := res.walk(s, s.until); err != nil {
		return res, err
	}
	acked, last := beyond(ring, history, node, res.End, s.until)
	if res.Acked = max(res.Acked, acked); res.Acked > res.End {
		// What came from the peer was acknowledged to it, and the last
		// segment has no hint behind it that says so.
		res.Acked = max(res.Acked, last)
	}
	res.judge()
	return res, nil
}

// ScanTo is ScanFrom where the log is known to end at end, as a clean close
// says. What lies behind is not looked at.
func ScanTo(ring Ring, history History, from LSN, chain uint32, acked, end LSN, sum func(h *Header, body []byte) uint32) (Scan, error) {
	s := newScanner(ring, history, from, chain)
	if sum != nil {
		s.sum = sum
	}
	res := Scan{From: from, Acked: acked}
	if err := res.walk(s, end); err != nil {
		return res, err
	}
	if res.Stop == nil {
		res.Stop = &FormatError{Kind: NoSegment, LSN: res.End, Detail: "the log was closed here"}
	}
	res.judge()
	return res, nil
}

// walk takes in the segments of s below end.
func (res *Scan) walk(s *scanner, end LSN) error {
	var h Header
	for s.next < end || end == s.until {
		if _, res.Stop = s.Next(&h); res.Stop != nil {
			break
		}
		res.Acked = max(res.Acked, min(h.Acked, h.LSN))
		res.Segments++
		res.Transactions += int(h.Count)
	}
	res.End, res.Chain = s.Position()
	res.pads = s.pads
	if isNewer(res.Stop) {
		return res.Stop
	}
	return nil
}

func (res *Scan) judge() {
	if res.Acked > res.End {
		res.Damage = &DamageError{At: res.End, Acked: res.Acked, Why: res.Stop}
	}
}

// beyond is the highest acknowledged-up-to hint that binds the node, of valid
// segments of this lap behind the one at end, and where the last of them ends
// that this node was sent, or wrote alone. What it wrote for both proves nothing
// by itself: its peer may never have had it.
func beyond(ring Ring, history History, node uint64, end, until LSN) (acked, last LSN) {
	var h Header
	f := NewFinder(ring, history, until)
	for from := end + Align; ; from = h.End() {
		if _, ok := f.Next(from, &h); !ok {
			return acked, last
		}
		if e, _ := history.At(h.LSN); e.Binds(node) && h.Acked <= h.LSN {
			acked = max(acked, h.Acked)
			if h.Epoch.Node != node || !e.BothIn() {
				last = h.End()
			}
		}
	}
}
