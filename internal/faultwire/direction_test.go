package faultwire

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// testbed is a direction between two socket pairs instead of two devices: what
// goes in and comes out is the test's, and no privilege is needed.
type testbed struct {
	*Direction
	t    testing.TB
	feed int // the test writes packets here
	exit int // and reads them here
	fed  uint64
	out  [][]byte // read from exit, not yet asked for
}

func newTestbed(t testing.TB, seed uint64) *testbed {
	t.Helper()
	var ports [2]*port
	var ends [2]int
	for i := range ports {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if ports[i], err = newPort(fds[0], "testbed"); err != nil {
			t.Fatal(err)
		}
		ends[i] = fds[1]
	}
	b := &testbed{Direction: newDirection("testbed", ports[0], ports[1], DefaultMTU, seed, 0), t: t, feed: ends[0], exit: ends[1]}
	b.mu.Lock()
	b.hold = time.Hour // a machine that stands still must not change an order
	b.mu.Unlock()
	t.Cleanup(func() {
		b.stop()
		if err := errors.Join(ports[0].close(), ports[1].close(), unix.Close(ends[0]), unix.Close(ends[1])); err != nil {
			t.Error(err)
		}
	})
	return b
}

// send feeds packets one by one, each relayed before the next.
func (b *testbed) send(packets ...[]byte) {
	b.t.Helper()
	for _, p := range packets {
		if _, err := unix.Write(b.feed, p); err != nil {
			b.t.Fatal(err)
		}
		b.fed++
		b.await(func(s Stats) bool { return s.Packets == b.fed })
		b.collect() // a full socket would refuse packets
	}
}

func (b *testbed) await(cond func(Stats) bool) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), testTimeout)
	defer cancel()
	if err := b.Await(ctx, cond); err != nil {
		b.t.Fatalf("%v: %+v", err, b.Stats())
	}
}

func (b *testbed) collect() {
	b.t.Helper()
	buf := make([]byte, MaxMTU)
	for {
		n, err := unix.Read(b.exit, buf)
		if err == unix.EAGAIN {
			return
		}
		if err != nil {
			b.t.Fatal(err)
		}
		b.out = append(b.out, bytes.Clone(buf[:n]))
	}
}

// received returns what has come out since it was last asked.
func (b *testbed) received() (packets [][]byte) {
	b.t.Helper()
	b.collect()
	packets, b.out = b.out, nil
	return packets
}

// order is the sequence numbers of what has come out.
func (b *testbed) order() (seqs []uint32) {
	b.t.Helper()
	for _, p := range b.received() {
		s, ok := ParseSegment(p)
		if !ok {
			b.t.Fatalf("no segment: %x", p)
		}
		seqs = append(seqs, s.Seq)
	}
	return seqs
}

// numbered is a data segment with a varied payload.
func numbered(seq uint32) []byte {
	payload := make([]byte, 512)
	fillBlock(payload, uint64(seq), 0)
	return testSegment(false, seq, payload, nil)
}

func someNumbered(n int) (packets [][]byte) {
	for i := range n {
		packets = append(packets, numbered(uint32(i)))
	}
	return packets
}

func wantOrder(t *testing.T, b *testbed, want ...uint32) {
	t.Helper()
	if got := b.order(); !slices.Equal(got, want) {
		t.Errorf("came out in order %v, want %v", got, want)
	}
}

func TestGoodWireChangesNothing(t *testing.T) {
	b := newTestbed(t, 1)
	in := append(someNumbered(20), []byte{4 << 4}, testSegment(true, 9, nil, nil))
	b.send(in...)
	if got := b.received(); !slices.EqualFunc(in, got, bytes.Equal) {
		t.Error("what came out is not what went in")
	}
	if s := b.Stats(); s.Packets != 22 || s.Delivered != 22 || s.Data != 20 || s.Corrupted() != 0 {
		t.Errorf("%+v", s)
	}
}

func TestSeedRepeatsFaults(t *testing.T) {
	plan := Plan{Drop: Rule{Every: 9}, Duplicate: Rule{Every: 8}, Reorder: Rule{Every: 7}, Truncate: Rule{Every: 6}, Flip: Rule{Every: 5}, Swap: Rule{Every: 4}, Add: Rule{Every: 3}}
	outcome := func(seed uint64) [][]byte {
		b := newTestbed(t, seed)
		b.SetPlan(plan)
		b.send(someNumbered(200)...)
		b.SetPlan(Plan{}) // a packet may be held
		s := b.Stats()
		for f := range faultCount {
			if f != Delay && s.Of(f) == 0 {
				t.Errorf("seed %d: no %v", seed, f)
			}
		}
		if s.Delivered != s.Packets-s.Dropped+s.Duplicated || s.Refused != 0 {
			t.Errorf("seed %d: the counts do not add up: %+v", seed, s)
		}
		return b.received()
	}
	first := outcome(5)
	if !slices.EqualFunc(first, outcome(5), bytes.Equal) {
		t.Error("the same seed gave another outcome")
	}
	if slices.EqualFunc(first, outcome(6), bytes.Equal) {
		t.Error("another seed gave the same outcome")
	}
}

