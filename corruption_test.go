package nvmmirror

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
)

func typed(err error) bool {
	var corrupt *CorruptError
	var length *LengthError
	var newer *NewerError
	var format *journal.FormatError
	return errors.Is(err, ErrNotRegion) || errors.As(err, &corrupt) || errors.As(err, &length) || errors.As(err, &newer) ||
		errors.As(err, &format) || errors.Is(err, ErrOutOfRange)
}

// span is a part of the region, of which each step-th byte is flipped.
type span struct {
	name   string
	lo, hi int64
	step   int64
}

func (c *crashed) spans(step, dataStep int64) []span {
	m := &c.meta
	meta := int64(metaFixed + len(m.State.History)*metaEntry + 4)
	s := []span{{"metadata A", 0, meta, step}, {"metadata B", metaArea, metaArea + meta, step}}
	ring := journal.Ring{Bytes: c.applied[m.Journal.Off:m.Journal.end()], Base: m.RingBase}
	from, end := m.Checkpoint.LSN, c.ends[len(c.ends)-1]
	for from < end {
		n := min(LSN(ring.Contiguous(from)), end-from)
		at := m.Journal.Off + int64(ring.Position(from))
		s = append(s, span{"journal", at, at + int64(n), step})
		from += n
	}
	return append(s,
		span{"block table", m.Table.Off, m.Table.Off + m.Size/blockSize*tableEntry, step},
		span{"data", m.Data.Off, m.Data.Off + m.Size, dataStep})
}

// TestEachByteFlipped flips each byte of the metadata, of the live journal and
// of the block table, and a sample of the data, of a region that was closed
// and of two that were killed (with -short or the race detector, a sample of
// all). Nothing wrong may be accepted:
//
//   - what is read afterwards is a prefix of the commits, and not one that was
//     acknowledged is missing, or
//   - the right error says why not, or
//   - the flip is in one of the two places that one node alone cannot judge,
//     which are counted: the last segment, persistent and not yet applied when
//     the process died, looks like a torn tail; a block that the log changes in
//     part takes its checksum anew.
func TestEachByteFlipped(t *testing.T) {
	t.Parallel()
	c := makeCrashed(t)
	step, dataStep := int64(1), int64(131)
	if testing.Short() || raceEnabled {
		step, dataStep = 11, 997
	}
	last := len(c.states) - 1
	for _, image := range []struct {
		name  string
		bytes []byte
		clean bool
		must  int // commits that were acknowledged
	}{
		{"closed", c.clean, true, last},
		{"killed", c.applied, false, last},
		{"killed before apply", c.pending, false, last - 1},
	} {
		t.Run(image.name, func(t *testing.T) {
			t.Parallel()
			mem := newHeapMemory(slices.Clone(image.bytes))
			if o := c.recoverImage(mem); o.err != nil || o.damaged || o.prefix != last || o.bad != 0 {
				t.Fatalf("the region is not sound to begin with: %+v", o)
			}
			if !bytes.Equal(mem.b, image.bytes) {
				t.Fatal("restore does not restore")
			}
			if r, err := checkImage(mem.b); err != nil || r.Damaged {
				t.Fatalf("check of the sound region: %v, %+v", err, r)
			}
			for _, s := range c.spans(step, dataStep) {
				if image.clean && s.name == "journal" {
					continue // all of it lies below the checkpoint
				}
				var flips, refused, repaired, read, torn, unjudged int
				for at := s.lo; at < s.hi; at += s.step {
					f := c.flipOne(t, mem, image.clean, image.must, s.name, at, byte(1)<<(at%8))
					flips++
					refused += f.refused
					repaired += f.repaired
					read += f.read
					torn += f.torn
					unjudged += f.unjudged
				}
				t.Logf("%-11s %6d flips: %6d refused, %5d repaired, %4d reported on read, %3d look like a torn tail, %3d in blocks whose checksum a crash made unknown",
					s.name, flips, refused, repaired, read, torn, unjudged)
			}
		})
	}
}

// ringSpan is where the segment of the n-th commit lies in the file.
func (c *crashed) ringSpan(n int) (lo, hi int64) {
	ring := ringOf(c.applied, &c.meta)
	lo = c.meta.Journal.Off + int64(ring.Position(c.ends[n-1]))
	return lo, lo + int64(c.ends[n]-c.ends[n-1])
}

// excusable: a flip of which nothing is left after recovery, in what it writes
// anew without having looked at it.
func (c *crashed) excusable(clean bool, area string, at int64, o outcome, r *CheckReport) bool {
	switch area {
	case "block table", "data":
		return !clean && r.Blocks.Rewritten > 0
	}
	return false
}

