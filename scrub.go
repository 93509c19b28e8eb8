package nvmmirror

import (
	"errors"
	"time"

	"go.uber.org/zap"
)

// scrubPass is the time in which each block is looked at once. A flip in data that
// nobody reads is found while the peer can still repair it: on a secondary, before it
// has to serve alone.
const scrubPass = 24 * time.Hour

// scrubber looks at the blocks of a volume, one after the other, all the time. It is
// for one goroutine.
type scrubber struct {
	v    *Volume
	last time.Time
	next int64   // the block that comes next
	due  float64 // blocks that should have been looked at by now
}

// newScrubber begins at another block after each start: a node that is restarted more
// than once a pass must not look at the same ones only.
func (v *Volume) newScrubber() *scrubber {
	v.metaMu.Lock()
	generation := v.meta.Generation
	v.metaMu.Unlock()
	blocks := uint64(v.size / blockSize)
	return &scrubber{v: v, last: time.Now(), next: int64(generation * 0x9e3779b97f4a7c15 % blocks)}
}

// look looks at the blocks that have become due. One that does not match its entry, or
// cannot be read, is damaged as if a reader had met it: it is noted, logged, and
// fetched from the peer. There are no readers while log is still to be redone.
func (s *scrubber) look() {
	v, now := s.v, time.Now()
	blocks := v.size / blockSize
	passed := now.Sub(s.last)
	s.last = now
	if v.Applied() < LSN(v.redoUntil.Load()) {
		return // a block that does not match may be one that redo will settle
	}
	s.due = min(s.due+float64(blocks)*passed.Seconds()/scrubPass.Seconds(), float64(blocks))
	for ; s.due >= 1 && v.failed.Load() == nil; s.due-- {
		ok, err := v.sound(s.next)
		if err == nil && !ok {
			_, err = v.judge(s.next)
		}
		if errors.Is(err, ErrClosed) {
			return
		}
		if err != nil {
			v.log.Error("a block cannot be verified", zap.String("region", v.path), zap.Int64("block", s.next), zap.Error(err))
		}
		v.counters.scrubbed.Add(1)
		s.next = (s.next + 1) % blocks
	}
}
