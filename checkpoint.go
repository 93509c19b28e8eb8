package nvmmirror

import (
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// Checkpoint is the LSN from which recovery would read the journal.
func (v *Volume) Checkpoint() LSN { return LSN(v.checkpointed.Load()) }

func (v *Volume) kickCheckpoint() {
	select {
	case v.ckptKick <- struct{}{}:
	default:
	}
}

// checkpointer moves the checkpoint in the background: when a quarter of the
// ring lies above it or many epochs began there, when a verdict on a block or its
// repair is to be stored, and when the node has been idle for a second. One that stays
// idle rests, until something is applied: each wake-up counts in what an idle pair
// takes.
func (v *Volume) checkpointer() {
	t := time.NewTicker(checkpointEvery)
	defer t.Stop()
	var seen LSN
	scrub := v.newScrubber()
	for {
		select {
		case <-v.stop:
			return
		case <-v.ckptKick:
			if v.resting.Swap(false) {
				t.Reset(checkpointEvery)
			}
			if v.checkpointDue() || v.unstored.Load() { // it may have been kicked during the last one
				v.runCheckpoint()
			}
		case <-t.C:
			v.committer.Tick() // what a caller that gave up left behind
			scrub.look()
			damage := v.compareUnverified()
			now := v.Applied()
			idle := now == seen
			if seen = now; idle && (now != v.Checkpoint() || v.ackedUnstored() || v.unstored.Load()) {
				v.runCheckpoint()
				idle = false
			}
			if rest := idle && !damage; rest != v.resting.Load() {
				v.resting.Store(rest)
				if t.Reset(checkpointEvery); rest && v.Applied() == now { // else nobody may have seen it
					t.Reset(restingEvery)
				}
			}
		}
	}
}

// checkpointDue: a quarter of the ring lies above the checkpoint, or half of
// the epochs that a history keeps.
func (v *Volume) checkpointDue() bool { return v.ringFilling() || v.crowded() }

// ringFilling is the part of checkpointDue that commits look at: no lock.
func (v *Volume) ringFilling() bool {
	return v.Applied()-v.Checkpoint() > LSN(v.ring.Len/4)
}

// crowded: many epochs began above the checkpoint. The history is bounded, and
// one that is pruned beyond the checkpoint makes the log there foreign.
func (v *Volume) crowded() bool {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	h := v.meta.State.History
	half := len(h) - journal.MaxHistory/2
	return half >= 0 && h[half].Start > v.meta.Checkpoint.LSN
}

// ackedUnstored: idle, and metadata does not say yet how far the log is
// acknowledged. Until it does, damage to the last segment looks like a torn
// tail.
func (v *Volume) ackedUnstored() bool {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	return v.meta.State.Acked < v.acked()
}

func (v *Volume) runCheckpoint() {
	if v.failed.Load() != nil || v.closed.Load() {
		return
	}
	if err := v.checkpoint(false); err != nil {
		v.fail(err)
		v.committer.Tick()
		return
	}
	v.wakeDriver()
	v.pair.Wake()
}

// checkpoint makes durable what was applied, then lets recovery start there:
//
//	take the set of changed blocks and the LSN that the data holds
//	flush the blocks and their table entries, fence
//	move the checkpoint in the metadata (both copies)
//
// Changes go on meanwhile: a block that changes above the new checkpoint is
// changed by log above it, so recovery writes it again.
func (v *Volume) checkpoint(clean bool) (err error) {
	v.ckptMu.Lock()
	defer v.ckptMu.Unlock()
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	v.applyMu.Lock()
	if v.copying {
		v.applyMu.Unlock()
		return nil // FinishCopy does it
	}
	dirty := v.dirty
	v.dirty = v.spare
	v.unstored.Store(false)
	c := checkpoint{LSN: v.Applied(), Chain: v.chain}
	v.applyMu.Unlock()

	v.flushBlocks(dirty)
	dirty.empty()
	v.spare = dirty
	if err := v.mem.Fence(); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	if clean && v.region != nil {
		// The next start trusts this state whatever the device counts meanwhile,
		// so it must not depend on what the device flushes at a power failure.
		if err := v.region.DeepFlush(); err != nil {
			v.log.Warn("not closed cleanly", zap.Error(err))
			clean = false
		}
	}
	err = v.updateMeta(func(m *metadata) error {
		e, _ := m.State.History.At(c.LSN)
		c.Epoch = e.Epoch
		m.Checkpoint = c
		m.State.Acked = max(m.State.Acked, v.acked())
		// What lies above a checkpoint below redoUntil may have been applied
		// in part before a crash: the next recovery still has to know.
		m.Clean = clean && c.LSN >= LSN(v.redoUntil.Load())
		m.Settled, m.End = v.unverified.n.Load()+v.bad.n.Load() == 0, v.journal.End()
		return nil
	})
	if err != nil {
		return err
	}
	v.checkpointed.Store(uint64(c.LSN))
	v.counters.checkpts.Add(1)
	v.log.Debug("checkpoint", zap.Uint64("lsn", uint64(c.LSN)))
	return nil
}

// flushBlocks flushes the data and the table entries of blocks.
func (v *Volume) flushBlocks(set blockSet) {
	line := int64(-1)
	for b := range set.all() {
		v.mem.Flush(v.data.Off+b*blockSize, blockSize)
		entry := v.table.area.Off + b*tableEntry
		if l := entry / pmem.LineSize; l != line {
			line = l
			v.mem.Flush(entry, tableEntry)
		}
	}
}

// acked is what is known to be acknowledged by all required nodes: on a
// secondary what the primary said of it.
func (v *Volume) acked() LSN {
	if v.pair == nil {
		return v.meta.State.Acked
	}
	return v.pair.Acked()
}

// updateMeta changes the metadata: durable in both copies when it returns.
func (v *Volume) updateMeta(f func(*metadata) error) (err error) {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	if e := v.failed.Load(); e != nil {
		return *e
	}
	next := v.meta
	if err := f(&next); err != nil {
		return err
	}
	if err := next.validate(); err != nil {
		return fmt.Errorf("metadata that would not be valid is not written: %w", err)
	}
	defer func() {
		if err != nil {
			v.fail(err)
		}
	}()
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	if err := writeMetadata(v.mem, &next); err != nil {
		return err
	}
	v.meta = next
	return nil
}
