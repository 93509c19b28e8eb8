package nvmmirror

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// A link is the network between two nodes under test. It can be cut: nothing
// passes, nothing is reset, as with a switch that lost power.
type link struct {
	mu     sync.Mutex
	cut    bool
	change chan struct{} // closed and replaced with each change
}

func newLink() *link { return &link{change: make(chan struct{})} }

func (l *link) set(cut bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = cut
	close(l.change)
	l.change = make(chan struct{})
}

func (l *link) state() (cut bool, change <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cut, l.change
}

// A wire is one node's end of a link: a transport, most often TCP_MD5SIG, with
// faults between it and the node.
type wire struct {
	transport.Transport
	link *link
	dead atomic.Bool // the node was killed: nothing leaves it any more
	mute atomic.Bool // nothing leaves it, what comes in it takes

	mu      sync.Mutex
	chop    int                  // bytes per read and write at most; 0: all
	pace    time.Duration        // between two writes
	corrupt func(out []byte) int // flips something in what leaves, says where; -1: nothing
	dials   atomic.Int64
	conns   []*wireConn // that were made, in this order
}

func (w *wire) setChop(chop int, pace time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.chop, w.pace = chop, pace
}

func (w *wire) setCorrupt(f func(out []byte) int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.corrupt = f
}

func (w *wire) faults() (chop int, pace time.Duration, corrupt func([]byte) int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.chop, w.pace, w.corrupt
}

var errCut = errors.New("the link is cut")

func (w *wire) Dial(ctx context.Context, local netip.Addr, peer netip.AddrPort) (transport.Conn, error) {
	w.dials.Add(1)
	if cut, change := w.link.state(); cut || w.dead.Load() {
		select {
		case <-ctx.Done():
		case <-change:
		}
		return nil, errCut
	}
	c, err := w.Transport.Dial(ctx, local, peer)
	if err != nil {
		return nil, err
	}
	return w.wrap(c), nil
}

func (w *wire) Listen(local netip.AddrPort) (transport.Listener, error) {
	l, err := w.Transport.Listen(local)
	if err != nil {
		return nil, err
	}
	return &wireListener{l, w}, nil
}

type wireListener struct {
	transport.Listener
	w *wire
}

func (l *wireListener) Accept() (transport.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.w.wrap(c), nil
}

func (w *wire) wrap(c transport.Conn) *wireConn {
	wc := &wireConn{Conn: c, w: w, woken: make(chan struct{}, 1)}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns = append(w.conns, wc)
	return wc
}

// made are the connections so far.
func (w *wire) made() []*wireConn {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.conns)
}

type wireConn struct {
	transport.Conn
	w      *wire
	woken  chan struct{}
	sent   atomic.Int64 // bytes
	moved  atomic.Int64 // bytes, in either direction
	closed atomic.Bool  // by this end: it is told, also where nothing passes
	next   time.Time    // of a paced write; the writer's
}

func (c *wireConn) stopped() (bool, <-chan struct{}) {
	cut, change := c.w.link.state()
	return cut || c.w.dead.Load(), change
}

func (c *wireConn) TryRead(p []byte) (int, error) {
	if c.closed.Load() {
		return 0, net.ErrClosed
	}
	if stop, _ := c.stopped(); stop {
		return 0, nil
	}
	if chop, _, _ := c.w.faults(); chop > 0 && len(p) > chop {
		p = p[:chop]
	}
	n, err := c.Conn.TryRead(p)
	c.moved.Add(int64(n))
	return n, err
}

func (c *wireConn) count(sent int) {
	c.sent.Add(int64(sent))
	c.moved.Add(int64(sent))
}

func (c *wireConn) TryWrite(bufs [][]byte) (int, error) {
	if stop, _ := c.stopped(); stop || c.w.mute.Load() {
		return 0, nil
	}
	chop, pace, corrupt := c.w.faults()
	if pace > 0 {
		if now := time.Now(); now.Before(c.next) {
			return 0, nil
		}
		c.next = time.Now().Add(pace)
	}
	if chop == 0 && corrupt == nil {
		n, err := c.Conn.TryWrite(bufs)
		c.count(n)
		return n, err
	}
	var out []byte
	for _, b := range bufs {
		out = append(out, b...)
	}
	if chop > 0 && len(out) > chop {
		out = out[:chop]
	}
	if corrupt == nil {
		n, err := c.Conn.TryWrite([][]byte{out})
		c.count(n)
		return n, err
	}
	bad := corrupt(out)
	n, err := c.Conn.TryWrite([][]byte{out})
	if err == nil && bad >= 0 && n > bad {
		c.w.setCorrupt(nil) // once
	}
	return n, err
}

func (c *wireConn) Wait(write bool, d time.Duration) error { return c.wait(c.Conn.Wait, write, d) }

func (c *wireConn) Park(write bool, d time.Duration) error { return c.wait(c.Conn.Park, write, d) }

func (c *wireConn) wait(wait func(bool, time.Duration) error, write bool, d time.Duration) error {
	stop, change := c.stopped()
	_, pace, _ := c.w.faults()
	if !stop {
		if pace > 0 {
			d = min(d, pace)
			write = false
		}
		return wait(write && !c.w.mute.Load(), d)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-c.woken:
	case <-change:
	case <-t.C:
	}
	return nil
}

func (c *wireConn) Close() error {
	c.closed.Store(true)
	c.Wake()
	return c.Conn.Close()
}

func (c *wireConn) Wake() {
	select {
	case c.woken <- struct{}{}:
	default:
	}
	c.Conn.Wake()
}
