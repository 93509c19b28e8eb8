package nvmmirror

import (
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/nvmmirror/nvmmirror/pmem/sim"
)

// simPair is one schedule: both nodes of a pair, the network between them, the
// time, and what the clients were told. One seed decides all of it.
//
// The driver lets one thing happen at a time: it waits until every goroutine
// of both nodes waits for something (a timer, a connection, another goroutine),
// looks at what came of the last event, and picks the next.
type simPair struct {
	seed    uint64
	rng     *rand.Rand
	began   time.Time
	net     *simNet
	nodes   [2]*simNode
	model   *simModel
	timeout time.Duration
	full    int
	plan    simPlan

	promised *simSegment // acknowledged to a client, or read by one
	results  chan simResult
	asked    int         // of clients and operators, so far
	told     []simResult // not looked at yet

	naps  sync.Mutex // guards what nodes draw from
	napOn bool

	failed error
	voided bool // see goesOnUnheard
	hash   uint64
	trace  []string
	logger *zap.Logger
	print  func(string)
	stats  simStats
	mutant func(sim.Op) bool // what both memories leave out
}

// simStats say what schedules have seen.
type simStats struct {
	steps, acked, reads, crashes, roles, refused, copies, flips, reported, trusted, modes, forced, images, blanks, voided int
	healed                                                                                                                time.Duration // the longest
}

const simStatsFormat = "%d steps, %d acknowledged, %d reads, %d crashes, %d roles, %d refused, %d copies, %d flips, %d reported, %d trusted, %d modes, %d forced, %d put back, %d renewed, %d void, healed in %s"

func (s *simStats) fields() []*int {
	return []*int{&s.steps, &s.acked, &s.reads, &s.crashes, &s.roles, &s.refused, &s.copies, &s.flips, &s.reported, &s.trusted, &s.modes, &s.forced, &s.images, &s.blanks, &s.voided}
}

func (s simStats) String() string {
	var args []any
	for _, p := range s.fields() {
		args = append(args, *p)
	}
	return fmt.Sprintf(simStatsFormat, append(args, s.healed)...)
}

// parseSimStats reads the end of a child's line.
func parseSimStats(line string) (s simStats) {
	var seed uint64
	var hash, healed string
	args := []any{&seed, &hash}
	for _, p := range s.fields() {
		args = append(args, p)
	}
	fmt.Sscanf(line, "%d hash %s "+simStatsFormat, append(args, &healed)...)
	s.healed, _ = time.ParseDuration(healed)
	return s
}

func (s *simStats) add(x simStats) {
	for i, p := range x.fields() {
		*s.fields()[i] += *p
	}
	s.healed = max(s.healed, x.healed)
}

func newSimPair(seed uint64, mutant func(sim.Op) bool) *simPair {
	w := &simPair{
		seed: seed, mutant: mutant, rng: simRand(seed, 1), began: time.Now(), net: &simNet{}, model: newSimModel(),
		results: make(chan simResult, 1000), logger: zap.NewNop(),
	}
	w.promised = w.model.places[simPlace{}]
	w.net.addr = [2]netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:7447"), netip.MustParseAddrPort("10.0.0.2:7447")}
	if w.rng.IntN(2) == 0 {
		w.net.addr[0], w.net.addr[1] = w.net.addr[1], w.net.addr[0]
	}
	w.draw()
	for i := range w.nodes {
		n := &simNode{w: w, i: i, name: string(rune('a' + i)), opt: w.plan.opt, rate: 1, draws: simRand(seed, uint64(2+i)), skew: time.Duration(w.rng.Int64N(1e12))}
		n.create()
		w.nodes[i] = n
	}
	if w.plan.skew > 0 {
		w.nodes[w.rng.IntN(2)].rate = 1 - w.plan.skew
	}
	return w
}

// event notes what happens, and what comes of it: the trace, and its hash.
func (w *simPair) event(format string, args ...any) {
	line := fmt.Sprintf("%12v ", time.Since(w.began)) + fmt.Sprintf(format, args...)
	h := fnv.New64a()
	fmt.Fprintf(h, "%x%s", w.hash, line)
	w.hash = h.Sum64()
	w.trace = append(w.trace, line)
	if w.print != nil {
		w.print(line)
	}
}

// broken notes the first promise that was broken, unless the schedule is void.
func (w *simPair) broken(format string, args ...any) {
	if w.failed == nil && !w.voided {
		w.failed = fmt.Errorf(format, args...)
		w.event("BROKEN: %v", w.failed)
	}
}

// nap is how long a write keeps its goroutine. Each node draws for itself:
// which of them comes first in one instant is not decided.
func (n *simNode) nap() time.Duration {
	w := n.w
	w.naps.Lock()
	defer w.naps.Unlock()
	if !w.napOn || n.draws.IntN(8) > 0 {
		return 0
	}
	return time.Duration(n.draws.Int64N(int64(w.timeout) / 3))
}

// keep is how much of so many bytes a process stores that dies meanwhile.
func (n *simNode) keep(bytes int) int {
	n.w.naps.Lock()
	defer n.w.naps.Unlock()
	return n.draws.IntN(max(1, bytes))
}

