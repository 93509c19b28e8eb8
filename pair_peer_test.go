package nvmmirror

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/internal/loopback"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

func TestWrongKey(t *testing.T) {
	t.Parallel()
	a, b := newPair(t, testConfig{bare: true, key: [2]string{"one key", "another key"}})
	for _, n := range []*testNode{a, b} {
		n.until("told of the key", func(s Status) bool {
			return s.Peer == "lost" && strings.Contains(s.Reason, "TCPMD5Failure")
		})
	}
}

// The other end does not sign at all.
func TestNoKey(t *testing.T) {
	t.Parallel()
	a, b := newPair(t, testConfig{bare: true})
	b.close()
	b.opt.Peer.Transport = newTransport(t, true, "", b.opt.Peer.Timeout)
	b.open()
	a.until("told of the key", func(s Status) bool {
		return s.Peer == "lost" && (strings.Contains(s.Reason, "TCPMD5NotFound") || strings.Contains(s.Reason, "TCPMD5Unexpected"))
	})
	if s := b.Status(); s.Peer != "lost" {
		t.Fatalf("%+v", s)
	}
}

func TestUnlistedAddress(t *testing.T) {
	t.Parallel()
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprintf("plain=%v", plain), func(t *testing.T) {
			a, b := pairInSync(t, testConfig{plain: plain, timeout: steady()})
			before := a.Status().Counters
			peer := netip.MustParseAddrPort(a.opt.Peer.Listen)
			from := netip.MustParseAddr("127.0.0.2")
			stranger, err := transport.NewPlain(peer.Addr(), transport.Options{})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
			defer cancel()
			c, err := stranger.Dial(ctx, from, peer)
			if !plain && err == nil {
				t.Fatal("an address without a key connected")
			}
			if err == nil {
				defer c.Close()
				if err := untilClosed(c); err != nil {
					t.Fatal(err)
				}
			}
			commit(t, a, 0, []byte("goes on"))
			if now := a.Status().Counters; now.Reconnects != before.Reconnects {
				t.Fatal("the stranger ended the session")
			}
			identical(t, a, b)
		})
	}
}

// untilClosed reads until the other end has closed the connection.
func untilClosed(c transport.Conn) error {
	buf := make([]byte, 4096)
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		n, err := c.TryRead(buf)
		if err != nil {
			return nil
		}
		if n == 0 {
			c.Wait(false, 50*time.Millisecond)
		}
	}
	return errors.New("the connection stays open")
}

// impostor listens in place of a closed node.
func impostor(t *testing.T, n *testNode, serve func(c transport.Conn)) {
	t.Helper()
	l, err := newTransport(t, false, "a key of both", time.Second).Listen(netip.MustParseAddrPort(n.opt.Peer.Listen))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { defer c.Close(); serve(c) })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
}

// A peer whose kernel answers and whose process does not.
func TestHalfOpenPeer(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
	b.crash()
	impostor(t, b, func(c transport.Conn) { untilClosed(c) })
	commit(t, a, 0, []byte("alone beside a silent peer"))
	if s := a.Status(); s.Peer == "in-sync" {
		t.Fatalf("%+v", s)
	}
}

// The network goes, without a reset, in the middle of a session.
func TestPeerFallsSilent(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{})
	b.wire.link.set(true)
	for _, n := range []*testNode{a, b} {
		n.until("silent", func(s Status) bool { return s.Peer == "lost" })
	}
	b.wire.link.set(false)
	identical(t, a, b)
}

// A peer that has this node decide again, each time, is not dialled without a
// pause for as long as it does.
func TestPeerThatDecidesAgainAndAgain(t *testing.T) {
	t.Parallel()
	a, b := newPair(t, testConfig{timeout: steady()})
	b.close()
	impostor(t, b, func(c transport.Conn) {
		bye := make([]byte, 64, 80)
		reason := "deciding again"
		copy(bye, "NVMW")
		le := binary.LittleEndian
		le.PutUint16(bye[4:], 1)
		le.PutUint16(bye[6:], 16)
		le.PutUint32(bye[48:], uint32(len(reason)))
		le.PutUint32(bye[52:], crc32c.Sum([]byte(reason)))
		le.PutUint32(bye[60:], crc32c.Sum(bye[:60]))
		c.TryWrite([][]byte{append(bye, reason...)})
		untilClosed(c)
	})
	a.until("told to decide again", func(s Status) bool { return s.Counters.Reconnects > 1 })
	before, begin := a.wire.dials.Load(), time.Now()
	time.Sleep(a.opt.Peer.Timeout / 4)                         // what is counted, as long as that is
	most := 20 + 2*int64(time.Since(begin)/a.opt.Peer.Timeout) // the pauses grow up to a timeout
	if n := a.wire.dials.Load() - before; n > most {
		t.Errorf("dialled %d times in %v, want at most %d", n, time.Since(begin), most)
	}
}

