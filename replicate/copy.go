package replicate

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
)

// A full copy leaves out what the follower has: the source sends the blocks that have
// changed since. What the follower has applied to those, or not, does not matter: they
// are replaced as a whole. It has
//
//   - its data, as far as its log goes, where that is the beginning of the source's
//     log and the source's ring no longer reaches back to its end;
//   - after a lost connection, as much as came of the copy: the blocks up to some
//     block hold all log that was applied to them. That is kept in memory, and is worth
//     something as long as neither node has restarted and the source has begun no
//     other epoch: its log, and with it its data, has only grown since then.
//
// It lacks the blocks that it knows to be damaged or unverified. One that is unverified
// at the source may have changed after what its entry says, and is sent. That nothing has
// changed in what is left out, both block tables must say alike.

// copied is what a follower has of a full copy that was cut off.
type copied struct {
	copyID uint64 // see follow.Copy
	record Resync // which the node holds as long as nothing else has happened to it
	parts
}

// parts are of a volume, from its first block on: each begins where the one before
// ends, and holds less of the log.
type parts []part

// part is a part of a volume.
type part struct {
	End int64       `json:"end"` // block
	LSN journal.LSN `json:"lsn"` // all log up to it is in the blocks
}

// claim is what a follower has of a copy that begins: the body of its msgFollowed.
type claim struct {
	Parts parts   `json:"parts"`
	Lacks []int64 `json:"lacks,omitempty"` // blocks in them
}

// What is kept and told is bounded.
const (
	maxParts = 16
	maxLacks = 4096
)

// blocks is how many there are.
func (have parts) blocks() int64 {
	if len(have) == 0 {
		return 0
	}
	return have[len(have)-1].End
}

// after is what there is after a session in which the blocks up to next came, or were
// the same: what lies behind it lacks log from before that session.
func (have parts) after(next int64, applied journal.LSN) parts {
	var all parts
	if next > 0 {
		all = append(all, part{next, applied})
	}
	for _, h := range have {
		if h.End > next {
			all = append(all, h)
		}
	}
	if len(all) > maxParts {
		all = slices.Delete(all, 1, 2) // not what came last: else no session would get further
	}
	return all
}

// valid reports whether a peer can have that of a volume of so many blocks.
func (have parts) valid(blocks int64) bool {
	last := int64(0)
	for _, h := range have {
		if h.End < last || h.End > blocks {
			return false
		}
		last = h.End
	}
	return len(have) <= maxParts
}

// claimOf is what this node has of the copy that it is to take after the verdict v.
func (p *Pair) claimOf(f *follow, v Verdict) claim {
	if lacks := p.node.Doubtful(maxLacks + 1); len(lacks) <= maxLacks {
		if have := p.partsOf(f, v); len(have) > 0 {
			return claim{have, lacks}
		}
	}
	return claim{}
}

func (p *Pair) partsOf(f *follow, v Verdict) parts {
	st, have := p.node.State(), p.have
	switch {
	case f.Copy == 0: // an earlier release's
	case st.Resync != nil:
		if *st.Resync == have.record && f.Copy == have.copyID && f.History.Last().Epoch == have.record.Epoch {
			return have.parts
		}
	case st.Lineage == f.Lineage && !p.node.Damaged():
		// v.From is up to where both have the same log.
		if applied := p.node.Applied(); applied <= v.From {
			return parts{{p.node.Geometry().Size / BlockSize, applied}}
		}
	}
	return nil
}

// copier is the progress of a full copy at its source.
type copier struct {
	done        bool
	block, end  int64
	have        parts // of the follower, from block on: it lacks only what has changed since
	lacks       map[int64]bool
	buf         []byte
	info        []BlockInfo
	look        []BlockInfo // of the table
	msg         []byte
	lastApplied journal.LSN
	sent        journal.LSN // how far the log was sent when the last blocks were queued
}

func (c *copier) start(size int64) {
	c.done = false
	c.end = size / BlockSize
	c.buf = make([]byte, blocksPerMessage*BlockSize)
	c.info = make([]BlockInfo, blocksPerMessage)
	c.msg = make([]byte, 0, blocksPerMessage*(BlockSize+blockInfoSize))
}

// resume takes in what the follower has of the copy: the body of its msgFollowed.
func (c *copier) resume(p *Pair, f *follow, body []byte) error {
	if !f.Full || len(body) == 0 {
		return nil
	}
	var has claim
	if err := unmarshal(msgFollowed, body, &has); err != nil {
		return err
	}
	if !has.Parts.valid(c.end) || len(has.Lacks) > maxLacks {
		return &WireError{fmt.Sprintf("%d parts of a full copy, less %d blocks, that are not those of a volume of %d blocks", len(has.Parts), len(has.Lacks), c.end)}
	}
	c.have, c.lacks = has.Parts, make(map[int64]bool, len(has.Lacks))
	for _, b := range has.Lacks {
		c.lacks[b] = true
	}
	for i := range c.have {
		c.have[i].LSN = min(c.have[i].LSN, f.From) // the log goes on there, also where it was sent before
	}
	c.look = make([]BlockInfo, blocksPerLook)
	p.log.Info("full copy of what the peer lacks", zap.Int64("has", c.have.blocks()), zap.Int64("of", c.end))
	return nil
}

