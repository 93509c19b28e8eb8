package nvmmirror

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"
)

// Schedules of a simulated pair that are written down, not drawn: bugs that
// drawn ones found. The seed only decides in which order bytes arrive.

const pairSimDirect = "NVMMIRROR_PAIRSIM_DIRECT" // set in the child process

// direct runs a script once for each of so many seeds, in a child process: see
// TestPairSim. There it returns true.
func direct(t *testing.T, seeds int, opt Options, script func(d *simScript)) bool {
	if os.Getenv(pairSimDirect) == "" {
		t.Parallel()
		needSelf(t)
		if out, err := runDirect(t, t.Name()); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return false
	}
	mutant := pairSimMutant()
	anyCPU()
	debug.SetGCPercent(-1)
	synctest.Test(t, func(t *testing.T) {
		for seed := range uint64(seeds) {
			cryptotest.SetGlobalRandom(t, seed)
			w := newSimPair(seed, mutant)
			w.plan = simPlan{opt: opt}
			w.timeout, w.full, w.napOn = 100*time.Millisecond+511, 1<<20, false
			for _, n := range w.nodes {
				n.opt, n.rate = opt, 1
			}
			d := &simScript{simPair: w, t: t, a: w.nodes[0], b: w.nodes[1]}
			func() {
				defer w.end()
				script(d)
				d.whole("at the end")
			}()
		}
	})
	return true
}

// runDirect runs the schedules of a test of this kind in a child process.
func runDirect(t *testing.T, name string, env ...string) (out []byte, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, "-test.run=^"+name+"$")
	cmd.Env = append(os.Environ(), pairSimDirect+"=1", "GOMAXPROCS=1", "GODEBUG=asyncpreemptoff=1")
	cmd.Env = append(cmd.Env, env...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	err = startSimulation(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	return said.Bytes(), err
}

// simScript is a schedule that is written down.
type simScript struct {
	*simPair
	t    *testing.T
	a, b *simNode
}

// whole fails where a promise is broken.
func (d *simScript) whole(what string) {
	if d.failed != nil {
		tail := d.trace[max(0, len(d.trace)-60):]
		d.t.Fatalf("seed %d, %s: %v\n%s", d.seed, what, d.failed, strings.Join(tail, "\n"))
	}
}

func (d *simScript) until(what string, ok func() bool) {
	d.t.Helper()
	good := d.calm(d.bound(), ok)
	d.whole(what)
	if !good {
		d.t.Fatalf("seed %d: never %s:\n%v\n%v", d.seed, what, d.a, d.b)
	}
}

// begin brings the pair in sync, with a as the primary.
func (d *simScript) begin() {
	d.a.open()
	d.b.open()
	d.a.promote()
	d.until("in sync", func() bool { return d.inSync() && !d.a.command })
}

func (d *simScript) kill(n *simNode) {
	n.outage = false
	d.net.mu.Lock()
	n.life.dead = true
	d.net.mu.Unlock()
	d.settle()
	d.whole("killed")
}

func (d *simScript) partition(on bool) {
	d.net.cut = [2]bool{on, on}
}

// lose ends all connections.
func (d *simScript) lose() {
	d.net.mu.Lock()
	for _, p := range d.net.pipes {
		d.net.lose(p)
	}
	d.net.mu.Unlock()
	d.settle()
}
