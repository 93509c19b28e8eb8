package nvmmirror

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
)

// sealedSegments writes segments behind a crashed region's log, with checksums,
// chain, epoch and place as they must be, and of each what prog says: kind,
// count, hint, and records that may be anything. It stops where the ring ends.
//
// A segment of prog is {kind u8, count u8, hint u8, length u8 in lines} and
// that many lines of body.
func (c *crashed) sealedSegments(mem *heapMemory, prog []byte) {
	const fixed = 4
	m := &c.meta
	ring := ringOf(mem.b, m)
	end := c.ends[len(c.ends)-1]
	var last journal.Header
	for at := m.Checkpoint.LSN; at < end; at = last.End() {
		if _, err := ring.Segment(at, &last); err != nil {
			panic(err) // the image is as it was built
		}
	}
	chain := last.CRC
	le := binary.LittleEndian
	for len(prog) >= fixed {
		kind, count, hint, lines := prog[0], prog[1], prog[2], 1+int(prog[3])%16
		prog = prog[fixed:]
		n := lines * journal.Align
		if n > ring.Contiguous(end) {
			return
		}
		b := make([]byte, n)
		prog = prog[copy(b[journal.HeaderSize:], prog):]
		le.PutUint32(b, journal.Magic)
		le.PutUint16(b[4:], journal.Version)
		le.PutUint16(b[6:], 1+uint16(kind)%3)
		le.PutUint64(b[8:], uint64(end))
		le.PutUint64(b[16:], last.Epoch.Counter)
		le.PutUint64(b[24:], last.Epoch.Node)
		le.PutUint64(b[32:], uint64(end)-min(uint64(end), uint64(hint)*journal.Align))
		if hint == 255 {
			le.PutUint64(b[32:], 1<<63)
		}
		le.PutUint32(b[40:], uint32(n))
		le.PutUint32(b[44:], uint32(count))
		le.PutUint32(b[48:], chain)
		le.PutUint32(b[52:], crc32c.Sum(b[journal.HeaderSize:]))
		chain = crc32c.Sum(b[:60])
		le.PutUint32(b[60:], chain)
		mem.put(m.Journal.Off+int64(ring.Position(end)), b)
		end += LSN(n)
	}
}

// FuzzRecoverSegments recovers a log whose last segments are right in every
// checksum, and anything in what they say.
//
// Recovery must not panic. What it accepts leaves no block that a read would
// report, and after a clean close it opens again with the same content.
func FuzzRecoverSegments(f *testing.F) {
	record := func(off uint64, n, flags uint32) []byte {
		b := binary.LittleEndian.AppendUint64(nil, off)
		b = binary.LittleEndian.AppendUint32(b, n)
		b = binary.LittleEndian.AppendUint32(b, flags)
		return append(b, bytes.Repeat([]byte{0x5a}, int(min(n, 64)+7)&^7)...)
	}
	c := makeCrashed(f)
	f.Add([]byte{})
	f.Add(append([]byte{0, 1, 0, 1}, record(100, 8, 1)...))
	f.Add(append([]byte{0, 1, 0, 1}, record(smallSize-4, 8, 1)...))
	f.Add(append([]byte{0, 2, 1, 2}, append(record(0, 40, 1), record(1<<62, 8, 0)...)...))
	f.Add(append([]byte{0, 1, 255, 1}, record(8, 8, 1)...))
	f.Add([]byte{1, 0, 0, 3, 1, 2, 3})
	mem := newHeapMemory(slices.Clone(c.applied))
	o, err := Options{Logger: nopLogger}.withDefaults()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, prog []byte) {
		mem.keepUndo = true
		defer func() {
			mem.restore()
			mem.keepUndo = false
		}()
		c.sealedSegments(mem, prog)
		v, err := openMemory("heap", mem, o)
		if err != nil {
			if !typed(err) {
				t.Fatalf("%v (%T)", err, err)
			}
			return
		}
		if v.damage.Load() != nil {
			return // a standalone start refuses it
		}
		data, bad := blockContent(v)
		for b := range bad {
			if !v.unverified.has(b) {
				t.Fatalf("block %d does not match its entry", b)
			}
		}
		content := bytes.Clone(data)
		if err := v.takeUp(); err != nil {
			t.Fatalf("recovered, and refused: %v", err)
		}
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		again, err := openMemory("heap", mem, o)
		if err != nil {
			t.Fatalf("recovered, closed, and refused: %v", err)
		}
		if data, bad := blockContent(again); !bytes.Equal(data, content) || len(bad) > 0 {
			t.Fatalf("another content after a clean close, %d bad blocks", len(bad))
		}
	})
}

