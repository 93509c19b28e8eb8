package demo

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/admin"
	"github.com/nvmmirror/nvmmirror/internal/faultwire"
	"github.com/nvmmirror/nvmmirror/replicate"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

const (
	smallWriters = 8
	largeWriters = 8
	// The primary is killed after so many small transactions and, on top of
	// them, a few large ones. On a slow machine, after loadTime.
	leastSmall, mostSmall = 7000, 12000
	leastLarge, mostLarge = 4, 12
	loadTime              = 3 * time.Second
	mostStops             = 15                    // until it is ahead of the survivor
	stopEvery             = 20 * time.Millisecond // or at each large transaction
	// Further loads, and how long they take at most.
	aloneCommits = 1000
	backCommits  = 500
	shortLoad    = 300 * time.Millisecond
	wireTime     = 8 * time.Second
)

func (d *demo) probe(context.Context) (string, error) {
	if err := transport.Probe(); err != nil {
		return "", fmt.Errorf("no pair without TCP_MD5SIG: %w", err)
	}
	return "TCP_MD5SIG is there", nil
}

// prepare makes what an administrator would make, with the same commands.
func (d *demo) prepare(ctx context.Context) (text string, err error) {
	if d.place, err = choosePlace(); err != nil {
		return "", err
	}
	if d.dir, err = d.place.make(); err != nil {
		return "", err
	}
	d.a, d.b = newDaemon(d.o.Program, d.dir, "a"), newDaemon(d.o.Program, d.dir, "b")
	if err := d.command(ctx, "key", "generate", d.key()); err != nil {
		return "", err
	}
	for _, n := range []*daemon{d.a, d.b} {
		if err := d.command(ctx, "create", n.region, "--size", fmt.Sprint(volumeSize), "--journal-size", fmt.Sprint(journalSize), d.place.accept()); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("a key, two blank regions of %s with journals of %s, in %s (%s)", bytesOf(volumeSize), bytesOf(journalSize), d.dir, d.place.memory()), nil
}

func (d *demo) key() string { return filepath.Join(d.dir, "pair.key") }

// startPair starts both daemons. A port may be taken between its choice and
// its use; then there are others.
func (d *demo) startPair(ctx context.Context) (string, error) {
	begin := time.Now()
	var err error
	for range 5 {
		if err = d.tryStart(ctx); err == nil || !strings.Contains(err.Error(), "address already in use") {
			break
		}
		d.a.end()
		d.b.end()
	}
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("a is pid %d, 127.0.0.1:%d; b is pid %d, 127.0.0.1:%d; up in %s",
		d.a.cmd.Process.Pid, d.a.port, d.b.cmd.Process.Pid, d.b.port, seconds(time.Since(begin))), nil
}

func (d *demo) tryStart(ctx context.Context) error {
	ports, err := freePorts()
	if err != nil {
		return err
	}
	d.a.port, d.b.port = ports[0], ports[1]
	if err := errors.Join(d.a.configure(d.b, d.key()), d.b.configure(d.a, d.key())); err != nil {
		return err
	}
	if err := d.a.run(ctx, d.start); err != nil {
		return err
	}
	return d.b.run(ctx, d.start)
}

func (d *demo) promoteFirst(ctx context.Context) (string, error) {
	begin := time.Now()
	if _, err := d.promote(ctx, d.a); err != nil {
		return "", err
	}
	if err := d.inSync(ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("a promoted; in sync without a copy after %s", seconds(time.Since(begin))), nil
}

// promote promotes, never by force.
func (d *demo) promote(ctx context.Context, n *daemon) (s admin.Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, stateTime)
	defer cancel()
	if s, err = n.admin.Promote(ctx, false); err == nil && s.Role != "primary" {
		err = fmt.Errorf("it is %s", s.Role)
	}
	if err != nil {
		return s, fmt.Errorf("promote %s: %w", n.name, err)
	}
	return s, nil
}

func (d *demo) inSync(ctx context.Context) error {
	for _, n := range []*daemon{d.a, d.b} {
		if _, err := n.admin.Wait(ctx, "in-sync", stateTime); err != nil {
			return fmt.Errorf("%s: %w", n.name, err)
		}
	}
	return nil
}

// showTitle shows who may go on without the other, before anything fails.
func (d *demo) showTitle(ctx context.Context) (string, error) {
	b, err := await(ctx, d.b, "with the title", func(s admin.Status) bool { return s.Title })
	if err != nil {
		return "", err
	}
	a, err := d.a.admin.Status(ctx)
	if err != nil {
		return "", err
	}
	if a.Title || a.Role != "primary" || b.Role != "secondary" || a.Ack != nvmmirror.AckBoth {
		return "", fmt.Errorf("a: %s, title %v, ack %s; b: %s, title %v", a.Role, a.Title, a.Ack, b.Role, b.Title)
	}
	d.begin = a.Committed
	return "secondary b holds it: b may go on without a, primary a not without b", nil
}

// runLoad writes to a from many connections, and kills it in the middle.
func (d *demo) runLoad(ctx context.Context) (string, error) {
	rng := rand.New(rand.NewPCG(d.o.Seed, 0))
	small := leastSmall + rng.Int64N(mostSmall-leastSmall)
	large := leastLarge + rng.Int64N(mostLarge-leastLarge)
	l := d.load
	begin := time.Now()
	c := l.newCrew(d.a, smallWriters, &l.small)
	err := c.until(ctx, loadTime, func() bool { return l.small.acked.Load() >= small })
	if err == nil {
		c.add(d.a, largeWriters, &l.large)
		err = c.until(ctx, loadTime, func() bool { return l.large.acked.Load() >= large })
	}
	if err == nil {
		err = d.killAhead(ctx, c)
	}
	if err != nil {
		d.a.end() // it may stand still, with writers that wait for it
		c.end()
		return "", err
	}
	if err := c.end(); err != nil {
		return "", err
	}
	took, n := d.killed.Sub(begin), l.small.acked.Load()
	if len(c.latencies) == 0 {
		return "", fmt.Errorf("nothing was acknowledged in %s", seconds(took))
	}
	slices.Sort(c.latencies)
	at := func(percent int) string { return seconds(c.latencies[(len(c.latencies)-1)*percent/100]) }
	return fmt.Sprintf("%d commits on %d connections: %.0f/s, p50 %s, p99 %s; at the end %d of %s on %d more",
		n, smallWriters, float64(n)/took.Seconds(), at(50), at(99), l.large.acked.Load(), bytesOf(largeSlot), largeWriters), nil
}

// killAhead kills a. To show what becomes of commits that never left it, it
// stops a at moments of chance until one comes at which a's journal is ahead
// of what has reached b, and kills it there.
func (d *demo) killAhead(ctx context.Context, c *crew) error {
	a, err := openRegion(d.a.region)
	if err != nil {
		return err
	}
	defer a.Close()
	for try := 1; ; try++ {
		d.killed = time.Now() // from here on it serves nobody
		if err := d.a.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			return err
		}
		end, err := d.reached(ctx)
		if err != nil {
			return err
		}
		isAhead, err := a.holds(end)
		if err != nil {
			return err
		}
		if isAhead || try == mostStops {
			c.doomed.Store(true)
			return d.a.kill()
		}
		if err := d.a.cmd.Process.Signal(syscall.SIGCONT); err != nil {
			return err
		}
		large := &d.load.large.acked
		before := large.Load()
		if err := c.until(ctx, stopEvery, func() bool { return large.Load() > before }); err != nil {
			return err
		}
	}
}

