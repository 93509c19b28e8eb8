package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/pmem/sim"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// Bugs that the simulation of a pair found, each as small as it can be shown.

// found is a volume on simulated memory.
func found(t *testing.T, o Options) *Volume {
	t.Helper()
	m := layout(pairSimSize, MinJournal)
	mem, err := sim.New(m.Data.end())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	if err := format(mem, m); err != nil {
		t.Fatal(err)
	}
	o, err = o.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	v, err := openMemory("sim", mem, o)
	if err == nil {
		err = v.takeUp()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.pair.Close)
	return v
}

// A segment that cannot be applied ends the committer's round: it was tried
// again without end, and the volume could not be closed.
func TestTickEndsWhereApplyFails(t *testing.T) {
	v := found(t, Options{})
	start := v.journal.End()
	if _, err := v.WriteAt([]byte("about to be damaged"), 0); err != nil {
		t.Fatal(err)
	}
	if err := v.committer.Acquire(context.Background()); err != nil {
		t.Fatal(err)
	}
	v.journal.Ring().Bytes[100] ^= 1
	v.applied.Store(uint64(start)) // as if it had not been applied yet
	v.committer.Open(start, start)
	v.committer.Release()
	done := make(chan struct{})
	go func() { v.committer.Tick(); close(done) }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("still trying to apply it")
	}
	if v.failed.Load() == nil {
		t.Fatal("applied a damaged segment")
	}
}

// refusing is a transport on which every dial fails at once.
type refusing struct {
	transport.Transport
	dials atomic.Int64
}

func (r *refusing) Dial(context.Context, netip.Addr, netip.AddrPort) (transport.Conn, error) {
	r.dials.Add(1)
	return nil, errors.New("unreachable")
}

// A peer that refuses connections at once was dialled again without a pause.
func TestDialPausesAfterRefusal(t *testing.T) {
	n := &simNet{addr: [2]netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.2:1")}}
	r := &refusing{Transport: &simLife{net: n}}
	v := found(t, Options{Peer: &Peer{Listen: "10.0.0.1:1", Address: "10.0.0.2:1", Timeout: 100 * time.Millisecond, Transport: r}})
	deadline := time.Now().Add(10 * time.Second)
	for start := time.Now(); time.Since(start) < 300*time.Millisecond || r.dials.Load() < 3; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not dialled again")
		}
	}
	if k := r.dials.Load(); k > 100 {
		t.Fatalf("dialled %d times in a moment", k)
	}
	v.pair.Close()
}

// The node that lets the other dial first never came to dial less often: it took the
// time that it waits longer for time that the dial had taken.
func TestDialDelayGrowsOnBothNodes(t *testing.T) {
	const timeout = 100 * time.Millisecond
	addr := [2]netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.2:1")}
	var node [2]*refusing
	for own := range addr {
		node[own] = &refusing{Transport: &simLife{net: &simNet{addr: addr}, node: own}}
		v := found(t, Options{Peer: &Peer{Listen: addr[own].String(), Address: addr[1-own].String(), Timeout: timeout, Transport: node[own]}})
		defer v.pair.Close()
	}
	time.Sleep(15 * timeout)
	for own, r := range node {
		// One each timeout, and a few more at the beginning.
		if k := r.dials.Load(); k > 25 {
			t.Errorf("node %d dialled %d times in 15 timeouts", own, k)
		}
	}
}

// A bit of the second metadata copy flipped in an open region. The next change
// wrote over the first, and a power failure in it lost both.
func TestMetadataChangeBesideAFlip(t *testing.T) {
	rng := simSeed(t)
	for copied := range int64(2) {
		for at, more := 1, true; more; at++ {
			m := layout(pairSimSize, MinJournal)
			mem, err := sim.New(m.Data.end())
			if err != nil {
				t.Fatal(err)
			}
			if err := format(mem, m); err != nil {
				t.Fatal(err)
			}
			mem.Bytes()[copied*metaArea+100] ^= 1
			media := &simMedia{Memory: mem, life: &simLife{net: &simNet{}}, keep: func(n int) int { return rng.IntN(max(1, n)) }, at: at}
			if err := writeMetadata(media, m); err != nil {
				t.Fatal(err)
			}
			more = media.life.dead
			mem.Images(40, rng, func(img *sim.Memory) {
				if _, err := readMetadata(img); err != nil {
					t.Fatalf("copy %d flipped, power failed at operation %d of a change: %v", copied, at, err)
				}
			})
			mem.Close()
		}
	}
}

