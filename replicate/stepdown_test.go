package replicate

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

type heap struct {
	pmem.Memory
	b []byte
}

func (m heap) Bytes() []byte { return m.b }

// primary is a node with log, whose state is in memory only.
type primary struct {
	Node
	log *journal.Log
	c   *journal.Committer
	st  State
}

func (n *primary) Memory() pmem.Memory               { return heap{} }
func (n *primary) State() State                      { return n.st }
func (n *primary) Update(f func(*State) error) error { return f(&n.st) }
func (n *primary) Log() *journal.Log                 { return n.log }
func (n *primary) Committer() *journal.Committer     { return n.c }

// TestStepDownAcknowledgesNothing: whoever looks while a primary steps down, as a
// checkpoint does, does not take log that the peer never had for acknowledged.
func TestStepDownAcknowledgesNothing(t *testing.T) {
	n := &primary{log: journal.NewLog(heap{b: make([]byte, 1<<20)}, 0, 1<<20, 0)}
	n.log.Reset(4096, 0) // log without the peer
	n.c = journal.NewCommitter(n.log, nil, 0, errors.New("closed"))
	p := New(n, Config{Timeout: time.Second})
	var rounds, seen atomic.Int64
	primaryAgain := func() {
		rounds.Add(1) // odd: what is seen counts for nothing
		n.st.Role = Primary
		p.mode.Store(&mode{role: Primary, required: true})
		rounds.Add(1)
	}
	primaryAgain()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if r := rounds.Load(); r%2 == 0 && p.Acked() != 0 && rounds.Load() == r {
				seen.Add(1)
			}
		}
	}()
	for range 1_000_000 {
		if err := p.stepDownLocked(true); err != nil {
			t.Fatal(err)
		}
		primaryAgain()
	}
	close(stop)
	<-done
	if n := seen.Load(); n > 0 {
		t.Errorf("%d times in %d", n, rounds.Load()/2)
	}
}
