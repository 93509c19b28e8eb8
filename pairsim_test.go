package nvmmirror

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/nvmmirror/nvmmirror/pmem/sim"
)

// The deterministic simulation of a pair runs in child processes, see
// startExactly; there, channels that requests keep from one use to the next never
// leave the bubble that they were made in.

const (
	pairSimSeed  = "NVMMIRROR_PAIRSIM_SEED"  // replays one schedule, with everything that happens
	pairSimSoak  = "NVMMIRROR_PAIRSIM_SOAK"  // runs schedules for so long
	pairSimChild = "NVMMIRROR_PAIRSIM_CHILD" // what a child is to run: first seed, count, the seed of which it tells all
	pairSimDrop  = "NVMMIRROR_PAIRSIM_DROP"  // the flush or fence that it leaves out, or "none": it names those that there are
	pairSimHang  = 5 * time.Minute           // a schedule takes some 40 ms; its process has what others leave
)

// TestPairSim runs schedules of a simulated pair, each from a seed of its own.
func TestPairSim(t *testing.T) {
	t.Parallel()
	needSelf(t)
	if s := os.Getenv(pairSimSeed); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", pairSimSeed, err)
		}
		if err := exactly(); err != nil {
			t.Log("not exactly: ", err)
		}
		if r := replayPairSim(t, seed, os.Stdout); r.failure != "" {
			t.Fatal(r.failure)
		}
		return
	}
	r := pairSimRun{t: t, next: 1, left: 2000, began: time.Now()}
	switch {
	case raceEnabled: // goroutines run one at a time here: little to race
		r.left = 100
	case testing.Short():
		r.left = 300
	}
	if s := os.Getenv(pairSimSoak); s != "" {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatalf("%s: %v", pairSimSoak, err)
		}
		r.next, r.left, r.until = rand.Uint64N(1<<40)*pairSimChunk+1, 1<<40, time.Now().Add(d)
	}
	t.Logf("seeds from %d on", r.next)
	var wg sync.WaitGroup
	for range max(1, min(runtime.NumCPU(), 8)) {
		wg.Go(r.work)
	}
	wg.Wait()
	t.Logf("%d schedules in %v: %s", r.done, time.Since(r.began).Round(time.Second), r.total)
}

// TestPairSimReplays runs schedules twice: all that happens is the same, also
// where one of them is replayed. What startExactly cannot rule out was not met in
// 60 runs beside each other: a run that differs is said, and must not differ again.
func TestPairSimReplays(t *testing.T) {
	t.Parallel()
	needSelf(t)
	if err := exactly(); err != nil {
		t.Skip("schedules come again only in part: ", err)
	}
	chunks := 2
	if testing.Short() {
		chunks = 1
	}
	for seed := uint64(5001); chunks > 0; chunks-- {
		some := seed % 7 // which of the chunk is replayed
		chunk := func() pairSimResult { return runPairSim(t, seed, pairSimChunk, 0, nil) }
		replay := func() pairSimResult { return replayPairSim(t, seed+some, io.Discard) }
		first := ends(t, chunk)
		if !sameEnds(t, first, ends(t, chunk)) {
			first = ends(t, chunk) // the one or the other was spoiled, not this one too
			if !sameEnds(t, first, ends(t, chunk)) {
				t.Error("four runs, and not the same twice")
			}
		}
		if r := ends(t, replay); !sameEnds(t, first[:some+1], r) && !sameEnds(t, first[:some+1], ends(t, replay)) {
			t.Error("two replays, and none was what had happened")
		}
		seed += pairSimChunk
	}
}

// ends runs schedules, which break no promise, and returns how they ended.
func ends(t *testing.T, run func() pairSimResult) []string {
	t.Helper()
	r := run()
	if r.failure != "" {
		t.Fatal(r.failure)
	}
	return r.ends
}

// sameEnds says where two runs of the same schedules differ.
func sameEnds(t *testing.T, a, b []string) bool {
	t.Helper()
	diff := cmp.Diff(a, b)
	if diff != "" {
		t.Log("not the same: ", diff)
	}
	return diff == ""
}

// pairSimRun is a run of many schedules by several workers.
type pairSimRun struct {
	t     *testing.T
	began time.Time
	until time.Time // zero: when none is left

	mu    sync.Mutex
	next  uint64
	left  int
	done  int
	told  time.Time
	total simStats
}

// pairSimChunk is how many schedules a process runs, from a seed after a multiple
// of it on. What chance decides in one depends on those before it, so all of them
// come again where one is replayed. Nothing is collected meanwhile: how long that
// takes would decide, too.
const pairSimChunk = 25

func (r *pairSimRun) work() {
	for {
		r.mu.Lock()
		seed, n := r.next, min(pairSimChunk, r.left)
		r.next += uint64(n)
		r.left -= n
		r.mu.Unlock()
		if n <= 0 || !r.until.IsZero() && time.Now().After(r.until) || r.t.Failed() {
			return
		}
		res := runPairSim(r.t, seed, n, 0, nil)
		if res.failure != "" {
			r.fail(res)
			return
		}
		r.mu.Lock()
		r.done += n
		for _, s := range res.stats {
			r.total.add(s)
		}
		if !r.until.IsZero() && time.Since(r.told) > 10*time.Second {
			r.told = time.Now()
			r.t.Logf("%d schedules, %v left: %s", r.done, time.Until(r.until).Round(time.Second), r.total)
		}
		r.mu.Unlock()
	}
}

