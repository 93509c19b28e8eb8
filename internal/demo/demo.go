// Package demo shows a mirrored pair at work, on one machine, by the programs
// and the protocol of a real one: two daemons, TCP_MD5SIG between them, a
// primary that is killed under load, a survivor that takes over and holds all
// that was acknowledged.
//
// What it says it has measured, and what it says is equal it has compared:
// the writer keeps a record of each transaction, made before anything is
// killed, and only the record says what must be there.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"time"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/admin"
)

// Options say how the demonstration runs.
type Options struct {
	Program string    // path of nvmmirrord
	Out     io.Writer // a line per step, the verdict last
	Err     io.Writer // the daemons' logs where a step fails
	Seed    uint64    // of contents, and of when the primary is killed; 0 draws one
	Keep    bool      // leave the pair running
	// Sabotage spoils a byte of the survivor before the proof, which must
	// then fail: one of the Sabotage constants, or "".
	Sabotage string
}

// What Options.Sabotage takes.
const (
	SabotageMemory = "memory" // the byte changes behind the daemon's back
	SabotageWrite  = "write"  // it is overwritten by a transaction
)

// Error is a demonstration that failed.
type Error struct {
	Step string
	Err  error
}

func (e *Error) Error() string { return fmt.Sprintf("demo: %s: %v", e.Step, e.Err) }
func (e *Error) Unwrap() error { return e.Err }

// demo is one run. Its steps run one after the other.
type demo struct {
	o     Options
	out   *output
	place place
	dir   string
	keep  bool // what runs, and the directory
	start *starter
	a, b  *daemon // a is the one that is killed
	load  *load

	killed   time.Time
	failover time.Duration // from the kill to the survivor's first acknowledgement
	begin    nvmmirror.LSN // of the load
	acked    nvmmirror.LSN // the highest, when the primary died
	fork     nvmmirror.LSN
	tail     tail
	found    tally
}

// output remembers that nobody reads it any more.
type output struct {
	w   io.Writer
	err error
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.w.Write(p)
	if err != nil && o.err == nil {
		o.err = err
	}
	return n, err
}

// step is one line of the output. What it returns is that line.
type step struct {
	name string
	run  func(ctx context.Context) (string, error)
}

// errSkipped: the step could not run here, which is no failure.
type errSkipped struct{ why string }

func (e *errSkipped) Error() string { return e.why }

// Run runs the demonstration. The error of one that failed is an [*Error];
// the verdict has been printed then too. Nothing is left behind, unless
// Options.Keep asks for it.
func Run(ctx context.Context, o Options) error {
	for o.Seed == 0 {
		o.Seed = rand.Uint64() >> 32 // short enough to be typed
	}
	out := &output{w: o.Out}
	o.Out = out
	d := &demo{o: o, out: out, start: newStarter(!o.Keep), load: newLoad(o.Seed)}
	defer d.cleanup()
	fmt.Fprintf(o.Out, "nvmmirrord demo: a mirrored pair on this machine; seed %d\n", o.Seed)
	err := d.steps(ctx)
	d.keep = o.Keep && ctx.Err() == nil && out.err == nil && d.dir != ""
	if err != nil && ctx.Err() == nil && out.err == nil {
		d.showLogs()
	}
	if d.keep {
		d.sayKept()
	}
	if e := d.cleanup(); e != nil && err == nil {
		err = &Error{"clean up", e}
	}
	fmt.Fprintln(o.Out, d.verdict(err))
	return err
}

func (d *demo) steps(ctx context.Context) error {
	for _, s := range []step{
		{"kernel", d.probe},
		{"prepare", d.prepare},
		{"start", d.startPair},
		{"in sync", d.promoteFirst},
		{"title", d.showTitle},
		{"load", d.runLoad},
		{"kill -9", d.kill},
		{"failover", d.promoteSurvivor},
		{"proof", d.prove},
		{"alone", d.goOnAlone},
		{"journals", d.journals},
		{"return", d.comeBack},
		{"identical", d.identical},
		{"wire", d.wire},
		{"keep", d.restart},
	} {
		if s.name == "keep" && !d.o.Keep {
			continue
		}
		text, err := s.run(ctx)
		var skipped *errSkipped
		switch {
		case errors.As(err, &skipped):
			d.say("-", s.name, "skipped: "+skipped.why)
		case err != nil:
			if ctx.Err() != nil {
				err = errors.New("interrupted")
			}
			d.say("FAIL", s.name, err.Error())
			return &Error{s.name, err}
		default:
			d.say("✓", s.name, text)
		}
		if d.out.err != nil {
			return &Error{"output", d.out.err}
		}
	}
	return nil
}