func TestReorder(t *testing.T) {
	b := newTestbed(t, 1)
	plan := Plan{Reorder: Rule{Every: 1, Limit: 1}}
	b.SetPlan(plan)
	b.send(someNumbered(3)...)
	wantOrder(t, b, 1, 0, 2)
	plan.ReorderBy = 3
	b.SetPlan(plan)
	b.send(someNumbered(6)...)
	wantOrder(t, b, 1, 2, 3, 0, 4, 5)
	b.SetPlan(plan)
	b.send(numbered(7))
	b.SetPlan(plan) // lets the held one go
	wantOrder(t, b, 7)
	b.send(numbered(8))
	b.SetCut(true)
	b.SetCut(false)
	b.send(numbered(9))
	wantOrder(t, b, 9)
	if s := b.Stats(); s.Reordered != 3 || s.Cut != 1 {
		t.Errorf("%+v", s)
	}
}

// A held packet that nothing overtakes goes out all the same.
func TestReorderEndsByItself(t *testing.T) {
	b := newTestbed(t, 1)
	b.mu.Lock()
	b.hold = reorderHold
	b.mu.Unlock()
	b.SetPlan(Plan{Reorder: Rule{Every: 1}})
	b.send(numbered(7))
	b.await(func(s Stats) bool { return s.Reordered == 1 })
	wantOrder(t, b, 7)
}

func TestDropAndDuplicate(t *testing.T) {
	b := newTestbed(t, 1)
	b.SetPlan(Plan{Drop: Rule{Every: 1, Limit: 2}, Duplicate: Rule{Every: 1, Limit: 1}})
	b.send(someNumbered(5)...)
	wantOrder(t, b, 2, 2, 3, 4)
	if s := b.Stats(); s.Dropped != 2 || s.Duplicated != 1 || s.Delivered != 4 {
		t.Errorf("%+v", s)
	}
}

func TestDelayKeepsTimeAndOrder(t *testing.T) {
	const delay = 20 * time.Millisecond
	b := newTestbed(t, 1)
	b.SetPlan(Plan{Delay: Rule{Every: 1}, DelayFor: delay})
	start := time.Now()
	b.send(someNumbered(100)...)
	b.await(func(s Stats) bool { return s.Delivered == 100 })
	if took := time.Since(start); took < delay {
		t.Errorf("delivered after %v, before %v", took, delay)
	}
	if got := b.order(); !slices.IsSorted(got) || len(got) != 100 {
		t.Errorf("order %v", got)
	}
	if s := b.Stats(); s.Delayed != 100 {
		t.Errorf("%+v", s)
	}
}

func TestDelayIsCutWithTheWire(t *testing.T) {
	b := newTestbed(t, 1)
	b.SetPlan(Plan{Delay: Rule{Every: 1, Limit: 3}, DelayFor: time.Hour})
	b.send(someNumbered(4)...)
	wantOrder(t, b, 3)
	b.SetCut(true)
	b.send(numbered(4))
	b.SetCut(false)
	b.send(numbered(5))
	wantOrder(t, b, 5)
	if s := b.Stats(); s.Cut != 4 || s.Delayed != 3 {
		t.Errorf("%+v", s)
	}
}

func TestDelayLineIsBounded(t *testing.T) {
	q := delayLine{mtu: 8}
	for i := range delayCap {
		if !q.push(binary.BigEndian.AppendUint64(nil, uint64(i)), noFault, time.Time{}) {
			t.Fatalf("full at %d", i)
		}
		if i%3 == 0 { // the ring's start moves while it grows
			q.push(binary.BigEndian.AppendUint64(nil, uint64(i)), noFault, time.Time{})
			q.pop()
		}
	}
	for q.count < delayCap {
		q.push(nil, noFault, time.Time{})
	}
	if q.push(nil, noFault, time.Time{}) {
		t.Error("takes more than its bound")
	}
	if n := q.clear(); n != delayCap || !q.empty() {
		t.Errorf("cleared %d", n)
	}
}