// A process was killed between the two fences of a metadata change: one copy was
// durable, the other only visible. The next change wrote over the durable one,
// and a power failure in it lost both.
func TestMetadataCopiesAreDurableOnceOpened(t *testing.T) {
	rng := simSeed(t)
	o, err := Options{}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	tried := 0
	// die opens the region, and dies in a change of its metadata, at its k-th
	// operation. It reports whether the change has so many.
	die := func(mem *sim.Memory, k int) bool {
		media := &simMedia{Memory: mem, life: &simLife{net: &simNet{}}, keep: func(n int) int { return rng.IntN(max(1, n)) }}
		v, err := openMemory("sim", media, o)
		if err != nil {
			t.Fatal(err)
		}
		media.at = media.ops + k
		v.updateMeta(func(m *metadata) error { m.State.Peer++; m.State.Acked += 64; return nil })
		return media.life.dead
	}
	for killed := 1; ; killed++ {
		for failed := 1; ; failed++ {
			m := layout(pairSimSize, MinJournal)
			mem, err := sim.New(m.Data.end())
			if err != nil {
				t.Fatal(err)
			}
			if err := format(mem, m); err != nil {
				t.Fatal(err)
			}
			more := die(mem, killed)
			if more {
				mem.Killed()
			}
			again := more && die(mem, failed)
			if again {
				mem.Images(40, rng, func(img *sim.Memory) {
					tried++
					if _, err := readMetadata(img); err != nil {
						t.Fatalf("killed at operation %d of a change, power failed at %d of the next: %v", killed, failed, err)
					}
				})
			}
			mem.Close()
			if !more {
				t.Logf("%d images", tried)
				if killed <= 4 {
					t.Fatalf("a change has %d operations", killed-1)
				}
				return
			}
			if !again {
				break
			}
		}
	}
}

// While blocks of a full copy arrive, a segment is applied to a block only where
// that does not hold it yet. Of several records for one block all but the first
// were left out: the first had moved the block's entry to the segment.
func TestCopyTakesAllRecordsOfABlock(t *testing.T) {
	v := found(t, Options{})
	ctx := context.Background()
	start, chain := v.journal.End(), v.chain
	old := [2]entry{}
	for b := range old {
		old[b], _ = v.table.get(int64(b))
	}
	data := v.mem.Bytes()[v.data.Off:][: 2*blockSize : 2*blockSize]
	before := bytes.Clone(data)
	tx := v.Begin()
	for i, off := range []int64{0, 2000, blockSize - 4, blockSize + 100, 3000} {
		if err := tx.Write(off, []byte{byte(i + 1), 2, 3, 4, 5, 6, 7, 8}); err != nil {
			t.Fatal(err)
		}
	}
	end, err := tx.Commit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	after := bytes.Clone(data)
	if err := v.committer.Acquire(ctx); err != nil {
		t.Fatal(err)
	}
	defer v.committer.Release()
	for name, c := range map[string]struct{ held [2]bool }{
		"both read before it": {},
		"one read after it":   {[2]bool{true, false}},
		"the other one":       {[2]bool{false, true}},
		"both read after it":  {[2]bool{true, true}},
	} {
		v.copying = true
		for b, held := range c.held {
			content, e := before, old[b]
			if held {
				content, e = after, entry{lsn: end, crc: crcOf(after[b*blockSize:][:blockSize])}
			}
			v.mem.Copy(v.data.Off+int64(b)*blockSize, content[b*blockSize:][:blockSize])
			v.table.set(int64(b), e)
		}
		v.applied.Store(uint64(start))
		v.chain = chain
		if err := v.apply(end); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		v.copying = false
		if !bytes.Equal(data, after) {
			t.Errorf("%s: not what the log makes of it", name)
		}
		for b := range int64(2) {
			if e, ok := v.table.get(b); !ok || e.lsn != end || e.crc != crcOf(v.block(b)) {
				t.Errorf("%s: block %d has the entry %+v, %v", name, b, e, ok)
			}
		}
	}
}