func TestVersionMismatch(t *testing.T) {
	a, b := pairInSync(t, testConfig{})
	b.close()
	impostor(t, b, func(c transport.Conn) {
		h := make([]byte, 64)
		copy(h, "NVMW")
		binary.LittleEndian.PutUint16(h[4:], 7)
		binary.LittleEndian.PutUint16(h[6:], 1)
		binary.LittleEndian.PutUint32(h[60:], crc32c.Sum(h[:60]))
		c.TryWrite([][]byte{h})
		untilClosed(c)
	})
	a.until("told of the version", func(s Status) bool { return strings.Contains(s.Reason, "version 7") })
}

// Each of two releases that do not understand each other closes what the other
// dials. That it was closed must not take the place of why.
func TestVersionMismatchStaysTold(t *testing.T) {
	t.Parallel()
	a, b := newPair(t, testConfig{plain: true})
	other := func(out []byte) int {
		if len(out) >= 64 && string(out[:4]) == "NVMW" {
			binary.LittleEndian.PutUint16(out[4:], 7)
			binary.LittleEndian.PutUint32(out[60:], crc32c.Sum(out[:60]))
		}
		return -1
	}
	for _, n := range []*testNode{a, b} {
		n.wire.setCorrupt(other)
	}
	told := func(s Status) bool { return strings.Contains(s.Reason, "version 7") }
	for _, n := range []*testNode{a, b} {
		n.until("told of the version", told)
		before := n.wire.dials.Load()
		n.until("dialling again and again, and closed each time", func(s Status) bool {
			if strings.Contains(s.Reason, "closed the connection") {
				t.Fatalf("%s: says %q, no longer why", n.name, s.Reason)
			}
			return n.wire.dials.Load() >= before+4
		})
	}
}

func TestSlowPeer(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{timeout: time.Second})
	a.wire.setChop(13, 0)
	b.wire.setChop(7, 0)
	l := startLoad(t, 4, func() *Volume { return a.Volume })
	l.more(60)
	l.end()
	commit(t, a, 2<<20, bytes.Repeat([]byte("large"), 20000)) // in frames
	a.wire.setChop(0, 0)
	b.wire.setChop(0, 0)
	l.check(a)
	if c := b.Status().Counters; c.CRCFailures != 0 {
		t.Fatalf("%+v", c)
	}
	identical(t, a, b)
}

func TestSimultaneousDials(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{quiet: true})
	for range 10 {
		a.close()
		b.close()
		var wg sync.WaitGroup
		wg.Go(a.open)
		wg.Go(b.open)
		wg.Wait()
		a.inSync()
		b.inSync()
		commit(t, a, 0, []byte("x"))
	}
	identical(t, a, b)
}

func TestOtherLineage(t *testing.T) {
	a, b := newPair(t, testConfig{})
	a.wire.link.set(true)
	a.promote(true)
	b.promote(true)
	commit(t, a, 0, []byte("volume a"))
	commit(t, b, 0, []byte("volume b"))
	a.wire.link.set(false)
	for _, n := range []*testNode{a, b} {
		s := n.peerIs("refused")
		if replicate.Rule(s.Rule) != replicate.RuleLineage {
			t.Fatalf("%+v", s)
		}
		if got := string(content(t, n)[:8]); got != "volume "+n.name {
			t.Fatalf("%s now holds %q", n.name, got)
		}
	}
}