// Only what differs can be swapped: the fault waits for such a packet.
func TestSwapWaitsForDifferingWords(t *testing.T) {
	b := newTestbed(t, 1)
	b.SetPlan(Plan{Swap: Rule{Every: 1, Limit: 1}})
	uniform := testSegment(false, 1, bytes.Repeat([]byte{7}, 512), nil)
	b.send(uniform, uniform, testSegment(false, 1, nil, nil))
	if s := b.Stats(); s.Swapped != 0 {
		t.Errorf("%+v", s)
	}
	b.send(numbered(1))
	if s := b.Stats(); s.Swapped != 1 {
		t.Errorf("%+v", s)
	}
}

func TestOneFaultAPacket(t *testing.T) {
	b := newTestbed(t, 1)
	b.SetPlan(Plan{Drop: Rule{Every: 2}, Flip: Rule{Every: 2}})
	b.send(someNumbered(100)...)
	s := b.Stats()
	if s.Dropped != 50 || s.Flipped == 0 || s.Delivered != 50 {
		t.Errorf("%+v", s)
	}
	damaged := slices.DeleteFunc(b.received(), checksumRight)
	if uint64(len(damaged)) != s.Flipped {
		t.Errorf("%d damaged packets came out, %d are counted", len(damaged), s.Flipped)
	}
}

// Rules without Any leave acknowledgements alone; no rule touches what is not TCP.
func TestWhatRulesStrike(t *testing.T) {
	b := newTestbed(t, 1)
	bare := testSegment(true, 1, nil, nil)
	notTCP := bytes.Clone(numbered(1))
	notTCP[9] = 17
	b.SetPlan(Plan{Drop: Rule{Every: 1}})
	b.send(bare, notTCP)
	b.SetPlan(Plan{Drop: Rule{Every: 1, Any: true}})
	b.send(bare, notTCP)
	if s := b.Stats(); s.Dropped != 1 || s.Delivered != 3 {
		t.Errorf("%+v", s)
	}
}

func TestCaptureKeepsTheNewest(t *testing.T) {
	b := newTestbed(t, 1)
	b.Capture(3)
	b.SetPlan(Plan{Flip: Rule{Every: 1}})
	for i := range uint32(5) {
		b.send(numbered(i))
		all := b.Captured()
		if want := int(min(i+1, 3)); len(all) != want {
			t.Fatalf("%d captured, want %d", len(all), want)
		}
		for k, s := range all {
			if want := i + 1 - uint32(len(all)) + uint32(k); s.Seq != want || !checksumRight(s.Raw) {
				t.Errorf("captured %d, want %d as it was sent", s.Seq, want)
			}
		}
	}
	b.Capture(0)
	b.send(numbered(9))
	if all := b.Captured(); all != nil {
		t.Errorf("captured %d after the end", len(all))
	}
}

func TestForgeNeedsACapture(t *testing.T) {
	b := newTestbed(t, 1)
	b.Capture(8)
	b.send(numbered(4))
	s := b.Captured()[0]
	err := b.Forge(s.Dst, s.Src, func(Segment) []byte { return nil })
	if !errors.Is(err, ErrNotCaptured) {
		t.Errorf("the other way: %v", err)
	}
	// The furthest in sequence space counts, not the last: retransmissions come later.
	b.send(numbered(1<<32-100), numbered(0))
	b.received()
	if err := b.Forge(s.Src, s.Dst, func(n Segment) []byte { return ForgeData(n, []byte("x"), nil) }); err != nil {
		t.Fatal(err)
	}
	wantOrder(t, b, 4+512)
}

// After the end nothing is written: the descriptor's number may be another file's.
func TestStoppedDirectionWritesNothing(t *testing.T) {
	b := newTestbed(t, 1)
	b.SetPlan(Plan{Reorder: Rule{Every: 1}})
	b.send(numbered(1))
	b.stop()
	b.SetPlan(Plan{})
	wantOrder(t, b)
}

func TestAwaitEnds(t *testing.T) {
	b := newTestbed(t, 1)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	never := func(Stats) bool { return false }
	if err := b.Await(ctx, never); !errors.Is(err, why) {
		t.Errorf("cancelled: %v", err)
	}
	if err := b.Await(t.Context(), func(Stats) bool { return true }); err != nil {
		t.Errorf("met at once: %v", err)
	}
	b.stop()
	if err := b.Await(t.Context(), never); !errors.Is(err, ErrClosed) {
		t.Errorf("stopped: %v", err)
	}
	if err := b.Inject(numbered(1)); !errors.Is(err, ErrClosed) {
		t.Errorf("inject: %v", err)
	}
}
