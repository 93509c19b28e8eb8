package report

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/nvmmirror/nvmmirror/internal/bench"
)

// Options say what [Run] measures. Each list that is empty leaves its part
// out.
type Options struct {
	Duration    time.Duration     // of each measurement
	Transports  []bench.Transport // of the wire
	Sizes       []int             // of round trips
	Connections []int             // of streams
	Loopback    bool
	MTUs        []int // between namespaces, as root

	Pairs       []bench.Transport // of mirrored pairs
	CommitSizes []int
	Committers  []int
	// More than one connection is for what uses them: the most committers of
	// the largest commits.
	PairConnections []int
	RegionSize      int64
	JournalSize     int64
	Regions         string // where the regions go

	Program []string // runs [bench.ServeChild]
	Version string
	// Progress, if not nil, is told before each measurement how much of the
	// time is over.
	Progress func(done, total time.Duration, what string)
}

// Report is all that was measured.
type Report struct {
	Version  string      `json:"version"`
	Started  time.Time   `json:"started"`
	Took     float64     `json:"took_s"`
	Duration float64     `json:"duration_of_each_s"`
	Host     *bench.Host `json:"host"`
	// Busy is how many processors' worth of other work ran in the second
	// before. LoadAfter is at the end what Host's load is at the start.
	Busy      float64 `json:"busy_before"`
	LoadAfter string  `json:"load_after"`

	Verified bench.Verify          `json:"verified_of_streams"`
	Paths    []bench.WirePath      `json:"wire"`
	Commits  []*bench.CommitResult `json:"commits"`
	Left     []Left                `json:"left_out,omitempty"`
}

// Left is something that was left out, or that failed.
type Left struct {
	Part   string `json:"part"` // loopback, namespaces or commit
	What   string `json:"what"`
	Why    string `json:"why"`
	Failed bool   `json:"failed"`
}

// Default is the whole evaluation on this machine. What it cannot do is in
// left.
func Default(d time.Duration) (o Options, left []Left) {
	o = Options{
		Duration: d, Transports: bench.Transports(), Sizes: bench.DefaultSizes, Connections: bench.DefaultConnections, Loopback: true,
		CommitSizes: []int{64, 4 << 10, 64 << 10, 1 << 20}, Committers: []int{1, 64}, PairConnections: []int{2, 4}, RegionSize: 256 << 20, JournalSize: 64 << 20,
	}
	if os.Getuid() == 0 {
		o.MTUs = []int{1500, 9000}
	} else {
		left = append(left, Left{Part: "namespaces", What: "network namespaces at MTU 1500 and 9000", Why: "they need root"})
	}
	for _, t := range bench.PairTransports() {
		if missing := t.Missing(); missing != nil {
			left = append(left, Left{Part: "commit", What: "commits over " + string(t), Why: missing.Reason})
			continue
		}
		o.Pairs = append(o.Pairs, t)
	}
	return o, left
}

// Run measures. What fails is in the report, and the rest goes on; an error is
// one that ends all.
func Run(ctx context.Context, o Options, left []Left) (*Report, error) {
	r := &Report{Version: o.Version, Duration: o.Duration.Seconds(), Verified: bench.VerifySample, Left: left}
	var err error
	if r.Busy, err = busy(ctx, time.Second); err != nil {
		return nil, err
	}
	if r.Host, err = bench.ThisHost(); err != nil {
		return nil, err
	}
	r.Started = time.Now()
	p := &progress{tell: o.Progress, total: o.total()}
	if o.Loopback {
		if err := r.wire(ctx, o, p, nil); err != nil {
			return nil, err
		}
	}
	for _, mtu := range o.MTUs {
		if err := r.wire(ctx, o, p, []int{mtu}); err != nil {
			return nil, err
		}
	}
	for _, c := range o.commits() {
		what := commitText(c)
		p.at(what)
		m, err := bench.Commit(ctx, c)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			r.Left = append(r.Left, Left{"commit", what, err.Error(), true})
		} else {
			r.Commits = append(r.Commits, m)
		}
		p.done += commitTime(c.Duration)
	}
	p.at("done")
	r.Took = time.Since(r.Started).Seconds()
	r.LoadAfter = loadAverage()
	return r, nil
}

