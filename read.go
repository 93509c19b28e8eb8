package nvmmirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// MaxRead is how many bytes one ReadAt reads at most. Commits wait meanwhile, and
// with them what keeps the peer and the lease.
const MaxRead = 64 << 20

// ReadAt reads the committed bytes at off: those of a prefix of the commit
// order that every required node holds, never a part of a transaction. Each
// block is verified; one that fails, or cannot be read, is fetched from the peer,
// repaired and counted, else the error is a [*CorruptError]. On a secondary it is an
// [*ErrNotPrimary], without the read lease ErrNoLease; what p holds then means
// nothing. Reading past the end returns io.EOF as io.ReaderAt says; reading more
// than MaxRead bytes is refused.
func (v *Volume) ReadAt(p []byte, off int64) (n int, err error) {
	if v.closed.Load() {
		return 0, v.errClosed()
	}
	if off < 0 {
		return 0, fmt.Errorf("%w: offset %d", ErrOutOfRange, off)
	}
	if off >= v.size {
		return 0, io.EOF
	}
	eof := int64(len(p)) > v.size-off
	if eof {
		p = p[:v.size-off]
	}
	if len(p) > MaxRead {
		return 0, fmt.Errorf("read of %d bytes, at most %d at a time: read piece by piece", len(p), MaxRead)
	}
	v.counters.reads.Add(1)
	for tries := 0; ; tries++ {
		bad, err := v.readOnce(p, off)
		if errors.Is(err, ErrNoLease) {
			// The peer's answer to a heartbeat may be here, and not taken yet.
			v.committer.Tick()
			bad, err = v.readOnce(p, off)
		}
		var unread error
		if b, ok := v.unreadable(err); ok && v.failed.Load() == nil { // else it tells of what made persistence fail
			bad, err, unread = b, nil, err
		}
		if err != nil {
			return 0, err
		}
		if bad < 0 {
			break
		}
		switch enough := len(p)/blockSize + 3; {
		case tries < enough:
			err = v.repair(bad)
		case tries < 2*enough:
			err = v.repairAtRest(bad)
		default:
			err = errors.New("it fails again and again after it was repaired")
		}
		if v.closed.Load() {
			return 0, v.errClosed()
		}
		if err != nil {
			detail := err.Error()
			if unread != nil {
				detail += "; " + unread.Error()
			}
			what := fmt.Sprintf("block %d (bytes %d to %d)", bad, bad*blockSize, (bad+1)*blockSize)
			return 0, &CorruptError{What: what, Detail: detail, Err: unread}
		}
	}
	if eof {
		return len(p), io.EOF
	}
	return len(p), nil
}

// readOnce reads, and returns the first block that fails its checksum, else
// -1. Whether this node may read at all is judged after the bytes were taken:
// then nobody else can have been primary when they were.
func (v *Volume) readOnce(p []byte, off int64) (bad int64, err error) {
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	v.applyMu.RLock()
	defer v.applyMu.RUnlock()
	if v.closed.Load() {
		return 0, v.errClosed()
	}
	if err := v.readable(); err != nil {
		return 0, err
	}
	for len(p) > 0 {
		b, lo := off/blockSize, int(off%blockSize)
		n := min(blockSize-lo, len(p))
		e, ok := v.table.get(b)
		if !ok {
			return b, nil
		}
		// The bytes are taken first and verified then: a bit that flips between
		// is not served.
		block := v.block(b)
		copy(p[:n], block[lo:])
		if n == blockSize {
			block = p[:n]
		}
		if crc32c.Sum(block) != e.crc {
			return b, nil
		}
		off, p = off+int64(n), p[n:]
	}
	return -1, v.readable()
}

// unreadable is the block of which an error says that memory cannot be read there.
func (v *Volume) unreadable(err error) (b int64, ok bool) {
	var fault *pmem.FaultError
	if !errors.As(err, &fault) || fault.Offset < v.data.Off {
		return 0, false
	}
	b = (fault.Offset - v.data.Off) / blockSize
	return b, b < v.size/blockSize
}

// sum is the checksum of a block, or the fault where it cannot be read.
func (v *Volume) sum(b int64) (crc uint32, err error) {
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	return crc32c.Sum(v.block(b)), nil
}

// clearBlock gives a block that cannot be read memory that can, for its content to
// be written there as a whole.
func (v *Volume) clearBlock(b int64) error {
	if v.region == nil {
		return errors.New("this memory cannot be replaced")
	}
	return v.region.Clear(v.data.Off+b*blockSize, blockSize)
}

// readable says why this node serves no reads.
func (v *Volume) readable() error {
	switch {
	case v.failed.Load() != nil:
		return fmt.Errorf("not read: persistence has failed here, restart the node or let the peer take over: %w", *v.failed.Load())
	case v.pair.Leased():
		return nil
	case v.pair.Role() != replicate.Primary:
		return v.pair.NotPrimary()
	}
	return ErrNoLease
}

