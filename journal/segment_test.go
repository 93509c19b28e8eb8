package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
)

func drawHeader(t *rapid.T) Header {
	return Header{
		LSN:   LSN(rapid.Uint64Range(0, 1<<57).Draw(t, "lsn")) * Align,
		Epoch: Epoch{rapid.Uint64().Draw(t, "counter"), rapid.Uint64().Draw(t, "node")},
		Acked: LSN(rapid.Uint64().Draw(t, "acked")), Length: rapid.Uint32Range(1, 1<<20).Draw(t, "length") * Align,
		Count: rapid.Uint32().Draw(t, "count"), Prev: rapid.Uint32().Draw(t, "prev"), BodyCRC: rapid.Uint32().Draw(t, "body"), Pad: rapid.Bool().Draw(t, "pad"),
	}
}

func TestHeaderRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := drawHeader(t)
		b := make([]byte, HeaderSize)
		h.encode(b)
		var got Header
		if err := DecodeHeader(b, &got); err != nil || got != h {
			t.Fatalf("%+v, not %+v: %v", got, h, err)
		}
		at, bit := rapid.IntRange(0, HeaderSize-1).Draw(t, "byte"), rapid.IntRange(0, 7).Draw(t, "bit")
		b[at] ^= 1 << bit
		if err := DecodeHeader(b, &got); err == nil {
			t.Fatalf("a flip in byte %d is not noticed", at)
		}
	})
}

// TestHeaderKinds: each way in which a header can be wrong is told apart.
func TestHeaderKinds(t *testing.T) {
	le := binary.LittleEndian
	for name, row := range map[string]struct {
		change func(b []byte)
		sealed bool
		want   FormatKind
	}{
		"zeros":           {func(b []byte) { clear(b) }, false, NoSegment},
		"magic":           {func(b []byte) { b[0]++ }, true, NoSegment},
		"flip":            {func(b []byte) { b[20]++ }, false, BadCRC},
		"flip in version": {func(b []byte) { b[4]++ }, false, BadCRC},
		"version":         {func(b []byte) { b[4]++ }, true, Newer},
		"kind":            {func(b []byte) { b[6] = 3 }, true, BadField},
		"length 0":        {func(b []byte) { le.PutUint32(b[40:], 0) }, true, BadField},
		"length":          {func(b []byte) { b[40]++ }, true, BadField},
		"LSN":             {func(b []byte) { b[8]++ }, true, BadField},
		"overflow":        {func(b []byte) { le.PutUint64(b[8:], 1<<64-64) }, true, BadField},
	} {
		h := Header{LSN: 6400, Epoch: testEpoch, Length: 128, Count: 1}
		b := make([]byte, HeaderSize)
		h.encode(b)
		row.change(b)
		if row.sealed {
			le.PutUint32(b[headerCRCOff:], crc32c.Sum(b[:headerCRCOff]))
		}
		var f *FormatError
		if err := DecodeHeader(b, &h); !errors.As(err, &f) || f.Kind != row.want {
			t.Errorf("%s: %v, not %v", name, err, row.want)
		}
		if isNewer(DecodeHeader(b, &h)) != (row.want == Newer) {
			t.Errorf("%s: newer", name)
		}
	}
}

func drawWrites(t *rapid.T, most int) (tx []Write) {
	for range rapid.IntRange(1, 5).Draw(t, "writes") {
		n := rapid.OneOf(rapid.IntRange(1, 20), rapid.IntRange(1, most)).Draw(t, "bytes")
		data := bytes.Repeat([]byte{byte(rapid.IntRange(1, 255).Draw(t, "fill"))}, n)
		tx = append(tx, Write{rapid.Int64Range(0, 1<<62).Draw(t, "offset"), data})
	}
	return tx
}

// readBack is the transactions in a segment's body.
func readBack(body []byte) (txs [][]Write, err error) {
	var tx []Write
	for records := NewRecords(body); ; {
		rec, ok, err := records.Next()
		if err != nil || !ok {
			return txs, err
		}
		tx = append(tx, Write{rec.Off, bytes.Clone(rec.Data)})
		if rec.Last {
			txs, tx = append(txs, tx), nil
		}
	}
}

func equalWrites(a, b []Write) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].Off != b[i].Off || !bytes.Equal(a[i].Data, b[i].Data) {
			return false
		}
	}
	return true
}

// TestWriterMatchesPlainEncoding compares what the staging writer puts into
// the ring, in pieces and past its buffer, with a plain encoding.
func TestWriterMatchesPlainEncoding(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		mem := &heapMemory{make([]byte, 1<<20)}
		l := NewLog(mem, 0, 1<<20, 0)
		l.Reset(0, 0)
		var txs [][]Write
		var plain []byte
		for range rapid.IntRange(1, 3).Draw(t, "transactions") {
			tx := drawWrites(t, 12000)
			for i := range tx {
				var h [RecordHeaderSize]byte
				putRecordHeader(h[:], &tx[i], i == len(tx)-1)
				plain = append(append(plain, h[:]...), tx[i].Data...)
				plain = append(plain, make([]byte, -len(plain)&(recordAlign-1))...)
			}
			txs = append(txs, tx)
		}
		end, err := appendTo(l, 0, txs...)
		if err != nil {
			t.Fatal(err)
		}
		plain = append(plain, make([]byte, int(end)-HeaderSize-len(plain))...)
		if !bytes.Equal(mem.b[HeaderSize:end], plain) {
			t.Fatal("the ring differs from a plain encoding")
		}
		var h Header
		body, err := l.Ring().Segment(0, &h)
		if err != nil || h.End() != end || int(h.Count) != len(txs) {
			t.Fatalf("%+v, %v", h, err)
		}
		got, err := readBack(body)
		if err != nil || len(got) != len(txs) {
			t.Fatal(len(got), err)
		}
		for i := range txs {
			if !equalWrites(got[i], txs[i]) {
				t.Fatalf("transaction %d differs", i)
			}
		}
	})
}