// fail prints the trace of a schedule that broke a promise.
func (r *pairSimRun) fail(res pairSimResult) {
	var out bytes.Buffer
	replayPairSim(r.t, res.seed, &out)
	lines := bytes.Split(out.Bytes(), []byte("\n"))
	if cut := len(lines) - 120; cut > 0 {
		lines = lines[cut:]
	}
	r.t.Errorf("%s\nreplay with %s=%d\nthe last of its trace:\n%s", res.failure, pairSimSeed, res.seed, bytes.Join(lines, []byte("\n")))
}

// needSelf skips where this program cannot start itself.
func needSelf(t testing.TB) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	err = exec.Command(self, "-test.run=^$").Run()
	if errors.Is(err, syscall.ENOEXEC) { // qemu-user without binfmt_misc
		t.Skip("needs to start itself as a second process: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// pairSimResult is what a child process said.
type pairSimResult struct {
	ends    []string // a line per schedule: seed, hash, statistics
	stats   []simStats
	seed    uint64 // of what failed
	failure string
	sites   []string // with pairSimDrop none
}

// replayPairSim runs the schedule of a seed behind those that come before it in
// its process. out gets all that happens.
func replayPairSim(t testing.TB, seed uint64, out io.Writer) pairSimResult {
	before := (seed - 1) % pairSimChunk
	return runPairSim(t, seed-before, int(before)+1, seed, out)
}

// runPairSim runs n schedules in a child process. out gets all that happens in
// the one of the seed told.
func runPairSim(t testing.TB, seed uint64, n int, told uint64, out io.Writer, env ...string) (r pairSimResult) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		t.Error(err)
		return r
	}
	cmd := exec.CommandContext(ctx, self, "-test.run=^TestPairSimChild$", "-test.timeout=0")
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(s string) bool {
		return strings.HasPrefix(s, "GODEBUG=") || strings.HasPrefix(s, "GOMAXPROCS=") || strings.HasPrefix(s, "NVMMIRROR_PAIRSIM")
	}), "GOMAXPROCS=1", "GODEBUG=asyncpreemptoff=1", fmt.Sprintf("%s=%d %d %d", pairSimChild, seed, n, told))
	cmd.Env = append(cmd.Env, env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	pipe, err := cmd.StdoutPipe()
	if err == nil {
		err = startSimulation(cmd)
	}
	if err != nil {
		t.Error(err)
		return r
	}
	hang := time.AfterFunc(pairSimHang, func() { cmd.Process.Signal(os.Interrupt); cancel() })
	defer hang.Stop()
	var rest []string
	in := bufio.NewScanner(pipe)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		line := in.Text()
		word, more, _ := strings.Cut(line, " ")
		if word == "begin" {
			r.seed, _ = strconv.ParseUint(more, 10, 64)
			rest = rest[:0]
			hang.Reset(pairSimHang)
		}
		if r.seed == told {
			fmt.Fprintln(out, line)
		}
		switch word {
		case "begin":
		case "site":
			r.sites = append(r.sites, more)
		case "end":
			r.ends = append(r.ends, more)
			r.stats = append(r.stats, parseSimStats(more))
		case "failed":
			r.failure = fmt.Sprintf("seed %d: %s", r.seed, more)
		default:
			rest = append(rest, line)
		}
	}
	if err := cmd.Wait(); err != nil && r.failure == "" {
		tail := append(rest, strings.Split(stderr.String(), "\n")...)
		r.failure = fmt.Sprintf("seed %d: the process ended (%v):\n%s", r.seed, err, strings.Join(tail[:min(len(tail), 80)], "\n"))
	}
	return r
}

// TestPairSimChild runs schedules in this process.
func TestPairSimChild(t *testing.T) {
	var seed, told uint64
	var n int
	if _, err := fmt.Sscanf(os.Getenv(pairSimChild), "%d %d %d", &seed, &n, &told); err != nil {
		t.Skip("runs in a child process of TestPairSim and the like")
	}
	mutant := pairSimMutant()
	anyCPU()
	debug.SetGCPercent(-1)
	synctest.Test(t, func(t *testing.T) {
		for end := seed + uint64(n); seed < end; seed++ {
			fmt.Printf("begin %d\n", seed)
			cryptotest.SetGlobalRandom(t, seed)
			w := newSimPair(seed, mutant)
			w.tellTo(teller(seed == told))
			w.run()
			if w.failed != nil {
				fmt.Printf("failed %s\n", strings.ReplaceAll(w.failed.Error(), "\n", "; "))
				os.Exit(1)
			}
			fmt.Printf("end %d hash %016x %s\n", seed, w.hash, w.stats)
			w.end()
		}
	})
}

// pairSimMutant is what pairSimDrop leaves out.
func pairSimMutant() func(sim.Op) bool {
	switch drop := os.Getenv(pairSimDrop); drop {
	case "":
		return nil
	case "none":
		sites := map[string]bool{}
		return func(o sim.Op) bool {
			if m := mutantOf(o); o.Kind != sim.Store && !sites[m] {
				sites[m] = true
				fmt.Printf("site %s\n", m)
			}
			return false
		}
	default:
		return func(o sim.Op) bool { return o.Kind != sim.Store && mutantOf(o) == drop }
	}
}

// teller writes, or does the same without a write: what a schedule does must not
// depend on whether somebody listens.
type teller bool

func (on teller) Write(p []byte) (int, error) {
	if !on {
		return len(p), nil
	}
	return os.Stdout.Write(p)
}

// TestPairSimFaultsApply: the faults that make pairsim-faults puts into the product
// are still faults of this product.
func TestPairSimFaultsApply(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("needs git")
	}
	patches, err := filepath.Glob("testdata/pairsim-faults/*.patch")
	if err != nil || len(patches) == 0 {
		t.Fatalf("no faults: %v", err)
	}
	for _, p := range patches {
		if out, err := exec.Command("git", "apply", "--check", p).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", p, err, out)
		}
	}
}
