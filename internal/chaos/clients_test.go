package chaos

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nvmmirror/nvmmirror/internal/admin"
)

const (
	clients       = 6
	registerCount = 48
	registerEvery = 4096 // bytes: one register to a block
	think         = time.Millisecond
	opTime        = 400 * time.Millisecond
)

// crowd is clients that write and read registers at whichever node they
// believe to be primary, and now and then at the other.
type crowd struct {
	p       *pair
	h       *history
	primary atomic.Int32 // index of the node that was promoted last
	values  atomic.Uint64
	done    atomic.Int64 // operations
	idle    atomic.Bool  // they do nothing for now
	cancel  context.CancelFunc
	wg      sync.WaitGroup
}

func startCrowd(p *pair, h *history, seed uint64) *crowd {
	ctx, cancel := context.WithCancel(context.Background())
	c := &crowd{p: p, h: h, cancel: cancel}
	for id := range clients {
		c.wg.Go(func() { c.client(ctx, id, rand.New(rand.NewPCG(seed, uint64(id)))) })
	}
	p.t.Cleanup(c.end)
	return c
}

// aim tells the clients who is primary.
func (c *crowd) aim(n *node) {
	i := int32(0)
	if n == c.p.b {
		i = 1
	}
	c.primary.Store(i)
}

func (c *crowd) end() {
	c.cancel()
	c.wg.Wait()
}

func (c *crowd) client(ctx context.Context, id int, rng *rand.Rand) {
	nodes := [2]*admin.Client{admin.NewClient(c.p.a.socket), admin.NewClient(c.p.b.socket)}
	defer nodes[0].Close()
	defer nodes[1].Close()
	names := [2]string{c.p.a.name, c.p.b.name}
	pause := time.NewTimer(0)
	defer pause.Stop()
	for at := 0; ctx.Err() == nil; {
		if c.idle.Load() {
			rest(ctx, pause)
			continue
		}
		if rng.IntN(20) == 0 {
			at = 1 - at
		} else if rng.IntN(4) == 0 {
			at = int(c.primary.Load())
		}
		// A few registers are hot, so that operations meet.
		o := operation{Client: id, Node: names[at], Register: rng.IntN(registerCount), Write: rng.IntN(2) == 0}
		if rng.IntN(2) == 0 {
			o.Register %= 4
		}
		c.operate(nodes[at], &o)
		c.h.add(o)
		if o.Outcome == done {
			c.done.Add(1)
		} else {
			at = int(c.primary.Load())
		}
		rest(ctx, pause)
	}
}

func rest(ctx context.Context, t *time.Timer) {
	t.Reset(think)
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// operate does one operation. A node that does not answer is not waited for.
func (c *crowd) operate(to *admin.Client, o *operation) {
	ctx, cancel := context.WithTimeout(context.Background(), opTime)
	defer cancel()
	p := make([]byte, 8)
	var err error
	if o.Write {
		o.Value = c.values.Add(1)
		binary.LittleEndian.PutUint64(p, o.Value)
		o.Call = c.h.now()
		_, err = to.Write(ctx, int64(o.Register)*registerEvery, p, opTime*3/4)
	} else {
		o.Call = c.h.now()
		if err = to.Read(ctx, int64(o.Register)*registerEvery, p); err == nil {
			o.Value = binary.LittleEndian.Uint64(p)
		}
	}
	o.Return = c.h.now()
	var e *admin.Error
	switch {
	case err == nil:
		o.Outcome = done
	case admin.IsOutcomeUnknown(err) || !errors.As(err, &e):
		o.Outcome = unknown
	default:
		o.Outcome = failed
	}
	if err != nil {
		o.Error = err.Error()
	}
}

// more waits for so many further operations that are done, unless the clients
// are idle.
func (c *crowd) more(n int64) {
	c.p.t.Helper()
	if c.idle.Load() {
		return
	}
	want := c.done.Load() + n
	poll(c.p.t, progressTime, "clients make progress", func() (bool, string) {
		return c.done.Load() >= want, "a: " + c.p.a.lastLines() + "\nb: " + c.p.b.lastLines()
	})
}
