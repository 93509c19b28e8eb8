package nvmmirror

import (
	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

const copyUnfinished = "a full copy onto this node did not finish"

// recover finds the end of the log, makes durable what it accepts, and brings
// the data up to date. It is idempotent: a crash within it changes nothing.
//
// A former primary whose peer was required applies only what is known to be
// acknowledged: of the rest its peer may know nothing. It is neither applied
// nor dropped until the handshake, or a decision to go on alone. A node whose
// full copy has not finished applies nothing.
func (v *Volume) recover() (err error) {
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	m := &v.meta
	if r := m.State.Resync; r != nil {
		v.startOver(r.Fork, r.Chain)
		v.journal.SetEpoch(r.Epoch)
		v.copying = true
		v.recovery = Recovery{From: r.Fork, End: r.Fork, Applied: r.Fork, Stop: copyUnfinished}
		v.log.Warn("inconsistent: a full copy onto this node did not finish", zap.String("region", v.path))
		return nil
	}
	ckpt := m.Checkpoint
	v.chain = ckpt.Chain
	v.applied.Store(uint64(ckpt.LSN))
	v.checkpointed.Store(uint64(ckpt.LSN))
	sums := scanSums{mem: v.mem, ring: v.journal.Ring(), history: m.State.History}
	scan, err := survey(v.mem.Bytes(), m, sums.sum)
	if err != nil {
		return err
	}
	if err := v.journal.Trust(&scan); err != nil {
		return err
	}
	v.journal.Reset(scan.End, scan.Chain)
	last, _ := m.State.History.At(scan.End)
	v.journal.SetEpoch(last.Epoch)
	m.State.Acked = scan.Acked // above the end where the log is damaged: the next recovery must know
	v.recovery = Recovery{
		Clean: m.Clean, From: scan.From, End: scan.End,
		Segments: scan.Segments, Transactions: scan.Transactions, Stop: scan.Stop.Error(),
	}
	if !m.Clean || !m.Settled {
		if err := v.readNotes(); err != nil {
			return err
		}
	}
	v.redoUntil.Store(uint64(scan.End))
	if scan.Damage != nil {
		v.damage.Store(scan.Damage)
		v.redoUntil.Store(uint64(scan.Damage.Acked))
		v.recovery.Damage = scan.Damage.Error()
		v.log.Error("journal damaged", zap.String("region", v.path), zap.Error(scan.Damage))
	}
	if scan.Damage == nil && m.closedBeyond(scan.End) {
		v.log.Error("journal damaged, above what is known to be acknowledged: what lies there is lost unless the peer has it",
			zap.String("region", v.path), zap.Uint64("lsn", uint64(scan.End)), zap.Uint64("closed", uint64(m.End)), zap.Error(scan.Stop))
	}
	if m.Clean {
		v.redoUntil.Store(0)
	}
	upTo := applyLimit(m, scan.End)
	if m.Clean && upTo > ckpt.LSN {
		// Nothing of this was applied before. If it is not done to its end, the
		// next recovery has to know that a part may be.
		if err := v.updateMeta(func(m *metadata) error { m.Clean = false; return nil }); err != nil {
			return err
		}
	}
	if err := v.redo(upTo, sums.blocks); err != nil {
		return err
	}
	v.recovery.Applied = v.Applied()
	v.log.Info("recovered", zap.String("region", v.path), zap.Bool("clean", v.recovery.Clean),
		zap.Uint64("from", uint64(scan.From)), zap.Uint64("end", uint64(scan.End)), zap.Uint64("applied", uint64(v.Applied())),
		zap.Int("segments", scan.Segments), zap.Int("transactions", scan.Transactions), zap.String("stop", v.recovery.Stop))
	if scan.Damage == nil && v.crowded() {
		return v.checkpoint(false) // before this start mints one more
	}
	return nil
}

// readNotes takes up which blocks are unverified, or were found damaged. That one was
// found damaged, a killed process may have left visible and not durable: were it lost
// after that, redo would take the block's checksum anew.
func (v *Volume) readNotes() error {
	found := false
	eachNoted(v.mem.Bytes()[v.table.area.Off:], v.size/blockSize, func(b int64, e entry) {
		if e.damaged {
			found = true
			if sum, fault := v.sum(b); fault != nil || sum != e.crc {
				v.bad.add(b)
			} else {
				// It was repaired, and the mark is of before: were it to stay, a change
				// that a crash cuts off would look like the damage. How far the block
				// had changed before the repair, the entry does not say: the peer does.
				e.damaged, e.unverified = false, true
				v.table.set(b, e)
			}
			at := v.table.area.Off + b*tableEntry
			pmem.Redirty(v.mem, at, tableEntry)
			v.mem.Flush(at, tableEntry)
		}
		if e.unverified {
			v.unverified.add(b)
		}
	})
	if !found {
		return nil
	}
	return v.mem.Fence()
}

// survey scans the log from the checkpoint on. What is applied was persistent
// and acknowledged before, so the newest entry of the block table says how far
// the log went at least: where it does not reach so far, that is damage and
// not a torn tail. A clean close has noted where the log ends, so that nothing
// has to be searched: opening takes as long whatever the region's size is. sum,
// where given, takes the checksums of bodies, in the log's order.
func survey(mem []byte, m *metadata, sum func(*journal.Header, []byte) uint32) (journal.Scan, error) {
	ring := ringOf(mem, m)
	acked := m.State.Acked
	switch {
	case m.Clean && m.End != 0:
		return journal.ScanTo(ring, m.State.History, m.Checkpoint.LSN, m.Checkpoint.Chain, acked, m.End, sum)
	case !m.Clean:
		acked = max(acked, newestEntry(mem[m.Table.Off:], m.Size/blockSize))
	}
	return journal.ScanFrom(ring, m.State.History, m.State.Node, m.Checkpoint.LSN, m.Checkpoint.Chain, acked, sum)
}

// applyLimit is how far a recovering node may apply its log. One that wrote the
// last of it was primary then, whatever it is now: it may have to drop what its
// peer never had.
func applyLimit(m *metadata, end LSN) LSN {
	e, ok := m.State.History.At(end)
	if ok && e.BothIn() && (m.State.Role == replicate.Primary || e.Epoch.Node == m.State.Node) {
		return min(end, max(m.State.Acked, m.Checkpoint.LSN))
	}
	return end
}
