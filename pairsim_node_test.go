package nvmmirror

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/nvmmirror/nvmmirror/pmem/sim"
	"github.com/nvmmirror/nvmmirror/replicate"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// simNode is one node of a simulated pair: a machine with persistent memory,
// on which a process runs or not.
type simNode struct {
	w     *simPair
	name  string
	i     int
	mem   *sim.Memory
	opt   Options
	rate  float64       // of its clock
	skew  time.Duration // its clock's start
	draws *rand.Rand    // of its goroutines

	life  *simLife // nil: no process
	media *simMedia
	v     *Volume
	err   error // why the region could not be opened
	// outage is whether a crash takes the machine down, or the process only.
	outage bool

	busy    int  // clients and operators inside
	command bool // an operator's command is under way
	closing bool

	tip     *simSegment    // where its log ends
	owes    *simSegment    // it must hold the log up to here
	flipped map[int64]bool // blocks that hold a flipped bit
	once    map[int64]int  // how many did ever: a power failure may undo the repair
	trusted map[int64]bool // those of them that are unverified since a crash
	doubt   bool           // there were such when the pair was quiet last
	hurt    bool           // bits of its log flipped
	lost    bool           // and it has said so, and lacks log since
	image   *simImage      // an older copy of its region
	before  []*simSegment  // where its log ended in regions that are gone
	stale   bool           // the other one went on without it, and it has not caught up
	heard   bool           // its peer was, since then
	since   int            // the first connection on which it could hear that
	renewed bool           // a new region took a lost one's place, and has not joined

	// As seen last.
	phase replicate.Phase
	role  replicate.Role
	seen  string
}

func (n *simNode) up() bool { return n.life != nil && !n.life.dead }

// clock is the node's CLOCK_BOOTTIME.
func (n *simNode) clock() time.Duration {
	return n.skew + time.Duration(float64(time.Since(n.w.began))*n.rate)
}

// create puts a blank region in the node's memory.
func (n *simNode) create() {
	m := layout(pairSimSize, MinJournal)
	mem, err := sim.New(m.Data.end())
	if err != nil {
		panic(err)
	}
	if n.mem != nil {
		n.mem.Close()
	}
	if n.w.mutant != nil {
		mem.Mutate(n.w.mutant)
		mem.TellApart()
	}
	if err := format(mem, m); err != nil {
		panic(err)
	}
	n.mem, n.flipped, n.once, n.trusted = mem, map[int64]bool{}, map[int64]int{}, map[int64]bool{}
	n.tip, n.owes, n.hurt, n.lost = n.w.model.places[simPlace{}], nil, false, false
	n.stale, n.heard, n.renewed = false, false, false
}

// open starts the node's process.
func (n *simNode) open() {
	w := n.w
	w.quiet() // opening takes long: what can run would, meanwhile
	n.life = &simLife{net: w.net, node: n.i, nap: n.nap, full: w.full}
	n.media = &simMedia{Memory: n.mem, life: n.life, keep: n.keep}
	w.net.mu.Lock()
	w.net.life[n.i] = n.life
	w.net.mu.Unlock()
	o := n.opt
	o.clock = n.clock
	o.counters = func() (transport.Counters, error) { return transport.Counters{}, nil } // without a system call
	o.Peer = &Peer{
		Listen: w.net.addr[n.i].String(), Address: w.net.addr[1-n.i].String(),
		Timeout: w.timeout, BusyPoll: -1, Connections: w.plan.lanes, Transport: n.life,
	}
	o.Logger = w.logger.Named(n.name)
	o, err := o.withDefaults()
	if err != nil {
		panic(err)
	}
	n.err = nil
	v, err := openMemory(n.name, n.media, o)
	if err == nil {
		err = v.start()
	}
	if err != nil {
		n.err = err
		w.event("%s: cannot be opened: %v", n.name, err)
		n.down(false)
		return
	}
	n.v = v
}

