// Package nvmmirror keeps a volume in persistent memory and mirrors it, commit
// by commit, to a second machine.
//
// A [Volume] is a range of bytes that changes only by transactions. Commit
// returns when the transaction is durable on both nodes of the pair (or on
// this one alone where the pair has durably recorded, beforehand, that the
// peer is out), and visible to readers.
//
//	v, err := nvmmirror.Open("/mnt/pmem0/vol0.nvm", nvmmirror.Options{})
//	tx := v.Begin()
//	tx.Write(0, []byte("hello"))
//	lsn, err := tx.Commit(ctx)
package nvmmirror

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// LSN is a position in the log: a commit's is the byte after its segment, and
// an acknowledged LSN at or above it means that the commit is acknowledged.
type LSN = journal.LSN

// Volume is an open region. All methods are safe for concurrent use.
//
// Who may touch what:
//   - The log belongs to the holder of the committer's role on a primary, to
//     the session on a secondary.
//   - Data, block table, dirty, bad and unverified change under applyMu held
//     for writing, by the log's owner or a repair; readers hold it shared.
//   - meta changes under metaMu, and only by writing both copies first.
//     History slices in it are never changed in place.
//
// What always holds:
//   - Data holds exactly the log up to applied (while copying: at least, for
//     blocks that have been copied).
//   - checkpoint ≤ applied ≤ End. Blocks changed above the checkpoint are in
//     dirty. The ring keeps everything from the checkpoint on.
type Volume struct {
	path   string
	mem    pmem.Memory
	region *pmem.Region // nil: the memory is a test's
	opt    Options
	log    *zap.Logger
	size   int64  // of the volume; it and the areas never change while it is open
	ring   extent // of the journal
	data   extent

	metaMu sync.Mutex
	meta   metadata

	journal   *journal.Log
	committer *journal.Committer
	pair      *replicate.Pair
	table     table

	applyMu    sync.RWMutex
	applied    atomic.Uint64
	chain      uint32   // of the segment before applied
	blockSums  []uint32 // of the segment that is being applied: the log's owner's
	dirty      blockSet // changed above the checkpoint
	spare      blockSet // empty; the checkpoint's
	looked     LSN      // the log's end when its owner looked last whether to ask for blocks ahead
	asked      LSN      // the end of the segment for which it has
	unverified marks
	bad        marks
	badAsked   int64          // where compareUnverified goes on: the checkpointer's
	compared   int64          // the same, of unverified
	redoUntil  atomic.Uint64  // segments below were perhaps applied before a crash; changed under applyMu
	copying    bool           // blocks arrive in a full copy: apply only what is newer
	unflushed  int            // bytes of a full copy, and of log beside it
	copied     map[int64]bool // of the segment that is being applied: blocks that hold it; the log's owner's

	checkpointed atomic.Uint64
	ckptMu       sync.Mutex // one checkpoint at a time
	ckptKick     chan struct{}
	resting      atomic.Bool   // the checkpointer waits longer: whoever applies kicks it
	wake         chan struct{} // of a driver that waits without a session

	damage   atomic.Pointer[journal.DamageError] // of the journal, when the region was opened or as the peer told; nil once it started over
	unstored atomic.Bool                         // a repair, or a verdict of damage, has not been flushed
	failed   atomic.Pointer[error]               // a persistence error: final until reopened
	closed   atomic.Bool
	closing  sync.Once
	stop     chan struct{}
	wg       sync.WaitGroup

	repairMu sync.Mutex
	repairs  map[int64][]chan error

	recovery      Recovery
	counters      counters
	kernelAtStart transport.Counters
}

type counters struct {
	commits, bytes, reads         atomic.Uint64
	repaired, badBlocks, checkpts atomic.Uint64
	metaRepairs, scrubbed         atomic.Uint64
}

// Recovery is what opening the region found.
type Recovery struct {
	Clean        bool   `json:"clean"`        // it was closed cleanly
	From         LSN    `json:"from"`         // checkpoint
	End          LSN    `json:"end"`          // first invalid segment
	Applied      LSN    `json:"applied"`      // replayed up to here
	Segments     int    `json:"segments"`     // valid ones
	Transactions int    `json:"transactions"` // in them
	Stop         string `json:"stop"`         // why the segment at End is not valid
	Damage       string `json:"damage,omitempty"`
}

