package nvmmirror

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// The metadata of a region stands twice, at file offsets 0 and 2 MiB. A copy:
//
//	  0  magic        8 bytes "NVMMIRR\x00"
//	  8  version      u32  1
//	 12  length       u32  of the copy, its checksum included
//	 16  generation   u64  grows with every change; recovery takes the newest
//	 24  compat       u64  features that an older program may ignore
//	 32  incompat     u64  features without which the region must not be opened
//	 40  ro compat    u64  features without which it must not be written
//	 48  lineage      16 bytes, a UUID; 0: blank
//	 64  node         u64  this node's id
//	 72  peer         u64  the last peer's id
//	 80  class        u32  device class at creation
//	 84  flags        u32  1 primary, 2 title, 4 alone on peer loss, 8 closed cleanly, 16 inconsistent
//	 88  block size   u32  4096
//	 92  history      u32  number of entries
//	 96  journal      u64 offset, u64 length in the file
//	112  block table  u64 offset, u64 length
//	128  data         u64 offset, u64 length
//	144  size         u64  of the volume
//	152  ring base    u64  LSN at the start of the journal area
//	160  checkpoint   u64  LSN from which recovery reads the journal
//	168               u64, u64  epoch (counter, node) in force there
//	184               u32  CRC field of the segment before it
//	188  lease        u32  read lease in milliseconds
//	192  acked        u64  LSN known to be acknowledged by all required nodes
//	200  resync       u64  LSN where the log starts over (flag 16)
//	208               u64  ring base
//	216               u64, u64  epoch
//	232               u32  CRC field of the segment before it
//	236  settled      u32  1: closed cleanly (flag 8), and no block is unverified or damaged
//	240  shutdowns    u64  dirty-shutdown count of the device when it was opened, and bit 63; 0: none
//	248  end          u64  LSN after the log where it was closed cleanly, else 0
//	256  history      per entry: u64 counter, u64 node, u64 start, u32 flags (1 peer in, 2 async), u32 reserved
//	...  CRC          u32  CRC32C of all before it
//
// All integers are little-endian. A change is written to copy A, fenced, then
// to copy B, fenced (B first where it is damaged), and only then acted upon. So a torn write leaves the other
// copy, and one flipped bit never revives an older state.
const (
	metaVersion = 1
	metaFixed   = 256
	metaEntry   = 32
	metaMax     = metaFixed + journal.MaxHistory*metaEntry + 4
	metaArea    = pmem.AreaAlign
	blockSize   = replicate.BlockSize
	tableEntry  = 16
	entryPeerIn = 1
	entryAsync  = 2
	flagPrimary = 1
	flagTitle   = 2
	flagAlone   = 4
	flagClean   = 8
	flagResync  = 16
	knownFlags  = flagPrimary | flagTitle | flagAlone | flagClean | flagResync
	// shutdownsKnown tells a count of 0 from none. Earlier builds left it out.
	shutdownsKnown = 1 << 63
	// maxLSN bounds where a log may go on: nothing that is added to it overflows.
	maxLSN = 1 << 62
)

var metaMagic = [8]byte{'N', 'V', 'M', 'M', 'I', 'R', 'R', 0}

// extent is an area of the file.
type extent struct{ Off, Len int64 }

func (e extent) end() int64 { return e.Off + e.Len }

// checkpoint is where recovery starts to read the journal.
type checkpoint struct {
	LSN   journal.LSN
	Epoch journal.Epoch
	Chain uint32
}

// metadata is everything that a copy holds.
type metadata struct {
	Generation uint64
	Compat     uint64
	Incompat   uint64
	ROCompat   uint64
	Class      pmem.Class
	Clean      bool
	Settled    bool        // no block is unverified or damaged; says nothing unless Clean
	End        journal.LSN // of the log; says nothing unless Clean and not 0
	Journal    extent
	Table      extent
	Data       extent
	Size       int64
	RingBase   journal.LSN
	Checkpoint checkpoint
	Shutdowns  uint64 // dirty ones that the device had counted; says nothing unless Counts
	Counts     bool
	State      replicate.State
}

