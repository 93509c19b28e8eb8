package nvmmirror

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"

	"github.com/nvmmirror/nvmmirror/journal"
)

const pairSimSize = 8 * blockSize

// simTx is a transaction of a simulated client. Its writes follow from its
// number and the schedule's seed.
type simTx struct {
	id     int
	off    []int64
	data   [][]byte
	failed string // an error that says that it never becomes visible
}

// simPlace names a place in the log: no two logs that differ below it have it
// in common, as far as CRC32C tells.
type simPlace struct {
	lsn   LSN
	chain uint32
}

// simSegment is a segment that some node has had in its log. They form a tree:
// logs fork.
type simSegment struct {
	simPlace
	parent  *simSegment
	depth   int
	txs     []*simTx
	content []byte // of a volume that holds the log up to here
}

// holds reports whether the log up to s contains x.
func (s *simSegment) holds(x *simSegment) bool {
	if s == nil || x == nil {
		return x == nil
	}
	for s.depth > x.depth {
		s = s.parent
	}
	return s == x
}

func (s *simSegment) has(tx *simTx) bool {
	for ; s != nil; s = s.parent {
		for _, t := range s.txs {
			if t == tx {
				return true
			}
		}
	}
	return false
}

func (s *simSegment) String() string {
	if s == nil {
		return "none"
	}
	return fmt.Sprintf("%d/%08x", s.lsn, s.chain)
}

// simModel knows every transaction and every log that there was.
type simModel struct {
	txs     []*simTx
	places  map[simPlace]*simSegment
	content map[uint32][]*simSegment // by checksum
}

func newSimModel() *simModel {
	m := &simModel{places: map[simPlace]*simSegment{}, content: map[uint32][]*simSegment{}}
	m.add(&simSegment{content: make([]byte, pairSimSize)})
	return m
}

func (m *simModel) add(s *simSegment) {
	m.places[s.simPlace] = s
	sum := crc32.ChecksumIEEE(s.content)
	m.content[sum] = append(m.content[sum], s)
}

// tx makes the next transaction. The first of its writes names it.
func (m *simModel) tx(rng *rand.Rand, large bool) *simTx {
	t := &simTx{id: len(m.txs) + 1}
	t.write(int64(t.id%64)*8, binary.LittleEndian.AppendUint64(nil, uint64(t.id)))
	n := 1 + rng.IntN(3)
	if large {
		n = 3 + rng.IntN(26) // some are long enough to travel by lanes
	}
	for range n {
		size := 1 + rng.IntN(200)
		switch {
		case large:
			size = 1 + rng.IntN(pairSimSize-blockSize)
		case rng.IntN(6) == 0:
			size = 1 + rng.IntN(2*blockSize)
		}
		p := make([]byte, size)
		for i := 0; i < size; i += 8 {
			var w [8]byte
			binary.LittleEndian.PutUint64(w[:], rng.Uint64())
			copy(p[i:], w[:])
		}
		off := int64(512 + rng.IntN(pairSimSize-512-size+1))
		if rng.IntN(8) == 0 && size > blockSize {
			off, p = off&^(blockSize-1)+blockSize, p[:blockSize]
			off = min(off, pairSimSize-blockSize)
		}
		t.write(off, p)
	}
	m.txs = append(m.txs, t)
	return t
}

func (t *simTx) write(off int64, p []byte) {
	t.off = append(t.off, off)
	t.data = append(t.data, p)
}

// walk brings the model up to a node's log, which was at from before, and
// returns where it ends now.
func (m *simModel) walk(ring journal.Ring, from *simSegment, to simPlace) (*simSegment, error) {
	if s := m.places[to]; s != nil {
		return s, nil
	}
	var first error
	for at := from; at != nil; at = at.parent {
		if at.lsn > to.lsn || to.lsn-at.lsn > LSN(ring.Size()) {
			continue
		}
		s, err := m.follow(ring, at, to)
		if err == nil {
			return s, nil
		}
		if first == nil {
			first = err
		}
	}
	return nil, fmt.Errorf("log up to LSN %d, chain %08x, comes from nowhere: %w", to.lsn, to.chain, first)
}

