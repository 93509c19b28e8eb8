package nvmmirror

import (
	"encoding/binary"
	"iter"
	"math/bits"
	"sync/atomic"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// table is the block table: per block of the volume 16 bytes
//
//	 0  lsn    u64  the LSN after the segment of the last change, 0: never changed
//	 8  CRC    u32  CRC32C of the block
//	12  check  u32  CRC32C of lsn (u64), CRC (u64) and the block's number (u64);
//	                with bit 32 of the CRC word set where the block is unverified,
//	                bit 33 where it was found damaged
//
// A block's CRC is carried over changes, not recomputed from the medium, so
// that a flipped bit is not blessed by the next change. Entries are the
// applier's to change, under the apply lock; a checkpoint flushes them.
type table struct {
	mem  pmem.Memory
	area extent
}

type entry struct {
	lsn journal.LSN
	crc uint32
	// unverified: after a crash the CRC was taken from the medium. It stays so,
	// over changes and restarts, until the block is compared with the peer's or
	// rewritten as a whole.
	unverified bool
	// damaged: the block was found not to match. Recovery does not take its
	// checksum anew, whatever changed it before the crash. Its lsn stays as it
	// was then: only one of the entry's two words changes with the block, so that
	// no power failure tears it, and recovery cannot take it for a torn change.
	damaged bool
}

func (e entry) check(block int64) uint32 {
	crc := uint64(e.crc)
	if e.unverified {
		crc |= 1 << 32
	}
	if e.damaged {
		crc |= 1 << 33
	}
	return crc32c.SumWords(uint64(e.lsn), crc, uint64(block))
}

// decodeEntry decodes the entry of a block; ok is false where it is damaged.
func decodeEntry(b []byte, block int64) (e entry, ok bool) {
	e.lsn = journal.LSN(binary.LittleEndian.Uint64(b))
	e.crc = binary.LittleEndian.Uint32(b[8:])
	check := binary.LittleEndian.Uint32(b[12:])
	for flags := range 4 {
		e.unverified, e.damaged = flags&1 != 0, flags&2 != 0
		if e.check(block) == check {
			return e, true
		}
	}
	e.unverified, e.damaged = false, false
	return e, false
}

// eachNoted calls f with each of so many blocks whose entry says that it is
// unverified, or was found damaged.
func eachNoted(area []byte, blocks int64, f func(block int64, e entry)) {
	for b := range blocks {
		p := area[b*tableEntry:][:tableEntry]
		if e, ok := decodeEntry(p, b); ok && (e.unverified || e.damaged) {
			f(b, e)
		}
	}
}

// newestEntry is the highest LSN of the valid entries of so many blocks.
func newestEntry(area []byte, blocks int64) (newest journal.LSN) {
	for b := range blocks {
		p := area[b*tableEntry:][:tableEntry]
		if journal.LSN(binary.LittleEndian.Uint64(p)) > newest {
			if e, ok := decodeEntry(p, b); ok {
				newest = e.lsn
			}
		}
	}
	return newest
}

func (t *table) get(block int64) (entry, bool) {
	off := t.area.Off + block*tableEntry
	return decodeEntry(t.mem.Bytes()[off:off+tableEntry], block)
}

// lsn is what an entry that may be damaged says.
func (t *table) lsn(block int64) journal.LSN {
	return journal.LSN(binary.LittleEndian.Uint64(t.mem.Bytes()[t.area.Off+block*tableEntry:]))
}

// vouches reports whether what is left of a damaged entry vouches for a block with
// checksum sum: it is there, or it is what the check is of. So it is after one flip.
func (t *table) vouches(block int64, sum uint32) bool {
	off := t.area.Off + block*tableEntry
	p := [tableEntry]byte(t.mem.Bytes()[off:])
	if binary.LittleEndian.Uint32(p[8:]) == sum {
		return true
	}
	binary.LittleEndian.PutUint32(p[8:], sum)
	_, ok := decodeEntry(p[:], block)
	return ok
}

// set changes an entry. It becomes durable with the next checkpoint.
func (t *table) set(block int64, e entry) {
	off := t.area.Off + block*tableEntry
	t.mem.Store64(off, uint64(e.lsn))
	t.mem.Store64(off+8, uint64(e.crc)|uint64(e.check(block))<<32)
}

// format writes the entries of so many zero blocks.
func (t *table) format(blocks int64) {
	e := entry{crc: zeroBlockCRC}
	buf := make([]byte, 64<<10)
	for first := int64(0); first < blocks; {
		n := min(int64(len(buf)/tableEntry), blocks-first)
		for i := range n {
			b := buf[i*tableEntry:]
			binary.LittleEndian.PutUint64(b, 0)
			binary.LittleEndian.PutUint32(b[8:], e.crc)
			binary.LittleEndian.PutUint32(b[12:], e.check(first+i))
		}
		t.mem.Copy(t.area.Off+first*tableEntry, buf[:n*tableEntry])
		first += n
	}
}

var zeroBlockCRC = crc32c.Sum(make([]byte, blockSize))

// blockSet is a set of blocks.
type blockSet []uint64

func newBlockSet(blocks int64) blockSet { return make(blockSet, (blocks+63)/64) }

func (s blockSet) has(b int64) bool { return s[b>>6]&(1<<(b&63)) != 0 }
func (s blockSet) add(b int64)      { s[b>>6] |= 1 << (b & 63) }
func (s blockSet) remove(b int64)   { s[b>>6] &^= 1 << (b & 63) }

// empty empties the set. Of a large one most memory was never touched, and stays so;
// and unlike clear it can be preempted.
func (s blockSet) empty() {
	for w, word := range s {
		if word != 0 {
			s[w] = 0
		}
	}
}

// all are the blocks in the set, in order.
func (s blockSet) all() iter.Seq[int64] {
	return func(yield func(int64) bool) {
		for w, word := range s {
			for ; word != 0; word &= word - 1 {
				if !yield(int64(w*64 + bits.TrailingZeros64(word))) {
					return
				}
			}
		}
	}
}

// marks is a set of blocks, mostly an empty one. How many they are is for anyone
// to read.
type marks struct {
	blockSet
	n atomic.Int64
}

func (m *marks) add(b int64) {
	if !m.has(b) {
		m.blockSet.add(b)
		m.n.Add(1)
	}
}

func (m *marks) remove(b int64) {
	if m.has(b) {
		m.blockSet.remove(b)
		m.n.Add(-1)
	}
}

func (m *marks) reset() {
	if m.n.Swap(0) > 0 { // else its memory may never have been touched
		m.empty()
	}
}

// some are at most so many of the blocks, from one on and around.
func (m *marks) some(most int, from int64) (blocks []int64) {
	if m.n.Load() == 0 {
		return nil // and nothing is searched
	}
	words, split := int64(len(m.blockSet)), uint64(1)<<(from&63) // from's bit in its word, which comes first and last
	for k := range words + 1 {
		w := (from>>6 + k) % words
		word := m.blockSet[w]
		switch k {
		case 0:
			word &^= split - 1
		case words:
			word &= split - 1
		}
		for ; word != 0; word &= word - 1 {
			if len(blocks) == most {
				return blocks
			}
			blocks = append(blocks, w<<6+int64(bits.TrailingZeros64(word)))
		}
	}
	return blocks
}
