package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest"

	"github.com/nvmmirror/nvmmirror/internal/loopback"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// testNode is one node of a pair under test, which can be stopped, crashed
// and opened again.
type testNode struct {
	t    testing.TB
	name string
	path string
	opt  Options
	wire *wire // nil: the node has its transport from its options
	*Volume

	endOnDisk LSN // of the log, when the closed region was last edited
}

func (n *testNode) open() {
	n.t.Helper()
	if n.wire != nil {
		n.wire.dead.Store(false)
	}
	v, err := Open(n.path, n.opt)
	if err != nil {
		n.t.Fatalf("%s: %v", n.name, err)
	}
	n.Volume = v
}

func (n *testNode) close() {
	n.t.Helper()
	if n.Volume == nil {
		return
	}
	failed := n.failed.Load() != nil
	if err := n.Volume.Close(); (err != nil) != failed {
		n.t.Errorf("%s: close of a node that failed: %v, %v", n.name, failed, err)
	}
	n.Volume = nil
}

// until waits for a state of the node.
func (n *testNode) until(what string, ok func(Status) bool) Status {
	n.t.Helper()
	deadline := time.Now().Add(slow(20 * time.Second))
	for {
		s := n.Status()
		if ok(s) {
			return s
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("%s: not %s: %+v", n.name, what, s)
		}
		time.Sleep(time.Millisecond)
	}
}

func (n *testNode) inSync() {
	n.t.Helper()
	n.until("in sync", func(s Status) bool { return s.Peer == "in-sync" })
}

type testConfig struct {
	size, journal int64
	timeout       time.Duration
	opt           Options
	quiet         bool
	plain         bool // TCP without signatures
	bare          bool // no faults between node and transport
	key           [2]string
}

// steady is a timeout for tests in which no session may end: longer than a busy
// machine stalls.
func steady() time.Duration { return slow(5 * time.Second) }

// newPair creates two blank nodes, and opens them.
func newPair(t testing.TB, c testConfig) (a, b *testNode) {
	t.Helper()
	if !c.plain {
		needMD5Sig(t)
	}
	if c.size == 0 {
		c.size = 4 << 20
	}
	if c.journal == 0 {
		c.journal = 2 << 20
	}
	if c.timeout == 0 {
		c.timeout = slow(time.Second)
		if raceEnabled {
			c.timeout *= 2
		}
	}
	dir := shm(t)
	addr := [2]string{loopback.AddrPort(t).String(), loopback.AddrPort(t).String()}
	if c.key[0] == "" {
		c.key = [2]string{"a key of both", "a key of both"}
	}
	l := newLink()
	var nodes [2]*testNode
	for i, name := range []string{"a", "b"} {
		o := c.opt
		o.Logger = zap.NewNop()
		if !c.quiet {
			o.Logger = zaptest.NewLogger(t, zaptest.Level(zapcore.DebugLevel)).Named(name)
		}
		o.Peer = &Peer{Listen: addr[i], Address: addr[1-i], Key: []byte(c.key[i]), Timeout: c.timeout}
		n := &testNode{t: t, name: name, path: filepath.Join(dir, name), opt: o}
		if !c.bare {
			n.wire = &wire{Transport: newTransport(t, c.plain, c.key[i], c.timeout), link: l}
			n.opt.Peer.Transport = n.wire
		}
		if err := Create(n.path, CreateOptions{Size: c.size, JournalSize: c.journal, Accept: pmem.Emulated}); err != nil {
			t.Fatal(err)
		}
		n.open()
		t.Cleanup(n.close)
		nodes[i] = n
	}
	return nodes[0], nodes[1]
}

// needMD5Sig skips where the kernel cannot sign: under qemu-user.
func needMD5Sig(t testing.TB) {
	t.Helper()
	var un *transport.UnsupportedError
	if err := transport.Probe(); errors.As(err, &un) {
		t.Skip("needs TCP_MD5SIG: ", err)
	}
}

// newTransport connects to this process.
func newTransport(t testing.TB, plain bool, key string, timeout time.Duration) (tr transport.Transport) {
	t.Helper()
	o := transport.Options{UserTimeout: timeout}
	var err error
	if plain {
		tr, err = transport.NewPlain(loopback.Addr, o)
	} else {
		tr, err = transport.NewMD5Sig(loopback.Addr, []byte(key), o)
	}
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func commit(t testing.TB, n *testNode, off int64, p []byte) LSN {
	t.Helper()
	tx := n.Begin()
	if err := tx.Write(off, p); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), slow(20*time.Second))
	defer cancel()
	lsn, err := tx.Commit(ctx)
	if err != nil {
		t.Fatalf("%s: commit: %v", n.name, err)
	}
	return lsn
}

func content(t testing.TB, n *testNode) []byte {
	t.Helper()
	p := make([]byte, n.Size())
	n.read(t, p, 0)
	return p
}

// read reads, and waits a lost lease out, and a peer that does not answer: a
// busy machine can hold both up for longer than a timeout.
func (n *testNode) read(t testing.TB, p []byte, off int64) {
	t.Helper()
	for deadline := time.Now().Add(slow(20 * time.Second)); ; time.Sleep(time.Millisecond) {
		_, err := n.ReadAt(p, off)
		if err == nil {
			return
		}
		late := errors.Is(err, ErrNoLease) || strings.Contains(err.Error(), "the peer did not answer within")
		if !late || time.Now().After(deadline) {
			t.Fatalf("%s: read: %v", n.name, err)
		}
	}
}

func TestPairFailover(t *testing.T) {
	t.Parallel()
	a, b := newPair(t, testConfig{})
	ctx := context.Background()
	if err := a.Promote(ctx, false); err != nil {
		t.Fatal(err)
	}
	a.inSync()
	rng := rand.New(rand.NewPCG(1, 2))
	model := make([]byte, a.Size())
	for range 3000 {
		off := rng.Int64N(a.Size() - 9000)
		p := make([]byte, 1+rng.IntN(9000))
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		commit(t, a, off, p)
		copy(model[off:], p)
	}
	big := bytes.Repeat([]byte("big"), 100000)
	commit(t, a, 12345, big)
	copy(model[12345:], big)
	if !bytes.Equal(content(t, a), model) {
		t.Fatal("primary differs from the model")
	}
	a.close()
	b.until("lost", func(s Status) bool { return s.Peer == "lost" })
	if err := b.Promote(ctx, false); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(content(t, b), model) {
		t.Fatal("promoted secondary differs from the model")
	}
	commit(t, b, 0, []byte("after"))
	copy(model, "after")
	a.open()
	a.inSync()
	b.inSync()
	commit(t, b, 100, []byte("again"))
	copy(model[100:], "again")
	if err := b.Demote(ctx); err != nil {
		t.Fatal(err)
	}
	if err := a.Promote(ctx, false); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(content(t, a), model) {
		t.Fatal("old primary differs from the model")
	}
}