// down notes the end of the process.
func (n *simNode) down(told bool) {
	n.w.net.bury(n.life, told)
	n.w.net.mu.Lock()
	n.w.net.life[n.i] = nil
	n.w.net.mu.Unlock()
	n.life, n.v, n.media = nil, nil, nil
}

// reap ends a process that has died, and cuts the power where the machine went
// down with it.
func (n *simNode) reap() {
	w := n.w
	v := n.v
	n.down(!n.outage)
	if v != nil {
		done := make(chan struct{})
		go func() {
			v.pair.Close()
			v.Close()
			close(done)
		}()
		<-done
	}
	for w.quiet(); n.busy > 0; w.quiet() {
		time.Sleep(time.Millisecond)
	}
	n.closing, n.command = false, false
	if n.outage {
		n.mem.Crash(w.rng)
		for b := range n.once {
			n.flipped[b] = true
		}
	} else {
		n.mem.Killed()
	}
	n.survey()
}

// survey finds out where the log of a node that is down ends.
func (n *simNode) survey() {
	c, err := readMetadata(n.mem)
	if err != nil {
		n.w.event("%s: metadata: %v", n.name, err)
		return
	}
	if c.meta.State.Resync != nil {
		return
	}
	scan, err := survey(n.mem.Bytes(), c.meta, nil)
	if err != nil {
		n.w.broken("%s: survey: %v", n.name, err)
		return
	}
	ring := n.ring(c.meta)
	// A node may have committed since it was looked at last, also behind a bit
	// that flipped.
	n.w.model.learn(ring, n.tip)
	at, err := n.w.model.walk(ring, n.tip, simPlace{c.meta.Checkpoint.LSN, c.meta.Checkpoint.Chain})
	if err != nil {
		n.w.broken("%s: checkpoint at LSN %d, chain %08x, was never in a log: %v", n.name, c.meta.Checkpoint.LSN, c.meta.Checkpoint.Chain, err)
		return
	}
	s, err := n.w.model.walk(ring, at, simPlace{scan.End, scan.Chain})
	if err != nil {
		n.w.broken("%s: recovered log: %v", n.name, err)
		return
	}
	n.tip = s
}

// client runs f beside the driver. done tells the driver what came of it,
// unless the process died before: then nobody got an answer.
func (n *simNode) client(f func(v *Volume), done func(dead bool)) {
	v, life := n.v, n.life
	n.busy++
	n.w.asked++
	id := n.w.asked
	go func() {
		f(v)
		n.w.results <- simResult{id, n, func() { done(life.dead) }}
	}()
}

// simResult is what came of something that a client or an operator asked for.
type simResult struct {
	id   int // in the order in which they were asked for
	n    *simNode
	tell func()
}

// commit begins a transaction.
func (n *simNode) commit(large bool, patience time.Duration) {
	w := n.w
	tx := w.model.tx(w.rng, large)
	w.event("%s: commit %d", n.name, tx.id)
	var lsn LSN
	var err error
	var dead bool
	n.client(func(v *Volume) {
		ctx, cancel := context.WithCancel(context.Background())
		if patience > 0 {
			ctx, cancel = context.WithTimeout(ctx, patience)
		}
		defer cancel()
		t := v.Begin()
		for k := range tx.off {
			if err = t.Write(tx.off[k], tx.data[k]); err != nil {
				t.Discard()
				return
			}
		}
		lsn, err = t.Commit(ctx)
		w.net.mu.Lock()
		dead = v.mem.(*simMedia).life.dead
		w.net.mu.Unlock()
	}, func(bool) {
		switch {
		case dead:
			w.event("%s: commit %d: nobody was told", n.name, tx.id)
		case err == nil:
			w.event("%s: commit %d: acknowledged at %d", n.name, tx.id, lsn)
			w.acknowledged(n, tx, lsn)
		case errors.Is(err, ErrOutcomeUnknown):
			w.event("%s: commit %d: unknown", n.name, tx.id)
		default:
			w.event("%s: commit %d: %v", n.name, tx.id, err)
			w.notCommitted(tx, err)
		}
	})
}

