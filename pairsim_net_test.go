package nvmmirror

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// simNet joins the two nodes of a simulated pair. Nothing moves by itself: what
// a node writes is under way until the driver delivers it.
//
// mu guards all of it. Whoever holds it does not block.
type simNet struct {
	mu    sync.Mutex
	addr  [2]netip.AddrPort
	cut   [2]bool // what leaves the node does not arrive, until this is healed
	life  [2]*simLife
	pipes []*simPipe // in the order in which they came about
	dials []*simDial
	next  int // id of the next connection
}

// simLife is a node from its start to its end, as the network sees it. Once
// dead, nothing that its process does has any effect outside.
type simLife struct {
	net   *simNet
	node  int
	dead  bool
	ln    *simListener
	nap   func() time.Duration // how long a write keeps its goroutine
	full  int                  // bytes that may be under way on a connection
	waits uint64               // so far
}

// simPipe is one direction of a connection.
type simPipe struct {
	id       int
	answer   bool // it leads to the end that dialled
	from     int
	src, dst *simConn
	under    []byte // under way
	arrived  []byte
	head     []byte // the first that were read
	taken    int    // how many were
	fin      bool   // src has closed; nothing follows what is under way
	ended    bool   // dst has been told so
	reset    bool   // both ends are told that the connection is lost
	stalled  bool   // by the driver
}

// simConn is one end of a connection.
type simConn struct {
	life    *simLife
	in, out *simPipe
	wake    chan struct{}
	closed  bool
}

// simDial is a connection on its way to be.
type simDial struct {
	life   *simLife
	done   chan dialed
	server *simConn // once the first segment has arrived
	client *simConn
	gone   bool // nobody waits for it any more
}

type dialed struct {
	conn *simConn
	err  error
}

type simListener struct {
	life     *simLife
	accepted chan *simConn
	end      chan struct{}
	once     sync.Once
}

var (
	_ transport.Transport = (*simLife)(nil)
	_ transport.Conn      = (*simConn)(nil)

	errSimReset   = errors.New("sim: connection reset by peer")
	errSimRefused = errors.New("sim: connection refused")
)

func (l *simLife) Name() string { return "sim" }

func (l *simLife) Listen(netip.AddrPort) (transport.Listener, error) {
	l.net.mu.Lock()
	defer l.net.mu.Unlock()
	l.ln = &simListener{life: l, accepted: make(chan *simConn, 64), end: make(chan struct{})}
	return l.ln, nil
}

func (l *simLife) Dial(ctx context.Context, _ netip.Addr, _ netip.AddrPort) (transport.Conn, error) {
	d := &simDial{life: l, done: make(chan dialed, 1)}
	l.net.mu.Lock()
	dead := l.dead
	if !dead {
		l.net.dials = append(l.net.dials, d)
	}
	l.net.mu.Unlock()
	if dead {
		return nil, net.ErrClosed
	}
	select {
	case r := <-d.done:
		if r.err != nil {
			return nil, r.err
		}
		return r.conn, nil
	case <-ctx.Done():
	}
	l.net.mu.Lock()
	defer l.net.mu.Unlock()
	d.gone = true
	select {
	case r := <-d.done: // at the same moment
		if r.conn != nil {
			r.conn.close()
		}
	default:
	}
	return nil, ctx.Err()
}

func (l *simListener) Accept() (transport.Conn, error) {
	select {
	case c := <-l.accepted:
		return c, nil
	case <-l.end:
		return nil, net.ErrClosed
	}
}

func (l *simListener) Addr() netip.AddrPort { return l.life.net.addr[l.life.node] }

func (l *simListener) Close() error {
	l.once.Do(func() { close(l.end) })
	return nil
}

// connect makes both ends of a connection.
func (n *simNet) connect(client, server *simLife) (c, s *simConn) {
	c = &simConn{life: client, wake: make(chan struct{}, 1)}
	s = &simConn{life: server, wake: make(chan struct{}, 1)}
	c.out = &simPipe{id: n.next, from: client.node, src: c, dst: s}
	s.out = &simPipe{id: n.next + 1, answer: true, from: server.node, src: s, dst: c}
	c.in, s.in = s.out, c.out
	n.next += 2
	n.pipes = append(n.pipes, c.out, s.out)
	return c, s
}

func (c *simConn) TryRead(p []byte) (int, error) {
	n := c.life.net
	n.mu.Lock()
	defer n.mu.Unlock()
	switch in := c.in; {
	case c.closed || c.life.dead:
		return 0, net.ErrClosed
	case len(in.arrived) > 0:
		full := len(in.under)+len(in.arrived) >= c.life.full
		k := copy(p, in.arrived)
		in.arrived = in.arrived[k:]
		in.took(p[:k])
		if full { // there is room again
			in.src.Wake()
		}
		return k, nil
	case in.reset:
		return 0, errSimReset
	case in.ended:
		return 0, io.EOF
	}
	return 0, nil
}

func (c *simConn) TryWrite(bufs [][]byte) (int, error) {
	n, err := c.write(bufs)
	if n > 0 && c.life.nap != nil {
		// The thread loses its CPU: what was written is on its way, what the
		// caller does next is late.
		if d := c.life.nap(); d > 0 {
			time.Sleep(d)
		}
	}
	return n, err
}

