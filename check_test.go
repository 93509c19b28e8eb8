package nvmmirror

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

func TestCheckChangesNothing(t *testing.T) {
	t.Parallel()
	c := makeCrashed(t)
	for name, image := range map[string][]byte{
		"clean": c.clean, "killed": c.applied, "torn": flipped(c.pending, c, len(c.states)-1), "damaged": flipped(c.applied, c, len(c.states)-5),
	} {
		path := writeRegion(t, image)
		unchanged(t, path, func() {
			r, err := Check(path)
			if err != nil {
				t.Fatal(name, err)
			}
			if r.Damaged != (name == "damaged") || r.Damaged != (r.Verdict == Damaged) || !r.Damaged != (r.Verdict == Sound) || (len(r.Findings) > 0) != (name == "damaged" || name == "torn") {
				t.Errorf("%s: %+v", name, r)
			}
			if _, err := json.Marshal(r); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestCheckBlankRegion(t *testing.T) {
	path := filepath.Join(shm(t), "r")
	if err := Create(path, CreateOptions{Size: 1 << 20, JournalSize: MinJournal, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	r, err := Check(path)
	if err != nil || r.Damaged || len(r.Findings) > 0 || r.Blocks.Checked != 256 || !r.Blank {
		t.Fatalf("%v, %+v", err, r)
	}
}

// TestCheckLength: a region that was cut off is never sound; what was appended to
// one is said, and nothing reads it.
func TestCheckLength(t *testing.T) {
	c := makeCrashed(t)
	path := writeRegion(t, c.clean)
	for _, n := range []int64{int64(len(c.clean)) + 1, int64(len(c.clean)) - 1, c.meta.Data.Off, c.meta.Journal.Off, 3 << 20, metaArea, metaMax, metaMax - 1, 1, 0} {
		if err := os.Truncate(path, n); err != nil {
			t.Fatal(err)
		}
		r, err := Check(path)
		if longer := n > int64(len(c.clean)); longer && (err != nil || r.Damaged || len(r.Findings) != 1) || !longer && err == nil && !r.Damaged {
			t.Errorf("%d bytes: %v, %+v", n, err, r)
		}
		if n < metaMax != errors.Is(err, ErrNotRegion) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

// TestCheckMetadataCopies tells what a crash leaves of a metadata change from
// damage.
func TestCheckMetadataCopies(t *testing.T) {
	c := makeCrashed(t)
	m := c.meta
	older := m.encode(make([]byte, metaMax))
	next := m
	next.Generation++
	next.Checkpoint.LSN += 6400
	newer := next.encode(make([]byte, metaMax))
	if len(older) != len(newer) {
		t.Fatal("lengths differ")
	}
	write := func(image []byte, a, b []byte) []byte {
		image = bytes.Clone(image)
		copy(image, a)
		copy(image[metaArea:], b)
		return image
	}
	// A process that is killed leaves a prefix of the change.
	for n := 0; n <= len(newer); n += 8 {
		part := append(bytes.Clone(newer[:n]), older[n:]...)
		if n == len(newer) {
			break // whole: it counts, and its checkpoint is made up
		}
		r, err := checkImage(write(c.applied, part, older))
		if err != nil || r.Damaged {
			t.Errorf("copy A with %d bytes of a change: %v, %+v", n, err, r)
		}
		if n > 16 && len(r.Findings) != 1 {
			t.Errorf("copy A with %d bytes of a change: not a word of it", n)
		}
	}
	// B, behind an A that was completed.
	for n := 0; n <= len(older); n += 8 {
		grown := m
		grown.Generation++
		grown.State.Acked = m.Checkpoint.LSN
		full := grown.encode(make([]byte, metaMax))
		part := append(bytes.Clone(full[:n]), older[n:]...)
		r, err := checkImage(write(c.applied, full, part))
		if err != nil || r.Damaged {
			t.Errorf("copy B with %d bytes of a change: %v, %+v", n, err, r)
		}
	}
	flip := bytes.Clone(older)
	flip[170] ^= 4
	if r, err := checkImage(write(c.applied, flip, older)); err != nil || !r.Damaged {
		t.Errorf("a flipped bit in a copy: %v, %+v", err, r)
	}
	var clean []byte
	for i := 0; i < 8; i++ { // no change is under way in a closed region
		clean = bytes.Clone(c.clean)
		clean[16+i*30]++
		clean[17+i*30]++
		if r, err := checkImage(clean); err != nil || !r.Damaged {
			t.Errorf("a closed region with a damaged copy: %v, %+v", err, r)
		}
	}
}

// TestCheckInconsistent: in a full copy that did not finish, blocks and
// entries are in any state.
func TestCheckInconsistent(t *testing.T) {
	c := makeCrashed(t)
	image := inconsistentImage(t, c)
	r, err := checkImage(image)
	if err != nil || r.Damaged || r.Verdict != Inconsistent || r.Recovery.Ending != EndCopying || r.Consistent || len(r.Findings) != 1 {
		t.Fatalf("%v, %+v", err, r)
	}
	v, err := openMemory("heap", newHeapMemory(image), Options{Logger: nopLogger})
	if err != nil || !v.copying || v.recovery.Stop != r.Recovery.Stop {
		t.Fatal(err)
	}
}

func inconsistentImage(t *testing.T, c *crashed) []byte {
	t.Helper()
	mem := newHeapMemory(bytes.Clone(c.clean))
	m := c.meta
	m.Clean = false
	m.State = m.State.Clone()
	m.State.Role, m.State.Title = replicate.Secondary, false
	last := m.State.History.Last()
	m.State.Resync = &replicate.Resync{Fork: 1 << 30, Base: 1<<30 - smallJournal, Chain: 7, Epoch: last.Epoch}
	m.RingBase, m.Checkpoint = m.State.Resync.Base, checkpoint{LSN: 1 << 30, Epoch: last.Epoch, Chain: 7}
	m.State.Acked = 0
	m.Generation = 1000
	if err := writeMetadata(mem, &m); err != nil {
		t.Fatal(err)
	}
	for i := range int64(blockSize) {
		mem.b[m.Data.Off+5*blockSize+i] = byte(i) // a block arrived, its entry did not
	}
	return mem.b
}

// TestCheckPadding: padding that is not zero is damage, but where a crash came
// between its header and its zeros; the next open writes them.
func TestCheckPadding(t *testing.T) {
	c := makeCrashed(t)
	var pad int64
	if _, err := InspectJournal(writeRegion(t, c.applied), JournalOptions{}, func(s *SegmentInfo) error {
		if s.Kind == "padding" {
			pad = s.Offset
		}
		return nil
	}); err != nil || pad == 0 {
		t.Fatal(pad, err)
	}
	image := bytes.Clone(c.applied)
	image[pad+100] = 1
	if r, err := checkImage(image); err != nil || !r.Damaged {
		t.Errorf("behind it the log goes on: %v, %+v", err, r)
	}
	// The process dies when it has written the padding's header: nothing is
	// behind it yet, and the table knows nothing of what came later.
	m := c.meta
	image = bytes.Clone(c.applied)
	clear(image[m.Journal.Off:][:64])
	for b := range m.Size / blockSize {
		p := image[m.Table.Off+b*tableEntry:][:tableEntry]
		if e, _ := decodeEntry(p, b); e.lsn > smallJournal {
			block := image[m.Data.Off+b*blockSize:][:blockSize]
			e = entry{lsn: m.Checkpoint.LSN, crc: crc32c.Sum(block)}
			binary.LittleEndian.PutUint64(p, uint64(e.lsn))
			binary.LittleEndian.PutUint32(p[8:], e.crc)
			binary.LittleEndian.PutUint32(p[12:], e.check(b))
		}
	}
	for lsn := LSN(64); lsn < 64<<10; lsn += 64 {
		clear(image[m.Journal.Off+int64(lsn):][:4])
	}
	image[pad+100] = 1
	r, err := checkImage(image)
	if err != nil || r.Damaged || len(r.Findings) != 1 || r.Recovery.End != smallJournal {
		t.Fatalf("at the log's end: %v, %+v", err, r)
	}
	if _, err := openMemory("heap", newHeapMemory(image), Options{Logger: nopLogger}); err != nil {
		t.Fatal(err)
	}
	if image[pad+100] != 0 {
		t.Error("recovery left it")
	}
}

// What the kernel knows to be unreadable is damage, also where nothing reads it.
func TestCheckBadBlocks(t *testing.T) {
	c := makeCrashed(t)
	s := &subject{view: newHeapMemory(c.clean), mem: c.clean, ins: Inspection{Length: int64(len(c.clean))}}
	r, err := s.check(false, []pmem.Range{{Offset: 8192, Length: 512}}, nil)
	if err != nil || !r.Damaged || len(r.Findings) != 1 || r.Findings[0].Offset != 8192 || !strings.Contains(r.Findings[0].Problem, "512 bytes") {
		t.Errorf("%v, %+v", err, r)
	}
	r, err = s.check(false, nil, errors.New("no permission"))
	if err != nil || r.Damaged || r.Verdict != Sound || len(r.Findings) != 1 {
		t.Errorf("%v, %+v", err, r)
	}
}

// TestCheckOfAFileCutOffInItsMetadata: one that ends within the area of the second
// copy, with a flip in the first.
func TestCheckOfAFileCutOffInItsMetadata(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	v := openQuiet(t, mem)
	if _, err := (transaction{{0, []byte("x")}}).commit(v); err != nil {
		t.Fatal(err)
	}
	image := slices.Clone(mem.b[:metaArea+metaMax+100])
	image[192] ^= 1
	if r, err := checkImage(image); err != nil || !r.Damaged {
		t.Errorf("%+v, %v", r, err)
	}
}
