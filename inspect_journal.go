package nvmmirror

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// JournalOptions say what an inspection of a journal shows.
type JournalOptions struct {
	// Records adds the records of each segment.
	Records bool
	// Data is how many bytes of each record's data are shown.
	Data int
}

// JournalLine is one line of an inspection of a journal: a segment, or, as
// the last one, where and why the log ends.
type JournalLine struct {
	*SegmentInfo
	Stop *JournalStop `json:"stop,omitempty"`
}

// SegmentInfo is one segment of a journal.
type SegmentInfo struct {
	LSN          LSN           `json:"lsn"`
	End          LSN           `json:"end"`
	Offset       int64         `json:"offset"` // in the region's file
	Bytes        int64         `json:"bytes"`
	Kind         string        `json:"kind"` // data, padding
	Epoch        journal.Epoch `json:"epoch"`
	Transactions int           `json:"transactions"`
	Acked        LSN           `json:"acked_hint"`
	CRC          string        `json:"crc"` // of the header
	BodyCRC      string        `json:"body_crc"`
	Prev         string        `json:"prev_crc"`
	// State is ok, or unreachable: whole, but the log is broken before it.
	State    string   `json:"state"`
	Problems []string `json:"problems,omitempty"`
	// Zeroed is false where the rest of a padding segment is not zero. It
	// holds nothing; a crash can leave it so until the next recovery.
	Zeroed  bool         `json:"-"`
	Records []RecordInfo `json:"records,omitempty"`

	body []byte
}

// RecordInfo is one write of a transaction.
type RecordInfo struct {
	Transaction int    `json:"transaction"` // counted from 1 in its segment
	Offset      int64  `json:"offset"`      // in the volume
	Length      int    `json:"length"`
	Data        string `json:"data,omitempty"` // hexadecimal, perhaps not all
}

// JournalStop is where a log ends, and what an inspection of it found.
type JournalStop struct {
	From         LSN    `json:"from"` // the checkpoint: what is below is not needed
	End          LSN    `json:"end"`
	Acked        LSN    `json:"acked_lsn"` // known to be acknowledged; above End where damaged
	Ending       Ending `json:"ending"`
	Reason       string `json:"reason"`
	Segments     int    `json:"segments"`
	Transactions int    `json:"transactions"`
	Unreachable  int    `json:"unreachable"` // whole segments behind the end
	Damaged      bool   `json:"damaged"`
}