func (c *simConn) write(bufs [][]byte) (n int, err error) {
	c.life.net.mu.Lock()
	defer c.life.net.mu.Unlock()
	switch {
	case c.closed || c.life.dead:
		return 0, net.ErrClosed
	case c.out.reset:
		return 0, errSimReset
	}
	for _, b := range bufs {
		k := min(len(b), c.life.full-len(c.out.under)-len(c.out.arrived))
		if k <= 0 {
			break
		}
		c.out.under = append(c.out.under, b[:k]...)
		n += k
	}
	return n, nil
}

func (c *simConn) Wait(write bool, d time.Duration) error {
	c.life.net.mu.Lock()
	over := c.closed || c.life.dead
	ready := over || len(c.in.arrived) > 0 || c.in.reset || c.in.ended ||
		write && len(c.out.under)+len(c.out.arrived) < c.life.full
	c.life.waits++
	// Timers of one instant fire in an order that chance decides.
	d += time.Duration((c.life.waits*2+uint64(c.life.node))*0x9e3779b97f4a7c15>>54) + 1
	c.life.net.mu.Unlock()
	switch {
	case over:
		return net.ErrClosed
	case ready:
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-c.wake:
	case <-t.C:
	}
	return nil
}

func (c *simConn) Park(write bool, d time.Duration) error { return c.Wait(write, d) }

func (c *simConn) Wake() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *simConn) RemoteAddr() netip.AddrPort { return c.life.net.addr[1-c.life.node] }

func (c *simConn) Close() error {
	c.life.net.mu.Lock()
	defer c.life.net.mu.Unlock()
	c.close()
	return nil
}

// close is Close under the lock.
func (c *simConn) close() {
	c.closed = true
	c.Wake()
	if !c.life.dead {
		c.out.fin = true
	}
}

// The driver's side. The bubble is quiet while it acts.

// deliverable are the pipes on which something can move.
func (n *simNet) deliverable() (out []*simPipe) {
	n.mu.Lock()
	defer n.mu.Unlock()
	live := n.pipes[:0]
	for _, p := range n.pipes {
		over := p.reset || p.ended || p.fin && p.dst.life.dead
		if over && len(p.under) == 0 && (p.dst.closed || p.dst.life.dead) {
			continue
		}
		live = append(live, p)
		if p.stalled || n.cut[p.from] || p.reset || len(p.under) == 0 && (!p.fin || p.ended) {
			continue
		}
		out = append(out, p)
	}
	n.pipes = live
	return out
}

// deliver moves at most k bytes, and the end of the stream behind the last.
func (n *simNet) deliver(p *simPipe, k int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	k = min(k, len(p.under))
	switch {
	case p.dst.life.dead:
		p.under = nil
		if n.life[p.dst.life.node] != nil { // a process, or the host, that knows nothing of it
			n.lose(p)
		} else if p.fin {
			p.ended = true
		}
		return
	case p.dst.closed:
		p.under = nil
		n.lose(p)
		return
	}
	p.arrived = append(p.arrived, p.under[:k]...)
	p.under = p.under[k:]
	p.ended = p.fin && len(p.under) == 0
	p.dst.Wake()
	p.src.Wake()
}

// lose ends the connection of a pipe: both ends are told.
func (n *simNet) lose(p *simPipe) {
	for _, q := range []*simPipe{p, p.dst.out} {
		q.reset, q.under = true, nil
		q.src.Wake()
	}
}

// pending are the dials that can make a step.
func (n *simNet) pending() (out []*simDial) {
	n.mu.Lock()
	defer n.mu.Unlock()
	live := n.dials[:0]
	for _, d := range n.dials {
		if d.gone || d.life.dead {
			if d.server != nil {
				n.lose(d.server.in)
			}
			continue
		}
		live = append(live, d)
		from := d.life.node
		if d.server != nil {
			from = 1 - from // the answer
		}
		if !n.cut[from] && (d.server != nil || n.life[1-from] != nil) {
			out = append(out, d)
		}
	}
	n.dials = live
	return out
}

// advance makes a dial's next step: the first segment reaches the listener, or
// the answer the dialler.
func (n *simNet) advance(d *simDial) {
	n.mu.Lock()
	defer n.mu.Unlock()
	drop := func() {
		for i, x := range n.dials {
			if x == d {
				n.dials = append(n.dials[:i:i], n.dials[i+1:]...)
			}
		}
	}
	peer := n.life[1-d.life.node]
	if d.server != nil {
		drop()
		d.done <- dialed{conn: d.client}
		return
	}
	if peer.ln == nil || peer.dead {
		drop()
		d.done <- dialed{err: errSimRefused}
		return
	}
	d.client, d.server = n.connect(d.life, peer)
	select {
	case peer.ln.accepted <- d.server:
	default: // the backlog is full
		d.client, d.server = nil, nil
	}
}

// bury ends a life. What it has sent may still arrive. told: the kernel that
// outlives the process ends its connections.
func (n *simNet) bury(l *simLife, told bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	l.dead = true
	for _, p := range n.pipes {
		if p.src.life == l {
			p.fin = p.fin || told
			p.src.Wake()
		}
	}
}
