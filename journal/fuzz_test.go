package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
)

func FuzzDecodeHeader(f *testing.F) {
	b := make([]byte, HeaderSize)
	(&Header{LSN: 6400, Epoch: testEpoch, Acked: 640, Length: 128, Count: 1, Prev: 7}).encode(b)
	f.Add(bytes.Clone(b), false)
	(&Header{LSN: 64, Length: 1 << 20, Pad: true}).encode(b)
	f.Add(bytes.Clone(b), true)
	f.Add([]byte("NVMS"), true)
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		if seal && len(b) >= HeaderSize {
			b = bytes.Clone(b)
			binary.LittleEndian.PutUint32(b, Magic)
			binary.LittleEndian.PutUint32(b[headerCRCOff:], crc32c.Sum(b[:headerCRCOff]))
		}
		var h Header
		if err := DecodeHeader(b, &h); err != nil {
			if !errors.As(err, new(*FormatError)) {
				t.Fatalf("%v (%T)", err, err)
			}
			return
		}
		if h.End() <= h.LSN || h.Length%Align != 0 || h.WireLength() > h.Length {
			t.Fatalf("%+v", h)
		}
	})
}

func FuzzRecords(f *testing.F) {
	l := newTestLog(f, 64*Align, 0)
	if _, err := appendTo(l, 0, []Write{{1, []byte("one")}, {1 << 40, []byte("two, and longer")}}, []Write{{0, []byte{0}}}); err != nil {
		f.Fatal(err)
	}
	f.Add(bytes.Clone(l.Ring().Bytes[HeaderSize:256]))
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{255}, 64))
	f.Fuzz(func(t *testing.T, body []byte) {
		rest := len(body)
		for records := NewRecords(body); ; {
			rec, ok, err := records.Next()
			if err != nil || !ok {
				if err != nil && !errors.As(err, new(*FormatError)) {
					t.Fatal(err)
				}
				return
			}
			if rest -= RecordHeaderSize + len(rec.Data); rest < 0 || len(rec.Data) == 0 || rec.Off < 0 || cap(rec.Data) != len(rec.Data) {
				t.Fatalf("%+v", rec)
			}
		}
	})
}

// FuzzScanFrom scans arbitrary bytes, and rings of true segments in which bytes
// are changed. edits is a list of {place u16, value}; seal makes the checksum
// of the header right in whose line an edit lies.
func FuzzScanFrom(f *testing.F) {
	const size = 128 * Align
	l := newTestLog(f, size, 0)
	for i := range 20 {
		if _, err := appendTo(l, l.End()/2, []Write{{int64(i), bytes.Repeat([]byte{1}, 50+i*17)}}); err != nil {
			f.Fatal(err)
		}
		if l.End() > 2*size/3 && i < 15 {
			break
		}
	}
	image := l.Ring().Bytes
	f.Add([]byte{}, false, uint64(0), uint64(0))
	f.Add([]byte{0, 64, 1}, false, uint64(0), uint64(640))
	f.Add([]byte{0, 40, 1, 0, 41, 1}, true, uint64(0), uint64(0))
	f.Add(bytes.Repeat([]byte("NVMS\x01\x00\x01\x00"), 100), false, uint64(1<<40), uint64(1<<63))
	f.Fuzz(func(t *testing.T, edits []byte, seal bool, from, acked uint64) {
		b := bytes.Clone(image)
		if len(edits) >= size {
			copy(b, edits)
		} else {
			for ; len(edits) >= 3; edits = edits[3:] {
				at := int(binary.BigEndian.Uint16(edits)) % size
				b[at] = edits[2]
				if line := b[at&^(Align-1):][:HeaderSize]; seal {
					binary.LittleEndian.PutUint32(line[headerCRCOff:], crc32c.Sum(line[:headerCRCOff]))
				}
			}
		}
		start := LSN(from) &^ (Align - 1)
		if start > 1<<62 {
			return // an LSN that no log reaches
		}
		ring := Ring{Bytes: b}
		scan, err := ScanFrom(ring, testHistory(0), testEpoch.Node, start, 0, LSN(acked), nil)
		if err != nil && !isNewer(err) {
			t.Fatal(err)
		}
		if scan.End < start || scan.End > start+size || scan.Stop == nil || (err == nil && scan.Damage != nil) != (err == nil && scan.Acked > scan.End) {
			t.Fatalf("%+v", scan)
		}
		// What was accepted can be read.
		s := newScanner(ring, testHistory(0), start, 0)
		for range scan.Segments {
			var h Header
			if _, err := s.Next(&h); err != nil {
				t.Fatal(err)
			}
		}
		if end, chain := s.Position(); end != scan.End || chain != scan.Chain {
			t.Fatal("two scans differ")
		}
	})
}