// reached is the LSN up to which b has the log, once it has taken in what was
// on its way.
func (d *demo) reached(ctx context.Context) (end nvmmirror.LSN, err error) {
	ctx, cancel := context.WithTimeout(ctx, stateTime)
	defer cancel()
	same := 0
	err = poll(ctx, func() (bool, error) {
		s, err := d.b.admin.Status(ctx)
		if same++; s.Committed != end {
			end, same = s.Committed, 0
		}
		return same == 3, err
	})
	return end, err
}

// until waits until done, or for so long at most.
func (c *crew) until(ctx context.Context, limit time.Duration, done func() bool) error {
	timed, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := poll(timed, func() (bool, error) { return done(), c.failed() })
	if ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	return err
}

func (d *demo) kill(context.Context) (string, error) {
	<-d.a.done
	unknowns := 0
	for id := range d.load.record {
		e := &d.load.record[id]
		if e.outcome == unknown {
			unknowns++
		}
		d.acked = max(d.acked, e.lsn)
	}
	return fmt.Sprintf("a is dead: %d acknowledged, up to LSN %v; %d of unknown outcome, some in its journal only", d.load.acknowledged(), d.acked, unknowns), nil
}

// promoteSurvivor promotes b, and writes to it.
func (d *demo) promoteSurvivor(ctx context.Context) (string, error) {
	if _, err := d.promote(ctx, d.b); err != nil {
		return "", err
	}
	l := d.load
	id, ok := l.small.take()
	if !ok {
		return "", errors.New("no slot is left")
	}
	if err := l.commit(d.b.admin, id, make([]byte, largeSlot), &l.small); err != nil {
		return "", fmt.Errorf("b is promoted, but takes no transaction: %w", err)
	}
	d.failover = time.Since(d.killed)
	return fmt.Sprintf("b promoted by its title, unforced; first commit acknowledged %s after the kill", seconds(d.failover)), nil
}

