package replicate

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// holding is a node whose session ends when it is let go.
type holding struct {
	*primary
	held chan struct{}
}

func (n holding) Failed() error { <-n.held; return errors.New("let go") }

type nowhere struct{ transport.Conn }

func (nowhere) TryWrite([][]byte) (int, error) { return 0, errors.New("nowhere") }
func (nowhere) Wake()                          {}
func (nowhere) RemoteAddr() (a netip.AddrPort) { return a }
func (nowhere) Close() error                   { return nil }

// TestChangesOfOneMoment: a change of role that comes while another one waits for the
// session to end is made after that one. A demotion comes so when it is done already.
func TestChangesOfOneMoment(t *testing.T) {
	n := holding{&primary{}, make(chan struct{})}
	p := New(n, Config{Timeout: time.Second})
	defer p.Close()
	s := newSession(p, nowhere{})
	p.wg.Go(func() { p.supervise(s) })
	var order []int
	var calls []*call
	for i := range 3 {
		c := &call{f: func() error { order = append(order, i); return nil }, done: make(chan error, 1)}
		p.calls <- c
		calls = append(calls, c)
	}
	close(n.held)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for i, c := range calls {
		select {
		case err := <-c.done:
			if err != nil {
				t.Errorf("change %d: %v", i, err)
			}
		case <-ctx.Done():
			t.Fatalf("change %d is not made", i)
		}
	}
	if len(order) != 3 || !slices.IsSorted(order) {
		t.Errorf("made in the order %v", order)
	}
}