// Failed is how many measurements failed.
func (r *Report) Failed() (n int) {
	for _, l := range r.Left {
		if l.Failed {
			n++
		}
	}
	return n
}

func (r *Report) wire(ctx context.Context, o Options, p *progress, mtus []int) error {
	w := o.wire(mtus)
	before := p.done
	w.Progress = func(done, total int, what string) {
		p.done = before + o.wireTime()*time.Duration(done)/time.Duration(total)
		if len(mtus) > 0 {
			what = fmt.Sprintf("MTU %d: %s", mtus[0], what)
		}
		p.at(what)
	}
	m, err := bench.Wire(ctx, w)
	p.done = before + o.wireTime()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if option := (*bench.OptionError)(nil); errors.As(err, &option) {
		return err
	}
	if err != nil {
		part, what := "loopback", "the wire over loopback"
		if len(mtus) > 0 {
			part, what = "namespaces", fmt.Sprintf("the wire at MTU %d", mtus[0])
		}
		r.Left = append(r.Left, Left{part, what, err.Error(), true})
		return nil
	}
	r.Paths = append(r.Paths, m.Paths...)
	return nil
}

func (o *Options) wire(mtus []int) bench.WireOptions {
	return bench.WireOptions{
		Transports: o.Transports, Sizes: o.Sizes, Connections: o.Connections, Duration: o.Duration,
		Verify: bench.VerifySample, Placement: bench.Auto, Program: o.Program, MTUs: mtus,
	}
}

// commits are the measurements of pairs. One committer that sleeps is placed in
// both ways, since that decides its figures.
func (o *Options) commits() (all []bench.CommitOptions) {
	for _, t := range o.Pairs {
		for _, size := range o.CommitSizes {
			for _, n := range o.Committers {
				c := bench.CommitOptions{
					Size: size, Committers: n, Ack: "both", Transport: t, Connections: 1, Placement: bench.Auto,
					RegionSize: o.RegionSize, JournalSize: o.JournalSize, Duration: o.Duration, Dir: o.Regions, Program: o.Program,
				}
				all = append(all, c)
				c.Poll = bench.PollOff
				all = append(all, c)
				if n == 1 {
					c.Placement = bench.Together
					all = append(all, c)
				}
			}
		}
		if len(all) == 0 {
			continue
		}
		// What came last is the largest, by the most.
		for _, n := range o.PairConnections {
			c := all[len(all)-1]
			c.Connections, c.Poll, c.Placement = n, 0, bench.Auto
			all = append(all, c)
		}
	}
	return all
}

// Expected times, for the progress alone: starting and comparing a pair, and
// beside the commits their floor.
func commitTime(d time.Duration) time.Duration { return d*2 + 800*time.Millisecond }

func (o *Options) wireTime() time.Duration {
	n := len(o.Transports)
	for _, t := range o.Transports {
		if t.Missing() != nil {
			n--
		}
	}
	return time.Duration(n) * (time.Duration(2*len(o.Sizes)+len(o.Connections))*o.Duration + 200*time.Millisecond)
}

func (o *Options) total() time.Duration {
	n := len(o.MTUs)
	if o.Loopback {
		n++
	}
	return time.Duration(n)*o.wireTime() + time.Duration(len(o.commits()))*commitTime(o.Duration)
}

type progress struct {
	tell        func(done, total time.Duration, what string)
	done, total time.Duration
}

func (p *progress) at(what string) {
	if p.tell != nil {
		p.tell(min(p.done, p.total), p.total, what)
	}
}

// busy is how many processors are at work, on average over d, this process
// asleep.
func busy(ctx context.Context, d time.Duration) (float64, error) {
	before, err := processorTime()
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	after, err := processorTime()
	return max(0, (after-before)/time.Since(begin).Seconds()), err
}

// processorTime is the seconds that all processors have worked so far.
func processorTime() (float64, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(b), "\n")
	var sum float64
	// cpu user nice system idle iowait irq softirq steal
	for i, f := range strings.Fields(line) {
		if i == 0 || i == 4 || i == 5 || i > 8 {
			continue
		}
		n, err := strconv.ParseFloat(f, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		sum += n / 100
	}
	return sum, nil
}

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	f := strings.Fields(string(b))
	return strings.Join(f[:min(3, len(f))], " ")
}