func (m *metadata) encode(b []byte) []byte {
	n := metaFixed + len(m.State.History)*metaEntry + 4
	b = b[:n]
	clear(b)
	le := binary.LittleEndian
	st := &m.State
	var flags uint32
	set := func(on bool, f uint32) {
		if on {
			flags |= f
		}
	}
	set(st.Role == replicate.Primary, flagPrimary)
	set(st.Title, flagTitle)
	set(st.Alone, flagAlone)
	set(m.Clean, flagClean)
	set(st.Resync != nil, flagResync)
	copy(b, metaMagic[:])
	le.PutUint32(b[8:], metaVersion)
	le.PutUint32(b[12:], uint32(n))
	le.PutUint64(b[16:], m.Generation)
	le.PutUint64(b[24:], m.Compat)
	le.PutUint64(b[32:], m.Incompat)
	le.PutUint64(b[40:], m.ROCompat)
	copy(b[48:], st.Lineage[:])
	le.PutUint64(b[64:], st.Node)
	le.PutUint64(b[72:], st.Peer)
	le.PutUint32(b[80:], uint32(m.Class))
	le.PutUint32(b[84:], flags)
	le.PutUint32(b[88:], blockSize)
	le.PutUint32(b[92:], uint32(len(st.History)))
	for i, e := range []extent{m.Journal, m.Table, m.Data} {
		le.PutUint64(b[96+16*i:], uint64(e.Off))
		le.PutUint64(b[104+16*i:], uint64(e.Len))
	}
	le.PutUint64(b[144:], uint64(m.Size))
	le.PutUint64(b[152:], uint64(m.RingBase))
	le.PutUint64(b[160:], uint64(m.Checkpoint.LSN))
	le.PutUint64(b[168:], m.Checkpoint.Epoch.Counter)
	le.PutUint64(b[176:], m.Checkpoint.Epoch.Node)
	le.PutUint32(b[184:], m.Checkpoint.Chain)
	le.PutUint32(b[188:], uint32((st.Lease+time.Millisecond-1)/time.Millisecond)) // never less
	le.PutUint64(b[192:], uint64(st.Acked))
	if r := st.Resync; r != nil {
		le.PutUint64(b[200:], uint64(r.Fork))
		le.PutUint64(b[208:], uint64(r.Base))
		le.PutUint64(b[216:], r.Epoch.Counter)
		le.PutUint64(b[224:], r.Epoch.Node)
		le.PutUint32(b[232:], r.Chain)
	}
	if m.Counts {
		le.PutUint64(b[240:], m.Shutdowns|shutdownsKnown)
	}
	if m.Clean {
		if m.Settled {
			le.PutUint32(b[236:], 1)
		}
		le.PutUint64(b[248:], uint64(m.End))
	}
	for i, e := range st.History {
		h := b[metaFixed+i*metaEntry:]
		le.PutUint64(h, e.Epoch.Counter)
		le.PutUint64(h[8:], e.Epoch.Node)
		le.PutUint64(h[16:], uint64(e.Start))
		var f uint32
		if e.PeerIn {
			f |= entryPeerIn
		}
		if e.Async {
			f |= entryAsync
		}
		le.PutUint32(h[24:], f)
	}
	le.PutUint32(b[n-4:], crc32c.Sum(b[:n-4]))
	return b
}

// Errors of one copy.
var (
	errNoMagic   = errors.New("no nvmmirror metadata")
	errMetaCRC   = errors.New("metadata checksum does not match")
	errMetaShort = errors.New("metadata is cut off")
	errMetaNone  = errors.New("the file ends before it")
)

// NewerError: the region was written by a newer program.
type NewerError struct{ Detail string }

func (e *NewerError) Error() string {
	return "the region needs a newer nvmmirror (" + e.Detail + "); upgrade this program"
}

