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
		var body []byte
		if body, v.blockSums, err = verified(ring, at, upTo, v.chain, &h, nil, v.blockSums[:0]); err != nil {
			return err
		}
		if err := v.applySegment(&h, body); err != nil {
			return err
		}
	}
	if v.ringFilling() || v.resting.Load() {
		v.kickCheckpoint()
	}
	return nil
}

// verified is the body of the segment at an LSN, nil for padding. It has been
// found valid before, but may have lain in memory for long: it must still be
// what was written, behind a segment with checksum chain, and end by upTo. known
// and sums are those of sumBody.
func verified(ring journal.Ring, at, upTo LSN, chain uint32, h *journal.Header, known, sums []uint32) (body []byte, all []uint32, err error) {
	err = ring.Header(at, h)
	switch {
	case err != nil:
	case h.Prev != chain || h.End() > upTo:
		err = fmt.Errorf("the segment at LSN %d is not the one that was", at)
	case !h.Pad:
		var crc uint32
		body = ring.Raw(at, int(h.Length))[journal.HeaderSize:]
		crc, sums = sumBody(body, known, sums)
		err = journal.CheckSum(h, crc)
	}
	if err != nil {
		return nil, sums, fmt.Errorf("the journal changed after it was written (bits flipped in memory, or a caller's buffer changed during its commit): %w", err)
	}
	return body, sums, nil
}

// sumBody is the checksum of a segment's body. It appends those of the whole
// blocks that its records cover to sums, on the way, so that its bytes are read
// once for both. What is in known are the first of them.
func sumBody(body []byte, known, sums []uint32) (crc uint32, all []uint32) {
	if len(body) < blockSize {
		return crc32c.Sum(body), sums
	}
	summed := 0
	for records := journal.NewRecords(body); ; {
		data := records.Position() + journal.RecordHeaderSize
		rec, ok, err := records.Next()
		if !ok || err != nil {
			break // what is wrong with it, is told once it is known to be what was written
		}
		first := int(-rec.Off & (blockSize - 1))
		for i := first; i+blockSize <= len(rec.Data); i += blockSize {
			if data+i > summed {
				crc = crc32c.Update(crc, body[summed:data+i])
			}
			var sum uint32
			if len(known) > 0 {
				sum, known = known[0], known[1:]
			} else {
				sum = crc32c.Sum(rec.Data[i : i+blockSize])
			}
			crc = crc32c.CombineBlock(crc, sum)
			sums = append(sums, sum)
			summed = data + i + blockSize
		}
	}
	return crc32c.Update(crc, body[summed:]), sums
}

// applySegment applies one segment while no reader looks.
func (v *Volume) applySegment(h *journal.Header, body []byte) error {
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	if !h.Pad {
		v.copied = nil
		if v.copying {
			v.copied = v.blocksAt(h.End(), body)
		}
		if _, err := v.applyRecords(h, body, v.blockSums, anyBlock, h.End() == v.asked); err != nil {
			return err
		}
	}
	v.chain = h.CRC
	v.applied.Store(uint64(h.End()))
	if v.copying {
		// After a crash the copy starts anew: recovery will not read this.
		v.checkpointed.Store(uint64(h.End()))
		if v.unflushed += len(body); v.unflushed >= copyStep {
			return v.storeCopied()
		}
	}
	return nil
}

// applyRecords applies what of a segment falls into a part of the blocks. sums
// are the checksums of the whole blocks to come, also of those that are not in
// the part; it returns those that are left. cached: the blocks were asked for.
func (v *Volume) applyRecords(h *journal.Header, body []byte, sums []uint32, of part, cached bool) (left []uint32, err error) {
	redo := h.LSN < LSN(v.redoUntil.Load())
	ahead, more := journal.NewRecords(body), h.Count > 1
	for i := 0; more && i < warmed; i++ {
		more = v.warm(&ahead, of)
	}
	for records := journal.NewRecords(body); ; {
		rec, ok, err := records.Next()
		if err != nil {
			return nil, fmt.Errorf("segment at LSN %d: %w", h.LSN, err)
		}
		if !ok {
			return sums, nil
		}
		more = more && v.warm(&ahead, of)
		if err := v.inRange(rec.Off, len(rec.Data)); err != nil {
			return nil, fmt.Errorf("segment at LSN %d: %w", h.LSN, err)
		}
		if sums, err = v.applyRecord(rec, sums, h.End(), redo, of, cached); err != nil {
			return nil, err
		}
	}
}