// forge appends a segment to a killed region's log, as a program could that
// writes what it should not, and gives it valid checksums.
func (c *crashed) forge(t *testing.T, image []byte, epoch journal.Epoch, w transaction, change func(header []byte)) {
	t.Helper()
	s := inspected(t, image)
	l := journal.NewLog(newHeapMemory(image), c.meta.Journal.Off, c.meta.Journal.Len, c.meta.RingBase)
	l.Reset(s.scan.End, s.scan.Chain)
	l.SetEpoch(epoch)
	r := journal.NewRequest()
	for _, x := range w {
		r.Add(x.off, x.data)
	}
	end, err := l.Append([]*journal.Request{r}, r.Size(), s.scan.End)
	if err != nil || int(end-s.scan.End) > ringOf(image, &c.meta).Contiguous(s.scan.End) {
		t.Fatal(end, err)
	}
	if change != nil {
		forgeHeader(image[c.meta.Journal.Off+int64(ringOf(image, &c.meta).Position(s.scan.End)):], change)
	}
}

// forgeHeader changes a segment's header and makes its checksum right.
func forgeHeader(b []byte, change func([]byte)) {
	change(b)
	binary.LittleEndian.PutUint32(b[60:], crc32c.Sum(b[:60]))
}

// forgeMetadata changes both copies and makes their checksums right.
func forgeMetadata(image []byte, change func([]byte)) {
	for i := range 2 {
		b := image[i*metaArea:]
		change(b)
		n := binary.LittleEndian.Uint32(b[12:])
		binary.LittleEndian.PutUint32(b[n-4:], crc32c.Sum(b[:n-4]))
	}
}

