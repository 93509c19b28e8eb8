package nvmmirror

import (
	"slices"
	"testing"
)

// flips counts what became of flips in one area of a closed region.
type flips struct {
	refused, repaired, read int
	torn, unjudged          int // one node alone cannot tell: see TestEachByteFlipped
}

func (f *flips) add(g flips) {
	f.refused += g.refused
	f.repaired += g.repaired
	f.read += g.read
	f.torn += g.torn
	f.unjudged += g.unjudged
}

// flipOne flips bits of one byte of a closed region, recovers and checks it,
// and puts it back. Of the commits, the first must were acknowledged. It fails
// where anything wrong is accepted, or where check does not find it.
func (c *crashed) flipOne(t *testing.T, mem *heapMemory, clean bool, must int, area string, at int64, bits byte) (f flips) {
	t.Helper()
	last := len(c.states) - 1
	tornFrom, tornTo := c.ringSpan(last)
	mem.b[at] ^= bits
	o := c.recoverImage(mem)
	report, err := checkImage(mem.b)
	mem.b[at] ^= bits
	found := err != nil || report.Damaged
	block := (at - c.meta.Data.Off) / blockSize
	switch {
	case o.err != nil:
		f.refused++
		if !typed(o.err) {
			t.Fatalf("%s, byte %d: %v (%T)", area, at, o.err, o.err)
		}
	case o.damaged:
		f.refused++
	case area == "data" && o.redone[block] && o.bad == 0:
		f.unjudged++
		found = true
	case o.prefix < 0 || o.end != c.ends[o.prefix]:
		t.Fatalf("%s, byte %d: wrong content was accepted: %+v", area, at, o)
	case o.bad > 0:
		f.read++
		if o.bad > 1 {
			t.Fatalf("%s, byte %d: one flip made %d blocks unreadable", area, at, o.bad)
		}
	case o.prefix == last:
		f.repaired++
	case o.prefix >= must && at >= tornFrom && at < tornTo:
		f.torn++
		found = found || len(report.Findings) == 1 && report.Log.Ending != EndDamaged || report.Log.Ending == EndOfLog
	default:
		t.Fatalf("%s, byte %d: %d commits recovered, %d were acknowledged: %+v", area, at, o.prefix, must, o)
	}
	if !found && !c.excusable(clean, area, at, o, report) {
		t.Fatalf("%s, byte %d: check did not find it: %+v", area, at, report)
	}
	return f
}

// What TestEachByteFlipped leaves out: every bit of the metadata, other bits of
// journal and block table, several places in each block, and each byte of one
// block.
func mediaClosed(t *testing.T, m *media) {
	c := makeCrashed(t)
	last := len(c.states) - 1
	rng := m.rng(10)
	step := int64(1)
	if testing.Short() || raceEnabled {
		step = 13
	}
	for _, image := range []struct {
		name  string
		bytes []byte
		clean bool
		must  int
	}{
		{"closed", c.clean, true, last},
		{"killed", c.applied, false, last},
		{"killed before apply", c.pending, false, last - 1},
	} {
		mem := newHeapMemory(slices.Clone(image.bytes))
		rows := map[string]*flips{}
		count := map[string]int{}
		flip := func(area string, at int64, bits byte) {
			if rows[area] == nil {
				rows[area] = &flips{}
			}
			rows[area].add(c.flipOne(t, mem, image.clean, image.must, area, at, bits))
			count[area]++
		}
		for _, s := range c.spans(step, step) {
			switch s.name {
			case "metadata A", "metadata B":
				for at := s.lo; at < s.hi; at += s.step {
					for bit := range 8 {
						if image.clean || int64(bit) == at%8 {
							flip("metadata", at, 1<<bit)
						}
					}
				}
			case "journal":
				if image.clean {
					continue // all of it lies below the checkpoint
				}
				for at := s.lo; at < s.hi; at += 5 * s.step {
					flip(s.name, at, 1<<rng.IntN(8))
				}
			case "block table":
				for at := s.lo; at < s.hi; at += s.step {
					flip(s.name, at, 1<<rng.IntN(8))
				}
			case "data":
				for b := s.lo; b < s.hi; b += blockSize {
					for _, at := range []int64{0, 1, 63, 2048, blockSize - 1, rng.Int64N(blockSize)} {
						flip(s.name, b+at, 1<<rng.IntN(8))
					}
				}
				one := s.lo + rng.Int64N(c.meta.Size/blockSize)*blockSize
				for at := one; at < one+blockSize && image.clean; at += s.step {
					flip(s.name, at, 1<<rng.IntN(8))
				}
			}
		}
		for _, area := range []string{"metadata", "journal", "block table", "data"} {
			f := rows[area]
			if f == nil {
				continue
			}
			m.add(mediaRow{
				where: "one node, " + image.name, area: area, flips: count[area], found: "check, open, read",
				repaired: f.repaired, reported: f.refused + f.read, unjudged: f.torn + f.unjudged,
			})
		}
	}
}
