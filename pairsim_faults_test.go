package nvmmirror

import (
	"time"

	"github.com/nvmmirror/nvmmirror/replicate"
)

// simPlan is what a schedule may do. Each schedule knows only some of the
// faults, so that every combination gets its turn.
type simPlan struct {
	opt   Options
	steps int
	lanes int // 0: as many as an option left out means
	skew  float64

	cuts, losses, stalls, crashes, points, closes, naps bool
	commands, modes, flips, large, rough, reads         bool
	images, blanks                                      bool
}

var simModes = []Options{{}, {OnPeerLoss: Alone}, {Ack: AckAsync}, {Ack: AckAsync, OnPeerLoss: Alone}}

func (w *simPair) draw() {
	often := func() bool { return w.rng.IntN(2) == 0 }
	seldom := func() bool { return w.rng.IntN(6) == 0 }
	p := &w.plan
	p.opt = simModes[w.rng.IntN(4)]
	if often() {
		p.opt.Ack = ""
	}
	p.steps = 100 + w.rng.IntN(400)
	p.cuts, p.losses, p.stalls, p.crashes, p.points = often(), often(), often(), often(), often()
	p.closes, p.naps, p.commands, p.reads = seldom(), seldom(), often(), often()
	p.modes, p.flips, p.rough = seldom(), seldom(), seldom()
	p.large = w.rng.IntN(16) == 0
	if p.large { // the ring wraps, and the other node misses more than it holds
		p.opt, p.crashes, p.flips = Options{OnPeerLoss: Alone}, true, false
		p.lanes = 1 + w.rng.IntN(3)
	}
	if often() {
		p.skew = 0.09 * w.rng.Float64()
	}
	w.timeout = time.Duration(60+w.rng.IntN(200))*time.Millisecond + time.Duration(w.rng.IntN(1e6))
	w.full = 1 << 20
	if seldom() {
		w.full = 2000 + w.rng.IntN(20000)
	}
	w.napOn = p.naps
	w.drawRegions()
}

// choice is one thing that could happen next.
type choice struct {
	weight int
	do     func()
}

// happen lets one thing happen, by the weights.
func (w *simPair) happen() {
	w.stats.steps++
	var all []choice
	add := func(on bool, weight int, do func()) {
		if on && weight > 0 {
			all = append(all, choice{weight, do})
		}
	}
	p := &w.plan
	add(true, 600, func() {
		if !w.step(false) {
			w.sleep(w.timeout / 40)
		}
	})
	add(true, 60, func() { w.sleep(time.Duration(w.rng.Int64N(int64(w.timeout / 20)))) })
	add(true, 20, func() { w.sleep(time.Duration(w.rng.Int64N(int64(w.timeout)))) })
	add(p.cuts || p.crashes || p.points, 8, func() { w.sleep(time.Duration(w.rng.Int64N(int64(2 * w.timeout)))) })
	add(p.closes, 1, func() { w.sleep(1500 * time.Millisecond) })
	for i, n := range w.nodes {
		w.network(add, i)
		add(p.flips && !n.closing, 5, func() { w.flip(n) })
		if !n.up() || n.v == nil {
			weight := 25
			if p.large {
				weight = 2
			}
			add(!n.closing, weight, func() { w.restart(n) })
			w.regions(add, n)
			other := w.nodes[1-i]
			add(p.large && !n.closing && other.serves() && other.alone() && other.tip.holds(w.promised), 4, func() {
				w.event("%s: a new region", n.name)
				n.create()
			})
			continue
		}
		w.afterHello(add, n)
		w.process(add, n)
		w.clients(add, n)
	}
	add(p.images && w.mayPutBackBoth(), 25, w.putBackBoth)
	total := 0
	for _, c := range all {
		total += c.weight
	}
	k := w.rng.IntN(total)
	for _, c := range all {
		if k -= c.weight; k < 0 {
			c.do()
			return
		}
	}
}

type adder = func(on bool, weight int, do func())