// repair fetches a block from the peer, once: where the peer's block is of
// another moment, nothing has changed when it returns.
func (v *Volume) repair(b int64) error {
	if bad, err := v.judge(b); err != nil || !bad {
		return err
	}
	done := v.request(b)
	t := time.NewTimer(v.opt.timeout())
	defer t.Stop()
	select {
	case err := <-done:
		return err
	case <-v.stop:
		return ErrClosed
	case <-t.C:
		return fmt.Errorf("the peer did not answer within %v", v.opt.timeout())
	}
}

// judge notes a block that a reader has found damaged, unless it has been
// rewritten meanwhile.
func (v *Volume) judge(b int64) (bad bool, err error) {
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	if v.closed.Load() {
		return false, ErrClosed
	}
	e, ok := v.table.get(b)
	sum, fault := v.sum(b)
	switch {
	case fault != nil:
		v.noteBad(b, fault.Error())
	case ok && sum == e.crc:
		return false, nil
	default:
		v.noteBad(b, "checksum does not match")
	}
	return true, nil
}

// request asks the peer for a block. The channel gets what came of it.
func (v *Volume) request(b int64) <-chan error {
	done := make(chan error, 1)
	v.repairMu.Lock()
	v.repairs[b] = append(v.repairs[b], done)
	v.repairMu.Unlock()
	if err := v.pair.RequestBlock(b); err != nil {
		v.answerRepair(b, err)
	}
	return done
}

// repairAtRest repairs a block that changes so often that the peer's is always
// of another moment. It takes the committers' role, so that nothing is
// appended, and does their work until both nodes' data hold the same log.
func (v *Volume) repairAtRest(b int64) error {
	ctx, cancel := context.WithTimeout(context.Background(), v.opt.timeout())
	defer cancel()
	if err := v.committer.Acquire(ctx); err != nil {
		return fmt.Errorf("commits did not pause for it within %v", v.opt.timeout())
	}
	defer v.committer.Release()
	for done := v.request(b); ctx.Err() == nil; {
		acked, _ := (*sink)(v).Progress()
		if err := v.apply(acked); err != nil {
			return err
		}
		if v.readable() != nil {
			return nil // the next look at the block says why
		}
		select {
		case err := <-done:
			if err != nil {
				return err
			}
			if ok, err := v.sound(b); ok || err != nil {
				return err
			}
			done = v.request(b)
		case <-time.After(time.Millisecond):
		}
	}
	return fmt.Errorf("the peer did not answer within %v", v.opt.timeout())
}

// sound reports whether a block matches its entry.
func (v *Volume) sound(b int64) (ok bool, err error) {
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	v.applyMu.RLock()
	defer v.applyMu.RUnlock()
	if v.closed.Load() {
		return false, ErrClosed
	}
	e, ok := v.table.get(b)
	sum, fault := v.sum(b)
	return ok && fault == nil && sum == e.crc, nil
}

func (v *Volume) answerRepair(b int64, err error) {
	v.repairMu.Lock()
	defer v.repairMu.Unlock()
	for _, done := range v.repairs[b] {
		done <- err
	}
	delete(v.repairs, b)
}

func (v *Volume) failRepairs(err error) {
	v.repairMu.Lock()
	defer v.repairMu.Unlock()
	for b, list := range v.repairs {
		for _, done := range list {
			done <- err
		}
		delete(v.repairs, b)
	}
}