// InspectJournal shows the live journal of a closed region, or of a copy of
// one: the segments from the checkpoint on, as recovery would read them, and
// behind damage those that it cannot reach. A region in use is refused with
// [ErrInUse]: its log moves, ask the program that has it open. An error of show
// ends it.
func InspectJournal(path string, o JournalOptions, show func(*SegmentInfo) error) (*JournalStop, error) {
	v, s, err := openSubject(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer v.Close()
	if s.ins.InUse {
		return nil, &pmem.InUseError{Path: path}
	}
	if err := s.inspect(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	stop, err := s.walkJournal(o, show)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return stop, nil
}

func (s *subject) walkJournal(o JournalOptions, show func(*SegmentInfo) error) (stop *JournalStop, err error) {
	defer pmem.Recover(s.view, pmem.Arm(), &err)
	r := s.ins.Recovery
	stop = &JournalStop{
		From: r.From, End: r.End, Acked: r.Acked, Ending: r.Ending, Reason: r.Stop,
		Segments: r.Segments, Transactions: r.Transactions, Damaged: r.Ending == EndDamaged,
	}
	if r.Ending == EndCopying {
		return stop, nil
	}
	ring := ringOf(s.mem, s.meta)
	look := func(h *journal.Header, body []byte, state string) error {
		if h.Pad {
			body = ring.Raw(h.LSN, int(h.Length))[journal.HeaderSize:]
		}
		info := describeSegment(s.meta, ring.Position(h.LSN), h, body, o)
		info.State = state
		if len(info.Problems) > 0 {
			stop.Damaged = true
		}
		return show(info)
	}
	var h journal.Header
	for at := r.From; at < r.End; at = h.End() {
		body, err := ring.Segment(at, &h)
		if err == nil {
			err = look(&h, body, "ok")
		}
		if err != nil {
			return nil, err
		}
	}
	if r.Ending != EndDamaged {
		return stop, nil
	}
	find := journal.NewFinder(ring, s.meta.State.History, r.From+LSN(ring.Size()))
	for from := r.End + journal.Align; ; from = h.End() {
		body, ok := find.Next(from, &h)
		if !ok {
			return stop, nil
		}
		stop.Unreachable++
		if err := look(&h, body, "unreachable"); err != nil {
			return nil, err
		}
	}
}

func ringOf(mem []byte, m *metadata) journal.Ring {
	return journal.Ring{Bytes: mem[m.Journal.Off:m.Journal.end():m.Journal.end()], Base: m.RingBase}
}

// describeSegment also checks what the checksums cannot: that the records are
// well formed, lie in the volume, and are as many transactions as the header
// says. pos is the segment's place in the ring, body all behind its header.
func describeSegment(m *metadata, pos int, h *journal.Header, body []byte, o JournalOptions) *SegmentInfo {
	info := &SegmentInfo{
		LSN: h.LSN, End: h.End(), Offset: m.Journal.Off + int64(pos), Bytes: int64(h.Length), Kind: "data",
		Epoch: h.Epoch, Transactions: int(h.Count), Acked: h.Acked, Zeroed: true,
		CRC: fmt.Sprintf("%08x", h.CRC), BodyCRC: fmt.Sprintf("%08x", h.BodyCRC), Prev: fmt.Sprintf("%08x", h.Prev), body: body,
	}
	problem := func(format string, args ...any) { info.Problems = append(info.Problems, fmt.Sprintf(format, args...)) }
	if h.Acked > h.LSN {
		problem("says that LSN %d was acknowledged when it was written", h.Acked)
	}
	if h.Pad {
		info.Kind = "padding"
		info.Zeroed = allZero(body)
		return info
	}
	transactions, open := 0, false
	for records := journal.NewRecords(body); ; {
		rec, ok, err := records.Next()
		if err != nil {
			problem("%v", err)
		}
		if !ok {
			break
		}
		if !open {
			transactions++
		}
		open = !rec.Last
		if rec.Off > m.Size || int64(len(rec.Data)) > m.Size-rec.Off {
			problem("a record of %d bytes at offset %d of a volume of %d", len(rec.Data), rec.Off, m.Size)
		}
		if o.Records {
			info.Records = append(info.Records, RecordInfo{
				Transaction: transactions, Offset: rec.Off, Length: len(rec.Data), Data: hex.EncodeToString(rec.Data[:min(len(rec.Data), max(0, o.Data))]),
			})
		}
	}
	if transactions != int(h.Count) || open {
		problem("%d transactions, the header says %d", transactions, h.Count)
	}
	return info
}

func allZero(p []byte) bool { return !slices.ContainsFunc(p, func(b byte) bool { return b != 0 }) }

// InspectJournal shows the journal of an open volume from its checkpoint to
// its end at this moment, while commits go on and without holding them up.
// What a checkpoint frees meanwhile is left out. An error of show ends it.
func (v *Volume) InspectJournal(ctx context.Context, o JournalOptions, show func(*SegmentInfo) error) (*JournalStop, error) {
	v.metaMu.Lock()
	m := v.meta
	v.metaMu.Unlock()
	stop := &JournalStop{From: v.Checkpoint(), End: v.journal.End(), Ending: EndLive, Reason: "the volume is open: its log goes on"}
	stop.Acked = min(v.acked(), stop.End)
	if d := v.damage.Load(); d != nil && (*node)(v).Damaged() {
		stop.Acked, stop.Ending, stop.Reason, stop.Damaged = max(stop.Acked, d.Acked), EndDamaged, d.Error(), true
	}
	l := liveReader{v: v, m: &m}
	var h journal.Header
	next, chain := LSN(0), uint32(0) // behind the segment before
	for at := stop.From; at < stop.End; at = h.End() {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		body, pos, err := l.segment(at, &h)
		if err == nil && at == next && h.Prev != chain {
			err = &journal.FormatError{Kind: journal.WrongChain, LSN: at, Detail: fmt.Sprintf("chained to %08x, the segment before it has %08x", h.Prev, chain)}
		}
		var f *journal.FormatError
		switch {
		case errors.Is(err, errReclaimed):
			if h.LSN, h.Length = max(at, v.Checkpoint()), 0; h.LSN < stop.End && h.LSN >= v.journal.End() {
				return nil, errors.New("the log was cut or started over meanwhile: look again")
			}
			continue
		case errors.As(err, &f):
			stop.End, stop.Ending, stop.Reason, stop.Damaged = at, EndDamaged, err.Error(), true
			return stop, nil
		case err != nil:
			return nil, err
		}
		info := describeSegment(&m, pos, &h, body, o)
		info.State = "ok"
		stop.Segments++
		stop.Transactions += info.Transactions
		stop.Damaged = stop.Damaged || len(info.Problems) > 0
		if err := show(info); err != nil {
			return nil, err
		}
		next, chain = h.End(), h.CRC
	}
	return stop, nil
}

// errReclaimed: the ring holds something else at this LSN by now.
var errReclaimed = errors.New("reclaimed")

// liveReader copies segments out of the ring of an open volume. A segment
// below End stays as it is until a checkpoint lies above it, so a copy is
// judged by its checksums, and a bad one is damage only where no checkpoint
// has passed.
type liveReader struct {
	v   *Volume
	m   *metadata
	buf []byte
}

// gone reports whether the ring does not hold what was at lsn.
func (l *liveReader) gone(lsn LSN) bool {
	return lsn < l.v.Checkpoint() || lsn >= l.v.journal.End()
}

// segment returns a private copy of a segment's body, nil for padding, and its
// place in the ring.
func (l *liveReader) segment(lsn LSN, h *journal.Header) (body []byte, pos int, err error) {
	for tries := 0; ; tries++ {
		body, pos, err = l.copySegment(lsn, h)
		switch {
		case err == nil:
			return body, pos, nil
		case l.gone(lsn):
			return nil, 0, errReclaimed
		case tries >= 3:
			return nil, 0, err
		}
	}
}

func (l *liveReader) copySegment(lsn LSN, h *journal.Header) (body []byte, pos int, err error) {
	l.grow(journal.HeaderSize)
	ring, err := l.copyOut(lsn, 0, journal.HeaderSize)
	if err != nil {
		return nil, 0, err
	}
	if err := journal.DecodeHeader(l.buf, h); err != nil {
		return nil, 0, err
	}
	if h.LSN != lsn || !ring.Fits(h) {
		return nil, 0, &journal.FormatError{Kind: journal.Stale, LSN: lsn, Detail: fmt.Sprintf("segment of LSN %d", h.LSN)}
	}
	if e, ok := l.m.State.History.At(lsn); !ok || e.Epoch != h.Epoch {
		// The history may have grown since it was taken.
		l.v.metaMu.Lock()
		l.m.State.History = l.v.meta.State.History
		l.v.metaMu.Unlock()
		if e, ok := l.m.State.History.At(lsn); !ok || e.Epoch != h.Epoch {
			return nil, 0, &journal.FormatError{Kind: journal.WrongEpoch, LSN: lsn, Detail: fmt.Sprintf("segment of %v, the history says %v", h.Epoch, e.Epoch)}
		}
	}
	pos = ring.Position(lsn)
	if h.Pad {
		return nil, pos, nil
	}
	n := int(h.Length)
	l.grow(n)
	if _, err = l.copyOut(lsn, journal.HeaderSize, n); err != nil {
		return nil, 0, err
	}
	body = l.buf[journal.HeaderSize:n]
	return body, pos, journal.CheckBody(h, body)
}

func (l *liveReader) grow(n int) { l.buf = slices.Grow(l.buf[:0], n)[:n] }

// copyOut copies bytes lo to hi of the segment at lsn into the buffer, in
// pieces, so that applying waits for one at most. The ring that it returns is
// for computing places only.
func (l *liveReader) copyOut(lsn LSN, lo, hi int) (places journal.Ring, err error) {
	const piece = 256 << 10
	defer pmem.Recover(l.v.mem, pmem.Arm(), &err)
	for ; lo < hi; lo += piece {
		if places, err = l.copyPiece(lsn, lo, min(lo+piece, hi)); err != nil {
			return places, err
		}
	}
	return places, nil
}

func (l *liveReader) copyPiece(lsn LSN, lo, hi int) (journal.Ring, error) {
	v := l.v
	v.applyMu.RLock() // the mapping stays, the ring is not moved
	defer v.applyMu.RUnlock()
	if v.closed.Load() {
		return journal.Ring{}, ErrClosed
	}
	ring := v.journal.Ring()
	if hi > ring.Contiguous(lsn) {
		return ring, &journal.FormatError{Kind: journal.BadField, LSN: lsn, Detail: "longer than the ring has room"}
	}
	copy(l.buf[lo:hi], ring.Raw(lsn, hi)[lo:])
	return ring, nil
}