// CreateOptions say what to create.
type CreateOptions struct {
	Size        int64 // of the volume in bytes, a multiple of 4096, at most 64 TiB
	JournalSize int64 // of the ring in bytes, a multiple of 2 MiB, at most 1 TiB; 0: 64 MiB
	// Accept is the weakest device class to create the region on; 0 means
	// cacheline. Emulated memory is volatile.
	Accept pmem.Class
}

// MinJournal is the smallest ring, DefaultJournal the usual one, in bytes.
const (
	MinJournal     = pmem.AreaAlign
	DefaultJournal = 64 << 20
)

// Create creates a blank region: a volume of zeros that belongs to no lineage
// yet. It overwrites no file, and nothing is at path unless it succeeds; of a
// devdax device, which is refused where it holds a region, it overwrites the
// first bytes, as many as the region has. Errors are a [*SizeError], one that
// matches [io/fs.ErrExist], and those of [pmem.Create].
func Create(path string, o CreateOptions) (err error) {
	if o.JournalSize == 0 {
		o.JournalSize = DefaultJournal
	}
	switch {
	case o.Size <= 0 || o.Size%blockSize != 0 || o.Size > 1<<46:
		return &SizeError{path, fmt.Sprintf("size %d is not a positive multiple of %d bytes up to 64 TiB", o.Size, blockSize)}
	case o.JournalSize < MinJournal || o.JournalSize%pmem.AreaAlign != 0 || o.JournalSize > 1<<40:
		return &SizeError{path, fmt.Sprintf("journal size %d is not a multiple of %d bytes from %d to 1 TiB", o.JournalSize, pmem.AreaAlign, MinJournal)}
	}
	if o.Accept == 0 {
		o.Accept = pmem.Cacheline
	}
	m := layout(o.Size, o.JournalSize)
	r, err := pmem.Create(path, m.Data.end(), pmem.Options{Accept: o.Accept})
	if err != nil {
		return err
	}
	defer r.Close()
	if r.Device() {
		if err := claim(r, m.Data.end()); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	if err := format(r, m); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return r.Publish()
}

// claim clears a device that holds no region, but something else: a blank
// region's blocks are zeros, and its block table says so. It is durable with
// format's first fence.
func claim(mem pmem.Memory, n int64) (err error) {
	defer pmem.Recover(mem, pmem.Arm(), &err)
	switch c, err := readMetadata(mem); {
	case c.unread() != nil:
		return c.unread()
	case !errors.Is(err, ErrNotRegion):
		return errors.New("the device holds a region already; zero its first 4 MiB if it may go")
	}
	mem.Zero(0, n)
	return nil
}

// format makes mem, which is zero, a blank region. Metadata comes last: before
// it there is no region.
func format(mem pmem.Memory, m *metadata) (err error) {
	defer pmem.Recover(mem, pmem.Arm(), &err)
	m.Class = mem.Class()
	m.State.Node = replicate.NewNodeID()
	t := table{mem, m.Table}
	t.format(m.Size / blockSize)
	if err := mem.Fence(); err != nil {
		return err
	}
	return writeMetadata(mem, m)
}

// Open opens a region: it recovers it, and takes up the role that the region
// remembers. Close must follow. Beside those of [pmem.Open], an error of the region
// is [ErrNotRegion], a [*NewerError], a [*CorruptError] (both metadata copies), a
// [*LengthError], a [*WeakerError], a [*ShutdownError], or, standalone, a
// [*DamageError]; one of the listen address is a [*transport.SetupError].
func Open(path string, o Options) (*Volume, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := lookAt(path); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	r, err := pmem.Open(path, pmem.Options{Accept: pmem.Emulated})
	if err != nil {
		return nil, err
	}
	if err := clearMetadata(r, o.Logger); err != nil {
		r.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	v, err := newVolume(path, r, o)
	if err == nil {
		err = v.checkPlatform(r) // before anything changes that it looks at
	}
	if err == nil {
		v.region = r
		err = v.recover()
	}
	if err == nil {
		err = v.start()
	}
	if err != nil {
		r.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return v, nil
}

// checkPlatform compares the device with what it was when the region was last
// open.
func (v *Volume) checkPlatform(r *pmem.Region) error {
	if r.Class() < v.meta.Class {
		return &WeakerError{v.meta.Class, r.Class(), r.Device()}
	}
	count, ok, err := pmem.ShutdownCount(r.Path())
	if err != nil {
		return err
	}
	if !ok || v.meta.Counts && count == v.meta.Shutdowns {
		return nil
	}
	return v.noteShutdowns(count)
}

// noteShutdowns: the device counts another number of dirty shutdowns than when
// the region was last open, or is seen to count for the first time.
func (v *Volume) noteShutdowns(count uint64) error {
	if v.meta.Counts && !v.meta.Clean {
		return &ShutdownError{Have: count, Want: v.meta.Shutdowns}
	}
	return v.updateMeta(func(m *metadata) error { m.Shutdowns, m.Counts = count, true; return nil })
}

// newVolume reads the metadata of the region in mem, and makes them durable in both
// copies. recover must follow.
func newVolume(path string, mem pmem.Memory, o Options) (v *Volume, err error) {
	defer pmem.Recover(mem, pmem.Arm(), &err)
	c, err := readMetadata(mem)
	if err != nil {
		return nil, err
	}
	if want := c.meta.Data.end(); int64(len(mem.Bytes())) < want {
		return nil, &LengthError{Have: int64(len(mem.Bytes())), Want: want}
	}
	m := c.meta
	v = &Volume{
		path: path, mem: mem, opt: o, log: o.Logger, meta: *m,
		size: m.Size, ring: m.Journal, data: m.Data,
		table:    table{mem, m.Table},
		dirty:    newBlockSet(m.Size / blockSize),
		repairs:  map[int64][]chan error{},
		ckptKick: make(chan struct{}, 1), wake: make(chan struct{}, 1), stop: make(chan struct{}),
	}
	v.spare = newBlockSet(m.Size / blockSize)
	v.unverified.blockSet = newBlockSet(m.Size / blockSize)
	v.bad.blockSet = newBlockSet(m.Size / blockSize)
	v.journal = journal.NewLog(mem, m.Journal.Off, m.Journal.Len, m.RingBase)
	// A killed process may have left a copy visible and not durable. The next
	// change to the other one would put both at risk.
	for i := range int64(2) {
		pmem.Redirty(mem, i*metaArea, metaMax)
		mem.Flush(i*metaArea, metaMax)
	}
	if err := mem.Fence(); err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	if c.repair {
		v.counters.metaRepairs.Add(1)
		v.log.Warn("repairing a metadata copy", zap.String("region", path), zap.Errors("copies", c.err[:]))
		if err := repairMetadata(mem, c); err != nil {
			return nil, err
		}
	}
	v.committer = journal.NewCommitter(v.journal, (*sink)(v), o.busyPoll(), errors.New("not serving yet"))
	return v, nil
}

// start takes up the role and begins the work in the background.
func (v *Volume) start() error {
	if err := v.takeUp(); err != nil {
		return err
	}
	v.wg.Go(v.checkpointer)
	return nil
}

// takeUp takes up the role that the region remembers.
func (v *Volume) takeUp() (err error) {
	v.kernelAtStart, _ = v.opt.kernel() // zeros where /proc does not tell
	cfg, err := v.opt.pairConfig(v.log)
	if err != nil {
		return err
	}
	if damage := v.damage.Load(); damage != nil && cfg.Transport == nil && !v.opt.AcceptLoss {
		return fmt.Errorf("%w; this region is opened without a peer: open it with its peer, restore it, or accept the loss of what lies behind the damage (serve --accept-loss)", damage)
	}
	v.pair = replicate.New((*node)(v), cfg)
	defer func() {
		if err != nil {
			v.pair.Close()
		}
	}()
	if err := v.pair.Listen(); err != nil {
		return err
	}
	// The region is open: what the next start finds is a crash, unless Close
	// says otherwise.
	if v.meta.Clean {
		if err := v.updateMeta(func(m *metadata) error { m.Clean = false; return nil }); err != nil {
			return err
		}
	}
	if err := v.pair.Start(); err != nil {
		return err
	}
	// Where a peer is required that may have been promoted, that is not accepted
	// as well: the node waits for an operator.
	if v.damage.Load() != nil && cfg.Transport == nil && v.pair.Role() == replicate.Primary && (v.meta.State.Title || !v.pair.Required()) {
		if err := v.pair.ContinueAlone(context.Background(), true); err != nil {
			return err
		}
	}
	v.committer.Tick()
	return nil
}

// Close ends the session with the peer and closes the region, cleanly where
// that is possible. The role stays. Transactions that wait are given the time
// that a lost peer would get, at most a minute. The volume is closed when it returns;
// again, it returns nil.
func (v *Volume) Close() (err error) {
	v.closing.Do(func() { err = v.close() })
	return err
}

func (v *Volume) close() error {
	v.closed.Store(true)
	closed := v.errClosed()
	ctx, cancel := context.WithTimeout(context.Background(), min(v.opt.timeout(), closeAtMost))
	defer cancel()
	if v.committer.Acquire(ctx) == nil {
		v.committer.Close(closed, nil)
		if v.committer.Waiting() > 0 && v.pair.Phase() == replicate.PhaseInSync {
			v.committer.Drain(ctx)
		}
		v.committer.Release()
	}
	v.pair.Close()
	close(v.stop)
	v.wg.Wait()
	v.committer.Acquire(context.Background())
	v.committer.Close(closed, closed)
	err := errOf(v.failed.Load())
	if err == nil {
		err = v.checkpoint(true)
	}
	if err != nil {
		err = fmt.Errorf("%s: not closed cleanly: %w", v.path, err)
	}
	v.committer.End(closed) // what the role guards is about to go
	v.failRepairs(ErrClosed)
	// Readers may still be inside; the mapping goes after them.
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	if v.region != nil {
		err = errors.Join(err, v.region.Close())
	}
	return err
}

// Size is the volume's size in bytes.
func (v *Volume) Size() int64 { return v.size }

// Promote makes this node the primary. Unforced, it is refused with a
// [*RefusedError] where that could lose acknowledged data; forced too, while a
// full copy onto this node has not finished.
func (v *Volume) Promote(ctx context.Context, force bool) error {
	return v.whileOpen(func() error { return v.pair.Promote(ctx, force) })
}

// Demote makes this node a secondary once all that it took is acknowledged. It is
// refused with a [*RefusedError] where the peer is required and not in sync; where
// ctx ends before, the node stays primary.
func (v *Volume) Demote(ctx context.Context) error {
	return v.whileOpen(func() error { return v.pair.Demote(ctx) })
}

// ContinueAlone makes a primary that waits for its lost peer go on without it.
// Unforced, it is refused with a [*RefusedError] without the title, with a damaged
// journal, beside a peer that is in sync, or that is primary as well.
func (v *Volume) ContinueAlone(ctx context.Context, force bool) error {
	return v.whileOpen(func() error { return v.pair.ContinueAlone(ctx, force) })
}

// whileOpen does something, unless the volume is closed; where it is being closed
// meanwhile, that is why it failed.
func (v *Volume) whileOpen(f func() error) error {
	if v.closed.Load() {
		return v.errClosed()
	}
	err := f()
	if err != nil && v.closed.Load() {
		return v.errClosed()
	}
	return err
}

func (v *Volume) errClosed() error { return fmt.Errorf("%s: %w", v.path, ErrClosed) }

// fail notes a persistence error: nothing more is acknowledged until the
// region is reopened and reconciled.
func (v *Volume) fail(err error) error {
	if err == nil {
		return nil
	}
	if final := err; v.failed.CompareAndSwap(nil, &final) {
		if v.pair != nil {
			v.pair.EndWait()
		}
		v.log.Error("persistence failed; this node acknowledges nothing until it is restarted", zap.String("region", v.path), zap.Error(err))
	}
	return err
}

const (
	// closeAtMost is less than service managers wait before they kill.
	closeAtMost     = time.Minute
	checkpointEvery = time.Second
	restingEvery    = 4 * time.Second
)