// takeRepair judges a block that the peer sent, with its data at LSN applied.
// It takes it where it is the state that this node's data must have, and one
// of the two can vouch for it: a block that is unverified at the peer is taken
// only where what is here confirms it.
func (v *Volume) takeRepair(b int64, data []byte, info replicate.BlockInfo, applied LSN) (err error) {
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	e, ok := v.table.get(b)
	mine, fault := v.sum(b)
	differs := fault != nil || mine != info.CRC
	// With equal entries, or where the peer's data holds all that is applied here and
	// the block has not changed beyond it, the blocks are of one moment. The LSN of a
	// damaged block's entry says nothing, and that of an unverified one may be too low,
	// where it was damaged before (see readNotes).
	same := ok && !e.damaged && info.LSN == e.lsn && !(e.unverified && v.beforeJoin(applied))
	switch {
	case !same && (applied < v.Applied() || info.LSN > v.Applied()):
		return errRetryRepair
	case fault != nil && info.Unverified && (!ok || info.CRC != e.crc):
		return errNoneVerified
	case fault != nil:
	case !differs:
		// Both nodes came to the same bytes, each by itself. Where the entry
		// here says otherwise, a change that went over a flip carried the flip
		// into the checksum.
	case ok && info.CRC == e.crc:
		// The flip is in the block here: what the entry says is there.
	case ok && !e.unverified && mine == e.crc:
		return errRetryRepair // nothing is wrong here
	case !info.Unverified:
		// The checksum here was taken anew after a crash, or carried over a
		// flip, or lost. The peer's block is that of the same log, and matches
		// what was carried there.
	case ok && e.unverified && mine == e.crc:
		return v.judgeUnverified(b, e, applied)
	default:
		return errNoneVerified
	}
	now := entry{lsn: info.LSN, crc: info.CRC}
	if differs {
		if err := v.rewrite(b, data, false); err != nil {
			return err
		}
		// Before the entry: with it alone, recovery would take what is here for a change
		// that a crash cut off, and its checksum anew.
		if err := v.mem.Fence(); err != nil {
			return v.fail(err)
		}
	}
	if !ok || e != now {
		v.table.set(b, now)
	}
	if differs || !ok || e != now {
		v.changedAside(b)
	}
	if differs || !ok || e.damaged {
		// At once: were the process killed before the checkpoint, the next one would serve
		// the block, and not know that its entry is not durable.
		v.mem.Flush(v.table.area.Off+b*tableEntry, tableEntry)
		if err := v.mem.Fence(); err != nil {
			return v.fail(err)
		}
	}
	v.trust(b)
	if ok && !differs && mine == e.crc {
		return nil
	}
	v.counters.repaired.Add(1)
	v.log.Warn("repaired a block from the peer", zap.String("region", v.path), zap.Int64("block", b))
	return nil
}

// doubt judges a block that was judged at the peer, where info tells of it: the one
// here is as doubtful, whichever node comes to serve it. The two are of one moment if
// this one has not changed beyond what the peer had applied.
func (v *Volume) doubt(b int64, info replicate.BlockInfo, applied LSN) (err error) {
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	e, ok := v.table.get(b)
	mine, fault := v.sum(b)
	if fault == nil && ok && e.unverified && mine == e.crc && e.lsn <= applied && applied <= v.Applied() && info.CRC != mine {
		return v.judgeUnverified(b, e, applied)
	}
	return nil
}

// judgeUnverified: the block differs from the peer's, and both are unverified. One of
// the two holds a flip, and nobody can tell which. It counts as damaged from here on,
// also after a restart: its entry holds the complement of its checksum, and does so
// over changes of a part of it. Before, both nodes have to have redone what they had
// applied before their crashes, so that neither block holds parts of later changes:
// what is known to be acknowledged reaches as far as the last join.
func (v *Volume) judgeUnverified(b int64, e entry, applied LSN) error {
	if v.Applied() < LSN(v.redoUntil.Load()) || v.beforeJoin(applied) {
		return errRetryRepair
	}
	v.table.set(b, entry{e.lsn, ^e.crc, true, true})
	v.changedAside(b)
	v.noteBad(b, "it differs from the peer's, and neither was verified since a crash")
	return errNoneVerified
}

// beforeJoin reports whether this node's data, or the peer's, which holds the log up to
// applied, may lack log that either held before a crash.
func (v *Volume) beforeJoin(applied LSN) bool {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	return min(applied, v.Applied()) < v.meta.State.Acked
}

// changedAside: a block or its entry has changed without the log. A checkpoint
// makes it durable, also where the node stays idle: until then a power failure
// would take a verdict back, or half of a repair.
func (v *Volume) changedAside(b int64) {
	v.dirty.add(b)
	v.unstored.Store(true)
	v.kickCheckpoint()
}

// errNoneVerified: the peer cannot help.
var errNoneVerified = errors.New("the peer's block was not verified since a crash either; it is readable again once it is rewritten as a whole")

// errRetryRepair: the peer's block is of another moment.
var errRetryRepair = fmt.Errorf("the peer's block is of another moment; try again")

// compareUnverified asks the peer for some of the blocks whose checksums were
// taken anew after a crash, and for damaged ones that could not be repaired
// yet: the peer was not there, or its block was of another moment. It reports
// whether there are any.
func (v *Volume) compareUnverified() (some bool) {
	const atOnce = 256
	v.applyMu.RLock()
	ask := v.bad.some(atOnce/2, v.badAsked) // some may stay damaged: each has its turn
	if n := len(ask); n > 0 {
		v.badAsked = ask[n-1] + 1
	}
	more := v.unverified.some(atOnce-len(ask), v.compared)
	if n := len(more); n > 0 {
		v.compared = more[n-1] + 1
	}
	ask = append(ask, more...)
	v.applyMu.RUnlock()
	for _, b := range ask {
		if v.pair.RequestBlock(b) != nil {
			break // not in sync
		}
	}
	return len(ask) > 0
}
