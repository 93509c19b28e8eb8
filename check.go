package nvmmirror

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// CheckReport is what [Check] found.
type CheckReport struct {
	Inspection
	Log      *JournalStop `json:"log,omitempty"`
	Blocks   BlockCheck   `json:"blocks"`
	Damaged  bool         `json:"damaged"`
	Verdict  Verdict      `json:"verdict"`
	Findings []Finding    `json:"findings"`
	Omitted  int          `json:"omitted_findings"`
}

// Verdict sums a report up.
type Verdict string

const (
	// Sound: all is as a clean close leaves it, or the next open settles it.
	Sound Verdict = "sound"
	// Inconsistent: a full copy onto the region did not finish. Its blocks are
	// of no one moment, and only its peer can complete it.
	Inconsistent Verdict = "inconsistent"
	// Damaged: see [CheckReport.Damaged]. It may be inconsistent as well.
	Damaged Verdict = "damaged"
)

// BlockCheck counts the volume's blocks as they compare with the block table.
type BlockCheck struct {
	Checked int64 `json:"checked"`
	Damaged int64 `json:"damaged"`
	// Rewritten blocks differ from their entries, and the next recovery
	// changes them: see blocks.
	Rewritten int64 `json:"rewritten_by_recovery"`
	// Unverified blocks match a checksum that was taken anew after a crash, and
	// have not been compared with the peer's since.
	Unverified int64 `json:"unverified"`
}

// Finding is something that is not as a clean close leaves it.
type Finding struct {
	Area   string `json:"area"`   // file, metadata, journal, block table, data
	Offset int64  `json:"offset"` // in the file
	// Damage: bytes are not what was made durable. Otherwise it is what a
	// crash may leave, and the next open settles it; only a full copy that did
	// not finish needs the peer.
	Damage  bool   `json:"damage"`
	Problem string `json:"problem"`
}

// maxFindings bounds a report.
const maxFindings = 1000