// network is what can happen to what leaves node i.
func (w *simPair) network(add adder, i int) {
	p, name := &w.plan, w.nodes[i].name
	add(p.cuts && !w.net.cut[i], 6, func() {
		w.event("cut what leaves %s", name)
		w.net.cut[i] = true
		if w.rng.IntN(2) == 0 {
			w.net.cut[1-i] = true
		}
	})
	add(w.net.cut[i], 20, func() {
		w.event("heal what leaves %s", name)
		w.net.cut[i] = false
	})
	var pipes []*simPipe
	stalled := 0
	for _, q := range w.net.pipes {
		if q.from == i && !q.reset {
			pipes = append(pipes, q)
			if q.stalled {
				stalled++
			}
		}
	}
	add(p.losses && len(pipes) > 0, 6, func() {
		q := pipes[w.rng.IntN(len(pipes))]
		w.event("lose connection %d", q.id)
		w.net.mu.Lock()
		w.net.lose(q)
		w.net.mu.Unlock()
	})
	add(p.stalls && len(pipes) > stalled, 8, func() {
		q := pipes[w.rng.IntN(len(pipes))]
		w.event("stall %d", q.id)
		q.stalled = true
	})
	add(stalled > 0, 25, func() {
		w.event("nothing that leaves %s is stalled", name)
		for _, q := range pipes {
			q.stalled = false
		}
	})
}

// process is what can happen to a running node.
func (w *simPair) process(add adder, n *simNode) {
	p := &w.plan
	die := func(outage bool) {
		n.outage = outage
		w.net.mu.Lock()
		n.life.dead = true
		w.net.mu.Unlock()
	}
	add(p.crashes, 3, func() { w.event("%s: power failure", n.name); die(true) })
	add(p.crashes, 3, func() { w.event("%s: kill", n.name); die(false) })
	add(p.crashes, 1, func() {
		w.event("both die")
		die(w.rng.IntN(2) == 0)
		if o := w.nodes[1-n.i]; o.up() {
			o.outage = n.outage
			w.net.mu.Lock()
			o.life.dead = true
			w.net.mu.Unlock()
		}
	})
	add(p.points && n.media.at <= n.media.ops, 8, func() {
		n.outage = w.rng.IntN(2) == 0
		n.media.at = n.media.ops + 1 + w.rng.IntN(1+w.rng.IntN(120))
		w.event("%s: dies %d operations from now, outage %v", n.name, n.media.at-n.media.ops, n.outage)
	})
	add(p.closes && !n.closing && !n.command, 4, n.stop)
	add(w.rng.IntN(4) == 0, 8, func() {
		w.event("%s: checkpoint", n.name)
		n.client(func(v *Volume) { v.runCheckpoint() }, func(bool) {})
	})
	if n.command || n.closing {
		return
	}
	primary := n.v.pair.Role() == replicate.Primary
	other := w.nodes[1-n.i]
	lost := !other.up() || other.v == nil || other.v.pair.Role() != replicate.Primary
	weight := 1
	if lost {
		weight = 20
	}
	add(!primary && !n.unheard() && (p.commands || lost), weight, n.promote)
	weight = 3
	if other.stale && other.heard { // it is back: the role may move again
		weight = 60
	}
	add(primary && p.commands, weight, n.demote)
	add(primary && p.commands && !n.unheard(), 4, n.continueAlone)
	settled := p.commands && !n.stale && !other.stale
	add(primary && settled && n.mayForce(other), 40, n.continueByForce)
	add(!primary && settled && n.mayTakeOver(other), 40, n.promoteByForce)
	add(primary && p.commands && !other.stale && !other.command && other.up() && other.v != nil, 3, func() {
		n.demote()
		other.promote()
	})
}

// mayForce reports whether a primary may go on without a peer that holds the
// title: that is down, was no primary, and holds nothing that is not here.
func (n *simNode) mayForce(other *simNode) bool {
	mine, ok := n.state()
	theirs, okToo := other.state()
	return ok && okToo && !other.up() && theirs.Role == replicate.Secondary && theirs.Title && !mine.Title &&
		!n.hurt && len(n.flipped) == 0 && n.tip.holds(n.w.promised) && n.tip.holds(other.tip)
}

