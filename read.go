package nvmmirror

import (
	"fmt"
	"io"
	"time"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// ReadAt reads the committed bytes at off: those of a prefix of the commit
// order that every required node holds, never a part of a transaction. Each
// block is verified; one that fails is fetched from the peer, repaired and
// counted, else the error is a [*CorruptError]. Reading past the end returns
// io.EOF as io.ReaderAt says.
func (v *Volume) ReadAt(p []byte, off int64) (n int, err error) {
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
	v.counters.reads.Add(1)
	for tries := 0; ; tries++ {
		bad, err := v.readOnce(p, off)
		if err != nil {
			return 0, err
		}
		if bad < 0 {
			break
		}
		if err := v.repair(bad); err != nil || tries > len(p)/blockSize+2 {
			return 0, &CorruptError{What: fmt.Sprintf("block %d (bytes %d to %d)", bad, bad*blockSize, (bad+1)*blockSize), Detail: fmt.Sprint(err)}
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
		return 0, ErrClosed
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
		if n == blockSize {
			// The copy is what is verified.
			copy(p, v.block(b))
			if crc32c.Sum(p[:n]) != e.crc {
				return b, nil
			}
		} else {
			block := v.block(b)
			if crc32c.Sum(block) != e.crc {
				return b, nil
			}
			copy(p[:n], block[lo:])
		}
		off, p = off+int64(n), p[n:]
	}
	return -1, v.readable()
}

// readable says why this node serves no reads.
func (v *Volume) readable() error {
	switch {
	case v.failed.Load() != nil:
		return *v.failed.Load()
	case v.pair.Role() != replicate.Primary:
		return v.pair.NotPrimary()
	case !v.pair.Serving() || !v.pair.Leased():
		return ErrNoLease
	}
	return nil
}

// repair fetches a block from the peer.
func (v *Volume) repair(b int64) error {
	done := make(chan error, 1)
	v.repairMu.Lock()
	v.repairs[b] = append(v.repairs[b], done)
	v.repairMu.Unlock()
	v.applyMu.Lock()
	v.noteBad(b, "checksum does not match")
	v.applyMu.Unlock()
	if err := v.pair.RequestBlock(uint32(b)); err != nil {
		v.answerRepair(b, err)
	}
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
// It takes it where it is the state that this node's data must have.
func (v *Volume) takeRepair(b int64, data []byte, info replicate.BlockInfo, applied LSN) (err error) {
	defer pmem.Recover(v.mem, pmem.Arm(), &err)
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	e, ok := v.table.get(b)
	unverified := v.unverified.has(b)
	mine := crc32c.Sum(v.block(b))
	switch {
	case ok && info.LSN == e.lsn && info.CRC == e.crc:
		if mine == e.crc {
			v.trust(b)
			return nil
		}
	case ok && info.LSN == e.lsn && unverified:
		// After a crash the block's checksum was taken anew: the peer's is
		// the one that was carried.
		if info.Unverified && v.pair.Role() == replicate.Primary {
			return nil // neither was; the primary's stands, the secondary asks for it
		}
	case !ok && applied >= v.Applied() && info.LSN <= v.Applied():
		// Nothing changed the block at the peer after what is applied here.
	default:
		return errRetryRepair
	}
	v.mem.Copy(v.data.Off+b*blockSize, data)
	v.table.set(b, entry{info.LSN, info.CRC})
	v.dirty.add(b)
	if !info.Unverified {
		v.trust(b)
	}
	v.counters.repaired.Add(1)
	v.log.Warn("repaired a block from the peer", zap.String("region", v.path), zap.Int64("block", b))
	return nil
}

// errRetryRepair: the peer's block is of another moment.
var errRetryRepair = fmt.Errorf("the peer's block is of another moment; try again")

// compareUnverified asks the peer for some of the blocks whose checksums were
// taken anew after a crash, and for damaged ones that could not be repaired
// yet: the peer was not there, or its block was of another moment.
func (v *Volume) compareUnverified() {
	if v.pair.Phase() != "in-sync" {
		return
	}
	const atOnce = 256
	v.applyMu.RLock()
	var ask []uint32
	for b := range v.bad {
		if len(ask) < atOnce/2 {
			ask = append(ask, uint32(b))
		}
	}
	for w := 0; v.unverifieds.Load() > 0 && w < len(v.unverified) && len(ask) < atOnce; w++ {
		for i := range 64 {
			if v.unverified[w]&(1<<i) != 0 && len(ask) < atOnce {
				ask = append(ask, uint32(w*64+i))
			}
		}
	}
	v.applyMu.RUnlock()
	for _, b := range ask {
		if v.pair.RequestBlock(b) != nil {
			return
		}
	}
}
