package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
)

// ringModel is a log with what was appended to it.
type ringModel struct {
	log   *Log
	segs  []modelSegment
	ckpt  int // index of the first segment that must be kept
	acked LSN
}

type modelSegment struct {
	start, end LSN // without the padding before it
	chain      uint32
	hint       LSN
	txs        [][]Write
}

func (m *ringModel) from() (LSN, uint32) {
	if m.ckpt == 0 {
		return m.log.Ring().Base, 0
	}
	s := m.segs[m.ckpt-1]
	return s.end, s.chain
}

// grow appends, and moves the checkpoint where there is no room.
func (m *ringModel) grow(t *rapid.T, count int) {
	l := m.log
	for range count {
		var txs [][]Write
		size := 0
		for range rapid.IntRange(1, 3).Draw(t, "transactions") {
			tx := drawWrites(t, l.MaxTransaction()/20)
			txs = append(txs, tx)
			for _, w := range tx {
				size += recordSize(len(w.Data))
			}
		}
		for from, _ := m.from(); l.End()+l.room(size) > from+LSN(l.Ring().Size()); from, _ = m.from() {
			m.ckpt++
		}
		m.acked = max(m.acked, min(m.acked+LSN(rapid.IntRange(0, 40).Draw(t, "acked"))*Align, l.End()))
		start := l.End()
		if n := roundUp(HeaderSize + size); n > l.Ring().Contiguous(start) {
			start += LSN(l.Ring().Contiguous(start))
		}
		end, err := appendTo(l, m.acked, txs...)
		if err != nil {
			t.Fatal(err)
		}
		if end != l.End() {
			t.Fatalf("appended to %d, the log ends at %d", end, l.End())
		}
		m.segs = append(m.segs, modelSegment{start, end, l.Chain(), m.acked, txs})
	}
}

func drawRing(t *rapid.T) *ringModel {
	size := rapid.Int64Range(40, 300).Draw(t, "lines") * Align
	base := LSN(rapid.Uint64Range(0, 1<<40).Draw(t, "base")) * Align
	l := NewLog(&heapMemory{make([]byte, size)}, 0, size, base)
	l.Reset(base, 0)
	l.SetEpoch(testEpoch)
	m := &ringModel{log: l, acked: base}
	m.grow(t, rapid.IntRange(1, 60).Draw(t, "segments"))
	return m
}

// TestScanFindsWhatWasAppended: over any number of laps, a scan from the
// checkpoint finds each segment, and ends at the log's end.
func TestScanFindsWhatWasAppended(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawRing(t)
		from, chain := m.from()
		s := newScanner(m.log.Ring(), testHistory(m.log.Ring().Base), from, chain)
		var h Header
		for _, want := range m.segs[m.ckpt:] {
			body, err := s.Next(&h)
			if err == nil && h.Pad {
				if p := m.log.Ring().Position(h.LSN) + int(h.Length); p != m.log.Ring().Size() {
					t.Fatalf("padding ends at %d", p)
				}
				body, err = s.Next(&h)
			}
			if err != nil {
				t.Fatal(err)
			}
			if h.LSN != want.start || h.End() != want.end || h.Acked != want.hint || int(h.Count) != len(want.txs) {
				t.Fatalf("%+v, not %+v", h, want)
			}
			got, err := readBack(body)
			if err != nil || len(got) != len(want.txs) {
				t.Fatal(err)
			}
			for i := range got {
				if !equalWrites(got[i], want.txs[i]) {
					t.Fatal("a transaction differs")
				}
			}
		}
		if _, err := s.Next(&h); err == nil {
			t.Fatalf("a segment behind the log's end: %+v", h)
		}
		scan, err := ScanFrom(m.log.Ring(), testHistory(m.log.Ring().Base), testEpoch.Node, from, chain, 0, nil)
		if err != nil || scan.End != m.log.End() || scan.Chain != m.log.Chain() || scan.Damage != nil {
			t.Fatalf("%+v, %v", scan, err)
		}
	})
}