// next queues the next message of blocks. They are read while nothing is
// applied, so that they hold exactly the log up to the LSN that they carry,
// and sent in order with the log: the follower applies a segment to a block
// only where it is newer.
func (c *copier) next(p *Pair, s *session) error {
	if c.block == c.end {
		s.send(message{typ: msgBlocksDone, a: uint64(c.lastApplied)}, nil)
		c.done = true
		return nil
	}
	n := min(c.end-c.block, blocksPerMessage)
	for len(c.have) > 0 && c.have[0].End <= c.block {
		c.have = c.have[1:]
	}
	if len(c.have) > 0 {
		// The LSN of an unverified block says too little where it was damaged before, or
		// where log that had changed it was given up.
		since := c.have[0].LSN
		changed := func(b BlockInfo) bool { return b.LSN > since || b.Unverified && !b.Damaged }
		var look []BlockInfo
		var left int64
		for _, most := range []int64{blocksPerMessage, blocksPerLook} { // further only where it is worth it
			look = c.look[:min(most, c.have[0].End-c.block)]
			var err error
			if c.lastApplied, err = p.node.Entries(c.block, look); err != nil {
				return fmt.Errorf("full copy: %w", err)
			}
			for i := range look {
				if c.lacks[c.block+int64(i)] {
					look[i].LSN = math.MaxUint64
				}
			}
			if left = run(look, func(b BlockInfo) bool { return !b.Damaged && !changed(b) }); left < int64(len(look)) {
				break
			}
		}
		if left == 0 && !changed(look[0]) {
			// It is damaged, and keeps its LSN: it may have changed since, but not without
			// its checksum. Where the follower has that one, it can repair the block here.
			left = 1
		}
		if left > 0 {
			s.send(message{typ: msgSame, a: uint64(c.block), b: uint64(left), c: uint64(sumEntries(look[:left]))}, nil)
			c.block += left
			p.copied.Store(c.block * BlockSize)
			return nil
		}
		n = worth(look[:min(blocksPerMessage, len(look))], changed)
	}
	applied, err := p.node.ReadBlocks(c.block, c.buf[:n*BlockSize], c.info[:n])
	if err != nil {
		return fmt.Errorf("full copy: %w", err)
	}
	c.lastApplied = applied
	c.msg = c.msg[:int(n)*blockInfoSize]
	for i := range c.info[:n] {
		putBlockInfo(c.msg[i*blockInfoSize:], c.info[i])
	}
	c.msg = append(c.msg, c.buf[:n*BlockSize]...)
	s.send(message{typ: msgBlocks, a: uint64(c.block), b: uint64(n), c: uint64(applied)}, c.msg)
	c.block += n
	p.copied.Store(c.block * BlockSize)
	return nil
}

// run is how many at the beginning are such.
func run(look []BlockInfo, such func(BlockInfo) bool) int64 {
	if i := slices.IndexFunc(look, func(b BlockInfo) bool { return !such(b) }); i >= 0 {
		return int64(i)
	}
	return int64(len(look))
}

// worth is how many at the beginning are worth a message: a few between them that have
// not changed cost less than two more would.
func worth(look []BlockInfo, changed func(BlockInfo) bool) (n int64) {
	const few = 8
	for i, b := range look {
		if changed(b) {
			n = int64(i) + 1
		} else if b.Damaged || int64(i) >= n+few {
			break
		}
	}
	return n
}

// sumEntries is the checksum of what a table says of blocks.
func sumEntries(look []BlockInfo) (sum uint32) {
	var said [12]byte
	for _, b := range look {
		binary.LittleEndian.PutUint64(said[:], uint64(b.LSN))
		binary.LittleEndian.PutUint32(said[8:], b.CRC)
		sum = crc32c.Update(sum, said[:])
	}
	return sum
}

// same takes it that so many blocks were left out.
func (r *receiver) same(m *message) error {
	first, n := int64(m.a), int64(m.b)
	if !r.full || first != r.nextBlock || n <= 0 || n > min(blocksPerLook, r.have.blocks()-first) {
		return &WireError{fmt.Sprintf("%d blocks from %d on are left out of a full copy where %d comes next", m.b, m.a, r.nextBlock)}
	}
	look := make([]BlockInfo, n)
	if _, err := r.p.node.Entries(first, look); err != nil {
		return err
	}
	if uint64(sumEntries(look)) != m.c {
		r.have, r.nextBlock = nil, 0
		return fmt.Errorf("blocks %d to %d are not what the peer has, though its log says so: all blocks are copied", first, first+n)
	}
	r.nextBlock += n
	r.p.copied.Store(r.nextBlock * BlockSize)
	return nil
}