// FuzzInspect shows regions of which any bytes were changed, as the commands
// info, check and journal do: no panic, no store, no segment outside the ring,
// and errors of known types.
func FuzzInspect(f *testing.F) {
	c := makeCrashed(f)
	m := &c.meta
	ring := ringOf(c.applied, m)
	end := c.ends[len(c.ends)-1]
	places := []int64{0, metaArea, m.Journal.Off + int64(ring.Position(m.Checkpoint.LSN)),
		m.Journal.Off + int64(ring.Position(c.ends[len(c.ends)-3])), m.Journal.Off + int64(ring.Position(end)), m.Table.Off, m.Data.Off}
	f.Add([]byte{}, []byte{}, uint32(0), false)
	f.Add([]byte{2, 0, 0, 70, 9, 3, 0, 0, 44, 255}, []byte{0, 1, 0, 1, 8}, uint32(0), true)
	f.Add([]byte{0, 0, 0, 96, 0, 1, 0, 0, 96, 0}, []byte{}, uint32(1), true)
	f.Add([]byte{5, 0, 0, 3, 1}, []byte{2, 9, 255, 2}, uint32(3<<20), false)
	f.Fuzz(func(t *testing.T, edits, prog []byte, cut uint32, seal bool) {
		mem := newHeapMemory(slices.Clone(c.applied))
		c.sealedSegments(mem, prog)
		for ; len(edits) >= 5; edits = edits[5:] {
			at := places[int(edits[0])%len(places)] + int64(binary.BigEndian.Uint32(append([]byte{0}, edits[1:4]...)))
			if at < int64(len(mem.b)) {
				mem.b[at] = edits[4]
			}
		}
		if seal {
			for _, at := range []int64{0, metaArea} {
				copy(mem.b[at:], sealed(slices.Clone(mem.b[at:at+metaMax])))
			}
			for _, at := range places[2:5] {
				forgeHeader(mem.b[at:at+journal.HeaderSize], func([]byte) {})
			}
		}
		image := mem.b[:len(mem.b)-int(cut)%(len(mem.b)+1)]
		was := crc32c.Sum(image)
		if _, err := checkImage(image); err != nil && !typed(err) {
			t.Fatalf("check: %v (%T)", err, err)
		}
		s := &subject{view: newHeapMemory(image), mem: image, ins: Inspection{Length: int64(len(image))}}
		err := s.inspect()
		if err == nil {
			_, err = s.walkJournal(JournalOptions{Records: true, Data: 16}, func(i *SegmentInfo) error {
				j := s.meta.Journal
				if i.Offset < j.Off || i.Offset+i.Bytes > j.end() || i.End != i.LSN+LSN(i.Bytes) {
					t.Fatalf("a segment outside the ring: %+v", i)
				}
				return nil
			})
		}
		if err != nil && !typed(err) {
			t.Fatalf("%v (%T)", err, err)
		}
		if crc32c.Sum(image) != was {
			t.Fatal("an inspection stores")
		}
	})
}

// FuzzTable reads block tables of any content: an entry is good for its own
// block only, and the newest is one of the good ones.
func FuzzTable(f *testing.F) {
	good := func(block int64, e entry) []byte {
		b := binary.LittleEndian.AppendUint64(nil, uint64(e.lsn))
		b = binary.LittleEndian.AppendUint32(b, e.crc)
		return binary.LittleEndian.AppendUint32(b, e.check(block))
	}
	f.Add(append(good(0, entry{lsn: 640, crc: 1}), good(1, entry{lsn: 128, crc: 2, unverified: true})...), byte(0))
	f.Add(good(3, entry{lsn: 1 << 63, crc: 1}), byte(0))
	f.Add(bytes.Repeat([]byte{255}, 4*tableEntry), byte(5))
	f.Fuzz(func(t *testing.T, area []byte, seal byte) {
		blocks := int64(len(area)) / tableEntry
		area = bytes.Clone(area)
		var newest LSN
		for b := range blocks {
			p := area[b*tableEntry:][:tableEntry]
			if seal&(1<<(b%8)) != 0 {
				e := entry{lsn: LSN(binary.LittleEndian.Uint64(p)), crc: binary.LittleEndian.Uint32(p[8:])}
				copy(p, good(b, e))
			}
			e, ok := decodeEntry(p, b)
			if !ok {
				continue
			}
			newest = max(newest, e.lsn)
			if _, ok := decodeEntry(p, b+1); ok {
				t.Fatalf("the entry of block %d is good for the next one", b)
			}
			if !bytes.Equal(good(b, e), p) {
				t.Fatalf("entry %+v stands for %x", e, p)
			}
		}
		if got := newestEntry(area, blocks); got != newest {
			t.Fatalf("newest %d, want %d", got, newest)
		}
	})
}