// decodeMetadata decodes one copy. Length and checksum keep their places in
// every version, so that a newer version is told apart from corruption.
func decodeMetadata(b []byte) (*metadata, error) {
	le := binary.LittleEndian
	if len(b) < metaFixed+4 {
		return nil, errMetaNone
	}
	if [8]byte(b) != metaMagic {
		return nil, errNoMagic
	}
	n := int64(le.Uint32(b[12:]))
	if n < metaFixed+4 || n > int64(len(b)) {
		return nil, errMetaShort
	}
	b = b[:n]
	if crc32c.Sum(b[:n-4]) != le.Uint32(b[n-4:]) {
		return nil, errMetaCRC
	}
	if v := le.Uint32(b[8:]); v != metaVersion {
		return nil, &NewerError{fmt.Sprintf("metadata version %d, this program knows %d", v, metaVersion)}
	}
	m := &metadata{
		Generation: le.Uint64(b[16:]), Compat: le.Uint64(b[24:]), Incompat: le.Uint64(b[32:]), ROCompat: le.Uint64(b[40:]),
		Class: pmem.Class(le.Uint32(b[80:])), Size: int64(le.Uint64(b[144:])), RingBase: journal.LSN(le.Uint64(b[152:])),
		Checkpoint: checkpoint{
			LSN:   journal.LSN(le.Uint64(b[160:])),
			Epoch: journal.Epoch{Counter: le.Uint64(b[168:]), Node: le.Uint64(b[176:])},
			Chain: le.Uint32(b[184:]),
		},
	}
	if n := le.Uint64(b[240:]); n != 0 {
		m.Shutdowns, m.Counts = n&^shutdownsKnown, true
	}
	if m.Incompat != 0 || m.ROCompat != 0 {
		return nil, &NewerError{fmt.Sprintf("feature bits %#x and %#x are unknown here", m.Incompat, m.ROCompat)}
	}
	flags := le.Uint32(b[84:])
	if m.Clean = flags&flagClean != 0; m.Clean {
		m.Settled, m.End = le.Uint32(b[236:]) == 1, journal.LSN(le.Uint64(b[248:]))
	}
	st := &m.State
	copy(st.Lineage[:], b[48:])
	st.Node, st.Peer = le.Uint64(b[64:]), le.Uint64(b[72:])
	if flags&flagPrimary != 0 {
		st.Role = replicate.Primary
	}
	st.Title, st.Alone = flags&flagTitle != 0, flags&flagAlone != 0
	st.Lease = time.Duration(le.Uint32(b[188:])) * time.Millisecond
	st.Acked = journal.LSN(le.Uint64(b[192:]))
	if flags&flagResync != 0 {
		st.Resync = &replicate.Resync{
			Fork: journal.LSN(le.Uint64(b[200:])), Base: journal.LSN(le.Uint64(b[208:])),
			Epoch: journal.Epoch{Counter: le.Uint64(b[216:]), Node: le.Uint64(b[224:])},
			Chain: le.Uint32(b[232:]),
		}
	}
	for i, e := range []*extent{&m.Journal, &m.Table, &m.Data} {
		e.Off, e.Len = int64(le.Uint64(b[96+16*i:])), int64(le.Uint64(b[104+16*i:]))
	}
	count := int64(le.Uint32(b[92:]))
	if flags&^knownFlags != 0 || le.Uint32(b[88:]) != blockSize || n != metaFixed+count*metaEntry+4 {
		return nil, fmt.Errorf("metadata is consistent but makes no sense: flags %#x, block size %d, %d epochs in %d bytes", flags, le.Uint32(b[88:]), count, n)
	}
	for i := range int(count) {
		h := b[metaFixed+i*metaEntry:]
		f := le.Uint32(h[24:])
		st.History = append(st.History, journal.Entry{
			Epoch: journal.Epoch{Counter: le.Uint64(h), Node: le.Uint64(h[8:])}, Start: journal.LSN(le.Uint64(h[16:])),
			PeerIn: f&entryPeerIn != 0, Async: f&entryAsync != 0,
		})
	}
	return m, m.validate()
}

