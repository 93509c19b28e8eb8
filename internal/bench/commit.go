package bench

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/vishvananda/netns"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// CommitResult is what [Commit] measured. Ratios are to the raw floor: the
// mirror's figure by the floor's.
type CommitResult struct {
	P50     float64 `json:"p50_us"`
	P99     float64 `json:"p99_us"`
	P999    float64 `json:"p999_us"`
	Max     float64 `json:"max_us"`
	Commits int64   `json:"commits"`       // recorded: the percentiles are of these
	Rate    float64 `json:"commits_per_s"` // of all, those that warm up included
	MB      float64 `json:"mb_per_s"`      // of payload, 10⁶ bytes
	CPU     float64 `json:"cpu_s_per_gib"`

	Allocs float64 `json:"allocs_per_commit"` // on the heaps of both nodes

	Resident          int64 `json:"rss_bytes"` // the larger of the two
	ResidentPrimary   int64 `json:"rss_primary_bytes"`
	ResidentSecondary int64 `json:"rss_secondary_bytes"`
	Own               int64 `json:"own_bytes"` // of the primary's: this measurement's histograms and buffers, at most

	FloorP50    float64 `json:"floor_p50_us"`
	FloorP99    float64 `json:"floor_p99_us"`
	FloorP999   float64 `json:"floor_p999_us"`
	FloorMax    float64 `json:"floor_max_us"`
	FloorRounds int64   `json:"floor_rounds"`
	FloorRate   float64 `json:"floor_rounds_per_s"`
	FloorMB     float64 `json:"floor_mb_per_s"`
	FloorCPU    float64 `json:"floor_cpu_s_per_gib"`

	RatioP50 float64 `json:"ratio_p50"`           // to one round trip: says what the mirror costs with one committer, both acknowledging
	RatioP99 float64 `json:"ratio_p99,omitempty"` // with one committer, of ends scheduled alike, where both tell
	RatioMB  float64 `json:"ratio_mb"`
	RatioCPU float64 `json:"ratio_cpu"`

	Size        int     `json:"size"`
	Committers  int     `json:"committers"`
	Ack         string  `json:"ack"`
	Transport   string  `json:"transport"`
	Connections int     `json:"connections"`
	Poll        string  `json:"poll"`
	Placement   string  `json:"placement"`
	RegionSize  int64   `json:"region_size"`
	JournalSize int64   `json:"journal_size"`
	Class       string  `json:"class"`     // of the memory
	Seconds     float64 `json:"seconds"`   // of commits
	Identical   bool    `json:"identical"` // both regions, at the end
	Host        *Host   `json:"host"`
}

// Commit measures commits of a pair in two processes, and in turns with them
// raw sockets between the same two. The regions are compared at the end.
func Commit(ctx context.Context, o CommitOptions) (_ *CommitResult, err error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	// The kernel lists mappings by their files' real names.
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return nil, err
	}
	if o.Dir, err = filepath.EvalSymlinks(o.Dir); err != nil {
		return nil, err
	}
	if err := o.room(); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(o.Dir, "nvmmirror-bench-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	p, err := startPair(ctx, o, dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.end()) }()
	return p.run(ctx)
}

var errGone = errors.New("the secondary's process ended before the measurement did")

// run measures and compares. Commits would wait without end for a secondary whose
// process was killed, so they end with it.
func (p *pair) run(ctx context.Context) (_ *CommitResult, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-p.child.gone:
			cancel(errGone)
		case <-ctx.Done():
		}
	}()
	defer func() {
		if err != nil && context.Cause(ctx) == errGone {
			err = errGone // the rest follows from it
		}
	}()
	r, err := p.measure(ctx)
	if err != nil {
		return nil, err
	}
	if err := p.compare(ctx); err != nil {
		return nil, err
	}
	r.Identical = true
	return r, nil
}

// pair is a mirrored pair, the primary here and the secondary in the child.
type pair struct {
	o       CommitOptions
	key     []byte
	region  [2]string
	primary *nvmmirror.Volume
	child   *child
	load    *load

	profiled func() error // ends the profile
	unplace  func() error
}

