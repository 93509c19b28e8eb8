package replicate_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// A pipe is a connection in memory. The test holds its far end.
type pipe struct {
	mu     sync.Mutex
	in     []byte // to the node
	out    []byte // from the node, at most room
	room   int
	eof    bool // the far end is closed
	closed bool
	wake   chan struct{}
	far    chan struct{} // something for the far end
}

func newPipe(room int) *pipe {
	return &pipe{room: room, wake: make(chan struct{}, 1), far: make(chan struct{}, 1)}
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (p *pipe) TryRead(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return 0, net.ErrClosed
	case len(p.in) == 0 && p.eof:
		return 0, io.EOF
	}
	n := copy(b, p.in)
	p.in = p.in[n:]
	return n, nil
}

func (p *pipe) TryWrite(bufs [][]byte) (n int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return 0, net.ErrClosed
	}
	for _, b := range bufs {
		k := min(len(b), p.room-len(p.out))
		p.out = append(p.out, b[:k]...)
		n += k
	}
	notify(p.far)
	return n, nil
}

func (p *pipe) Wait(write bool, d time.Duration) error {
	p.mu.Lock()
	ready := p.closed || p.eof || len(p.in) > 0 || write && len(p.out) < p.room
	p.mu.Unlock()
	if ready {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-p.wake:
	case <-t.C:
	}
	return nil
}

func (p *pipe) Park(write bool, d time.Duration) error { return p.Wait(write, d) }

func (p *pipe) Wake()                      { notify(p.wake) }
func (p *pipe) RemoteAddr() netip.AddrPort { return netip.MustParseAddrPort("127.0.0.1:1") }

func (p *pipe) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	notify(p.wake)
	notify(p.far)
	return nil
}

// send gives the node bytes; hangUp ends them.
func (p *pipe) send(b []byte) {
	p.mu.Lock()
	p.in = append(p.in, b...)
	p.mu.Unlock()
	notify(p.wake)
}

func (p *pipe) hangUp() {
	p.mu.Lock()
	p.eof = true
	p.mu.Unlock()
	notify(p.wake)
}

// receive takes one message from the node; ok is false where the node has
// closed the connection, or says nothing.
func (p *pipe) receive() (m replicate.Message, ok bool) {
	t := time.NewTimer(2 * time.Second)
	defer t.Stop()
	for {
		p.mu.Lock()
		m, n, whole := replicate.DecodeMessage(p.out)
		if whole {
			m.Body = bytes.Clone(m.Body)
			p.out = p.out[n:]
		}
		closed := p.closed
		p.mu.Unlock()
		if whole {
			return m, true
		}
		if closed {
			return m, false
		}
		select {
		case <-p.far:
		case <-t.C:
			return m, false
		}
	}
}

// await takes messages until one of a type.
func (p *pipe) await(typ uint16) (m replicate.Message, ok bool) {
	for {
		if m, ok = p.receive(); !ok || m.Type == typ {
			return m, ok
		}
	}
}

// taken waits until the node has read everything, or has closed.
func (p *pipe) taken() {
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); {
		p.mu.Lock()
		done := p.closed || len(p.in) == 0
		p.mu.Unlock()
		if done {
			return
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// A stage is a transport on which only the test makes connections.
type stage struct {
	offered chan transport.Conn
	done    chan struct{}
	once    sync.Once
}

func newStage() *stage {
	return &stage{offered: make(chan transport.Conn), done: make(chan struct{})}
}

func (s *stage) Name() string                                      { return "stage" }
func (s *stage) Listen(netip.AddrPort) (transport.Listener, error) { return s, nil }
func (s *stage) Addr() netip.AddrPort                              { return netip.AddrPort{} }
func (s *stage) Close() error                                      { s.once.Do(func() { close(s.done) }); return nil }
func (s *stage) Accept() (transport.Conn, error) {
	select {
	case c := <-s.offered:
		return c, nil
	case <-s.done:
		return nil, net.ErrClosed
	}
}

func (s *stage) Dial(ctx context.Context, _ netip.Addr, _ netip.AddrPort) (transport.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

const (
	volumeSize = 1 << 20
	ringSize   = 2 << 20
)

// A victim is a node whose peer is the test.
type victim struct {
	t     testing.TB
	path  string
	loss  nvmmirror.OnPeerLoss
	log   *zap.Logger // nil: none
	stage *stage
	*nvmmirror.Volume
}

func newVictim(t testing.TB, loss nvmmirror.OnPeerLoss) *victim {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "nvmmirror-test-")
	if err != nil {
		t.Skip("needs /dev/shm: ", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	v := &victim{t: t, loss: loss, path: filepath.Join(dir, "r")}
	err = nvmmirror.Create(v.path, nvmmirror.CreateOptions{Size: volumeSize, JournalSize: ringSize, Accept: pmem.Emulated})
	if err != nil {
		t.Fatal(err)
	}
	v.open()
	t.Cleanup(func() {
		if v.Volume != nil {
			v.Close()
		}
	})
	return v
}

func (v *victim) open() {
	v.t.Helper()
	v.stage = newStage()
	var err error
	v.Volume, err = nvmmirror.Open(v.path, nvmmirror.Options{OnPeerLoss: v.loss, Logger: v.log, Peer: &nvmmirror.Peer{
		Listen: "127.0.0.1:1", Address: "127.0.0.1:2", Timeout: 100 * time.Millisecond, Transport: v.stage,
	}})
	if err != nil {
		v.t.Fatalf("the region no longer opens: %v", err)
	}
}

func (v *victim) connect(room int) *pipe {
	p := newPipe(room)
	select {
	case v.stage.offered <- p:
	case <-time.After(5 * time.Second):
		v.t.Fatal("the node takes no connection")
	}
	return p
}

// drained is a transport whose listener has no descriptor left.
type drained struct {
	*stage
	tries atomic.Int64
}

func (d *drained) Listen(netip.AddrPort) (transport.Listener, error) { return d, nil }
func (d *drained) Accept() (transport.Conn, error) {
	d.tries.Add(1)
	return nil, &transport.SetupError{Transport: "stage", Op: "accept on", Err: syscall.EMFILE}
}

// Accepting that fails is tried again for as long as it fails, ten times in each
// timeout. The log is not to have a line for each.
func TestAcceptFailsOnAndOn(t *testing.T) {
	core, logs := observer.New(zap.WarnLevel)
	v := &victim{t: t, path: newVictim(t, nvmmirror.Alone).path + "2", log: zap.New(core)}
	if err := nvmmirror.Create(v.path, nvmmirror.CreateOptions{Size: volumeSize, JournalSize: ringSize, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	d := &drained{stage: newStage()}
	begin := time.Now()
	vol, err := nvmmirror.Open(v.path, nvmmirror.Options{Logger: v.log, Peer: &nvmmirror.Peer{
		Listen: "127.0.0.1:1", Address: "127.0.0.1:2", Timeout: 50 * time.Millisecond, Transport: d,
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer vol.Close()
	for d.tries.Load() < 50 {
		time.Sleep(time.Millisecond)
	}
	lines := logs.FilterMessage("accept").Len()
	if most := 1 + int(time.Since(begin)/time.Minute); lines < 1 || lines > most {
		t.Errorf("%d lines for %d tries, want at most %d", lines, d.tries.Load(), most)
	}
}
