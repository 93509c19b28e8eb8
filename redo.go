package nvmmirror

import (
	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/internal/parts"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// scanSums takes the checksums of bodies for a scan, in the log's order: of a run
// of long segments ahead of it, several goroutines at once. It keeps those of the
// whole blocks in them, which redo needs.
type scanSums struct {
	mem     pmem.Memory
	ring    journal.Ring
	history journal.History

	bodies [][]byte   // of a run
	crcs   []uint32   // theirs
	next   int        // of crcs: the scan's next
	found  [][]uint32 // by part

	blocks  []uint32 // checksums of all whole blocks so far
	faulted bool     // memory could not be read: one body at a time from now on
}

// run is how many bytes of log are summed ahead of the scan.
const run = 32 << 20

func (s *scanSums) sum(h *journal.Header, body []byte) (crc uint32) {
	if len(body) < blockSize {
		return crc32c.Sum(body)
	}
	if s.next == len(s.crcs) && !s.ahead(h) {
		crc, s.blocks = sumBody(body, nil, s.blocks)
		return crc
	}
	s.next++
	return s.crcs[s.next-1]
}

// ahead sums a run from the segment with header h on. It reports false, now and
// from then on, where memory could not be read: whether the scan comes to that, it
// will see.
func (s *scanSums) ahead(h *journal.Header) bool {
	if !s.faulted && s.take(h) != nil {
		s.crcs, s.next, s.faulted = s.crcs[:0], 0, true
	}
	return !s.faulted
}

// take sums the segments that the scan will come to, as far as headers tell.
func (s *scanSums) take(first *journal.Header) (err error) {
	defer pmem.Recover(s.mem, pmem.Arm(), &err)
	s.bodies = s.bodies[:0]
	h, size := *first, LSN(0)
	for {
		if !h.Pad {
			s.bodies = append(s.bodies, s.ring.Raw(h.LSN, int(h.Length))[journal.HeaderSize:])
		}
		size = h.End() - first.LSN
		chain := h.CRC
		if size >= min(run, LSN(s.ring.Size())/2) || s.ring.Header(h.End(), &h) != nil || h.Prev != chain || !h.Pad && h.Length < journal.HeaderSize+blockSize {
			break
		}
		if e, ok := s.history.At(h.LSN); !ok || e.Epoch != h.Epoch {
			break
		}
	}
	n := min(parts.Of(int64(size)), len(s.bodies))
	s.crcs, s.next = append(s.crcs[:0], make([]uint32, len(s.bodies))...), 0
	for len(s.found) < n {
		s.found = append(s.found, nil)
	}
	err = parts.Do(n, func(i int) (err error) {
		defer pmem.Recover(s.mem, pmem.Arm(), &err)
		s.found[i] = s.found[i][:0]
		for k := len(s.bodies) * i / n; k < len(s.bodies)*(i+1)/n; k++ {
			s.crcs[k], s.found[i] = sumBody(s.bodies[k], nil, s.found[i])
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, sums := range s.found[:n] {
		s.blocks = append(s.blocks, sums...)
	}
	return nil
}

// redo applies what recovery has scanned, up to an LSN, in as many goroutines
// as are worth it. sums are the checksums of the whole blocks in it.
//
// Each steps through all of the log and applies what falls into its part of the
// blocks: a block is changed by one of them, in the log's order, and so is its
// entry. Recovery's order of stores to different blocks never mattered: what was
// done is done once more after a crash, from the checkpoint on. Each verifies
// every segment once more, as apply does, before it takes anything from it; where
// one has changed in memory since the scan, the region does not open.
func (v *Volume) redo(upTo LSN, sums []uint32) (err error) {
	defer func() { v.fail(err) }()
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	from := v.Applied()
	n := parts.Of(int64(upTo - from))
	chains := make([]uint32, n)
	err = parts.Do(n, func(i int) (err error) {
		defer pmem.Recover(v.mem, pmem.Arm(), &err)
		chains[i], err = v.redoPart(part{int64(i), int64(n)}, from, upTo, sums)
		return err
	})
	if err != nil {
		return err
	}
	v.chain = chains[0]
	v.applied.Store(uint64(upTo))
	if v.ringFilling() {
		v.kickCheckpoint()
	}
	return nil
}

func (v *Volume) redoPart(of part, from, upTo LSN, sums []uint32) (chain uint32, err error) {
	ring := v.journal.Ring()
	chain = v.chain
	var h journal.Header
	var scratch []uint32
	for at := from; at < upTo; at = h.End() {
		var body []byte
		if body, scratch, err = verified(ring, at, upTo, chain, &h, sums, scratch[:0]); err != nil {
			return 0, err
		}
		chain = h.CRC
		if h.Pad {
			continue
		}
		if sums, err = v.applyRecords(&h, body, sums, of, false); err != nil {
			return 0, err
		}
	}
	return chain, nil
}

// part is one part of the blocks of several: every n-th group of 64, whose
// marks in the sets of blocks share a word.
type part struct{ i, n int64 }

// anyBlock is the only part there is.
var anyBlock = part{0, 1}

func (p part) has(b int64) bool { return p.n == 1 || b>>6%p.n == p.i }
