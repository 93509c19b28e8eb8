package replicate

import (
	"fmt"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/journal"
)

// A full copy that a lost connection cuts off goes on where it was, as long as
// neither node has restarted and the source has begun no other epoch: its log, and
// with it its data, has only grown since then. The follower keeps in memory which
// blocks it has, and up to where the log is in them; of those the source sends the
// ones that have changed since. What the follower has applied to them meanwhile, or
// not, does not matter: they are replaced as a whole.

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

// maxParts bounds what is kept and told.
const maxParts = 16

// blocks is how many there are.
func (have parts) blocks() int64 {
	if len(have) == 0 {
		return 0
	}
	return have[len(have)-1].End
}

// after is what there is after a session in which the blocks up to next came, or had
// not changed: what lies behind it lacks log from before that session.
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
	return all[max(0, len(all)-maxParts):] // the first one counts as of the next
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

// partsOf is what this node has of the copy that it is to follow, if that goes on.
func (p *Pair) partsOf(f *follow) parts {
	st := p.node.State()
	have := p.have
	if st.Resync == nil || *st.Resync != have.record || f.Copy == 0 || f.Copy != have.copyID || f.History.Last().Epoch != have.record.Epoch {
		return nil
	}
	return have.parts
}

// copier is the progress of a full copy at its source.
type copier struct {
	done        bool
	block, end  int64
	have        parts // of the follower, from block on: it lacks only what has changed since
	buf         []byte
	info        []BlockInfo
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
	if err := unmarshal(msgFollowed, body, &c.have); err != nil {
		return err
	}
	if !c.have.valid(c.end) {
		return &WireError{fmt.Sprintf("it has blocks %+v of %d", c.have, c.end)}
	}
	for i := range c.have {
		c.have[i].LSN = min(c.have[i].LSN, f.From) // the log goes on there, also where it was sent before
	}
	p.log.Info("full copy goes on", zap.Int64("blocks", c.have.blocks()), zap.Int64("of", c.end))
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
		const atOnce = 64 << 10 // blocks, so that the log has its turn
		last := min(c.have[0].End, c.block+atOnce)
		var applied journal.LSN
		c.block, n, applied = p.node.Changed(c.block, last, blocksPerMessage, c.have[0].LSN)
		p.copied.Store(c.block * BlockSize)
		if n == 0 {
			c.lastApplied = applied
			return nil
		}
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