// ahead asks the CPU for what applying the last segment will read and change,
// where that is a short transaction for which alone the driver waits: the
// acknowledgement takes longer. What is wrong with it, apply will say.
func (v *Volume) ahead() {
	at, end := v.Applied(), v.journal.End()
	if end == v.looked || end-at > askAtMost {
		return
	}
	v.looked = end
	var err error
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	var h journal.Header
	ring := v.journal.Ring()
	if ring.Header(at, &h) != nil || h.End() != end || h.Count != 1 {
		return
	}
	v.asked = end
	segment := ring.Raw(at, int(h.Length))
	ask(segment)
	left := askAtMost / blockSize
	for records := journal.NewRecords(segment[journal.HeaderSize:]); ; {
		rec, ok, err := records.Next()
		if !ok || err != nil || v.inRange(rec.Off, len(rec.Data)) != nil {
			return
		}
		for b := rec.Off / blockSize; b*blockSize < rec.Off+int64(len(rec.Data)); b++ {
			if left--; left < 0 {
				return
			}
			ask(v.mem.Bytes()[v.table.area.Off+b*tableEntry:][:tableEntry])
			ask(v.block(b))
		}
	}
}

// askAtMost is how many bytes of log, and how many of blocks, are asked for ahead.
const askAtMost = 8 << 10

func ask(p []byte) {
	for i := 0; i < len(p); i += pmem.LineSize {
		pmem.Prefetch(&p[i])
	}
}

// warmed is how many records ahead of the one that is applied the CPU is asked
// for what they change. The transactions that many callers commit together change
// blocks that are in no cache: applying would wait for one after the other.
const warmed = 8

// warm asks for what applying the next of records reads, if it is of a part, and
// reports whether there was one.
func (v *Volume) warm(records *journal.Records, of part) bool {
	rec, ok, _ := records.Next()
	if !ok || rec.Off >= v.size {
		return false
	}
	if !of.has(rec.Off / blockSize) {
		return true
	}
	mem := v.mem.Bytes()
	pmem.Prefetch(&mem[v.table.area.Off+rec.Off/blockSize*tableEntry])
	if len(rec.Data) < blockSize {
		pmem.Prefetch(&mem[v.data.Off+rec.Off])
	}
	return true
}

// blocksAt are the blocks of a segment that hold it already: the source had
// applied it when it read them. It is settled before the first of its records
// changes an entry: another one may change the same block.
func (v *Volume) blocksAt(lsn LSN, body []byte) map[int64]bool {
	held := map[int64]bool{}
	for records := journal.NewRecords(body); ; {
		rec, ok, err := records.Next()
		if !ok || err != nil || v.inRange(rec.Off, len(rec.Data)) != nil {
			return held // what is wrong with it, applying it will say
		}
		for b := rec.Off / blockSize; b*blockSize < rec.Off+int64(len(rec.Data)); b++ {
			if e, ok := v.table.get(b); ok && e.lsn >= lsn {
				held[b] = true
			}
		}
	}
}

// applyRecord applies one record, block by block. sums are the checksums of
// the whole blocks to come; it returns those that are left. There are enough,
// unless memory has changed since they were taken: a block without one will
// then count as damaged.
func (v *Volume) applyRecord(rec journal.Record, sums []uint32, lsn LSN, redo bool, of part, cached bool) (left []uint32, err error) {
	for off, p := rec.Off, rec.Data; len(p) > 0; {
		b, lo := off/blockSize, int(off%blockSize)
		n := min(blockSize-lo, len(p))
		var sum uint32
		if n == blockSize && len(sums) > 0 {
			sum, sums = sums[0], sums[1:]
		}
		if of.has(b) {
			if err := v.applyBlock(b, lo, p[:n], sum, lsn, redo, cached); err != nil {
				return nil, err
			}
		}
		off, p = off+int64(n), p[n:]
	}
	return sums, nil
}

// applyBlock changes one block: its data, and its entry by carrying the CRC
// over the change. sum is that of p where p is the whole block.
func (v *Volume) applyBlock(b int64, lo int, p []byte, sum uint32, lsn LSN, redo, cached bool) error {
	if v.copied[b] {
		return nil // the copied block holds it already
	}
	e, ok := v.table.get(b)
	off := v.data.Off + b*blockSize + int64(lo)
	switch {
	case len(p) == blockSize:
		if err := v.rewrite(b, p, cached); err != nil {
			return err
		}
		v.table.set(b, entry{lsn: lsn, crc: sum})
		v.trust(b)
	case redo && !v.dirty.has(b) && (!ok || !e.damaged && crc32c.Sum(v.block(b)) != e.crc):
		// A crash may have kept any part of the changes above the checkpoint,
		// in the block and in its entry. They are made again; what else the
		// block holds cannot be judged: its checksum is taken anew, and it
		// counts as unverified.
		v.takeAnew(b, off, p, lsn)
	case !ok:
		v.noteBad(b, "its block table entry is damaged")
		switch {
		case v.copying:
			v.mem.Write(off, p)
		case v.vouched(b):
			v.takeAnew(b, off, p, lsn)
			v.counters.repaired.Add(1)
			v.log.Warn("replaced a damaged block table entry", zap.String("region", v.path), zap.Int64("block", b))
		default:
			v.mark(b) // it may have been noted when its data was whole
			e, _ = v.table.get(b)
			block := v.block(b)
			e.crc = crc32c.Patch(e.crc, block[lo:lo+len(p)], p, int64(blockSize-lo-len(p)))
			v.mem.Write(off, p)
			v.table.set(b, e)
		}
	default:
		block := v.block(b)
		switch sound := v.dirty.has(b) || crc32c.Sum(block) == e.crc; {
		case !sound:
			v.noteBad(b, "checksum does not match before a change")
			if redo && e.damaged {
				// As above: what the entry says may be of another moment than the block.
				e.unverified = true
				v.unverified.add(b)
			}
		case e.damaged && !v.dirty.has(b):
			e.damaged = false // it was repaired, and its entry is of before
			v.bad.remove(b)
		}
		crc := crc32c.Patch(e.crc, block[lo:lo+len(p)], p, int64(blockSize-lo-len(p)))
		v.mem.Write(off, p)
		if e.damaged = e.damaged || v.bad.has(b); e.damaged {
			lsn = e.lsn
		}
		v.table.set(b, entry{lsn, crc, e.unverified, e.damaged})
	}
	v.dirty.add(b)
	return nil
}

