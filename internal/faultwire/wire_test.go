package faultwire

import (
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
)

const ownNamespace = "/proc/thread-self/ns/net"

func namespaceID(t testing.TB) string {
	t.Helper()
	id, err := os.Readlink(ownNamespace)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func namespaceOf(t testing.TB, h *Host) (id string) {
	t.Helper()
	if err := h.Do(func() error { id = namespaceID(t); return nil }); err != nil {
		t.Fatal(err)
	}
	return id
}

func TestGoodWireCarriesBothWays(t *testing.T) {
	eachTransport(t, func(t *testing.T, ipv6, signed bool) {
		w := needWire(t, Config{})
		from, to := needPair(t, w, ipv6, signed)
		before := counters(t, w.B)
		if wrong := carry(t, from, to, 1, 1<<20) + carry(t, to, from, 2, 1<<20); wrong != 0 {
			t.Errorf("%d wrong blocks", wrong)
		}
		after := counters(t, w.B)
		for _, name := range []string{MD5Failure, MD5NotFound, MD5Unexpected, CsumErrors, QueueDrops} {
			if _, known := after[name]; !known {
				t.Errorf("the kernel has no counter %s", name)
			}
			if n := after.Rise(before, name); n != 0 {
				t.Errorf("%s rose by %d", name, n)
			}
		}
		for _, d := range []*Direction{w.AtoB, w.BtoA} {
			if s := d.Stats(); s.Packets != s.Delivered || s.Corrupted() != 0 || s.Data == 0 {
				t.Errorf("%v: %+v", d, s)
			}
		}
	})
}

func TestLoopbackIsUp(t *testing.T) {
	w := needWire(t, Config{})
	for _, h := range []*Host{w.A, w.B} {
		l, err := h.Listen(t.Context(), &net.ListenConfig{}, "tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		c, err := h.Dial(t.Context(), &net.Dialer{}, "tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(c.Close(), l.Close()); err != nil {
			t.Error(err)
		}
	}
	if s := w.AtoB.Stats(); s.Packets != 0 {
		t.Errorf("loopback went over the wire: %+v", s)
	}
}

// A new wire loses no packet to addresses that are not yet usable: each SYN is
// answered the first time. A loss is a race, hence several wires.
func TestAddressesAreUsableAtOnce(t *testing.T) {
	for range 10 {
		w := needWire(t, Config{})
		w.AtoB.Capture(16)
		from, to := needPair(t, w, true, false)
		exchange(t, from, to, "at once")
		syns := 0
		for _, s := range w.AtoB.Captured() {
			syns += int(s.Flags & flagSYN / flagSYN)
		}
		if syns != 1 {
			t.Errorf("it took %d SYNs", syns)
		}
		if err := errors.Join(from.Close(), to.Close(), w.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// Do is in the namespace exactly while f runs, however it ends.
func TestDoComesBack(t *testing.T) {
	w := needWire(t, Config{})
	runtime.LockOSThread() // one thread to look at
	defer runtime.UnlockOSThread()
	home := namespaceID(t)
	a, b := namespaceOf(t, w.A), namespaceOf(t, w.B)
	if a == home || b == home || a == b {
		t.Fatalf("namespaces %s, %s and at home %s", a, b, home)
	}
	err := w.A.Do(func() error {
		if inner := namespaceOf(t, w.B); inner != b {
			t.Errorf("nested in %s, want %s", inner, b)
		}
		if id := namespaceID(t); id != a {
			t.Errorf("after nesting in %s, want %s", id, a)
		}
		return os.ErrExist
	})
	if !errors.Is(err, os.ErrExist) {
		t.Errorf("f's error became %v", err)
	}
	func() {
		defer func() { _ = recover() }()
		_ = w.A.Do(func() error { panic("out") })
	}()
	if id := namespaceID(t); id != home {
		t.Errorf("after a panic in %s, want %s", id, home)
	}
}

func TestDialTakesLiteralsOnly(t *testing.T) {
	w := needWire(t, Config{})
	if _, err := w.A.Dial(t.Context(), &net.Dialer{}, "tcp", "localhost:80"); err == nil || !strings.Contains(err.Error(), "localhost") {
		t.Errorf("got %v", err)
	}
}

func TestClosedWire(t *testing.T) {
	w := needWire(t, Config{})
	for range 2 {
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.A.Do(func() error { return nil }); !errors.Is(err, ErrClosed) {
		t.Errorf("Do: %v", err)
	}
	if err := w.AtoB.Inject(numbered(1)); !errors.Is(err, ErrClosed) {
		t.Errorf("Inject: %v", err)
	}
	w.SetPlan(Plan{Drop: Rule{Every: 1}})
	w.SetCut(true)
}

func TestMTULimits(t *testing.T) {
	for _, mtu := range []int{-1, MinMTU - 1, MaxMTU + 1} {
		if _, err := New(Config{MTU: mtu}); err == nil || errors.Is(err, ErrNotPermitted) {
			t.Errorf("MTU %d: %v", mtu, err)
		}
	}
	for _, mtu := range []int{MinMTU, MaxMTU} {
		w := needWire(t, Config{MTU: mtu})
		from, to := needPair(t, w, false, true)
		if wrong := carry(t, from, to, 1, 1<<20); wrong != 0 {
			t.Errorf("MTU %d: %d wrong blocks", mtu, wrong)
		}
	}
}

// Whatever a wire has opened is closed with it; goleak sees to goroutines.
func TestNothingIsLeft(t *testing.T) {
	files := func() int {
		t.Helper()
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	use := func() {
		w := needWire(t, Config{})
		from, to := needPair(t, w, false, true)
		w.SetPlan(Plan{Delay: Rule{Every: 2}, DelayFor: 1, Reorder: Rule{Every: 3}, Drop: Rule{Every: 50}})
		carry(t, from, to, 1, 1<<20)
		if err := errors.Join(from.Close(), to.Close(), w.Close()); err != nil {
			t.Error(err)
		}
	}
	use() // the runtime opens its poller once
	before := files()
	for range 3 {
		use()
	}
	if after := files(); after != before {
		t.Errorf("%d files open, %d before", after, before)
	}
}

// The relay allocates nothing for a packet.
func TestNoAllocationPerPacket(t *testing.T) {
	w := needWire(t, Config{})
	w.AtoB.Capture(100)
	from, to := needPair(t, w, false, true)
	plan := Plan{Swap: Rule{Every: 50}, Reorder: Rule{Every: 50}, Duplicate: Rule{Every: 50}}
	w.AtoB.SetPlan(plan)
	carry(t, from, to, 1, 1<<20)
	var before, after runtime.MemStats
	packets := w.AtoB.Stats().Packets
	runtime.ReadMemStats(&before)
	carry(t, from, to, 1, 16<<20)
	runtime.ReadMemStats(&after)
	packets = w.AtoB.Stats().Packets - packets
	if n := after.Mallocs - before.Mallocs; n > packets/50 {
		t.Errorf("%d allocations for %d packets", n, packets)
	}
}

// Everything that a test may do while packets pass, at once, for the race
// detector; the stream must survive it.
func TestControlsWhilePacketsPass(t *testing.T) {
	w := needWire(t, Config{})
	from, to := needPair(t, w, false, true)
	stop := make(chan struct{})
	var controls sync.WaitGroup
	control := func(f func(i int)) {
		controls.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
					f(i)
				}
				n := w.AtoB.Stats().Packets
				if w.AtoB.Await(t.Context(), func(s Stats) bool { return s.Packets > n+20 || s.Cut > 0 }) != nil {
					return
				}
			}
		})
	}
	control(func(i int) { w.SetPlan(Plan{Swap: Rule{Every: 30 + i%20}, Reorder: Rule{Every: 30}}) })
	control(func(i int) { w.AtoB.Capture(i % 3 * 10) })
	control(func(int) { w.AtoB.Captured() })
	wrong := carry(t, from, to, 1, 8<<20)
	close(stop)
	w.AtoB.SetCut(true)
	if err := w.AtoB.Inject(numbered(1)); err != nil {
		t.Error(err)
	}
	// A last packet into the cut lets the controls see that it is over.
	if _, err := from.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	controls.Wait()
	if wrong != 0 {
		t.Errorf("%d wrong blocks", wrong)
	}
}