func (d *demo) say(mark, name, text string) {
	fmt.Fprintf(d.o.Out, "%-4s %-9s %s\n", mark, name, text)
}

// verdict is the last line.
func (d *demo) verdict(err error) string {
	var failed *Error
	if errors.As(err, &failed) {
		return fmt.Sprintf("FAIL: %s: %v", failed.Step, failed.Err)
	}
	return fmt.Sprintf("PASS: %v; failover took %s", &d.found, seconds(d.failover))
}

// cleanup ends what runs and removes the directory, unless it is to be kept.
// It may be called again.
func (d *demo) cleanup() error {
	defer d.start.close()
	if d.keep {
		return nil
	}
	for _, n := range []*daemon{d.a, d.b} {
		if n != nil {
			n.end()
		}
	}
	if d.dir == "" {
		return nil
	}
	return os.RemoveAll(d.dir)
}

// showLogs shows the end of the daemons' logs: the directory with them goes.
func (d *demo) showLogs() {
	for _, n := range []*daemon{d.a, d.b} {
		if n == nil {
			continue
		}
		if text := n.lastLog(); text != "" {
			fmt.Fprintf(d.o.Err, "log of %s, its end:\n%s\n", n.name, text)
		}
	}
}

func (d *demo) sayKept() {
	w := d.o.Out
	fmt.Fprintf(w, "\nThe pair is left in %s. Look at it:\n", d.dir)
	var pids string
	for _, n := range []*daemon{d.a, d.b} {
		if n == nil {
			continue
		}
		state := "has ended"
		if n.running() {
			state = fmt.Sprintf("pid %d", n.cmd.Process.Pid)
			pids += fmt.Sprintf(" %d", n.cmd.Process.Pid)
		}
		fmt.Fprintf(w, "  %s status --socket %s\n", d.o.Program, n.socket)
		fmt.Fprintf(w, "  %s: %s, configuration %s, log %s\n", n.name, state, n.config, n.log)
	}
	fmt.Fprintln(w, "Stop and remove it:")
	if pids != "" {
		fmt.Fprintf(w, "  kill%s\n", pids)
	}
	fmt.Fprintf(w, "  rm -r %s\n\n", d.dir)
}

// seconds is a duration as the output shows it.
func seconds(d time.Duration) string {
	switch {
	case d < 100*time.Microsecond:
		return fmt.Sprintf("%d µs", d.Microseconds())
	case d < 100*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1e3)
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

// bytesOf is a size as the output shows it.
func bytesOf[N int | int64 | nvmmirror.LSN](n N) string {
	switch {
	case n < 10<<10:
		return fmt.Sprintf("%d bytes", n)
	case n < 1<<20:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}

// await polls a daemon's status until ok; what names what it waits for.
func await(ctx context.Context, n *daemon, what string, ok func(s admin.Status) bool) (s admin.Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, stateTime)
	defer cancel()
	err = poll(ctx, func() (bool, error) {
		if s, err = n.admin.Status(ctx); err != nil {
			return false, err
		}
		return ok(s), nil
	})
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("not %s in %v: role %s, peer %s (%s)", what, stateTime, s.Role, s.Peer, s.Reason)
	}
	if err != nil {
		return s, fmt.Errorf("%s: %w", n.name, err)
	}
	return s, nil
}

// poll calls f until it says that it is done.
func poll(ctx context.Context, f func() (done bool, err error)) error {
	t := time.NewTicker(2 * time.Millisecond)
	defer t.Stop()
	for {
		if done, err := f(); done || err != nil {
			return err
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