// mayTakeOver reports whether a secondary may be promoted without the title: its
// peer is down, and has no log that is not here.
func (n *simNode) mayTakeOver(other *simNode) bool {
	mine, ok := n.state()
	theirs, okToo := other.state()
	return ok && okToo && !other.up() && !mine.Title && mine.Resync == nil && !mine.Blank() && !theirs.Blank() &&
		!n.hurt && !other.hurt && len(n.flipped)+len(other.flipped) == 0 &&
		n.tip.holds(n.w.promised) && n.tip.holds(other.tip)
}

// clients is what clients can do.
func (w *simPair) clients(add adder, n *simNode) {
	primary := n.v.pair.Role() == replicate.Primary
	weight := 4
	if primary {
		weight = 90
		if w.plan.large && n.alone() {
			weight = 400
		}
	}
	add(n.busy < 5, weight, func() {
		patience := time.Duration(0)
		if w.rng.IntN(5) == 0 {
			patience = time.Duration(1 + w.rng.Int64N(int64(w.timeout)))
		}
		n.commit(w.plan.large && w.rng.IntN(4) > 0, patience)
	})
	add(n.busy < 5, 3+weight/5, n.read)
}

// restart starts a node that is down, perhaps with another configuration.
func (w *simPair) restart(n *simNode) {
	if w.plan.modes && w.rng.IntN(2) == 0 {
		n.opt = simModes[w.rng.IntN(4)]
		w.stats.modes++
	}
	w.event("%s: start, ack %q, on peer loss %q", n.name, n.opt.Ack, n.opt.OnPeerLoss)
	n.open()
	if w.plan.points && n.up() && w.rng.IntN(4) == 0 {
		n.outage = w.rng.IntN(2) == 0
		n.media.at = n.media.ops + 1 + w.rng.IntN(30)
	}
}

// patience bounds how long the pair takes once nothing fails any more.
func (w *simPair) bound() time.Duration { return 10*time.Second + 40*w.timeout }

// heal ends all faults. The pair must come to be in sync, and acknowledge.
func (w *simPair) heal() {
	w.event("heal")
	for i := range w.nodes {
		w.net.cut[i] = false
	}
	for _, p := range w.net.pipes {
		p.stalled = false
	}
	w.napOn = false
	for _, n := range w.nodes {
		if n.media != nil {
			n.media.at = 0
		}
	}
	start := time.Now()
	ok := w.calm(w.bound(), w.every(nil, w.inSync))
	w.stats.healed = time.Since(start)
	if w.voided {
		return
	}
	if !ok && !w.lawful() {
		w.broken("no progress within %v:\n%v\n%v", w.bound(), w.nodes[0], w.nodes[1])
	}
	if ok {
		w.prove()
	}
}

// tend is what an operator does who watches.
func (w *simPair) tend(n *simNode) {
	switch {
	case n.closing || n.command:
	case !n.up():
		n.open()
	case n.v.failed.Load() != nil:
		w.event("%s: restarted, persistence failed: %v", n.name, errOf(n.v.failed.Load()))
		n.stop()
	case n.stale && n.v.pair.Role() == replicate.Primary && n.v.pair.Phase() == replicate.PhaseRefused && !n.v.pair.Serving():
		n.demote()
	case n.v.pair.Role() != replicate.Primary:
		other := w.nodes[1-n.i]
		st, _ := n.state()
		switch {
		case !other.up() || other.v == nil || other.v.pair.Role() == replicate.Primary:
		case st.Title && !n.unheard() || st.Blank() && !n.renewed:
			n.promote()
		case n.inherits():
			n.promoteByForce()
		}
	}
}

func (w *simPair) inSync() bool {
	p := w.primary()
	if p == nil {
		return false
	}
	other := w.nodes[1-p.i]
	return other.up() && other.v != nil && p.v.pair.Phase() == "in-sync" && other.v.pair.Phase() == "in-sync" && !p.closing && !other.closing
}