// quiet waits until nothing moves by itself.
func (w *simPair) quiet() {
	w.yield()
	synctest.Wait()
	for {
		select {
		case r := <-w.results:
			r.n.busy--
			w.told = append(w.told, r)
		default:
			// Which of two goroutines ended first in one instant is not decided.
			slices.SortFunc(w.told, func(a, b simResult) int { return a.id - b.id })
			return
		}
	}
}

// yield orders what the driver has looked at before what the nodes do next, for
// the race detector: they take the lock before they change it.
func (w *simPair) yield() {
	w.net.mu.Lock()
	defer w.net.mu.Unlock()
}

// settle waits until the pair is quiet, does what follows from the last event,
// and checks everything.
func (w *simPair) settle() {
	w.quiet()
	for _, n := range w.nodes {
		n.goesOnUnheard()
	}
	for again := true; again; { // time passes, in which the other one may die
		again = false
		for _, n := range w.nodes {
			if n.life != nil && n.life.dead {
				w.stats.crashes++
				w.event("%s: died, outage %v", n.name, n.outage)
				n.reap()
				again = true
			}
		}
	}
	for len(w.told) > 0 {
		r := w.told[0]
		w.told = w.told[1:]
		r.tell()
	}
	w.check()
	w.note()
}

// note adds what can be seen of the nodes to the hash, where it has changed.
func (w *simPair) note() {
	for _, n := range w.nodes {
		s := "down"
		if n.up() && n.v != nil {
			p := n.v.pair
			st, _ := n.state()
			s = fmt.Sprintf("%v %s title %v serving %v required %v log %d applied %d epochs %d", p.Role(), p.Phase(), st.Title, p.Serving(), p.Required(), n.v.journal.End(), n.v.Applied(), len(st.History))
			switch {
			case p.Phase() == n.phase:
			case p.Phase() == "resyncing":
				w.stats.copies++
			case p.Phase() == "refused":
				w.stats.refused++
			}
			if n.phase = p.Phase(); n.role != p.Role() {
				n.role = p.Role()
				w.stats.roles++
			}
		}
		if s != n.seen {
			n.seen = s
			w.event("%s is %s", n.name, s)
		}
	}
}

// sleep lets time pass. The odd nanoseconds keep timers of different origin
// from firing together, which the runtime would order by chance.
func (w *simPair) sleep(d time.Duration) {
	w.yield()
	time.Sleep(d + time.Duration(w.rng.IntN(997)+1))
}

// simPiece bounds what is delivered at once: a goroutine that takes 10 ms for it
// is preempted, at a point that chance decides.
const simPiece = 128 << 10

// step lets one thing happen that does not need time; ok is false where there
// is none.
func (w *simPair) step(whole bool) (ok bool) {
	pipes, dials := w.net.deliverable(), w.net.pending()
	switch k := w.rng.IntN(len(pipes) + len(dials) + 1); {
	case len(pipes)+len(dials) == 0:
		return false
	case k < len(pipes) || len(dials) == 0:
		p := pipes[k%len(pipes)]
		n := min(len(p.under), simPiece)
		if !whole && n > 0 && w.rng.IntN(3) == 0 {
			n = 1 + w.rng.IntN(n)
		}
		w.event("deliver %d of %d on %d", n, len(p.under), p.id)
		w.net.deliver(p, n)
	default:
		d := dials[(k-len(pipes))%len(dials)]
		w.event("dial of %s: answered %v", w.nodes[d.life.node].name, d.server != nil)
		w.net.advance(d)
	}
	return true
}

// calm lets things happen without faults until ok, at most for so long.
func (w *simPair) calm(limit time.Duration, ok func() bool) bool {
	for end := time.Now().Add(limit); ; {
		w.settle()
		switch {
		case w.failed != nil || w.voided:
			return false
		case ok():
			return true
		case time.Now().After(end):
			return false
		}
		w.settle() // ok may have begun something
		w.stats.steps++
		if !w.step(true) {
			w.sleep(w.timeout / 20)
		}
	}
}

// tellTo prints all that happens, and the nodes' logs between it.
func (w *simPair) tellTo(out io.Writer) {
	w.print = func(s string) { fmt.Fprintln(out, s) }
	enc := zap.NewDevelopmentEncoderConfig()
	enc.TimeKey, enc.CallerKey, enc.StacktraceKey = "", "", ""
	w.logger = zap.New(zapcore.NewCore(zapcore.NewConsoleEncoder(enc), zapcore.AddSync(out), zap.DebugLevel))
}

// primary is the node that serves, nil for none.
func (w *simPair) primary() *simNode {
	for _, n := range w.nodes {
		if n.up() && n.v != nil && n.v.pair.Serving() {
			return n
		}
	}
	return nil
}

// end kills both nodes, whatever they do.
func (w *simPair) end() {
	for _, n := range w.nodes {
		n.outage = false
		if n.up() {
			w.net.bury(n.life, true)
		}
	}
	w.settle()
	for _, n := range w.nodes {
		n.mem.Close()
		if n.image != nil {
			spareImages = append(spareImages, n.image.region)
		}
	}
}