func startPair(ctx context.Context, o CommitOptions, dir string) (_ *pair, err error) {
	p := &pair{o: o, key: []byte(rand.Text())}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.end())
		}
	}()
	for i, name := range []string{"a", "b"} {
		p.region[i] = filepath.Join(dir, name)
		err := nvmmirror.Create(p.region[i], nvmmirror.CreateOptions{Size: o.RegionSize, JournalSize: o.JournalSize, Accept: pmem.Emulated})
		if err != nil {
			return nil, err
		}
		if o.Transport == TLS {
			if _, _, _, err := transport.GenerateTLSKey(p.region[i]); err != nil {
				return nil, err
			}
		}
	}
	if p.child, err = startChild(o.Program, netns.None()); err != nil {
		return nil, err
	}
	if p.unplace, err = p.child.place(o.placement()); err != nil {
		return nil, err
	}
	addr, err := freeAddresses()
	if err != nil {
		return nil, err
	}
	job := func(own int) nodeJob {
		j := nodeJob{
			Region: p.region[own], Listen: addr[own], Peer: addr[1-own], Transport: o.Transport, Key: p.key,
			Ack: o.Ack, Poll: o.Poll, Lanes: o.Connections, Profile: o.profile(own),
		}
		if o.Transport == TLS {
			j.TLSKey, j.TLSPeer = p.region[own]+".key", p.region[1-own]+".pub"
		}
		return j
	}
	second := job(1)
	if _, err := p.child.ask(request{Op: opNode, Node: &second}); err != nil {
		return nil, err
	}
	first := job(0)
	if p.primary, err = first.open(); err != nil {
		return nil, err
	}
	if p.profiled, err = first.profile(); err != nil {
		return nil, err
	}
	if err := await(ctx, "connected", func() (bool, error) { return p.primary.Status().Peer == "connected", nil }); err != nil {
		return nil, err
	}
	if err := p.primary.Promote(ctx, false); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err() // the rest follows from it
		}
		return nil, fmt.Errorf("promote: %w", err)
	}
	err = await(ctx, "in sync", func() (bool, error) { return p.primary.Status().Peer == "in-sync", nil })
	return p, err
}

// end ends both nodes, whatever state they are in.
func (p *pair) end() (err error) {
	if p.profiled != nil {
		err = p.profiled()
	}
	if p.primary != nil {
		err = errors.Join(err, p.primary.Close())
	}
	if p.unplace != nil {
		err = errors.Join(err, p.unplace())
	}
	if p.child != nil {
		err = errors.Join(err, p.child.end())
	}
	return err
}

func (p *pair) secondary(memory bool) (nodeState, error) {
	a, err := p.child.ask(request{Op: opNodeState, Memory: memory})
	if err == nil && a.State == nil {
		err = &OtherEndError{"no state"}
	}
	if err != nil {
		return nodeState{}, err
	}
	return *a.State, nil
}

// drain waits until both nodes have applied all that was committed.
func (p *pair) drain(ctx context.Context) error {
	return await(ctx, "at rest", func() (bool, error) {
		s, err := p.secondary(false)
		st := p.primary.Status()
		return s.Applied >= st.Committed && st.Applied >= st.Committed, err
	})
}

