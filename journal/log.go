package journal

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"sync/atomic"

	"github.com/nvmmirror/nvmmirror/internal/parts"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// Log appends segments to a ring in persistent memory.
//
// Invariants:
//   - Everything below End is durable, valid and chained.
//   - Bytes from End on are scratch: no reader may trust them.
//   - One goroutine at a time owns the log: on a primary the committer's
//     driver, on a secondary the session's receiver. Only the owner calls
//     what changes it. End and Size are for anyone, and Ring while no full copy
//     can begin, which rebases it.
type Log struct {
	mem   pmem.Memory
	off   int64
	ring  Ring
	end   atomic.Uint64
	chain uint32
	epoch Epoch
	w     writer
	sums  pieceSums
}

// NewLog is the log in the size bytes of mem at off, with LSN base at the
// ring's start. Reset must follow.
func NewLog(mem pmem.Memory, off, size int64, base LSN) *Log {
	l := &Log{mem: mem, off: off}
	l.ring = Ring{Bytes: mem.Bytes()[off : off+size : off+size], Base: base}
	l.sums = newPieceSums(size)
	l.w.mem, l.w.cache = mem, &l.sums
	return l
}

// Ring is the log's ring, for reading.
func (l *Log) Ring() Ring { return l.ring }

// Size is the ring's size in bytes.
func (l *Log) Size() LSN { return LSN(len(l.ring.Bytes)) }

// End is the LSN after the last persistent segment.
func (l *Log) End() LSN { return LSN(l.end.Load()) }

// Chain is the header checksum of the last persistent segment.
func (l *Log) Chain() uint32 { return l.chain }

// Epoch is the epoch of the segments to come.
func (l *Log) Epoch() Epoch { return l.epoch }

// Reset makes end the place of the next segment, behind a header with
// checksum chain.
func (l *Log) Reset(end LSN, chain uint32) {
	l.sums.forget()
	l.advance(end, chain)
}

func (l *Log) advance(end LSN, chain uint32) {
	l.chain = chain
	l.end.Store(uint64(end))
}

// Rebase moves the ring's start to another LSN: what it held is lost.
func (l *Log) Rebase(base LSN) { l.ring.Base = base }

// SetEpoch sets the epoch of the segments to come. The history must hold it
// durably, from End on.
func (l *Log) SetEpoch(e Epoch) { l.epoch = e }

// PieceSum is the checksum that Append took of a long segment's piece at lsn,
// the segment's header excluded. Without it, the piece has to be read.
func (l *Log) PieceSum(lsn LSN) (crc uint32, ok bool) { return l.sums.get(lsn) }

// MaxTransaction is how many bytes of records, headers included, a segment
// takes.
func (l *Log) MaxTransaction() int { return MaxSegment(int64(l.ring.Size())) - HeaderSize }

// room is how many bytes of log a segment with so many bytes of records takes,
// the padding at the ring's end before it included.
func (l *Log) room(records int) LSN {
	n := roundUp(HeaderSize + records)
	if c := l.ring.Contiguous(l.End()); n > c {
		n += c
	}
	return LSN(n)
}

// Append writes one segment with the records of reqs, which hold size bytes
// of records, makes it durable with one fence, and returns its end. acked is
// the hint that it carries. The caller has seen to the room. Where the callers'
// memory cannot be read, the error matches ErrUnreadable and the log is as it was.
func (l *Log) Append(reqs []*Request, size int, acked LSN) (end LSN, err error) {
	defer l.recovered(pmem.Arm(), l.chain, &err)
	n := roundUp(HeaderSize + size)
	lsn := l.End()
	if c := l.ring.Contiguous(lsn); n > c {
		lsn = l.pad(lsn, c, acked)
	}
	h := Header{LSN: lsn, Epoch: l.epoch, Acked: acked, Length: uint32(n), Count: uint32(len(reqs)), Prev: l.chain}
	w := &l.w
	w.start(l.off+int64(l.ring.Position(lsn)), lsn)
	for _, r := range reqs {
		for i := range r.writes {
			w.record(&r.writes[i], i == len(r.writes)-1)
		}
	}
	w.zero(n - HeaderSize - size)
	h.BodyCRC = w.total()
	w.finish(&h)
	if err := l.mem.Fence(); err != nil {
		return 0, fmt.Errorf("journal: segment at LSN %d: %w", lsn, err)
	}
	l.advance(h.End(), h.CRC)
	return h.End(), nil
}