// goOnAlone writes to b only, so that the two logs part.
func (d *demo) goOnAlone(ctx context.Context) (string, error) {
	n, err := d.more(ctx, aloneCommits)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d more acknowledged by b without a", n), nil
}

// more writes some more small transactions to b.
func (d *demo) more(ctx context.Context, n int64) (int64, error) {
	ids := &d.load.small
	before := ids.acked.Load()
	c := d.load.newCrew(d.b, smallWriters, ids)
	err := c.until(ctx, shortLoad, func() bool { return ids.acked.Load() >= before+n })
	err = errors.Join(err, c.end())
	return ids.acked.Load() - before, err
}

// comeBack starts a again.
func (d *demo) comeBack(ctx context.Context) (string, error) {
	begin := time.Now()
	if err := d.a.run(ctx, d.start); err != nil {
		return "", err
	}
	if err := d.inSync(ctx); err != nil {
		return "", err
	}
	took := time.Since(begin)
	b, err := d.b.admin.Status(ctx)
	if err != nil {
		return "", err
	}
	a, err := await(ctx, d.a, "a secondary with the title", func(s admin.Status) bool { return s.Role == "secondary" && s.Title })
	if err != nil {
		return "", err
	}
	if a.Epoch.Node != b.Epoch.Node || b.Role != "primary" || d.tail.bytes > 0 && b.Rule != string(replicate.RuleDropTail) {
		return "", fmt.Errorf("a follows epoch %v by rule %s, b is %s in %v", a.Epoch, b.Rule, b.Role, b.Epoch)
	}
	n, err := d.more(ctx, backCommits)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("a is secondary, %s; in sync %s after its start; %d more acknowledged by both",
		d.tail.dropped(b.Rule), seconds(took), n), nil
}

// restart leaves the pair running.
func (d *demo) restart(ctx context.Context) (string, error) {
	for _, n := range []*daemon{d.b, d.a} {
		if err := n.run(ctx, d.start); err != nil {
			return "", err
		}
	}
	if err := d.inSync(ctx); err != nil {
		return "", err
	}
	return "both started again, b as primary; in sync", nil
}

// wire shows what the signature is for, where this process may make a wire.
func (d *demo) wire(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, wireTime)
	defer cancel()
	res, err := faultwire.CompareTransports(ctx, faultwire.CompareConfig{Seed: d.o.Seed})
	if errors.Is(err, faultwire.ErrNotPermitted) {
		return "", &errSkipped{err.Error()}
	}
	if err == nil {
		err = res.Verdict()
	}
	if err != nil {
		return "", err
	}
	p, s := res.Plain, res.Signed
	return fmt.Sprintf("%s, 16-bit words swapped in 1 packet of %d: plain TCP %d of %d blocks wrong, TCP_MD5SIG %d, TCPMD5Failure rose by %d",
		bytesOf(s.Bytes), res.Every, p.Wrong, p.Blocks, s.Wrong, s.FailuresB), nil
}
