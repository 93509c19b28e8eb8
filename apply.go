package nvmmirror

import (
	"fmt"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// apply brings the data up to an LSN, segment by segment. Only the log's
// owner calls it. Each segment is verified once more: it may have lain in
// memory for long.
func (v *Volume) apply(upTo LSN) (err error) {
	if f := v.failed.Load(); f != nil {
		return *f
	}
	defer func() { v.fail(err) }()
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	ring := v.journal.Ring()
	var h journal.Header
	for at := v.Applied(); at < upTo; at = h.End() {
		body, err := ring.Segment(at, &h)
		if err != nil {
			return fmt.Errorf("the journal changed after it was written: %w", err)
		}
		if h.Prev != v.chain || h.End() > upTo {
			return fmt.Errorf("the journal changed after it was written: the segment at LSN %d is not the one that was", at)
		}
		if err := v.applySegment(&h, body); err != nil {
			return err
		}
	}
	if v.ringFilling() {
		v.kickCheckpoint()
	}
	return nil
}

// applySegment applies one segment while no reader looks.
func (v *Volume) applySegment(h *journal.Header, body []byte) error {
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	if !h.Pad {
		redo := h.LSN < v.redoUntil
		for records := journal.NewRecords(body); ; {
			rec, ok, err := records.Next()
			if err != nil {
				return fmt.Errorf("segment at LSN %d: %w", h.LSN, err)
			}
			if !ok {
				break
			}
			if err := v.inRange(rec.Off, len(rec.Data)); err != nil {
				return fmt.Errorf("segment at LSN %d: %w", h.LSN, err)
			}
			v.applyRecord(rec, h.End(), redo)
		}
	}
	v.chain = h.CRC
	v.applied.Store(uint64(h.End()))
	if v.copying {
		// After a crash the copy starts anew: recovery will not read this.
		v.checkpointed.Store(uint64(h.End()))
	}
	return nil
}

// applyRecord applies one record, block by block.
func (v *Volume) applyRecord(rec journal.Record, lsn LSN, redo bool) {
	for off, p := rec.Off, rec.Data; len(p) > 0; {
		b, lo := off/blockSize, int(off%blockSize)
		n := min(blockSize-lo, len(p))
		v.applyBlock(b, lo, p[:n], lsn, redo)
		off, p = off+int64(n), p[n:]
	}
}

// applyBlock changes one block: its data, and its entry by carrying the CRC
// over the change.
func (v *Volume) applyBlock(b int64, lo int, p []byte, lsn LSN, redo bool) {
	e, ok := v.table.get(b)
	if v.copying && ok && e.lsn >= lsn {
		return // the copied block holds it already
	}
	off := v.data.Off + b*blockSize + int64(lo)
	switch {
	case len(p) == blockSize:
		v.mem.Copy(off, p)
		v.table.set(b, entry{lsn, crc32c.Sum(p)})
		v.trust(b)
	case redo && !v.dirty.has(b) && (!ok || crc32c.Sum(v.block(b)) != e.crc):
		// A crash may have kept any part of the changes above the checkpoint,
		// in the block and in its entry. They are made again; what else the
		// block holds cannot be judged: its checksum is taken anew, and it
		// counts as unverified.
		v.mem.Write(off, p)
		v.table.set(b, entry{lsn, crc32c.Sum(v.block(b))})
		v.distrust(b)
	case !ok:
		v.noteBad(b, "its block table entry is damaged")
		v.mem.Write(off, p)
	default:
		block := v.block(b)
		if !v.dirty.has(b) && crc32c.Sum(block) != e.crc {
			v.noteBad(b, "checksum does not match before a change")
		}
		crc := crc32c.Patch(e.crc, block[lo:lo+len(p)], p, int64(blockSize-lo-len(p)))
		v.mem.Write(off, p)
		v.table.set(b, entry{lsn, crc})
	}
	v.dirty.add(b)
}

// block is a block's data.
func (v *Volume) block(b int64) []byte {
	off := v.data.Off + b*blockSize
	return v.mem.Bytes()[off : off+blockSize : off+blockSize]
}

// trust: the block was rewritten as a whole, or compared with the peer.
func (v *Volume) trust(b int64) {
	if v.unverified.has(b) {
		v.unverified.remove(b)
		v.unverifieds.Add(-1)
	}
	if len(v.bad) > 0 {
		delete(v.bad, b)
	}
}

func (v *Volume) distrust(b int64) {
	if !v.unverified.has(b) {
		v.unverified.add(b)
		v.unverifieds.Add(1)
	}
}

// noteBad notes a block that does not match its entry. Its entry keeps not
// matching, whatever is changed around the damage, until the block is
// rewritten or repaired.
func (v *Volume) noteBad(b int64, why string) {
	if v.bad[b] {
		return
	}
	v.bad[b] = true
	v.counters.badBlocks.Add(1)
	v.log.Error("damaged block", zap.String("region", v.path), zap.Int64("block", b), zap.Int64("offset", b*blockSize), zap.String("why", why))
	if v.pair != nil {
		v.pair.RequestBlock(uint32(b)) // where there is no peer, a read will say so
	}
}