// recovered is pmem.Recover that also takes up a fault that was not the memory's. What
// has been written lies above End. chain is that of before.
func (l *Log) recovered(old bool, chain uint32, err *error) {
	debug.SetPanicOnFault(old)
	value := recover()
	if value == nil {
		return
	}
	if *err = pmem.AsFault(l.mem, value); *err != nil {
		return
	}
	fault, ok := value.(interface {
		runtime.Error
		Addr() uintptr
	})
	if !ok {
		panic(value)
	}
	l.chain = chain
	l.sums.forget() // some are of a segment that is not there
	*err = fmt.Errorf("%w (address %#x)", ErrUnreadable, fault.Addr())
}

// pad fills the ring from lsn to its end. The fence of the segment behind it
// covers it as well.
func (l *Log) pad(lsn LSN, n int, acked LSN) LSN {
	h := Header{LSN: lsn, Epoch: l.epoch, Acked: acked, Length: uint32(n), Prev: l.chain, Pad: true}
	l.PlacePad(&h)
	l.chain = h.CRC
	return h.End()
}

// PlacePad places the padding segment with header h and zeros behind it.
func (l *Log) PlacePad(h *Header) {
	b := l.w.buf[:HeaderSize]
	h.encode(b)
	p := l.off + int64(l.ring.Position(h.LSN))
	l.mem.Copy(p, b)
	l.mem.Zero(p+HeaderSize, int64(h.Length)-HeaderSize)
}

// Place copies p, a piece of a segment that the peer wrote, to lsn in the
// ring: scratch until Fence. It goes through the cache, as its checksum is
// taken there next.
func (l *Log) Place(lsn LSN, p []byte) {
	off := l.off + int64(l.ring.Position(lsn))
	l.mem.Write(off, p)
	l.mem.Flush(off, int64(len(p)))
}

// Warm asks the CPU for the lines in which the first n bytes from lsn on will be
// placed, without waiting for them.
func (l *Log) Warm(lsn LSN, n int) {
	p := l.ring.Position(lsn)
	for end := min(p+n, len(l.ring.Bytes)); p < end; p += pmem.LineSize {
		pmem.Prefetch(&l.ring.Bytes[p])
	}
}

// Window is the ring's memory for n bytes from lsn on, to receive into. What
// arrived there needs a Flush.
func (l *Log) Window(lsn LSN, n int) []byte {
	return l.mem.Window(l.off+int64(l.ring.Position(lsn)), int64(n))
}

// Flush writes back what was received into a Window.
func (l *Log) Flush(lsn LSN, n int) { l.mem.Flush(l.off+int64(l.ring.Position(lsn)), int64(n)) }

// Fence makes durable what was placed and flushed, and moves End to end,
// behind a segment whose header has checksum chain. The caller has verified
// all segments up to there.
func (l *Log) Fence(end LSN, chain uint32) error {
	if err := l.mem.Fence(); err != nil {
		return fmt.Errorf("journal: received log up to LSN %d: %w", end, err)
	}
	l.advance(end, chain)
	return nil
}

// Extend moves End over the valid segments that follow, and makes them durable.
func (l *Log) Extend(history History) error {
	s := newScanner(l.ring, history, l.End(), l.chain)
	for h := new(Header); ; {
		if _, err := s.Next(h); err != nil {
			break
		}
	}
	end, chain := s.Position()
	if err := l.Trust(&Scan{From: l.End(), End: end, pads: s.pads}); err != nil {
		return err
	}
	l.Reset(end, chain)
	return nil
}

// Trust flushes and fences what a scan has found valid: bytes that are visible
// after a crash may never have been durable. Behind the header of a padding
// segment, which alone its validity depends on, the zeros may be missing: they
// are written again, before several goroutines share out the rest.
func (l *Log) Trust(scan *Scan) (err error) {
	defer pmem.Recover(l.mem, pmem.Arm(), &err)
	for i := range scan.pads {
		h := &scan.pads[i]
		l.mem.Zero(l.off+int64(l.ring.Position(h.LSN))+HeaderSize, int64(h.Length)-HeaderSize)
	}
	from, to := scan.From, scan.End
	n := parts.Of(int64(to - from))
	start := func(i int) LSN { return from + (to-from)/LSN(n)*LSN(i)&^(Align-1) }
	return parts.Do(n, func(i int) (err error) {
		defer pmem.Recover(l.mem, pmem.Arm(), &err)
		end := to
		if i+1 < n {
			end = start(i + 1)
		}
		for at := start(i); at < end; {
			k := min(int(end-at), l.ring.Contiguous(at))
			pmem.Redirty(l.mem, l.off+int64(l.ring.Position(at)), int64(k))
			l.Flush(at, k)
			at += LSN(k)
		}
		return l.mem.Fence()
	})
}