// validate checks what the checksum cannot: that the fields fit together.
func (m *metadata) validate() error {
	if err := m.State.History.Validate(); err != nil {
		return err
	}
	at := int64(2 * metaArea)
	for _, e := range []extent{m.Journal, m.Table, m.Data} {
		if e.Off != at || e.Len <= 0 || e.Len%pmem.AreaAlign != 0 || e.end() < e.Off {
			return fmt.Errorf("area at %d of %d bytes where one should start at %d", e.Off, e.Len, at)
		}
		at = e.end()
	}
	if m.Size <= 0 || m.Size%blockSize != 0 || m.Size > m.Data.Len || m.Size/blockSize*tableEntry > m.Table.Len {
		return fmt.Errorf("volume of %d bytes in a data area of %d, a block table of %d", m.Size, m.Data.Len, m.Table.Len)
	}
	if m.Checkpoint.LSN%journal.Align != 0 || m.RingBase%journal.Align != 0 || m.Checkpoint.LSN < m.RingBase {
		return fmt.Errorf("checkpoint at LSN %d in a ring that starts at %d", m.Checkpoint.LSN, m.RingBase)
	}
	if m.Checkpoint.LSN >= maxLSN {
		return fmt.Errorf("checkpoint at LSN %d, out of range", m.Checkpoint.LSN)
	}
	r := m.State.Resync
	switch {
	case r == nil:
	case m.State.Role == replicate.Primary:
		return errors.New("a full copy onto a primary")
	case r.Fork%journal.Align != 0 || r.Base%journal.Align != 0 || r.Fork < r.Base || r.Fork >= maxLSN:
		return fmt.Errorf("a full copy from LSN %d on in a ring that starts at %d", r.Fork, r.Base)
	}
	return nil
}

// layout computes the areas of a region.
func layout(size, journalSize int64) *metadata {
	up := func(n int64) int64 { return (n + pmem.AreaAlign - 1) / pmem.AreaAlign * pmem.AreaAlign }
	m := &metadata{Size: size}
	m.Journal = extent{2 * metaArea, journalSize}
	m.Table = extent{m.Journal.end(), up(size / blockSize * tableEntry)}
	m.Data = extent{m.Table.end(), up(size)}
	return m
}

// copies is the state of the two metadata copies of a region.
type copies struct {
	meta   *metadata
	err    [2]error // of each copy
	repair bool     // one of them is not the newest:
	stale  int      // this one
}

// closedBeyond reports whether a clean close left log at and above an LSN: no crash
// can have torn it.
func (m *metadata) closedBeyond(lsn LSN) bool { return m.Clean && lsn < m.End }

// readMetadata reads both copies and takes the newest valid one. A copy that cannot
// be read is as one that is damaged.
func readMetadata(mem interface{ Bytes() []byte }) (copies, error) {
	var m [2]*metadata
	var errs [2]error
	for i, raw := range metadataBytes(mem.Bytes()) {
		m[i], errs[i] = decodeMapped(mem, raw)
	}
	return judgeCopies(m, errs)
}

// decodeMapped is decodeMetadata of a piece of mem.
func decodeMapped(mem interface{ Bytes() []byte }, raw []byte) (m *metadata, err error) {
	defer pmem.Recover(mem, pmem.Arm(), &err)
	crc32c.Sum(raw[:min(len(raw), metaMax)]) // all that a change may write has to be readable
	return decodeMetadata(raw)
}

// lookAt refuses a file that holds no region, or a part of one, before it is opened
// for storing: that fills a file's holes. What cannot be judged in this way (a device,
// a bad page, metadata that are longer, or are being changed) is opened.
func lookAt(path string) error {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	var raw [2][]byte
	for i := range raw {
		b := make([]byte, metaMax)
		switch _, err := f.ReadAt(b, int64(i)*metaArea); {
		case err == nil:
			raw[i] = b
		case err != io.EOF:
			return nil
		}
	}
	c, err := readCopies(raw)
	var newer *NewerError
	switch {
	case errors.Is(err, ErrNotRegion), errors.As(err, &newer):
		return err
	case err == nil && info.Size() < c.meta.Data.end():
		return &LengthError{Have: info.Size(), Want: c.meta.Data.end()}
	}
	return nil
}

// metadataBytes is where the two copies lie; nil for one that is cut off.
func metadataBytes(mem []byte) (raw [2][]byte) {
	for i := range raw {
		if off := i * metaArea; len(mem) >= off+metaMax {
			end := min(off+metaArea, len(mem)) // a newer version's may be longer
			raw[i] = mem[off:end:end]
		}
	}
	return raw
}