// quiesce waits until that is so, and both sleep.
func (p *pair) quiesce(ctx context.Context) error {
	if err := p.drain(ctx); err != nil {
		return err
	}
	t := time.NewTimer(max(p.o.Poll, 0) + time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
	return ctx.Err()
}

func (p *pair) measure(ctx context.Context) (*CommitResult, error) {
	host, err := ThisHost()
	if err != nil {
		return nil, err
	}
	floor, err := p.child.open(ctx, setup{Transport: p.o.Transport, Connections: p.o.Connections, Key: p.key})
	if err != nil {
		return nil, err
	}
	defer floor.close()
	p.load = newLoad(p.primary, p.o)
	m := &measured{o: p.o, ping: newHistogram()}
	plan := p.o.plan()
	// Neither end is cold when it begins.
	if err := p.load.run(ctx, plan.commits/10); err != nil {
		return nil, err
	}
	p.load.forget()
	for range plan.rounds {
		if err := p.commits(ctx, m, plan.commits); err != nil {
			return nil, err
		}
		if err := p.quiesce(ctx); err != nil {
			return nil, err
		}
		if err := m.floor(floor, plan); err != nil {
			return nil, fmt.Errorf("raw floor: %w", err)
		}
	}
	r := m.result(p.load)
	r.Class, r.Host = p.primary.Status().Class, host
	return r, nil
}

// measured sums the rounds up.
type measured struct {
	o      CommitOptions
	usage  usage // of both nodes while they committed
	rss    [2]int64
	ping   *hdrhistogram.Histogram
	pinged time.Duration

	streamed  int64
	streaming time.Duration
	streamCPU time.Duration
}

// commits is one slice of commits, with what both processes use for it.
func (p *pair) commits(ctx context.Context, m *measured, d time.Duration) error {
	there, err := p.secondary(false)
	if err != nil {
		return err
	}
	here, err := used()
	if err != nil {
		return err
	}
	if err := p.load.run(ctx, d); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	if p.o.Ack == nvmmirror.AckAsync { // what waits to be mirrored is not done yet
		end := time.Now()
		if err := p.drain(ctx); err != nil {
			return err
		}
		p.load.took += time.Since(end)
	}
	hereAfter, err := used()
	if err != nil {
		return err
	}
	thereAfter, err := p.secondary(true)
	if err != nil {
		return err
	}
	m.usage = m.usage.add(hereAfter.sub(here)).add(thereAfter.Usage.sub(there.Usage))
	rss, err := residentBeside(p.region[0])
	m.rss[0], m.rss[1] = max(m.rss[0], rss), max(m.rss[1], thereAfter.Resident)
	return err
}

func (m *measured) floor(s *session, plan plan) error {
	r, err := s.run(m.o.ping(), plan.ping)
	if err != nil {
		return err
	}
	m.ping.Merge(r.latency)
	m.pinged += r.took
	// A stream blocks, whatever the pair does: that is its fastest.
	r, err = s.run(work{Stream: true, Size: chunk, Verify: VerifyNone}, plan.stream)
	m.streamed += r.bytes
	m.streaming += r.took
	m.streamCPU += r.here.cpu() + r.there.cpu()
	return err
}

func (m *measured) result(l *load) *CommitResult {
	c, f := latencyOf(l.hist), latencyOf(m.ping)
	n, bytes := float64(l.commits()), float64(m.o.Size)
	poll := "auto"
	switch {
	case m.o.Poll == PollOff:
		poll = "off"
	case m.o.Poll > 0:
		poll = m.o.Poll.String()
	}
	const gib = 1 << 30
	r := &CommitResult{
		P50: c.P50, P99: c.P99, P999: c.P999, Max: c.Max, Commits: c.Count,
		Rate: n / l.took.Seconds(), MB: n * bytes / 1e6 / l.took.Seconds(),
		CPU:      m.usage.cpu().Seconds() / (n * bytes / gib),
		Allocs:   float64(m.usage.Allocs) / n,
		Resident: max(m.rss[0], m.rss[1]), ResidentPrimary: m.rss[0], ResidentSecondary: m.rss[1],
		Own: l.ownBytes(), FloorRounds: f.Count,
		FloorP50: f.P50, FloorP99: f.P99, FloorP999: f.P999, FloorMax: f.Max,
		FloorRate: float64(f.Count) / m.pinged.Seconds(),
		FloorMB:   float64(m.streamed) / 1e6 / m.streaming.Seconds(),
		FloorCPU:  m.streamCPU.Seconds() / (float64(m.streamed) / gib),
		Size:      m.o.Size, Committers: m.o.Committers, Ack: string(m.o.Ack), Transport: string(m.o.Transport),
		Connections: m.o.Connections, Poll: poll, Placement: string(m.o.placement()), RegionSize: m.o.RegionSize, JournalSize: m.o.JournalSize,
		Seconds: l.took.Seconds(),
	}
	r.RatioP50 = r.P50 / r.FloorP50
	// A tail is made by the scheduler: where that had its choice, mirror and
	// floor have had different ones.
	if m.o.placement() != Free && m.o.Committers == 1 && c.Tells(0.99) && f.Tells(0.99) {
		r.RatioP99 = r.P99 / r.FloorP99
	}
	r.RatioMB, r.RatioCPU = r.MB/r.FloorMB, r.CPU/r.FloorCPU
	return r
}

// freeAddresses are two that the kernel chose.
func freeAddresses() (addr [2]string, err error) {
	var l [2]net.Listener
	for i := range addr {
		if l[i], err = net.Listen("tcp4", "127.0.0.1:0"); err != nil {
			break
		}
		addr[i] = l[i].Addr().String()
	}
	for _, l := range l {
		if l != nil {
			err = errors.Join(err, l.Close())
		}
	}
	return addr, err
}