// TestScanTellsDamageFromTornTail breaks one segment. It is damage exactly
// where something proves that it was acknowledged: a hint before or behind it,
// or what is known from elsewhere.
func TestScanTellsDamageFromTornTail(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawRing(t)
		live := m.segs[m.ckpt:]
		if len(live) == 0 {
			t.Skip("the checkpoint is at the end")
		}
		k := rapid.IntRange(0, len(live)-1).Draw(t, "broken")
		ring, broken := m.log.Ring(), live[k]
		from, chain := m.from()
		known := LSN(0)
		if rapid.Bool().Draw(t, "elsewhere") {
			known = min(m.acked, broken.start)
		}
		node, history := testEpoch.Node, testHistory(ring.Base)
		history[0].PeerIn = rapid.Bool().Draw(t, "for both")
		if history[0].PeerIn && rapid.Bool().Draw(t, "sent") {
			node++ // the log came from its peer
		}
		at := ring.Position(broken.start) + rapid.IntRange(0, int(broken.end-broken.start)-1).Draw(t, "byte")
		ring.Bytes[at] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		scan, err := ScanFrom(ring, history, node, from, chain, known, nil)
		if err != nil {
			t.Fatal(err)
		}
		proven := known
		for i, s := range live {
			if i != k {
				proven = max(proven, s.hint)
			}
		}
		// Padding carries a hint too: that of the segment which it makes
		// room for.
		end := scan.End
		if end != broken.start {
			t.Fatalf("ends at %d, broken at %d", end, broken.start)
		}
		if damage := max(proven, paddingHint(ring, live, from)) > end; damage != (scan.Damage != nil) {
			t.Fatalf("acknowledged up to %d, ends at %d: %+v", proven, end, scan)
		}
		if scan.Damage != nil && (scan.Damage.At != end || scan.Damage.Acked <= end || !errors.As(scan.Damage, new(*FormatError))) {
			t.Fatalf("%+v", scan.Damage)
		}
		own := history[0].PeerIn && node == testEpoch.Node
		if last := live[len(live)-1]; scan.Damage != nil && k < len(live)-1 && !own && scan.Damage.Acked < last.end {
			t.Fatalf("damaged up to %d, the log was valid up to %d behind it", scan.Damage.Acked, last.end)
		}
		if proven := max(proven, paddingHint(ring, live, from)); scan.Damage != nil && own && scan.Damage.Acked != proven {
			t.Fatalf("damaged up to %d, acknowledged up to %d", scan.Damage.Acked, proven)
		}
		before := bytes.Clone(ring.Bytes)
		if again, _ := ScanFrom(ring, history, node, from, chain, known, nil); again.End != end || !bytes.Equal(before, ring.Bytes) {
			t.Fatal("a second scan differs, or scanning stores")
		}
	})
}

// paddingHint is the highest hint in the live padding segments.
func paddingHint(ring Ring, live []modelSegment, from LSN) (hint LSN) {
	prev := from
	for _, s := range live {
		if s.start != prev {
			var h Header
			if ring.Header(prev, &h) == nil && h.Pad {
				hint = max(hint, h.Acked)
			}
		}
		prev = s.end
	}
	return hint
}

// TestScanOfDroppedTail: what a truncated log left behind does not come back
// under the next epoch, wherever that one's segments end.
func TestScanOfDroppedTail(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawRing(t)
		live := m.segs[m.ckpt:]
		if len(live) < 2 {
			t.Skip("nothing to drop")
		}
		k := rapid.IntRange(0, len(live)-2).Draw(t, "kept")
		l, cut := m.log, live[k]
		from, chain := m.from()
		l.Reset(cut.end, cut.chain)
		next := Epoch{Counter: testEpoch.Counter + 1, Node: 5}
		l.SetEpoch(next)
		h := testHistory(l.Ring().Base).Append(Entry{Epoch: next, Start: cut.end})
		m.segs = m.segs[:m.ckpt+k+1]
		m.acked = min(m.acked, cut.end)
		scan, err := ScanFrom(l.Ring(), h, testEpoch.Node, from, chain, 0, nil)
		if err != nil || scan.End != cut.end || scan.Damage != nil {
			t.Fatalf("behind the cut at %d: %+v, %v", cut.end, scan, err)
		}
		m.grow(t, rapid.IntRange(1, 4).Draw(t, "more"))
		from, chain = m.from()
		scan, err = ScanFrom(l.Ring(), h, testEpoch.Node, from, chain, 0, nil)
		if err != nil || scan.End != l.End() || scan.Damage != nil {
			t.Fatalf("log up to %d: %+v, %v", l.End(), scan, err)
		}
	})
}

// TestGapInThePeersLog: whole segments behind a gap say that it was
// acknowledged. That is damage on a node that it was acknowledged with, or by;
// not on one that was sent what its peer had written alone.
func TestGapInThePeersLog(t *testing.T) {
	const me, peer = 5, 6
	for _, c := range []struct {
		entry  Entry
		damage bool
	}{
		{Entry{Epoch: Epoch{3, peer}}, false},
		{Entry{Epoch: Epoch{3, peer}, PeerIn: true, Async: true}, false},
		{Entry{Epoch: Epoch{3, peer}, Async: true}, false},
		{Entry{Epoch: Epoch{3, peer}, PeerIn: true}, true},
		{Entry{Epoch: Epoch{3, me}}, true},
		{Entry{Epoch: Epoch{3, me}, PeerIn: true, Async: true}, true},
		{Entry{Epoch: Epoch{3, me}, PeerIn: true}, true},
	} {
		l := newTestLog(t, 64*Align, 0)
		l.SetEpoch(c.entry.Epoch)
		for range 5 {
			if _, err := appendTo(l, l.End(), []Write{{0, make([]byte, 100)}}); err != nil {
				t.Fatal(err)
			}
		}
		n := l.End() / 5
		l.Ring().Bytes[n+HeaderSize] ^= 1 // in the second
		scan := func(h History, acked LSN) Scan {
			scan, err := ScanFrom(l.Ring(), h, me, 0, 0, acked, nil)
			if err != nil || scan.End != n {
				t.Fatalf("%+v: %+v, %v", c.entry, scan, err)
			}
			return scan
		}
		if s := scan(History{c.entry}, 0); (s.Damage != nil) != c.damage {
			t.Errorf("%+v: damage %v", c.entry, s.Damage)
		}
		if s := scan(History{c.entry}, n+Align); s.Damage == nil {
			t.Errorf("%+v: what was noted as acknowledged is missing, and that is no damage", c.entry)
		}
	}
}

