package nvmmirror

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// Inspection is what a region says of itself, read without a lock and without
// a store. While the region is in use it is a moment's view.
type Inspection struct {
	Path     string          `json:"region"`
	InUse    bool            `json:"in_use"`
	Class    string          `json:"class"`         // of the memory that the file lies on
	Created  string          `json:"created_class"` // and of that which it was created on
	Length   int64           `json:"file_length"`
	Expected int64           `json:"expected_length"`
	Metadata [2]MetadataCopy `json:"metadata"`

	Size    int64 `json:"size"`
	Journal Area  `json:"journal"`
	Table   Area  `json:"block_table"`
	Data    Area  `json:"data"`

	Lineage    replicate.UUID    `json:"lineage"`
	Blank      bool              `json:"blank"`
	Node       string            `json:"node"`
	Peer       string            `json:"peer,omitempty"`
	Role       replicate.Role    `json:"role"`
	Title      bool              `json:"title"`
	OnLoss     OnPeerLoss        `json:"on_peer_loss"`
	ReadLease  string            `json:"read_lease"`
	Clean      bool              `json:"clean"` // closed cleanly
	Consistent bool              `json:"consistent"`
	Copy       *replicate.Resync `json:"unfinished_copy,omitempty"`
	RingBase   LSN               `json:"ring_base"`
	Checkpoint CheckpointInfo    `json:"checkpoint"`
	Acked      LSN               `json:"acked_lsn"`
	History    journal.History   `json:"epochs"`
	Shutdowns  uint64            `json:"dirty_shutdowns"`

	// Recovery is what the next open would do; nil while the region is in
	// use.
	Recovery *Outlook `json:"recovery,omitempty"`
}

// Area is a part of the region's file.
type Area struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// MetadataCopy is one of the two copies of the metadata.
type MetadataCopy struct {
	Offset     int64  `json:"offset"`
	Valid      bool   `json:"valid"`
	Newest     bool   `json:"newest"` // the one that counts
	Generation uint64 `json:"generation"`
	Error      string `json:"error,omitempty"`
}

// CheckpointInfo is where recovery starts to read the journal.
type CheckpointInfo struct {
	LSN   LSN           `json:"lsn"`
	Epoch journal.Epoch `json:"epoch"`
	Chain uint32        `json:"chain"`
}

// Ending says how a log ends.
type Ending string

const (
	// EndOfLog: nothing was written behind it.
	EndOfLog Ending = "end-of-log"
	// EndTorn: a segment follows that is not whole, and nothing says that it
	// was acknowledged. After a crash this is its ordinary trace. One node
	// alone cannot tell it from damage to the last segment; the peer can.
	EndTorn Ending = "torn-tail"
	// EndDamaged: a segment that was acknowledged is not valid.
	EndDamaged Ending = "damage"
	// EndCopying: a full copy onto this node did not finish. It starts anew;
	// the log here is not read.
	EndCopying Ending = "full-copy-unfinished"
	// EndNewer: a segment of a format that this program does not know.
	EndNewer Ending = "newer-format"
	// EndLive: the volume is open, its log goes on.
	EndLive Ending = "live"
)

// Outlook is what recovery would do: it reads the journal from From to End,
// and applies it up to Apply.
type Outlook struct {
	From         LSN    `json:"from"`
	End          LSN    `json:"end"`
	Apply        LSN    `json:"apply"`
	Acked        LSN    `json:"acked_lsn"` // proven to be acknowledged by all required nodes; above End where damaged
	Segments     int    `json:"segments"`
	Transactions int    `json:"transactions"`
	Ending       Ending `json:"ending"`
	Stop         string `json:"stop"` // why the log ends at End
	// Refused says why a standalone open is refused.
	Refused string `json:"refused,omitempty"`
}