// read reads the whole volume.
func (n *simNode) read() {
	w := n.w
	p := make([]byte, pairSimSize)
	before := w.promised
	var err error
	var dead bool
	n.client(func(v *Volume) {
		_, err = v.ReadAt(p, 0)
		w.net.mu.Lock()
		dead = v.mem.(*simMedia).life.dead
		w.net.mu.Unlock()
	}, func(bool) {
		switch {
		case dead:
		case err == nil:
			w.wasRead(n, p, before)
		default:
			w.event("%s: read: %v", n.name, err)
		}
	})
}

// operator gives the node a command, with the patience of a person. after is done
// once it has ended.
func (n *simNode) operator(what string, f func(ctx context.Context, v *Volume) error, after ...func()) {
	w := n.w
	n.command = true
	w.event("%s: %s", n.name, what)
	var err error
	n.client(func(v *Volume) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*w.timeout)
		defer cancel()
		err = f(ctx, v)
	}, func(dead bool) {
		n.command = false
		if !dead {
			w.event("%s: %s: %v", n.name, what, err)
		}
		for _, g := range after {
			g()
		}
	})
}

func (n *simNode) promote() {
	n.operator("promote", func(ctx context.Context, v *Volume) error { return v.Promote(ctx, false) })
}

func (n *simNode) demote() {
	n.operator("demote", func(ctx context.Context, v *Volume) error { return v.Demote(ctx) })
}

func (n *simNode) continueAlone() {
	n.operator("continue alone", func(ctx context.Context, v *Volume) error { return v.ContinueAlone(ctx, false) })
}

// continueByForce is what an operator does who knows that the other node is
// down, and holds the title.
func (n *simNode) continueByForce() {
	n.force("continue alone by force", func(ctx context.Context, v *Volume) error { return v.ContinueAlone(ctx, true) })
}

// promoteByForce is what an operator does who knows that the other node is down,
// and that nothing was acknowledged there which is not here.
func (n *simNode) promoteByForce() {
	n.force("promote by force", func(ctx context.Context, v *Volume) error { return v.Promote(ctx, true) })
}

// force makes the node go on without the other one, whose title is void from now on,
// unless nothing comes of it.
func (n *simNode) force(what string, f func(ctx context.Context, v *Volume) error) {
	other := n.w.nodes[1-n.i]
	fresh := !other.stale
	other.leaveBehind()
	n.w.stats.forced++
	n.operator(what, f, func() {
		if fresh && !n.entitled() {
			other.stale = false
		}
	})
}

// stop closes the node cleanly.
func (n *simNode) stop() {
	w := n.w
	w.event("%s: close", n.name)
	n.closing = true
	life := n.life
	n.client(func(v *Volume) { v.Close() }, func(dead bool) {
		if dead || n.life != life {
			return
		}
		w.event("%s: closed", n.name)
		n.closing = false
		n.down(true)
		n.survey()
	})
}

// state is the durable state: what the process has, or the next will find.
func (n *simNode) state() (replicate.State, bool) {
	if n.up() && n.v != nil {
		return (*node)(n.v).State(), true
	}
	c, err := readMetadata(n.mem)
	if err != nil {
		return replicate.State{}, false
	}
	return c.meta.State, true
}

func (n *simNode) String() string {
	if !n.up() || n.v == nil {
		st, _ := n.state()
		return fmt.Sprintf("%s: down, %v, title %v, log %v, history %v", n.name, st.Role, st.Title, n.tip, st.History)
	}
	s := n.v.Status()
	return fmt.Sprintf("%s: %s, peer %s (%s), rule %s, title %v, serving %v, required %v, leased %v, committed %d, acked %d, applied %d, checkpoint %d, history %v, degraded %q, failed %v",
		n.name, s.Role, s.Peer, s.Reason, s.Rule, s.Title, s.Serving, n.v.pair.Required(), n.v.pair.Leased(), s.Committed, s.Acked, s.Applied, s.Ckpt, n.v.meta.State.History, s.Degraded, errOf(n.v.failed.Load()))
}

func simRand(seed, stream uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, stream)) }
