package nvmmirror

import (
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// node is the volume as replication sees it.
type node Volume

var _ replicate.Node = (*node)(nil)

func (n *node) v() *Volume { return (*Volume)(n) }

func (n *node) Memory() pmem.Memory           { return n.mem }
func (n *node) Log() *journal.Log             { return n.journal }
func (n *node) Committer() *journal.Committer { return n.committer }
func (n *node) Checkpoint() LSN               { return n.v().Checkpoint() }
func (n *node) Applied() LSN                  { return n.v().Applied() }
func (n *node) Apply(upTo LSN) error          { return n.v().apply(upTo) }
func (n *node) Geometry() replicate.Geometry {
	return replicate.Geometry{Size: n.size, Journal: n.ring.Len, Block: blockSize}
}

func (n *node) Damaged() bool {
	d := n.damage.Load()
	return d != nil && n.journal.End() < d.Acked
}

func (n *node) Lost(upTo LSN) error {
	v := n.v()
	end := v.journal.End()
	if err := v.updateMeta(func(m *metadata) error {
		m.State.Acked = max(m.State.Acked, upTo) // above the end: the next recovery finds the same
		return nil
	}); err != nil {
		return err
	}
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	d := &DamageError{At: end, Acked: upTo, Why: errors.New("the peer holds acknowledged log that this node has lost")}
	v.damage.Store(d)
	v.redoUntil.Store(max(v.redoUntil.Load(), uint64(upTo))) // it may have been applied here
	v.log.Error("journal damaged", zap.String("region", v.path), zap.Error(d))
	return nil
}

func (n *node) State() replicate.State {
	n.metaMu.Lock()
	defer n.metaMu.Unlock()
	return n.meta.State
}

func (n *node) Update(f func(*replicate.State) error) error {
	v := n.v()
	update := func(m *metadata) error {
		m.State = m.State.Clone()
		return f(&m.State)
	}
	err := v.updateMeta(func(m *metadata) error {
		if err := update(m); err != nil {
			return err
		}
		// Of log above the checkpoint that the history no longer tells of, recovery
		// could not say that it is this node's.
		if h := m.State.History; len(h) > 0 && h[0].Start > m.Checkpoint.LSN && m.Checkpoint.LSN < v.Applied() {
			return errPruned
		}
		return nil
	})
	if err == errPruned {
		if err := v.checkpoint(false); err != nil {
			return v.fail(err)
		}
		err = v.updateMeta(update)
	}
	if err == nil && n.v().crowded() {
		n.v().kickCheckpoint()
	}
	return err
}

var errPruned = errors.New("the history begins above the checkpoint")

// Truncate drops the log from lsn on. The history, durable before, gives
// another epoch to lsn, or the log is shipped again from there as it was: so
// what is dropped cannot come back.
func (n *node) Truncate(lsn LSN, chain uint32) error {
	if lsn < n.Applied() {
		return fmt.Errorf("the log was applied up to LSN %d, it cannot be cut at %d", n.Applied(), lsn)
	}
	n.journal.Reset(lsn, chain)
	if n.damage.Load() == nil {
		// What takes its place was never applied before: it is no redo.
		n.applyMu.Lock()
		n.redoUntil.Store(min(n.redoUntil.Load(), uint64(lsn)))
		n.applyMu.Unlock()
	}
	return nil
}

// Extend: what follows was perhaps applied before the crash as well.
func (n *node) Extend() (err error) {
	v := n.v()
	defer func() { v.fail(err) }()
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	if err := v.journal.Extend(n.State().History); err != nil {
		return err
	}
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	v.redoUntil.Store(max(v.redoUntil.Load(), uint64(v.journal.End())))
	return nil
}

// AcceptLoss: the log ends where the damage begins. Blocks may hold parts of
// what is lost behind it, so the data is no longer a state of the log that a
// peer could reach by it: the log starts over a ring further on, and a peer
// that rejoins is copied to in full. Those blocks count as unverified.
//
// What f changes of the state is durable in the same step: the epoch from which on
// other log is foreign. Before that, how far the log went is durable in the
// metadata, since the block table says it no longer.
func (n *node) AcceptLoss(f func(*replicate.State) error) (err error) {
	v := n.v()
	v.ckptMu.Lock()
	defer v.ckptMu.Unlock()
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	lost := v.journal.End()
	start := lost + LSN(v.ring.Len) + journal.Align
	if err := v.updateMeta(func(*metadata) error { return nil }); err != nil { // recovery has put it there
		return err
	}
	for b := range v.size / blockSize {
		e, ok := v.table.get(b)
		// One that does not match and says lost, or more, was torn by a power failure
		// in here, or before: nothing vouches for the block.
		if ok && (e.lsn > lost || e.damaged) || !ok && v.table.lsn(b) >= lost {
			sum, fault := v.sum(b)
			now := entry{lsn: lost, crc: sum, unverified: true}
			if fault != nil || e.damaged && sum != e.crc { // else it was repaired, and the mark is of before
				now = entry{e.lsn, ^sum, true, true} // as it was: not to be served
			}
			v.table.set(b, now)
			v.unverified.add(b)
			if fault != nil { // a flush of the block would meet it
				v.mem.Flush(v.table.area.Off+b*tableEntry, tableEntry)
				continue
			}
			v.dirty.add(b)
		}
	}
	v.flushBlocks(v.dirty)
	if err := v.mem.Fence(); err != nil {
		return v.fail(err)
	}
	err = v.updateMeta(func(m *metadata) error {
		m.State = m.State.Clone()
		if err := f(&m.State); err != nil {
			return err
		}
		e, _ := m.State.History.At(start)
		m.Checkpoint = checkpoint{LSN: start, Epoch: e.Epoch}
		m.State.Acked = start
		return nil
	})
	if err != nil {
		return err
	}
	v.dirty.empty()
	v.startOver(start, 0)
	return nil
}

// startOver makes the log begin at an LSN, behind a segment with checksum chain,
// and the data hold it up to there, as the metadata already says. The caller
// holds applyMu.
func (v *Volume) startOver(at LSN, chain uint32) {
	v.journal.Reset(at, chain)
	v.chain = chain
	v.applied.Store(uint64(at))
	v.checkpointed.Store(uint64(at))
	v.damage.Store(nil)
	v.redoUntil.Store(0)
}

// ReadBlocks reads and verifies blocks while nothing is applied. Where one is
// damaged, this node says so from now on, whoever asked for it.
func (n *node) ReadBlocks(first int64, dst []byte, info []replicate.BlockInfo) (applied LSN, err error) {
	for {
		applied, bad, err := n.readBlocks(first, dst, info)
		if b, ok := n.v().unreadable(err); ok {
			bad, err = b, nil
		}
		if err != nil || bad < 0 {
			return applied, err
		}
		if sound, err := n.v().resum(bad); err != nil {
			return 0, err
		} else if !sound {
			return applied, corruptForPeer(bad)
		}
	}
}

// resum does what redo would do with a block that does not match its entry, and
// that log changes which is yet to be redone: its checksum is taken anew, and the
// block counts as unverified. A primary that was restarted applies such log only
// once it serves, but its peer may want the block before. It reports false where
// the block is damaged, or cannot be read, and notes that.
func (v *Volume) resum(b int64) (sound bool, err error) {
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	e, ok := v.table.get(b)
	sum, fault := v.sum(b)
	switch {
	case fault != nil:
		v.noteBad(b, fault.Error())
		return false, nil
	case ok && sum == e.crc:
	case v.dirty.has(b) || ok && e.damaged || !v.redoes(b):
		v.noteBad(b, "checksum does not match when read for the peer")
		return false, nil
	default:
		if !ok || e.lsn > v.Applied() {
			e.lsn = v.Applied() // it may not hold what lies above, whatever its entry said
		}
		v.table.set(b, entry{lsn: e.lsn, crc: sum, unverified: true})
		v.unverified.add(b)
		v.bad.remove(b)
		v.dirty.add(b)
	}
	return true, nil
}

// redoes reports whether log that is not applied, and perhaps was before a crash,
// changes a block. The caller holds applyMu.
func (v *Volume) redoes(b int64) bool {
	ring := v.journal.Ring()
	end := min(v.journal.End(), LSN(v.redoUntil.Load()))
	var h journal.Header
	for at := v.Applied(); at < end; at = h.End() {
		body, err := ring.Segment(at, &h)
		if err != nil {
			return false
		}
		for records := journal.NewRecords(body); ; {
			rec, ok, err := records.Next()
			if !ok || err != nil {
				break
			}
			if rec.Off < (b+1)*blockSize && b*blockSize < rec.Off+int64(len(rec.Data)) {
				return true
			}
		}
	}
	return false
}

func corruptForPeer(b int64) error {
	return &CorruptError{What: fmt.Sprintf("block %d", b), Detail: fmt.Sprintf("checksum does not match, or it cannot be read; where the peer has no copy of it, write all its %d bytes at offset %d anew", blockSize, b*blockSize)}
}

// readBlocks is ReadBlocks that only returns which block is damaged, else -1.
func (n *node) readBlocks(first int64, dst []byte, info []replicate.BlockInfo) (applied LSN, bad int64, err error) {
	defer pmem.Recover(n.mem, pmem.Arm(), &err)
	n.applyMu.RLock()
	defer n.applyMu.RUnlock()
	if n.copying {
		return 0, -1, errors.New("this node is inconsistent")
	}
	for i := range info {
		b := first + int64(i)
		e, ok := n.table.get(b)
		p := dst[i*blockSize:][:blockSize]
		copy(p, n.v().block(b))
		sum := crc32c.Sum(p)
		switch {
		case ok && sum == e.crc:
			info[i] = replicate.BlockInfo{LSN: e.lsn, CRC: sum, Unverified: e.unverified}
			if e.damaged { // it was repaired; how far it had changed before, its entry does not say
				info[i].LSN = n.Applied()
			}
		case ok && e.unverified && sum == ^e.crc: // see judgeUnverified
			info[i] = replicate.BlockInfo{LSN: e.lsn, CRC: sum, Unverified: true}
			return n.Applied(), b, nil
		default:
			info[i] = replicate.BlockInfo{}
			return n.Applied(), b, nil
		}
	}
	return n.Applied(), -1, nil
}

// StartCopy makes the node inconsistent, durably, before the first block of a
// full copy is overwritten, and starts the log over. What it keeps stays dirty,
// unverified or damaged, as it is.
func (n *node) StartCopy(r replicate.Resync, keep bool, f func(*replicate.State)) error {
	v := n.v()
	v.ckptMu.Lock() // no checkpoint may come between
	defer v.ckptMu.Unlock()
	err := v.updateMeta(func(m *metadata) error {
		m.State = m.State.Clone()
		f(&m.State)
		m.State.Resync = &r
		m.State.Acked = 0
		m.RingBase = r.Base
		m.Checkpoint = checkpoint{LSN: r.Fork, Epoch: r.Epoch, Chain: r.Chain}
		return nil
	})
	if err != nil {
		return err
	}
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	v.journal.Rebase(r.Base)
	v.startOver(r.Fork, r.Chain)
	v.copying = true
	if !keep {
		v.unverified.reset()
		v.bad.reset()
	}
	return nil
}

// Doubtful: see replicate.Node.
func (n *node) Doubtful(most int) []int64 {
	n.applyMu.RLock()
	defer n.applyMu.RUnlock()
	blocks := n.bad.some(most, 0)
	return append(blocks, n.unverified.some(most-len(blocks), 0)...)
}

// Entries: see replicate.Node.
func (n *node) Entries(first int64, info []replicate.BlockInfo) (applied LSN, err error) {
	defer pmem.Recover(n.mem, pmem.Arm(), &err)
	n.applyMu.RLock()
	defer n.applyMu.RUnlock()
	for i := range info {
		e, ok := n.table.get(first + int64(i))
		info[i] = replicate.BlockInfo{LSN: e.lsn, CRC: e.crc, Unverified: e.unverified, Damaged: !ok || e.damaged}
	}
	return n.Applied(), nil
}

// copyStep is how many bytes of a full copy become durable at a time. All of it at
// the end would take longer than the source waits for an answer.
const copyStep = 64 << 20

// CopyBlocks stores blocks of a full copy, in order.
func (n *node) CopyBlocks(first int64, src []byte, info []replicate.BlockInfo) (err error) {
	defer pmem.Recover(n.mem, pmem.Arm(), &err)
	n.applyMu.Lock()
	defer n.applyMu.Unlock()
	for i, in := range info {
		b := first + int64(i)
		if err := n.v().rewrite(b, src[i*blockSize:][:blockSize], false); err != nil {
			return err
		}
		n.table.set(b, entry{lsn: in.LSN, crc: in.CRC, unverified: in.Unverified})
		n.v().trust(b)
		if in.Unverified {
			n.unverified.add(b)
		}
		n.dirty.add(b)
	}
	if n.unflushed += len(src); n.unflushed >= copyStep {
		return n.v().storeCopied()
	}
	return nil
}

// storeCopied makes durable what was copied and applied. The caller holds applyMu.
func (v *Volume) storeCopied() error {
	v.flushBlocks(v.dirty)
	if err := v.mem.Fence(); err != nil {
		return v.fail(err)
	}
	v.dirty.empty()
	v.unflushed = 0
	return nil
}

// FinishCopy makes durable what was copied and applied, moves the checkpoint
// past it, and clears the record in the same change.
func (n *node) FinishCopy() (err error) {
	v := n.v()
	v.ckptMu.Lock()
	defer v.ckptMu.Unlock()
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	if err := v.storeCopied(); err != nil {
		return err
	}
	c := checkpoint{LSN: v.Applied(), Chain: v.chain}
	err = v.updateMeta(func(m *metadata) error {
		e, _ := m.State.History.At(c.LSN)
		c.Epoch = e.Epoch
		m.Checkpoint = c
		m.State = m.State.Clone()
		m.State.Resync = nil
		return nil
	})
	if err != nil {
		return err
	}
	v.copying = false
	v.checkpointed.Store(uint64(c.LSN))
	return nil
}

func (n *node) Repaired(block int64, data []byte, info replicate.BlockInfo, applied LSN, err error) {
	if err == nil {
		err = n.v().takeRepair(block, data, info, applied)
	} else if info != (replicate.BlockInfo{}) {
		err = errors.Join(err, n.v().doubt(block, info, applied))
	}
	if errors.Is(err, errRetryRepair) {
		err = nil // the reader looks again, and asks again
	}
	n.v().answerRepair(block, err)
}

func (n *node) Fail(err error) { n.v().fail(err) }

func (n *node) Failed() error { return errOf(n.failed.Load()) }

// sink is the volume as its committer sees it.
type sink Volume

func (s *sink) Progress() (acked, limit LSN) {
	if err := s.failed.Load(); err != nil {
		s.committer.Close(*err, *err) // else whoever waits would wait for ever
		return 0, 0
	}
	if s.pair == nil {
		return 0, 0
	}
	if acked, limit = s.pair.Progress(); acked < s.journal.End() && s.pair.Serving() {
		(*Volume)(s).ahead() // else a session applies
	}
	return acked, limit
}

func (s *sink) Apply(upTo LSN) error { return (*Volume)(s).apply(upTo) }

func (s *sink) Failed(err error) { (*Volume)(s).fail(err) }

func (s *sink) Wait(d time.Duration) {
	if s.pair.Wait(d) {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-s.wake:
	case <-t.C:
	}
}

func (s *sink) Wake() {
	s.pair.Wake()
	(*Volume)(s).wakeDriver()
}

func (v *Volume) wakeDriver() {
	select {
	case v.wake <- struct{}{}:
	default:
	}
}
