package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// options are how much is measured.
type options struct {
	root        string
	nvmmirrord  string // "": built here
	only        []string
	rounds      int
	slice       time.Duration
	guestRounds int
	guestSlice  time.Duration
	guestPoll   time.Duration
}

var all = []string{"pmem", "redis", "postgres", "etcd", "drbd"}

func main() {
	var o options
	var only string
	flag.StringVar(&o.root, "root", "../..", "the repository")
	flag.StringVar(&o.nvmmirrord, "nvmmirrord", "", "the mirror's command; built from the repository where it is not named")
	flag.StringVar(&only, "only", strings.Join(all, ","), "which peers")
	flag.IntVar(&o.rounds, "rounds", 7, "of each peer, in turns")
	flag.DurationVar(&o.slice, "slice", time.Second, "of a round")
	flag.IntVar(&o.guestRounds, "guest-rounds", 3, "the same, in the guest")
	flag.DurationVar(&o.guestSlice, "guest-slice", 2*time.Second, "the same, in the guest, in whole seconds")
	flag.DurationVar(&o.guestPoll, "guest-poll", time.Millisecond, "how long the pair polls there: an emulated round trip takes longer than one on a machine; 0 for its own choice")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := o.take(only)
	if err == nil {
		err = measure(ctx, o)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "peers:", err)
		os.Exit(1)
	}
}

func (o *options) take(only string) (err error) {
	if o.root, err = filepath.Abs(o.root); err != nil {
		return err
	}
	o.only = strings.Split(only, ",")
	for _, name := range o.only {
		if !slices.Contains(all, name) {
			return fmt.Errorf("-only %s: there are %s", name, strings.Join(all, ", "))
		}
	}
	if flag.NArg() > 0 || o.rounds < 1 || o.guestRounds < 1 || o.slice < 10*time.Millisecond || o.guestSlice < time.Second {
		return errors.New("rounds begin at 1, a slice at 10ms, in the guest at 1s; there are no arguments")
	}
	return nil
}

// results are what is printed in the end.
type results struct {
	rows     []row
	verified []string
	skipped  []string
}

// skip notes what is missing; another error stays one.
func (r *results) skip(name string, err error) error {
	var missing *missingError
	if errors.As(err, &missing) {
		fmt.Fprintf(os.Stderr, "%s: skipped: %v\n", name, missing)
		r.skipped = append(r.skipped, fmt.Sprintf("%s: %v", name, missing))
		return nil
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", name, err)
	}
	return err
}

func measure(ctx context.Context, o options) (err error) {
	began := time.Now()
	dir, err := os.MkdirTemp("/dev/shm", "nvmmirror-peers-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return err
	}
	if fs.Type != unix.TMPFS_MAGIC {
		return errors.New("/dev/shm is not a tmpfs: nothing here could be compared")
	}
	// Another user's servers have directories of their own in it.
	if err := os.Chmod(dir, 0o711); err != nil {
		return err
	}
	// Not in /dev/shm: the guest has another one.
	bin, err := os.MkdirTemp("", "nvmmirror-peers-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(bin)) }()
	t, err := build(ctx, o, bin)
	if err != nil {
		return err
	}
	host := describe()
	r := &results{}
	if slices.Contains(o.only, "pmem") {
		fmt.Fprintln(os.Stderr, "libpmem, libpmemlog …")
		rows, err := measurePmem(ctx, o.root, o.rounds)
		if err := r.skip("libpmem", err); err != nil {
			return err
		}
		r.rows = append(r.rows, rows...)
	}
	if err := measureServers(ctx, o, t, dir, r); err != nil {
		return err
	}
	var failed error // what was measured before is printed all the same
	if slices.Contains(o.only, "drbd") {
		fmt.Fprintln(os.Stderr, "DRBD, in a guest …")
		rows, how, err := measureDRBD(ctx, o, t)
		if failed = r.skip("DRBD", err); err == nil {
			r.rows = append(r.rows, rows...)
			r.verified = append(r.verified, "DRBD: "+how)
		}
	}
	return errors.Join(r.print(host, o, time.Since(began)), failed)
}

// measureServers measures a commit of the pair and a write of each server in
// turns: what disturbs the machine meets all of them.
func measureServers(ctx context.Context, o options, t *tools, dir string, r *results) error {
	starts := map[string]func(context.Context, string) (peer, error){"redis": startRedis, "postgres": startPostgres, "etcd": startEtcd}
	peers := []peer{&own{nvmmirrord: t.nvmmirrord, dir: dir}}
	for _, name := range all {
		if starts[name] == nil || !slices.Contains(o.only, name) {
			continue
		}
		fmt.Fprintln(os.Stderr, "start", name, "…")
		p, err := starts[name](ctx, dir)
		if err := r.skip(name, err); err != nil {
			return err
		}
		if p != nil {
			defer p.close()
			peers = append(peers, p)
			if r, ok := p.(*redis); ok {
				peers = append(peers, redisLocal{r})
			}
		}
	}
	if len(peers) == 1 {
		return nil
	}
	p50 := make([][]float64, len(peers))
	for n := range o.rounds {
		fmt.Fprintf(os.Stderr, "round %d of %d, p50:", n+1, o.rounds)
		for i, p := range peers {
			v, err := p.round(ctx, o.slice)
			if err != nil {
				fmt.Fprintln(os.Stderr)
				return fmt.Errorf("%s: %w", p.name(), err)
			}
			fmt.Fprintf(os.Stderr, " %s %s µs", strings.Fields(p.name())[0], figure(v))
			p50[i] = append(p50[i], v)
		}
		fmt.Fprintln(os.Stderr)
	}
	for i, p := range peers {
		how, err := p.verify(ctx)
		if err != nil {
			return fmt.Errorf("%s is not what it should be: %w", p.name(), err)
		}
		name, work, _ := strings.Cut(p.name(), ", ")
		if line := name + ": " + how; !slices.Contains(r.verified, line) {
			r.verified = append(r.verified, line)
		}
		if i > 0 {
			r.rows = append(r.rows, row{peer: name, work: work + ", 64 B, p50", theirs: median(p50[i]), ours: median(p50[0]), unit: "µs", target: 0.25})
		}
	}
	return nil
}

func (r *results) print(host string, o options, took time.Duration) error {
	fmt.Printf("%s; medians of %d rounds (in the guest %d), in turns, %.0f s in all\n\n", host, o.rounds, o.guestRounds, took.Seconds())
	if err := printTable(os.Stdout, r.rows); err != nil {
		return err
	}
	for _, list := range []struct {
		heading string
		lines   []string
	}{{"Verified", r.verified}, {"Skipped", r.skipped}} {
		if len(list.lines) > 0 {
			fmt.Printf("\n%s:\n- %s\n", list.heading, strings.Join(list.lines, "\n- "))
		}
	}
	return nil
}

// describe says what machine this is, and how busy before anything began.
func describe() string {
	cpu := "unknown processor"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, rest, ok := bytes.Cut(b, []byte("model name\t: ")); ok {
			line, _, _ := bytes.Cut(rest, []byte("\n"))
			cpu = string(line)
		}
	}
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	load, _ := os.ReadFile("/proc/loadavg")
	words := strings.Fields(string(load))
	return fmt.Sprintf("%s, %d processors, Linux %s, load %s", cpu, runtime.NumCPU(), bytes.TrimSpace(release), strings.Join(words[:min(3, len(words))], " "))
}
