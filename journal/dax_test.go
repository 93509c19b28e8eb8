package journal

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/pmem"
)

// A log on real DAX, where the environment names it (see pmem's tests): what
// was appended is there after the region was mapped anew, is what the file
// holds, and goes on from there; many times around the ring.
func TestDAXLog(t *testing.T) {
	var places []string
	for _, parent := range filepath.SplitList(os.Getenv("NVMMIRROR_DAX_DIR")) {
		dir, err := os.MkdirTemp(parent, "journal-test-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		places = append(places, filepath.Join(dir, "region"))
	}
	if device := os.Getenv("NVMMIRROR_DEVDAX"); device != "" {
		places = append(places, device)
	}
	if len(places) == 0 {
		t.Skip("needs real DAX: name a directory on it in NVMMIRROR_DAX_DIR, a device in NVMMIRROR_DEVDAX (make test-dax boots a machine that has them)")
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for i, path := range places {
		t.Run(path, func(t *testing.T) { logOnDAX(t, path, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
}

func logOnDAX(t *testing.T, path string, rng *rand.Rand) {
	const off, size = 4096, 64 << 10
	r, err := pmem.Create(path, pmem.AreaAlign, pmem.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Publish(); err != nil {
		t.Fatal(err)
	}
	base := LSN(rng.Uint64N(1<<40)) * Align
	end, chain := base, uint32(0)
	from, fromChain := end, chain // of the checkpoint
	if r.Device() {
		r.Zero(off, size)
	}
	segments := 0
	for round := range 30 {
		if r.Class() < pmem.Cacheline {
			t.Fatalf("class %v", r.Class())
		}
		l := NewLog(r, off, size, base)
		l.SetEpoch(testEpoch)
		scan, err := ScanFrom(l.Ring(), testHistory(base), testEpoch.Node, from, fromChain, end, nil)
		if err != nil || scan.End != end || scan.Chain != chain || scan.Segments != segments || scan.Damage != nil {
			t.Fatalf("round %d: log from %d to %d with %d segments: %+v, %v", round, from, end, segments, scan, err)
		}
		if err := l.Trust(&scan); err != nil {
			t.Fatal(err)
		}
		l.Reset(scan.End, scan.Chain)
		from, fromChain, segments = end, chain, 0
		for l.End() < from+size/2 {
			data := make([]byte, 1+rng.IntN(3000))
			for i := range data {
				data[i] = byte(rng.Uint32())
			}
			before := l.End()
			if _, err := appendTo(l, end, []Write{{int64(rng.IntN(1 << 30)), data}, {7, data[:1]}}); err != nil {
				t.Fatal(err)
			}
			var h Header
			for at := before; at < l.End(); at = h.End() {
				body, err := l.Ring().Segment(at, &h)
				if err != nil || !h.Pad && !bytes.Contains(body, data) {
					t.Fatalf("segment at %d: %v", at, err)
				}
				segments++
			}
		}
		end, chain = l.End(), l.Chain()
		want := bytes.Clone(l.Ring().Bytes)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if r, err = pmem.Open(path, pmem.Options{}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(r.Bytes()[off:off+size], want) {
			t.Fatalf("round %d: the ring changed while it was closed", round)
		}
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}
