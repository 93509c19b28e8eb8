package journal

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"
)

// limited is a sink whose log may not go beyond limit.
type limited struct {
	log   *Log
	acked LSN // no log above is acknowledged
	limit LSN
	over  LSN // where it did
}

func (s *limited) Progress() (acked, limit LSN) {
	if s.log.End() > s.limit {
		s.over = s.log.End()
	}
	return min(s.log.End(), s.acked), s.limit
}
func (s *limited) Apply(LSN) error    { return nil }
func (s *limited) Failed(error)       {}
func (s *limited) Wait(time.Duration) { runtime.Gosched() }
func (s *limited) Wake()              {}

// Who holds the role may lower the limit, as for a follower that wants the log kept:
// what was queued meanwhile keeps to it. So also where the role was claimed from a
// committer.
func TestLimitLoweredUnderTheRole(t *testing.T) {
	for _, claimed := range []bool{false, true} {
		log := newTestLog(t, 1<<20, 0)
		s := &limited{log: log, acked: 1 << 20, limit: 1 << 20}
		closed := errors.New("closed")
		c := NewCommitter(log, s, 0, closed)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		c.Acquire(ctx)
		c.Open(0, 0)
		c.Release()
		commit := func(n int) error {
			r := NewRequest()
			r.Add(0, make([]byte, n))
			_, err := c.Commit(ctx, r)
			return err
		}
		if err := commit(1000); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 2)
		if claimed {
			s.acked = log.End()
			go func() { done <- commit(1000) }()
			for c.Waiting() == 0 { // once it is written, it drives until it is acknowledged
				runtime.Gosched()
			}
		}
		c.Acquire(ctx)
		s.limit = log.End() + 5000
		end := log.End()
		go func() { done <- commit(100 << 10) }()
		for c.pending.Load() == 0 {
			runtime.Gosched()
		}
		c.Release()
		c.Acquire(ctx) // once the driver lets it go
		cancel()
		c.Release()
		<-done
		if claimed {
			<-done
		}
		if s.over != 0 || log.End() != end {
			t.Errorf("claimed %v: the log goes to %d, it may be written below %d", claimed, log.End(), s.limit)
		}
	}
}
