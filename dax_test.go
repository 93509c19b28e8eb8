package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/internal/loopback"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// Volumes and pairs on real DAX, where the environment names it: directories
// in NVMMIRROR_DAX_DIR, separated by ":", and a device, whose content is lost,
// in NVMMIRROR_DEVDAX. hack/vm has both in a guest.

// clockStepEnv is set where the tests may set the machine's clock.
const clockStepEnv = "NVMMIRROR_CLOCK_STEP"

// daxPlaces are paths for new regions, by what they are on.
func daxPlaces(t *testing.T) (paths []string) {
	t.Helper()
	for _, parent := range filepath.SplitList(os.Getenv("NVMMIRROR_DAX_DIR")) {
		dir, err := os.MkdirTemp(parent, "volume-test-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		paths = append(paths, filepath.Join(dir, "region"))
	}
	if device := os.Getenv("NVMMIRROR_DEVDAX"); device != "" {
		paths = append(paths, device)
	}
	if len(paths) == 0 {
		t.Skip("needs real DAX: name a directory on it in NVMMIRROR_DAX_DIR, a device in NVMMIRROR_DEVDAX (make test-dax boots a machine that has them)")
	}
	return paths
}

// createDAX creates a region that nothing weaker than persistent memory would
// do for. A device gives up what it held.
func createDAX(t *testing.T, path string, size, journal int64) {
	t.Helper()
	if isDevice(path) {
		r, err := pmem.Open(path, pmem.Options{})
		if err != nil {
			t.Fatal(err)
		}
		r.Zero(0, 2*metaArea)
		if err := errors.Join(r.Fence(), r.Close()); err != nil {
			t.Fatal(err)
		}
	}
	o := CreateOptions{Size: size, JournalSize: journal}
	if err := Create(path, o); err != nil {
		t.Fatal(err)
	}
	if err := Create(path, o); err == nil {
		t.Fatalf("%s: created over a region", path)
	}
}

func needCacheline(t *testing.T, v *Volume) {
	t.Helper()
	if got := v.Status().Class; got != "cacheline" && got != "byte" {
		t.Fatalf("%s is of class %s", v.path, got)
	}
}

func reopen(t *testing.T, path string) *Volume {
	t.Helper()
	v, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	needCacheline(t, v)
	return v
}

func TestDAXVolume(t *testing.T) {
	for _, path := range daxPlaces(t) {
		t.Run(path, func(t *testing.T) {
			const size = 2 << 20
			createDAX(t, path, size, MinJournal)
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 0))
			model := make([]byte, size)
			for round := range 3 {
				v := reopen(t, path)
				if r := v.Status().Recovery; r.Clean != (round > 0) || r.Damage != "" {
					t.Fatalf("round %d: %+v", round, r)
				}
				for range 300 { // more than the ring holds
					tx := randomTransaction(rng, size, 6, 8000)
					if _, err := tx.commit(v); err != nil {
						t.Fatal(err)
					}
					tx.applyTo(model)
				}
				got := make([]byte, size)
				if _, err := v.ReadAt(got, 0); err != nil || !bytes.Equal(got, model) {
					t.Fatalf("round %d: content differs from the model (%v)", round, err)
				}
				if err := v.Close(); err != nil {
					t.Fatal(err)
				}
				if report, err := Check(path); err != nil || report.Damaged || len(report.Findings) > 0 {
					t.Fatalf("check: %v, %+v", err, report)
				}
			}
		})
	}
}

// Kill -9 of the writing process: all that it acknowledged is there, and of
// each goroutine at most one transaction more.
func TestDAXKill9(t *testing.T) {
	for _, path := range daxPlaces(t) {
		t.Run(path, func(t *testing.T) {
			createDAX(t, path, crashSize, MinJournal)
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			r := &crashRig{t: t, model: make([]byte, crashSize), rng: rand.New(rand.NewPCG(seed, 1))}
			r.spec.seed, r.spec.path = seed, path
			for round := range 8 {
				r.spec.parallel = round%2 == 1
				acked, err := r.run(1 + r.rng.IntN(60))
				if err != nil {
					t.Fatal(err)
				}
				if report, err := Check(path); err != nil || report.Damaged {
					t.Fatalf("check: %v, %+v", err, report)
				}
				v := reopen(t, path)
				data := make([]byte, crashSize)
				if _, err := v.ReadAt(data, 0); err != nil {
					t.Fatal(err)
				}
				if err := v.Close(); err != nil {
					t.Fatal(err)
				}
				for s := range crashStripes {
					r.follow(t, s, acked[s], data)
				}
			}
			t.Logf("%d transactions acknowledged, %d more were persistent", r.acks, r.unacked)
		})
	}
}

// follow moves the model of a stripe on to what is in data.
func (r *crashRig) follow(t *testing.T, stripe, acked int, data []byte) {
	t.Helper()
	lo, hi := stripe*crashStripe, (stripe+1)*crashStripe
	next := func() {
		crashTransaction(r.spec.seed, stripe, r.spec.next[stripe]).applyTo(r.model)
		r.spec.next[stripe]++
	}
	for range acked {
		next()
		r.acks++
	}
	if bytes.Equal(data[lo:hi], r.model[lo:hi]) {
		return
	}
	next()
	r.unacked++
	if !bytes.Equal(data[lo:hi], r.model[lo:hi]) {
		t.Fatalf("stripe %d is neither %d nor %d transactions", stripe, r.spec.next[stripe]-1, r.spec.next[stripe])
	}
}