// takeAnew changes a part of a block, and takes its checksum anew.
func (v *Volume) takeAnew(b, off int64, p []byte, lsn LSN) {
	v.mem.Write(off, p)
	v.table.set(b, entry{lsn: lsn, crc: crc32c.Sum(v.block(b)), unverified: true})
	v.unverified.add(b)
	v.bad.remove(b)
}

// vouched reports whether what is left of a block's damaged entry vouches for it.
func (v *Volume) vouched(b int64) bool {
	sum, fault := v.sum(b)
	return fault == nil && v.table.vouches(b, sum)
}

// rewrite stores a whole block. One that cannot be read gets memory that can.
func (v *Volume) rewrite(b int64, p []byte, cached bool) error {
	fault := v.store(b, p, cached)
	if fault == nil {
		return nil
	}
	if _, ok := v.unreadable(fault); !ok {
		return fault // p is the journal's, and lost: the block is sound
	}
	if err := v.condemn(b); err != nil {
		return err
	}
	if err := v.clearBlock(b); err != nil {
		return fmt.Errorf("%w; replacing it: %w", fault, err)
	}
	return v.store(b, p, cached)
}

// condemn makes durable that a block which cannot be read is damaged. Once its memory
// is replaced, here or by an administrator, it reads as zeros, and redo would take them
// for what a crash has left. A checkpoint cannot do it: it would meet the fault.
func (v *Volume) condemn(b int64) error {
	e, ok := v.table.get(b)
	if !ok {
		e = entry{lsn: v.Applied(), crc: zeroBlockCRC ^ 1} // neither what will be there, nor its complement
	}
	e.damaged = true
	v.table.set(b, e)
	v.mem.Flush(v.table.area.Off+b*tableEntry, tableEntry)
	return v.fail(v.mem.Fence())
}

func (v *Volume) store(b int64, p []byte, cached bool) (err error) {
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	off := v.data.Off + b*blockSize
	if cached {
		v.mem.Write(off, p) // the checkpoint flushes it: quicker than past the cache
	} else {
		v.mem.Copy(off, p)
	}
	return nil
}

// block is a block's data.
func (v *Volume) block(b int64) []byte {
	off := v.data.Off + b*blockSize
	return v.mem.Bytes()[off : off+blockSize : off+blockSize]
}

// trust: the block was rewritten as a whole, or compared with the peer. Its
// entry says so already.
func (v *Volume) trust(b int64) {
	v.unverified.remove(b)
	v.bad.remove(b)
}

// noteBad notes a block that does not match its entry. Its entry keeps not
// matching, whatever is changed around the damage, until the block is
// rewritten or repaired, also after a crash. The caller holds applyMu.
func (v *Volume) noteBad(b int64, why string) {
	if v.bad.has(b) || v.copying { // a full copy replaces it
		return
	}
	v.bad.add(b)
	v.mark(b)
	v.counters.badBlocks.Add(1)
	v.log.Error("damaged block", zap.String("region", v.path), zap.Int64("block", b), zap.Int64("offset", b*blockSize), zap.String("why", why))
	if v.pair != nil {
		v.pair.RequestBlock(b) // where there is no peer, a read will say so
	}
}

// mark makes the entry of a damaged block say so. An entry that is damaged itself, and
// does not vouch for the block, becomes one that the block does not match: else redo
// would take the checksum anew. Where it does vouch, nothing is known to be wrong with
// the block, and the entry is left for a change to replace.
func (v *Volume) mark(b int64) {
	e, ok := v.table.get(b)
	sum, fault := v.sum(b)
	switch {
	case fault != nil:
		v.condemn(b) // where that fails, persistence has, and it is said
		return
	case ok && e.damaged, !ok && v.table.vouches(b, sum):
		return
	case !ok:
		e = entry{lsn: v.Applied(), crc: sum ^ 1} // not its complement: see judgeUnverified
	}
	e.damaged = true
	v.table.set(b, e)
	v.changedAside(b)
}
