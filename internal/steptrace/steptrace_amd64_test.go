package steptrace

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror"
)

// envSeed replays the choice of crash points, images and mutants.
const envSeed = "NVMMIRROR_SEED"

// traced is one choice of instructions, and how much is done with it.
type traced struct {
	primitives
	script string
	kill   int // operations in the last transaction, then the child is killed; 0: before its fence
}

func (c traced) String() string {
	if c.primitives == (primitives{}) {
		return "byte"
	}
	return fmt.Sprintf("%s-%d", flushNames[c.flush], c.width)
}

// choices are each flush instruction that this CPU has, and none, with each
// width of non-temporal stores that it has, and with cached stores alone. All
// are done with the best. Each flush instruction and each width does more at
// least once, and so do cached stores, with a flush and without (class byte).
func choices() []traced {
	widths := []uint8{0, 8}
	if cpu.X86.HasAVX2 {
		widths = append(widths, 32)
	}
	if cpu.X86.HasAVX512F {
		widths = append(widths, 64)
	}
	out := []traced{{choice, "long", 0}}
	for f := int(choice.flush); f >= 0; f-- {
		for i, w := range widths {
			c := traced{primitives{uint8(f), w}, "brief", (f + i) % 2 * 2}
			diagonal := max(1, len(widths)-1-(int(choice.flush)-f))
			switch {
			case c.primitives == choice:
				continue
			case f > 0 && i == diagonal, f == 0 && w == 0, f == int(choice.flush) && w == 0:
				c.script = "short"
			}
			out = append(out, c)
		}
	}
	// The long ones first: the last to end is then a brief one.
	slices.SortStableFunc(out, func(a, b traced) int {
		order := map[string]int{"long": 0, "short": 1, "brief": 2}
		return order[a.script] - order[b.script]
	})
	return out
}

// TestInstructions traces a volume's work for each choice of instructions, and
// recovers what power failures would leave by what the trace shows.
func TestInstructions(t *testing.T) {
	if raceEnabled {
		t.Skip("under the race detector each access takes many more instructions: too slow to step")
	}
	if choice.flush == 0 {
		t.Skip("this CPU has no instruction that flushes a line")
	}
	seed := uint64(20261122)
	if s := os.Getenv(envSeed); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%s=%d", envSeed, seed)
	for i, ch := range choices() {
		t.Run(ch.String(), func(t *testing.T) {
			t.Parallel()
			ch.run(t, rand.New(rand.NewPCG(seed, uint64(i))))
		})
	}
}

func (ch traced) run(t *testing.T, rng *rand.Rand) {
	dir := memoryDir(t)
	path := filepath.Join(dir, "region")
	tr := &trace{size: regionSize(t, dir), cachesLast: ch.flush == 0 && ch.width != 0}
	start := time.Now()
	child := func(script string, first int) {
		err := run(tr, path, append(os.Environ(), "GODEBUG=asyncpreemptoff=1", "GOMAXPROCS=1", "GOGC=off",
			fmt.Sprintf("%s=%s %s %d %d %d %d", envScript, script, path, ch.flush, ch.width, first, ch.kill)))
		if errors.Is(err, errForbidden) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatalf("%s: after %d steps, %d events: %v", script, tr.steps, len(tr.ops), err)
		}
	}
	child(ch.script, 0)
	if last := tr.ops[len(tr.ops)-1]; last.kind != opKilled {
		t.Fatalf("the child was not killed in its last transaction, but ended with %v", last)
	}
	began := 0
	for _, o := range tr.ops {
		if o.kind == opMark && o.mark.kind == markBegin {
			began++
		}
	}
	survived := ch.kill == 0 // it was killed before the fence: all is visible
	recovery := "recover"
	if ch.script == "long" {
		recovery = "recover-close"
	}
	child(recovery, began)
	stepped := time.Since(start)

	m, err := newModel(tr, survived)
	if err != nil {
		t.Fatal(err)
	}
	if last := m.commits[len(m.commits)-1].lsn; last <= nvmmirror.MinJournal {
		t.Errorf("the last LSN is %d: the ring of %d bytes did not wrap", last, nvmmirror.MinJournal)
	}
	if err := checkInstructions(tr, ch.primitives); err != nil {
		t.Error(err)
	}
	if err := checkCommits(tr, m, ch.primitives, ringOf(t, path)); err != nil {
		t.Error(err)
	}
	r, err := newRecoverer(dir, tr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := r.close(); err != nil {
			t.Error(err)
		}
	}()
	x := &examiner{tr: tr, m: m, r: r, rng: rng, caches: ch.primitives == primitives{}, atFence: atFence, samples: 60}
	changes := 2
	if ch.script == "brief" {
		x.atFence, x.samples, changes = 2, 15, 1
	}
	if err := x.crash(); err != nil {
		t.Error(err)
	}
	points, tried := x.points, x.tried
	var mutants []string
	if !x.caches { // the model of class byte loses nothing that is visible
		if mutants, err = x.mutants(changes); err != nil {
			t.Error(err)
		}
		if survived && ch.flush != 0 && ch.width == 0 { // non-temporal stores of a primary's segment need no flush
			broken, err := x.untrusted()
			if err != nil || broken == nil {
				t.Errorf("without recovery's flushes of the journal: %v; recovery noticed: %v", err, broken)
			}
			mutants = append(mutants, fmt.Sprintf("recovery's flushes of the journal left out: %v", broken))
		}
	}
	t.Logf("%d steps in %v (%.0f/s), %d events, %d commits in %d segments; %d images at %d crash points; %d mutants caught; %v in all",
		tr.steps, stepped.Round(time.Millisecond), float64(tr.steps)/stepped.Seconds(), len(tr.ops), len(m.commits), len(m.states)-1, tried, points, len(mutants), time.Since(start).Round(time.Millisecond))
	for _, s := range mutants {
		t.Log(s)
	}
}

// memoryDir is a directory on tmpfs.
func memoryDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "nvmmirror-steptrace-")
	if err != nil {
		t.Skipf("no memory file system at /dev/shm: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil || uint32(fs.Type) != unix.TMPFS_MAGIC {
		t.Skipf("/dev/shm is no tmpfs: type %#x, %v", fs.Type, err)
	}
	return dir
}

// regionSize is how large the child's region will be.
func regionSize(t *testing.T, dir string) int64 {
	path := filepath.Join(dir, "sample")
	defer os.Remove(path)
	w := worker{path: path}
	if err := w.create(); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// ringOf is the journal's extent in the region.
func ringOf(t *testing.T, path string) [2]int64 {
	in, err := nvmmirror.Inspect(path)
	if err != nil {
		t.Fatal(err)
	}
	return [2]int64{in.Journal.Offset, in.Journal.Offset + in.Journal.Length}
}