func TestOtherGeometry(t *testing.T) {
	a, b := newPair(t, testConfig{})
	b.close()
	if err := os.Remove(b.path); err != nil {
		t.Fatal(err)
	}
	if err := Create(b.path, CreateOptions{Size: 6 << 20, JournalSize: 2 << 20, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	a.promote(true)
	b.open()
	for _, n := range []*testNode{a, b} {
		if s := n.peerIs("refused"); replicate.Rule(s.Rule) != replicate.RuleGeometry {
			t.Fatalf("%+v", s)
		}
	}
}

// A region and its copy are no pair. They refuse each other as long as it takes, and
// each log has it once.
func TestSameNode(t *testing.T) {
	a, b := pairInSync(t, testConfig{timeout: slow(300 * time.Millisecond)})
	a.close()
	b.close()
	region, err := os.ReadFile(a.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.path, region, 0o600); err != nil {
		t.Fatal(err)
	}
	core, logged := observer.New(zap.InfoLevel)
	a.opt.Logger = zap.New(core)
	a.open()
	b.open()
	for _, n := range []*testNode{a, b} {
		if s := n.peerIs("refused"); replicate.Rule(s.Rule) != replicate.RuleSameNode {
			t.Fatalf("%+v", s)
		}
	}
	a.until("refused again and again", func(s Status) bool { return s.Counters.Refused >= 4 })
	if n := logged.FilterMessage("handshake").Len(); n != 1 {
		t.Errorf("%d handshakes are logged: %v", n, logged.All())
	}
}

// Whoever can connect to the port can send anything. The session goes on.
func TestGarbageOnThePort(t *testing.T) {
	a, b := pairInSync(t, testConfig{timeout: steady()})
	before := [2]Counters{a.Status().Counters, b.Status().Counters}
	l := startLoad(t, 2, func() *Volume { return a.Volume })
	rng := rand.New(rand.NewPCG(3, 4))
	tr := newTransport(t, false, "a key of both", time.Second)
	for i := range 40 {
		n := []*testNode{a, b}[i%2]
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		c, err := tr.Dial(ctx, loopback.Addr, netip.MustParseAddrPort(n.opt.Peer.Listen))
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 1+rng.IntN(3000))
		for j := range p {
			p[j] = byte(rng.Uint32())
		}
		if i%3 == 0 { // the start of a good message
			copy(p, "NVMW\x01\x00")
		}
		c.TryWrite([][]byte{p})
		if i%4 != 0 { // some stay, half open
			c.Close()
		} else {
			t.Cleanup(func() { c.Close() })
		}
	}
	l.more(100)
	l.end()
	l.check(a)
	if x, y := a.Status().Counters, b.Status().Counters; x.Reconnects != before[0].Reconnects || y.Reconnects != before[1].Reconnects {
		t.Fatal("garbage ended the session")
	}
	identical(t, a, b)
}

// A bit flips on an unsigned wire, once in a body, once in a header.
func TestCorruptedFrame(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		size int
		at   int // from the marker
	}{
		{"short segment", 3000, 100},
		{"frame of a long segment", 200 << 10, 100},
		{"header", 3000, -70},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := pairInSync(t, testConfig{plain: true, timeout: steady()})
			fill(t, a, 10, 5, 2000)
			before := [2]Counters{a.Status().Counters, b.Status().Counters}
			marker := []byte("here it is")
			a.wire.setCorrupt(func(out []byte) int {
				i := bytes.Index(out, marker)
				if i < 0 || i+c.at < 0 || i+c.at >= len(out) {
					return -1
				}
				out[i+c.at] ^= 0x10
				return i + c.at
			})
			commit(t, a, 4096, append(bytes.Clone(marker), make([]byte, c.size)...))
			if _, _, left := a.wire.faults(); left != nil {
				t.Fatal("nothing was corrupted")
			}
			x, y := a.Status().Counters, b.Status().Counters
			switch {
			case c.at < 0:
				if y.Reconnects == before[1].Reconnects {
					t.Error("the session survived a damaged header")
				}
			case y.CRCFailures != before[1].CRCFailures+1 || x.Resends != before[0].Resends+1 || y.Reconnects != before[1].Reconnects:
				t.Errorf("sender %+v, receiver %+v", x, y)
			}
			identical(t, a, b)
		})
	}
}