// learn takes in what the ring holds behind a place.
func (m *simModel) learn(ring journal.Ring, at *simSegment) {
	for at != nil {
		var h journal.Header
		if _, err := ring.Segment(at.lsn, &h); err != nil {
			return
		}
		at, _ = m.follow(ring, at, simPlace{h.End(), h.CRC})
	}
}

func (m *simModel) follow(ring journal.Ring, at *simSegment, to simPlace) (*simSegment, error) {
	for at.lsn < to.lsn {
		var h journal.Header
		body, err := ring.Segment(at.lsn, &h)
		if err != nil {
			return nil, err
		}
		if h.Prev != at.chain {
			return nil, fmt.Errorf("segment at LSN %d is not chained", at.lsn)
		}
		if s := m.places[simPlace{h.End(), h.CRC}]; s != nil && s.parent == at {
			at = s
			continue
		}
		s := &simSegment{simPlace: simPlace{h.End(), h.CRC}, parent: at, depth: at.depth + 1, content: at.content}
		if !h.Pad {
			if err := m.take(s, body, int(h.Count)); err != nil {
				return nil, fmt.Errorf("segment at LSN %d: %w", h.LSN, err)
			}
		}
		m.add(s)
		at = s
	}
	if at.simPlace != to {
		return nil, fmt.Errorf("the segments in the ring end at %v", at)
	}
	return at, nil
}

// take reads the transactions in a segment's body, whole ones.
func (m *simModel) take(s *simSegment, body []byte, count int) error {
	s.content = bytes.Clone(s.content)
	var tx *simTx
	k := 0
	for records := journal.NewRecords(body); ; {
		rec, ok, err := records.Next()
		if err != nil {
			return err
		}
		if !ok {
			break
		}
		if tx == nil {
			if len(rec.Data) != 8 {
				return fmt.Errorf("a transaction starts with a record of %d bytes", len(rec.Data))
			}
			id := binary.LittleEndian.Uint64(rec.Data)
			if id == 0 || id > uint64(len(m.txs)) {
				return fmt.Errorf("transaction %d was never begun", id)
			}
			tx, k = m.txs[id-1], 0
			if s.has(tx) {
				return fmt.Errorf("transaction %d is in the log twice", id)
			}
			if tx.failed != "" {
				return fmt.Errorf("transaction %d is in the log, its client was told %q", id, tx.failed)
			}
			s.txs = append(s.txs, tx)
		}
		if rec.Off != tx.off[k] || !bytes.Equal(rec.Data, tx.data[k]) {
			return fmt.Errorf("record %d of transaction %d is not what was written", k, tx.id)
		}
		copy(s.content[rec.Off:], rec.Data)
		if k++; rec.Last != (k == len(tx.off)) {
			return fmt.Errorf("transaction %d ends after %d of %d records", tx.id, k, len(tx.off))
		}
		if rec.Last {
			tx = nil
		}
	}
	if tx != nil || len(s.txs) != count {
		return fmt.Errorf("%d whole transactions, the header says %d", len(s.txs), count)
	}
	return nil
}

// holding is the segment up to lsn that carries a transaction, if there was one.
func (m *simModel) holding(tx *simTx, lsn LSN) *simSegment {
	for p, s := range m.places {
		if p.lsn == lsn && s.hasHere(tx) {
			return s
		}
	}
	return nil
}

// find are the places in the log at which a volume has this content.
func (m *simModel) find(content []byte) (out []*simSegment) {
	for _, s := range m.content[crc32.ChecksumIEEE(content)] {
		if bytes.Equal(s.content, content) {
			out = append(out, s)
		}
	}
	return out
}