// TestScanTo: below the end that a clean close noted, a segment that does not
// read is damage where it is known to be acknowledged, else the log's end; what
// lies behind the noted end, whole as it may be, is not looked at.
func TestScanTo(t *testing.T) {
	l := newTestLog(t, 64*Align, 0)
	var ends []LSN
	for range 5 {
		end, err := appendTo(l, l.End(), []Write{{0, make([]byte, 100)}})
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, end)
	}
	scan := func(acked, end LSN) (Scan, error) { return ScanTo(l.Ring(), testHistory(0), 0, 0, acked, end, nil) }
	if s, err := scan(ends[1], ends[3]); err != nil || s.End != ends[3] || s.Segments != 4 || s.Damage != nil || s.Stop == nil {
		t.Fatalf("up to the fourth of five: %+v, %v", s, err)
	}
	third := l.Ring().Bytes[ends[1]:]
	third[HeaderSize] ^= 1
	if s, err := scan(ends[1], ends[4]); err != nil || s.End != ends[1] || s.Segments != 2 || s.Damage != nil {
		t.Errorf("a flip above what is known to be acknowledged: %+v, %v", s, err)
	}
	if s, err := scan(ends[2], ends[4]); err != nil || s.End != ends[1] || s.Damage == nil {
		t.Errorf("a flip below: %+v, %v", s, err)
	}
	third[HeaderSize] ^= 1
	third[4]++
	binary.LittleEndian.PutUint32(third[headerCRCOff:], crc32c.Sum(third[:headerCRCOff]))
	if _, err := scan(0, ends[4]); !isNewer(err) {
		t.Errorf("a segment of a newer format: %v", err)
	}
}

// TestScanFullRing: a ring that is full to the last byte.
func TestScanFullRing(t *testing.T) {
	const size = 64 * Align
	l := newTestLog(t, size, 0)
	for l.End() < size {
		if _, err := appendTo(l, l.End(), []Write{{0, make([]byte, 48)}}); err != nil {
			t.Fatal(err)
		}
	}
	scan, err := ScanFrom(l.Ring(), testHistory(0), testEpoch.Node, 0, 0, size, nil)
	if err != nil || scan.End != size || scan.Segments != 32 || scan.Transactions != 32 || scan.Damage != nil {
		t.Fatalf("%+v, %v", scan, err)
	}
	if scan, _ := ScanFrom(l.Ring(), testHistory(0), testEpoch.Node, 0, 0, size+Align, nil); scan.Damage == nil {
		t.Error("more was acknowledged than the ring holds, and that is no damage")
	}
}

// TestTrustWritesPadding: recovery accepts padding by its header alone, and
// writes the zeros behind it.
func TestTrustWritesPadding(t *testing.T) {
	const size = 64 * Align
	l := newTestLog(t, size, 0)
	one := func() {
		if _, err := appendTo(l, l.End(), []Write{{0, make([]byte, 700)}}); err != nil {
			t.Fatal(err)
		}
	}
	for l.room(recordSize(700)) <= 832 {
		one()
	}
	pad := l.End()
	one()
	var h Header
	if err := l.Ring().Header(pad, &h); err != nil || !h.Pad || h.Length < 128 {
		t.Fatalf("%+v, %v", h, err)
	}
	want := bytes.Clone(l.Ring().Bytes)
	l.Ring().Raw(pad, int(h.Length))[70] = 9
	if err := l.Ring().Header(832, &h); err != nil {
		t.Fatal(err)
	}
	scan, err := ScanFrom(l.Ring(), testHistory(0), testEpoch.Node, 832, h.Prev, l.End(), nil)
	if err != nil || scan.End != l.End() {
		t.Fatalf("%+v, %v", scan, err)
	}
	if err := l.Trust(&scan); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(l.Ring().Bytes, want) {
		t.Error("Trust left bytes behind the padding's header, or changed others")
	}
}

// TestHeaderFromNowhere: a peer may name any LSN.
func TestHeaderFromNowhere(t *testing.T) {
	const size = 64 * Align
	l := newTestLog(t, size, 0)
	var h Header
	for _, lsn := range []LSN{1, size - 8, size - 63, 3*size - 1} {
		var wrong *FormatError
		if err := l.Ring().Header(lsn, &h); !errors.As(err, &wrong) {
			t.Errorf("LSN %d: %v", lsn, err)
		}
	}
}