func inspected(t *testing.T, image []byte) *subject {
	t.Helper()
	s := &subject{view: newHeapMemory(image), mem: image, ins: Inspection{Length: int64(len(image))}}
	if err := s.inspect(); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestCorruptions is the table of everything worse than a flipped bit: what a
// killed region is turned into, what opening it says, and what check says.
func TestCorruptions(t *testing.T) {
	c := makeCrashed(t)
	last := len(c.states) - 1
	m := &c.meta
	end := c.ends[last]
	at := func(lsn LSN) int64 { return m.Journal.Off + int64(ringOf(c.applied, m).Position(lsn)) }
	// Of the last commits, all in one lap and in data segments.
	segment := func(b []byte, n int) []byte { return b[at(c.ends[n-1]):at(c.ends[n])] }
	epoch := m.State.History.Last().Epoch
	le := binary.LittleEndian

	// What opening says.
	type want struct {
		all     bool // opens, and all commits are there
		damaged bool // opens only with a peer
		is      error
		as      any
		bad     bool // opens; reads report damaged blocks
	}
	accepted, damaged := want{all: true}, want{damaged: true}
	corrupt, newer, length := want{as: new(*CorruptError)}, want{as: new(*NewerError)}, want{as: new(*LengthError)}
	const (
		sound = iota
		damage
		fails
	)
	for _, row := range []struct {
		name  string
		do    func(b []byte) []byte // the region, changed in place or cut
		open  want
		check int
		ends  Ending // where check does not fail, how it sees the log end
	}{
		{"nothing", func(b []byte) []byte { return b }, accepted, sound, EndOfLog},

		{"empty file", func(b []byte) []byte { return b[:0] }, want{is: ErrNotRegion}, fails, ""},
		{"cut in metadata A", func(b []byte) []byte { return b[:100] }, want{is: ErrNotRegion}, fails, ""},
		{"cut before metadata B", func(b []byte) []byte { return b[:metaArea] }, length, damage, ""},
		{"cut before metadata B, A damaged", func(b []byte) []byte { b[100]++; return b[:metaArea] }, corrupt, damage, ""},
		{"no metadata A, no room for B", func(b []byte) []byte { clear(b[:8]); return b[:metaArea+metaFixed] }, want{is: ErrNotRegion}, fails, ""},
		{"cut in the journal", func(b []byte) []byte { return b[:m.Journal.Off+100] }, length, damage, ""},
		{"cut by one byte", func(b []byte) []byte { return b[:len(b)-1] }, length, damage, ""},
		{"one byte appended", func(b []byte) []byte { return append(b, 1) }, accepted, sound, EndOfLog},

		{"metadata A zeroed", func(b []byte) []byte { clear(b[:metaMax]); return b }, accepted, damage, EndOfLog},
		{"metadata B zeroed", func(b []byte) []byte { clear(b[metaArea:][:metaMax]); return b }, accepted, damage, EndOfLog},
		{"both zeroed", func(b []byte) []byte { clear(b[:metaArea+metaMax]); return b }, want{is: ErrNotRegion}, fails, ""},
		{"both damaged", func(b []byte) []byte { b[100]++; b[metaArea+100]++; return b }, corrupt, damage, ""},
		{"A zeroed, B damaged", func(b []byte) []byte { clear(b[:metaMax]); b[metaArea+100]++; return b }, corrupt, damage, ""},
		{"metadata of a newer version", func(b []byte) []byte {
			forgeMetadata(b, func(b []byte) { le.PutUint32(b[8:], metaVersion+1) })
			return b
		}, newer, fails, ""},
		{"an unknown incompatible feature", func(b []byte) []byte {
			forgeMetadata(b, func(b []byte) { b[32] = 1 })
			return b
		}, newer, fails, ""},
		{"an unknown compatible feature", func(b []byte) []byte {
			forgeMetadata(b, func(b []byte) { b[24] = 1 })
			return b
		}, accepted, sound, EndOfLog},
		{"a checkpoint that divides no segment", func(b []byte) []byte {
			forgeMetadata(b, func(b []byte) { b[160]++ })
			return b
		}, corrupt, damage, ""},
		{"areas that overlap", func(b []byte) []byte {
			forgeMetadata(b, func(b []byte) { le.PutUint64(b[128:], le.Uint64(b[112:])) })
			return b
		}, corrupt, damage, ""},
		{"an area beyond all", func(b []byte) []byte {
			forgeMetadata(b, func(b []byte) { le.PutUint64(b[136:], 1<<62) })
			return b
		}, length, damage, ""},
		{"more epochs than there is room for", func(b []byte) []byte {
			forgeMetadata(b, func(b []byte) { le.PutUint32(b[92:], 1<<30) })
			return b
		}, corrupt, damage, ""},

		{"journal zeroed", func(b []byte) []byte { clear(b[m.Journal.Off:m.Journal.end()]); return b }, damaged, damage, EndDamaged},
		{"a line of the journal zeroed", func(b []byte) []byte { clear(segment(b, last-4)[:64]); return b }, damaged, damage, EndDamaged},
		{"the last segment zeroed", func(b []byte) []byte { clear(segment(b, last)); return b }, damaged, damage, EndDamaged},
		{"a segment in another's place", func(b []byte) []byte {
			copy(segment(b, last-4), segment(b, last-3))
			return b
		}, damaged, damage, EndDamaged},
		{"two segments exchanged", func(b []byte) []byte {
			x, y := segment(b, last-4), segment(b, last-3)
			both := append(slices.Clone(y), x...)
			copy(b[at(c.ends[last-5]):], both)
			return b
		}, damaged, damage, EndDamaged},
		{"a segment of an earlier lap", func(b []byte) []byte {
			forgeHeader(segment(b, last-4), func(h []byte) { le.PutUint64(h[8:], le.Uint64(h[8:])-smallJournal) })
			return b
		}, damaged, damage, EndDamaged},
		{"a segment of a foreign epoch", func(b []byte) []byte {
			forgeHeader(segment(b, last-4), func(h []byte) { h[24]++ })
			return b
		}, damaged, damage, EndDamaged},
		{"a segment of a later epoch", func(b []byte) []byte {
			forgeHeader(segment(b, last-4), func(h []byte) { h[16]++ })
			return b
		}, damaged, damage, EndDamaged},
		{"a segment that is not chained", func(b []byte) []byte {
			forgeHeader(segment(b, last-4), func(h []byte) { h[48]++ })
			return b
		}, damaged, damage, EndDamaged},
		{"a length beyond the ring", func(b []byte) []byte {
			forgeHeader(segment(b, last-4), func(h []byte) { le.PutUint32(h[40:], 1<<31) })
			return b
		}, damaged, damage, EndDamaged},
		{"a segment of a newer format", func(b []byte) []byte {
			forgeHeader(segment(b, last-4), func(h []byte) { h[4]++ })
			return b
		}, want{as: new(*journal.FormatError)}, fails, ""},
		{"the journal of another region", func(b []byte) []byte {
			other := newImage(t, smallSize, smallJournal)
			v := openQuiet(t, other)
			for range 5 {
				if _, err := (transaction{{0, []byte("other")}}).commit(v); err != nil {
					t.Fatal(err)
				}
			}
			copy(b[m.Journal.Off:m.Journal.end()], other.b[m.Journal.Off:])
			return b
		}, damaged, damage, EndDamaged},

		{"behind the log, a segment of a foreign epoch", func(b []byte) []byte {
			c.forge(t, b, journal.Epoch{Counter: epoch.Counter, Node: epoch.Node + 1}, transaction{{0, []byte("x")}}, nil)
			return b
		}, accepted, sound, EndOfLog},
		{"behind the log, one that is not chained", func(b []byte) []byte {
			c.forge(t, b, epoch, transaction{{0, []byte("x")}}, func(h []byte) { h[48]++ })
			return b
		}, accepted, sound, EndTorn},
		{"behind the log, one of a newer format", func(b []byte) []byte {
			c.forge(t, b, epoch, transaction{{0, []byte("x")}}, func(h []byte) { h[4]++ })
			return b
		}, want{as: new(*journal.FormatError)}, fails, ""},
		{"a record beyond the volume", func(b []byte) []byte {
			c.forge(t, b, epoch, transaction{{smallSize - 1, []byte("xx")}}, nil)
			return b
		}, want{is: ErrOutOfRange}, damage, EndOfLog},
		{"a record at the end of all offsets", func(b []byte) []byte {
			c.forge(t, b, epoch, transaction{{1<<63 - 1, []byte("xx")}}, nil)
			return b
		}, want{is: ErrOutOfRange}, damage, EndOfLog},
		{"a record at a negative offset", func(b []byte) []byte {
			c.forge(t, b, epoch, transaction{{-4096, []byte("xx")}}, nil)
			return b
		}, want{as: new(*journal.FormatError)}, damage, EndOfLog},

		{"block table zeroed", func(b []byte) []byte { clear(b[m.Table.Off:m.Table.end()]); return b }, want{bad: true}, damage, EndOfLog},
		{"data zeroed", func(b []byte) []byte { clear(b[m.Data.Off:m.Data.end()]); return b }, want{bad: true}, damage, EndOfLog},
		{"two blocks exchanged", func(b []byte) []byte {
			x, y := c.untouched(b)
			bx, by := b[m.Data.Off+x*blockSize:][:blockSize], b[m.Data.Off+y*blockSize:][:blockSize]
			keep := slices.Clone(bx)
			copy(bx, by)
			copy(by, keep)
			return b
		}, want{bad: true}, damage, EndOfLog},
		{"two blocks exchanged with their entries", func(b []byte) []byte {
			x, y := c.untouched(b)
			bx, by := b[m.Data.Off+x*blockSize:][:blockSize], b[m.Data.Off+y*blockSize:][:blockSize]
			ex, ey := b[m.Table.Off+x*tableEntry:][:tableEntry], b[m.Table.Off+y*tableEntry:][:tableEntry]
			keep, keepEntry := slices.Clone(bx), slices.Clone(ex)
			copy(bx, by)
			copy(by, keep)
			copy(ex, ey)
			copy(ey, keepEntry)
			return b
		}, want{bad: true}, damage, EndOfLog},
	} {
		t.Run(row.name, func(t *testing.T) {
			image := row.do(slices.Clone(c.applied))
			report, err := checkImage(image)
			switch {
			case row.check == fails:
				if err == nil || !typed(err) {
					t.Errorf("check: error %v, report %+v", err, report)
				}
			case err != nil || report.Damaged != (row.check == damage):
				t.Errorf("check: error %v, report %+v", err, report)
			case row.ends != "" && report.Recovery.Ending != row.ends:
				t.Errorf("check: the log ends in %s (%s), not %s", report.Recovery.Ending, report.Recovery.Stop, row.ends)
			}
			before := slices.Clone(image)
			o := c.recoverImage(newHeapMemory(image))
			switch {
			case row.open.is != nil:
				if !errors.Is(o.err, row.open.is) {
					t.Errorf("open: %v, not %v", o.err, row.open.is)
				}
			case row.open.as != nil:
				if !errors.As(o.err, row.open.as) {
					t.Errorf("open: %v (%T), not %T", o.err, o.err, row.open.as)
				}
			case o.err != nil || o.damaged != row.open.damaged || o.bad > 0 != row.open.bad || row.open.all && (o.prefix != last || o.end != end):
				t.Errorf("open: %+v", o)
			}
			if o.err == nil {
				return
			}
			if _, err := openMemory("heap", newHeapMemory(image), Options{Logger: nopLogger}); err == nil {
				t.Error("a second open is not refused")
			} else if row.open.is != ErrOutOfRange && !bytes.Equal(image, before) && row.check == fails {
				t.Error("a region that was refused was changed")
			}
		})
	}
}

// untouched is two blocks with different content that the log above the
// checkpoint does not change.
func (c *crashed) untouched(image []byte) (x, y int64) {
	m := &c.meta
	x = -1
	for b := range m.Size / blockSize {
		e, ok := decodeEntry(image[m.Table.Off+b*tableEntry:][:tableEntry], b)
		if !ok || e.lsn == 0 || e.lsn > m.Checkpoint.LSN {
			continue
		}
		if x >= 0 && !bytes.Equal(image[m.Data.Off+x*blockSize:][:blockSize], image[m.Data.Off+b*blockSize:][:blockSize]) {
			return x, b
		}
		x = b
	}
	panic("the test needs two such blocks")
}