// Inspect reads a region, or a copy of one, without changing a byte of it, and
// while another process may have it open. An error that concerns its format is
// [ErrNotRegion], a [*NewerError], a [*CorruptError] or a [*LengthError]; with
// all but the first comes what could be read nevertheless.
func Inspect(path string) (*Inspection, error) {
	v, s, err := openSubject(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer v.Close()
	err = s.inspect()
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	if s.meta == nil && s.ins.Metadata == [2]MetadataCopy{} {
		return nil, err
	}
	return &s.ins, err
}

// subject is a region under inspection.
type subject struct {
	view interface{ Bytes() []byte } // the mapping, of which faults become errors
	mem  []byte
	meta *metadata // nil until inspect has found it
	raw  [2][]byte // private copies of what the metadata was decoded from
	scan journal.Scan
	ins  Inspection
}

func openSubject(path string) (*pmem.View, *subject, error) {
	v, err := pmem.OpenReadOnly(path)
	if err != nil {
		return nil, nil, err
	}
	return v, &subject{
		view: v, mem: v.Bytes(),
		ins: Inspection{Path: path, InUse: v.InUse(), Class: v.Class().String(), Length: int64(len(v.Bytes()))},
	}, nil
}

// inspect reads all but journal bodies, table and data.
func (s *subject) inspect() (err error) {
	defer pmem.Recover(s.view, pmem.Arm(), &err)
	c, err := s.readMetadata()
	if err != nil {
		return err
	}
	s.meta = c.meta
	s.describe()
	if s.ins.Length < s.ins.Expected {
		return &LengthError{Have: s.ins.Length, Want: s.ins.Expected}
	}
	if !s.ins.InUse {
		s.ins.Recovery, s.scan = foresee(s.mem, s.meta)
	}
	return nil
}

// clone copies what is used of a metadata copy's area.
func (s *subject) clone(p []byte) (b []byte, err error) {
	defer pmem.Recover(s.view, pmem.Arm(), &err)
	used := metaMax
	if len(p) >= metaFixed { // a newer version's may be longer
		used = max(used, int(binary.LittleEndian.Uint32(p[12:])))
	}
	return bytes.Clone(p[:min(len(p), used)]), nil
}

// readMetadata decodes a private copy: the region may be in use, and what is
// judged must be what was verified. A copy that is caught half-written then is
// looked at again.
func (s *subject) readMetadata() (c copies, err error) {
	for tries := 0; ; tries++ {
		var m [2]*metadata
		var errs [2]error
		for i, p := range metadataBytes(s.mem) {
			if s.raw[i], errs[i] = s.clone(p); errs[i] == nil {
				m[i], errs[i] = decodeMetadata(s.raw[i])
			}
		}
		c, err = judgeCopies(m, errs)
		settled := c.err[0] == nil && c.err[1] == nil && !c.repair
		if settled || !s.ins.InUse || tries >= 100 {
			break
		}
		runtime.Gosched()
	}
	if err == ErrNotRegion {
		return c, err
	}
	for i := range s.ins.Metadata {
		m := &s.ins.Metadata[i]
		m.Offset = int64(i) * metaArea
		if c.err[i] != nil {
			m.Error = c.err[i].Error()
			continue
		}
		one, _ := decodeMetadata(s.raw[i])
		m.Valid, m.Generation = true, one.Generation
		m.Newest = c.meta != nil && one.Generation == c.meta.Generation
	}
	return c, err
}

func (s *subject) describe() {
	m, st, i := s.meta, &s.meta.State, &s.ins
	area := func(e extent) Area { return Area{e.Off, e.Len} }
	i.Created, i.Expected = m.Class.String(), m.Data.end()
	i.Size, i.Journal, i.Table, i.Data = m.Size, area(m.Journal), area(m.Table), area(m.Data)
	i.Lineage, i.Blank, i.Role, i.Title = st.Lineage, st.Blank(), st.Role, st.Title
	i.Node = fmt.Sprintf("%016x", st.Node)
	if st.Peer != 0 {
		i.Peer = fmt.Sprintf("%016x", st.Peer)
	}
	i.OnLoss = Block
	if st.Alone {
		i.OnLoss = Alone
	}
	i.ReadLease = st.Lease.Round(time.Millisecond).String()
	i.Clean, i.Consistent, i.Copy = m.Clean, st.Resync == nil, st.Resync
	i.RingBase, i.Acked, i.Shutdowns = m.RingBase, st.Acked, m.Shutdowns
	i.History = append(journal.History{}, st.History...)
	i.Checkpoint = CheckpointInfo{m.Checkpoint.LSN, m.Checkpoint.Epoch, m.Checkpoint.Chain}
}

// foresee says what recovery would do with the region in mem.
func foresee(mem []byte, m *metadata) (*Outlook, journal.Scan) {
	if r := m.State.Resync; r != nil {
		return &Outlook{From: r.Fork, End: r.Fork, Apply: r.Fork, Ending: EndCopying, Stop: copyUnfinished}, journal.Scan{}
	}
	scan, err := survey(mem, m, nil)
	o := &Outlook{
		From: scan.From, End: scan.End, Acked: scan.Acked, Segments: scan.Segments, Transactions: scan.Transactions,
		Ending: endingOf(scan.Stop), Stop: scan.Stop.Error(),
	}
	if err != nil {
		o.Refused = err.Error()
		return o, scan
	}
	found := *m
	found.State.Acked = min(scan.Acked, scan.End)
	o.Apply = applyLimit(&found, scan.End)
	switch {
	case scan.Damage != nil:
		o.Ending, o.Stop, o.Refused = EndDamaged, scan.Damage.Error(), scan.Damage.Error()
	case m.closedBeyond(scan.End):
		o.Ending = EndDamaged
		o.Stop = fmt.Sprintf("damaged at LSN %d: %v; the log was closed at LSN %d, and is known to be acknowledged up to LSN %d: of what lies between only the peer can tell", scan.End, scan.Stop, m.End, o.Acked)
	}
	return o, scan
}

// endingOf tells the end of a log by why the scan stopped, as far as nothing
// says that it went on.
func endingOf(stop error) Ending {
	f, ok := stop.(*journal.FormatError)
	if !ok {
		return EndTorn
	}
	switch f.Kind {
	case journal.NoSegment, journal.Stale, journal.WrongEpoch:
		// Zeros, an earlier lap, or what was dropped when a later epoch began.
		return EndOfLog
	case journal.Newer:
		return EndNewer
	}
	return EndTorn
}

// isDevice reports whether path is a character device: a devdax device may be
// longer than the region on it.
func isDevice(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
