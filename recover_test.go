package nvmmirror

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/nvmmirror/nvmmirror/journal"
)

// flippingMemory flips a bit before the first whole block is copied.
type flippingMemory struct {
	*heapMemory
	flip func()
}

func (m *flippingMemory) Copy(off int64, p []byte) {
	if m.flip != nil && len(p) == blockSize {
		m.flip()
		m.flip = nil
	}
	m.heapMemory.Copy(off, p)
}

// Recovery takes the checksums of whole blocks once, as it scans the log. What
// changes in memory before it is applied is found all the same: a block does
// not match its entry, and the rest of a segment does not match its checksum.
func TestLogChangesAfterTheScan(t *testing.T) {
	for _, c := range []struct {
		name    string
		segment int // the flip's: the first or the second
		at      int // in the segment's body
		block   int64
		err     string
	}{
		{"a block of the segment that is being applied", 0, journal.RecordHeaderSize + blockSize + 77, 1, ""},
		{"a block of a later segment", 1, journal.RecordHeaderSize + 1000 + 77, 5, ""},
		{"before the first whole block", 1, journal.RecordHeaderSize + 77, 0, "the journal changed after it was written"},
		{"behind the last whole block", 1, journal.RecordHeaderSize + 1000 + blockSize + 7, 0, "the journal changed after it was written"},
		{"a record's header", 1, 3, 0, "the journal changed after it was written"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem := newImage(t, smallSize, smallJournal)
			v := openQuiet(t, mem)
			ring := v.journal.Ring()
			at := []LSN{v.journal.End()}
			for _, w := range []store{{0, bytes.Repeat([]byte{7}, 3*blockSize)}, {5*blockSize - 1000, bytes.Repeat([]byte{9}, 1000+blockSize+10)}} {
				if _, err := (transaction{w}).commit(v); err != nil {
					t.Fatal(err)
				}
				at = append(at, v.journal.End())
			}
			flip := func() { ring.Raw(at[c.segment], blockSize*3)[journal.HeaderSize+c.at] ^= 0x10 }
			again, err := tryOpenQuiet(&flippingMemory{mem, flip})
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("%v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer again.pair.Close()
			for b := range again.size / blockSize {
				_, err := again.ReadAt(make([]byte, blockSize), b*blockSize)
				var corrupt *CorruptError
				if b == c.block && !errors.As(err, &corrupt) || b != c.block && err != nil {
					t.Errorf("block %d: %v", b, err)
				}
			}
		})
	}
}