// Check verifies a closed region, or a copy of one, without changing a byte of
// it: metadata, length, each segment of the live journal, each block against
// the block table, and what the kernel knows of the device's bad blocks. An error says that it could not be checked: [ErrNotRegion],
// a [*NewerError], [ErrInUse]; damage is in the report.
func Check(path string) (*CheckReport, error) {
	v, s, err := openSubject(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer v.Close()
	if s.ins.InUse {
		return nil, &pmem.InUseError{Path: path}
	}
	bad, _, badErr := pmem.BadBlocks(path)
	report, err := s.check(isDevice(path), bad, badErr)
	if v.InUse() {
		// Someone opened it meanwhile: what was read is of no one moment.
		return nil, &pmem.InUseError{Path: path}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return report, nil
}

// check checks all of it. A device may be longer than the region on it. bad are the
// ranges that the kernel knows to be unreadable.
func (s *subject) check(device bool, bad []pmem.Range, badErr error) (*CheckReport, error) {
	c := &checker{subject: s, report: &CheckReport{Findings: []Finding{}}, device: device}
	for _, r := range bad {
		c.damage("file", r.Offset, "%d bytes from here on cannot be read, as the kernel knows (ndctl list --media-errors): put the region on sound memory, and let the peer fill it", r.Length)
	}
	if badErr != nil {
		c.note("file", 0, "whether the device has bad blocks is not known: %v", badErr)
	}
	err := c.run()
	r := c.report
	r.Inspection = s.ins
	switch {
	case r.Damaged:
		r.Verdict = Damaged
	case !r.Consistent:
		r.Verdict = Inconsistent
	default:
		r.Verdict = Sound
	}
	return r, err
}

type checker struct {
	*subject
	report  *CheckReport
	device  bool
	touched blockSet // blocks that recovery changes, or may have begun to
}

func (c *checker) damage(area string, off int64, format string, args ...any) {
	c.report.Damaged = true
	c.add(Finding{Area: area, Offset: off, Damage: true, Problem: fmt.Sprintf(format, args...)})
}

func (c *checker) note(area string, off int64, format string, args ...any) {
	c.add(Finding{Area: area, Offset: off, Problem: fmt.Sprintf(format, args...)})
}

func (c *checker) add(f Finding) {
	if len(c.report.Findings) == maxFindings {
		c.report.Omitted++
		return
	}
	c.report.Findings = append(c.report.Findings, f)
}

func (c *checker) run() error {
	err := c.inspect()
	var length *LengthError
	var corrupt *CorruptError
	var fault *pmem.FaultError
	switch {
	case errors.As(err, &length):
		c.metadata()
		c.damage("file", length.Have, "%v", length)
		return nil
	case errors.As(err, &corrupt):
		c.damage("metadata", 0, "%v", corrupt)
		return nil
	case errors.As(err, &fault):
		c.damage("file", fault.Offset, "%v", fault)
		return nil
	case err != nil:
		return err
	}
	c.metadata()
	if c.ins.Length > c.ins.Expected && !c.device {
		c.note("file", c.ins.Expected, "the file has %d bytes, its metadata says %d: something was appended, which nothing reads and truncate -s %[2]d removes", c.ins.Length, c.ins.Expected)
	}
	c.touched = newBlockSet(c.meta.Size / blockSize)
	if err := c.journal(); err != nil {
		return err
	}
	if c.ins.Recovery.Ending == EndCopying {
		c.note("data", c.meta.Data.Off, "inconsistent: %s; blocks are not judged", copyUnfinished)
		return nil
	}
	c.blocks()
	return nil
}

// metadata judges a copy that is not as the other. A crash in the middle of a
// change leaves one: partly written, or older. It is damage where no change
// can have been under way, or where it cannot be the trace of one: what no
// change touches differs, or a single byte does. A change touches at least the
// generation and the checksum.
func (c *checker) metadata() {
	for i := range c.ins.Metadata {
		m, other := c.ins.Metadata[i], c.ins.Metadata[1-i]
		name := string(rune('A' + i))
		switch {
		case m.Valid && (!other.Valid || m.Generation >= other.Generation):
		case m.Valid:
			c.note("metadata", m.Offset, "copy %s is of generation %d, the other of %d: a crash came between; the next open repairs it", name, m.Generation, other.Generation)
		case other.Valid && c.tornCopy(i):
			c.note("metadata", m.Offset, "copy %s: %s: a crash cut its change off; the next open repairs it from the other", name, m.Error)
		case other.Valid:
			c.damage("metadata", m.Offset, "copy %s: %s; the next open repairs it from the other", name, m.Error)
		}
	}
}

// tornCopy reports whether invalid copy i may be a change that a crash cut
// off, going by the other copy, which is valid.
func (c *checker) tornCopy(i int) bool {
	bad, good := c.raw[i], c.raw[1-i]
	if c.meta.Clean || bad == nil {
		return false
	}
	// Magic and version, features, node, class, block size, areas and size.
	for _, fixed := range [][2]int{{0, 12}, {24, 48}, {64, 72}, {80, 84}, {88, 92}, {96, 152}} {
		if !bytes.Equal(bad[fixed[0]:fixed[1]], good[fixed[0]:fixed[1]]) {
			return false
		}
	}
	if binary.LittleEndian.Uint64(bad[16:]) == binary.LittleEndian.Uint64(good[16:])+1 {
		return true
	}
	differ := 0
	for k := range min(len(bad), len(good)) { // the file may end within the second copy's area
		if bad[k] != good[k] {
			differ++
		}
	}
	return differ > 1
}

// journal verifies the live journal segment by segment, and gathers what
// recovery would change.
func (c *checker) journal() error {
	m, r := c.meta, c.ins.Recovery
	start := c.ringOffset(r.End)
	if r.Ending == EndNewer {
		return &NewerError{r.Stop}
	}
	stop, err := c.walkJournal(JournalOptions{}, func(s *SegmentInfo) error {
		for _, p := range s.Problems {
			c.damage("journal", s.Offset, "segment at LSN %d: %s", s.LSN, p)
		}
		switch {
		case s.Zeroed:
		case s.End == r.End && !m.Clean:
			c.note("journal", s.Offset, "padding at LSN %d is not zero: a crash came before its end was written; the next open writes it", s.LSN)
		default:
			c.damage("journal", s.Offset, "padding at LSN %d is not zero: it holds nothing, but it was changed", s.LSN)
		}
		c.touch(s)
		return nil
	})
	var fault *pmem.FaultError
	if errors.As(err, &fault) {
		c.damage("journal", fault.Offset, "%v", fault)
		return nil
	}
	if err != nil {
		return err
	}
	c.report.Log = stop
	switch r.Ending {
	case EndDamaged:
		c.damage("journal", start, "%s", r.Stop)
	case EndTorn:
		c.note("journal", start, "torn tail at LSN %d, which the next open cuts off: %s; the log up to LSN %d is known to be acknowledged; whether a crash or damage did it, only the peer can tell", r.End, r.Stop, r.Acked)
	}
	return nil
}

func (c *checker) ringOffset(lsn LSN) int64 {
	return c.meta.Journal.Off + int64(ringOf(c.mem, c.meta).Position(lsn))
}

// touch notes the blocks that a segment changes.
func (c *checker) touch(s *SegmentInfo) {
	if s.Kind != "data" {
		return
	}
	for records := journal.NewRecords(s.body); ; {
		rec, ok, err := records.Next()
		if !ok || err != nil {
			return
		}
		end := rec.Off + int64(len(rec.Data))
		if end < rec.Off || end > c.meta.Size {
			continue
		}
		for b := rec.Off / blockSize; b*blockSize < end; b++ {
			c.touched.add(b)
		}
	}
}

// blocks compares each block with its entry in the block table.
//
// After a crash, a block that the log above the checkpoint changes may hold
// any part of these changes, and so may its entry: what it held before is not
// known. Recovery writes the changes again and takes the checksum anew (see
// applyBlock), and so such a block, where it differs, is counted and not
// judged. All others are as the last checkpoint left them.
func (c *checker) blocks() {
	count := c.meta.Size / blockSize
	for b := int64(0); b < count; b++ {
		var err error
		if b, err = c.blocksFrom(b, count); err != nil {
			var fault *pmem.FaultError
			errors.As(err, &fault)
			c.report.Blocks.Damaged++
			c.damage("data", fault.Offset, "block %d: %v", b, fault)
		}
	}
}

// blocksFrom checks from block b on. It returns before the end at a block that
// cannot be read, with the fault.
func (c *checker) blocksFrom(b, count int64) (at int64, err error) {
	defer pmem.Recover(c.view, pmem.Arm(), &err)
	for at = b; at < count; at++ {
		c.report.Blocks.Checked++
		off := c.meta.Table.Off + at*tableEntry
		e, ok := decodeEntry(c.mem[off:off+tableEntry], at)
		data := c.meta.Data.Off + at*blockSize
		match := ok && crc32c.Sum(c.mem[data:data+blockSize]) == e.crc
		if match && e.unverified {
			c.report.Blocks.Unverified++
		}
		if match && e.lsn <= c.scan.End {
			continue
		}
		c.judge(at, off, data, e, ok, match)
	}
	return at, nil
}

// judge notes a block that is not as its entry says.
func (c *checker) judge(b, entryOff, dataOff int64, e entry, ok, match bool) {
	unread := ""
	if !c.meta.Clean {
		if c.touched.has(b) && !e.damaged {
			c.report.Blocks.Rewritten++
			return
		}
		if c.scan.Damage != nil {
			if match {
				return // above the damage in the journal, which is reported
			}
			unread = " (or log that cannot be read has changed it)"
		}
	}
	c.report.Blocks.Damaged++
	switch {
	case !ok:
		c.damage("block table", entryOff, "the entry of block %d does not match its checksum%s", b, unread)
	case !match:
		c.damage("data", dataOff, "block %d (bytes %d to %d of the volume) does not match its checksum, last changed at LSN %d%s", b, b*blockSize, (b+1)*blockSize, e.lsn, unread)
	default:
		c.damage("block table", entryOff, "block %d was changed at LSN %d, the log ends at %d", b, e.lsn, c.scan.End)
	}
}