// daxPair is a pair over TCP_MD5SIG with its regions at two paths.
func daxPair(t *testing.T, paths [2]string) (a, b *testNode) {
	t.Helper()
	timeout := slow(1500 * time.Millisecond)
	addr := [2]string{loopback.AddrPort(t).String(), loopback.AddrPort(t).String()}
	l := newLink()
	var nodes [2]*testNode
	for i, name := range []string{"a", "b"} {
		createDAX(t, paths[i], 4<<20, MinJournal)
		n := &testNode{t: t, name: name, path: paths[i]}
		n.wire = &wire{Transport: newTransport(t, false, "a key of both", timeout), link: l}
		n.opt = Options{Logger: zap.NewNop(), Peer: &Peer{Listen: addr[i], Address: addr[1-i], Timeout: timeout, Transport: n.wire}}
		n.open()
		t.Cleanup(n.close)
		needCacheline(t, n.Volume)
		nodes[i] = n
	}
	a, b = nodes[0], nodes[1]
	a.promote(false)
	a.inSync()
	b.inSync()
	return a, b
}

// stopHard crashes a node whose region is a file, and closes one on a device,
// which the harness cannot put an image on.
func (n *testNode) stopHard() {
	n.t.Helper()
	if isDevice(n.path) {
		n.close()
		return
	}
	n.crash()
}

// A pair on each two of the places: commit, failover, rejoin, switch over.
func TestDAXPair(t *testing.T) {
	paths := daxPlaces(t)
	if len(paths) < 2 {
		t.Skip("needs two places on real DAX: a pair has two regions")
	}
	for i, path := range paths {
		two := [2]string{path, paths[(i+1)%len(paths)]}
		t.Run(fmt.Sprintf("%d", i), func(t *testing.T) {
			t.Logf("%s and %s", two[0], two[1])
			remove(t, two[:]...)
			a, b := daxPair(t, two)
			var primary atomic.Pointer[Volume]
			primary.Store(a.Volume)
			l := startLoad(t, 8, primary.Load)
			for range 2 {
				l.more(150)
				a.stopHard()
				b.peerIs("lost")
				b.promote(false)
				primary.Store(b.Volume)
				l.more(50)
				a.open()
				needCacheline(t, a.Volume)
				a.inSync()
				b.inSync()
				a, b = b, a
			}
			l.end()
			l.check(a)
			identical(t, a, b)
			a.demote()
			b.promote(false)
			l.check(b)
			a.inSync()
			b.inSync()
			identical(t, b, a)
			a.close()
			b.close()
			for _, path := range two {
				if report, err := Check(path); err != nil || report.Damaged {
					t.Errorf("check: %v, %+v", err, report)
				}
			}
		})
	}
}

// remove removes regions that are files.
func remove(t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if isDevice(path) {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
}

// Steps of the wall clock are nothing to a pair in sync: no session ends, no
// lease runs out, no commit fails.
func TestDAXClockStep(t *testing.T) {
	if os.Getenv(clockStepEnv) == "" {
		t.Skipf("sets the machine's clock: set %s where that may be", clockStepEnv)
	}
	paths := slices.DeleteFunc(daxPlaces(t), func(p string) bool { return strings.HasPrefix(p, "/dev/") })
	if len(paths) < 2 {
		t.Skip("needs two directories on real DAX: a pair has two regions")
	}
	a, b := daxPair(t, [2]string(paths[:2]))
	l := startLoad(t, 4, func() *Volume { return a.Volume })
	l.more(50)
	before := [2]Status{a.Status(), b.Status()}
	var off time.Duration
	step := func(d time.Duration) {
		var now unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_REALTIME, &now); err != nil {
			t.Fatal(err)
		}
		now = unix.NsecToTimespec(now.Nano() + int64(d))
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
			t.Fatal(err)
		}
		off += d
	}
	defer func() { step(-off) }()
	for _, d := range []time.Duration{time.Hour, -2 * time.Hour, time.Hour} {
		step(d)
		ctx, cancel := context.WithTimeout(context.Background(), slow(20*time.Second))
		if err := a.Volume.pair.AwaitServing(ctx); err != nil {
			t.Errorf("after a step of %v: %v", d, err)
		}
		cancel()
		l.more(50)
		if _, err := slotAt(a.Volume, 0); err != nil {
			t.Errorf("read after a step of %v: %v", d, err)
		}
		// Longer than the peer's timeout, so that what a step began would
		// have ended by now.
		for end := time.Now().Add(a.opt.Peer.Timeout + time.Second); time.Now().Before(end); {
			l.more(20)
		}
		for i, n := range []*testNode{a, b} {
			s, was := n.Status(), before[i]
			if s.Peer != "in-sync" || s.Epoch != was.Epoch || s.Counters.Reconnects != was.Counters.Reconnects {
				t.Errorf("%s after a step of %v: peer %s (%s), epoch %v, was %v, %d reconnects, were %d",
					n.name, d, s.Peer, s.Reason, s.Epoch, was.Epoch, s.Counters.Reconnects, was.Counters.Reconnects)
			}
		}
	}
	l.end()
	l.check(a)
	identical(t, a, b)
}