// prove commits and reads on a healed pair, and compares the nodes.
func (w *simPair) prove() {
	acked, reads := w.stats.acked, w.stats.reads
	ok := w.calm(w.bound(), w.every(func() {
		if p := w.primary(); p != nil && w.inSync() && w.nodes[0].busy+w.nodes[1].busy == 0 {
			p.commit(false, 0)
			p.read()
		}
	}, func() bool {
		return w.stats.acked > acked && w.stats.reads > reads && w.nodes[0].busy+w.nodes[1].busy == 0
	}))
	if w.voided || !ok && w.lawful() {
		return
	}
	if !ok {
		w.broken("no commit is acknowledged:\n%v\n%v", w.nodes[0], w.nodes[1])
		return
	}
	ok = w.calm(w.bound(), w.every(nil, func() bool {
		return w.inSync() && w.nodes[0].tip == w.nodes[1].tip && w.nodes[0].v.Applied() == w.nodes[1].v.Applied()
	}))
	if !ok {
		w.broken("the nodes do not become equal:\n%v\n%v", w.nodes[0], w.nodes[1])
		return
	}
	a, _ := w.nodes[0].state()
	if b, _ := w.nodes[1].state(); a.Title == b.Title {
		w.broken("the pair is in sync, and both nodes say of the title: %v", a.Title)
		return
	}
	if w.rng.IntN(3) == 0 || len(w.nodes[0].flipped)+len(w.nodes[1].flipped) > 0 {
		w.switchOver()
	}
}

// every is ok, with operators who look after the nodes, and f, once in a
// timeout.
func (w *simPair) every(f func(), ok func() bool) func() bool {
	var asked time.Time
	return func() bool {
		if time.Since(asked) > w.timeout {
			asked = time.Now()
			for _, n := range w.nodes {
				w.tend(n)
			}
			if f != nil {
				f()
			}
		}
		return ok()
	}
}

// switchOver moves the role to the other node, which must then read and commit.
func (w *simPair) switchOver() {
	w.calm(w.bound(), func() bool { return !w.nodes[0].command && !w.nodes[1].command })
	p := w.primary()
	if p == nil {
		w.broken("no primary:\n%v\n%v", w.nodes[0], w.nodes[1])
		return
	}
	other := w.nodes[1-p.i]
	// A connection that is still on its way from before may come between.
	again := func(n *simNode, role replicate.Role, command func()) bool {
		if !n.command && n.v.pair.Role() != role {
			command()
		}
		return !n.command && n.v.pair.Role() == role
	}
	ok := w.calm(w.bound(), func() bool { return again(p, replicate.Secondary, p.demote) })
	ok = ok && w.calm(w.bound(), func() bool {
		return again(other, replicate.Primary, other.promote) && w.primary() == other && w.inSync()
	})
	acked, reads := w.stats.acked, w.stats.reads
	if ok {
		other.read()
		other.commit(false, 0)
		ok = w.calm(w.bound(), func() bool { return w.stats.acked > acked && w.stats.reads > reads && other.busy == 0 })
	}
	if !ok && !w.lawful() {
		w.broken("no switch-over:\n%v\n%v", w.nodes[0], w.nodes[1])
	}
}

// run is the whole schedule.
func (w *simPair) run() {
	w.event("plan %+v, timeout %v, %d bytes under way", w.plan, w.timeout, w.full)
	first := w.rng.IntN(2)
	w.nodes[first].open()
	w.nodes[1-first].open()
	if !w.plan.rough {
		w.nodes[0].promote()
		if w.rng.IntN(2) == 0 {
			w.nodes[1].promote()
		}
		if !w.calm(w.bound(), w.inSync) {
			w.broken("the pair does not start:\n%v\n%v", w.nodes[0], w.nodes[1])
			return
		}
	}
	for range w.plan.steps {
		w.happen()
		w.settle()
		if w.failed != nil || w.voided {
			return
		}
	}
	w.heal()
}