func readCopies(raw [2][]byte) (copies, error) {
	var m [2]*metadata
	var errs [2]error
	for i := range m {
		m[i], errs[i] = decodeMetadata(raw[i])
	}
	return judgeCopies(m, errs)
}

// judgeCopies takes the newest valid one.
func judgeCopies(m [2]*metadata, errs [2]error) (copies, error) {
	c := copies{err: errs}
	for i := range m {
		var newer *NewerError
		if errors.As(c.err[i], &newer) && (m[1-i] == nil || c.err[1-i] != nil) {
			return c, newer
		}
	}
	switch {
	case c.err[0] == nil && c.err[1] == nil && !m[0].sameRegion(m[1]):
		return c, &CorruptError{What: "the metadata", Detail: "its two copies are of different regions, both whole: something else was written over the file; restore the region, or create it anew and let the peer fill it"}
	case c.err[0] == nil && c.err[1] == nil:
		c.meta, c.stale = m[0], 1
		if m[1].Generation > m[0].Generation {
			c.meta, c.stale = m[1], 0
		}
		c.repair = m[0].Generation != m[1].Generation
	case c.err[0] == nil:
		c.meta, c.repair, c.stale = m[0], true, 1
	case c.err[1] == nil:
		c.meta, c.repair, c.stale = m[1], true, 0
	case errors.Is(c.err[0], errNoMagic) && (errors.Is(c.err[1], errNoMagic) || errors.Is(c.err[1], errMetaNone)), errors.Is(c.err[0], errMetaNone):
		return c, ErrNotRegion
	default:
		return c, &CorruptError{What: "both metadata copies", Detail: fmt.Sprintf("A: %v; B: %v; restore the region, or create it anew and let the peer fill it", c.err[0], c.err[1])}
	}
	return c, nil
}

// sameRegion compares what no change touches.
func (m *metadata) sameRegion(o *metadata) bool {
	return m.State.Node == o.State.Node && m.Class == o.Class && m.Size == o.Size && m.Journal == o.Journal && m.Table == o.Table && m.Data == o.Data
}

// unread is why a copy cannot be read, where one cannot.
func (c *copies) unread() error {
	for _, err := range c.err {
		if fault := new(pmem.FaultError); errors.As(err, &fault) {
			return err
		}
	}
	return nil
}

// clearMetadata gives a copy of the metadata that cannot be read memory that can,
// where the other one is whole, from which newVolume then repairs it.
func clearMetadata(r *pmem.Region, log *zap.Logger) error {
	c, err := readMetadata(r)
	fault := c.unread()
	if err != nil || fault == nil {
		return nil // newVolume says what is wrong
	}
	log.Warn("a metadata copy cannot be read, and is given new memory", zap.String("region", r.Path()), zap.Error(fault))
	if err := r.Clear(int64(c.stale)*metaArea, metaMax); err != nil {
		return fmt.Errorf("%w; replacing it: %w", fault, err)
	}
	return nil
}

// repairMetadata rewrites the copy that is not the newest. The newest is not
// touched: a crash meanwhile must leave it.
func repairMetadata(mem pmem.Memory, c copies) error {
	mem.Copy(int64(c.stale)*metaArea, c.meta.encode(make([]byte, metaMax)))
	if err := mem.Fence(); err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	return nil
}

// writeMetadata writes m with the next generation to both copies, first to the one
// that is damaged, where one is: a crash meanwhile must leave a whole copy. m is
// unchanged where it fails.
func writeMetadata(mem pmem.Memory, m *metadata) error {
	first := int64(0)
	if _, err := decodeMetadata(metadataBytes(mem.Bytes())[1]); err != nil {
		first = 1
	}
	next := *m
	next.Generation++
	b := next.encode(make([]byte, metaMax))
	for i := range int64(2) {
		mem.Copy((first^i)*metaArea, b)
		if err := mem.Fence(); err != nil {
			return fmt.Errorf("metadata: %w", err)
		}
	}
	m.Generation = next.Generation
	return nil
}
