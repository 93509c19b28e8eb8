package bench

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

func shortCommit(t testing.TB) CommitOptions {
	return CommitOptions{
		Size: 64, Committers: 1, Ack: nvmmirror.AckBoth, Transport: Plain, Connections: 1,
		RegionSize: 4 << 20, JournalSize: 2 << 20, Duration: 60 * time.Millisecond, Dir: directory(t), Program: program(t),
	}
}

func needsMD5(t testing.TB) {
	t.Helper()
	if err := transport.Probe(); err != nil {
		t.Skip("needs TCP_MD5SIG: ", err)
	}
}

func TestCommit(t *testing.T) {
	for name, change := range map[string]func(*CommitOptions){
		"plain":    func(*CommitOptions) {},
		"md5sig":   func(o *CommitOptions) { o.Transport = MD5Sig },
		"sleeping": func(o *CommitOptions) { o.Poll = PollOff },
		"together": func(o *CommitOptions) { o.Poll, o.Placement = PollOff, Together },
		"free":     func(o *CommitOptions) { o.Poll, o.Placement = PollOff, Free },
		"async":    func(o *CommitOptions) { o.Ack = nvmmirror.AckAsync },
		"many":     func(o *CommitOptions) { o.Committers, o.Size, o.Poll = 16, 100, time.Millisecond },
		"large":    func(o *CommitOptions) { o.Size = 256 << 10 },
	} {
		t.Run(name, func(t *testing.T) {
			o := shortCommit(t)
			if change(&o); o.Transport == MD5Sig {
				needsMD5(t)
			}
			r, err := Commit(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			if !r.Identical || r.Commits == 0 || r.P50 <= 0 || r.P50 > r.P99 || r.P99 > r.P999 || r.P999 > r.Max {
				t.Errorf("latencies are not in order, or there are none: %+v", r)
			}
			if r.FloorP50 <= 0 || r.FloorMB <= 0 || r.FloorCPU <= 0 || r.CPU <= 0 || r.Rate <= 0 {
				t.Errorf("without a floor, or without a cost: %+v", r)
			}
			if got := r.P50 / r.FloorP50; got != r.RatioP50 {
				t.Errorf("ratio %v, not %v", r.RatioP50, got)
			}
			// Tails are compared where both were scheduled alike, and are some.
			alike := r.Placement != string(Free) && r.Committers == 1 && min(r.Commits, r.FloorRounds) >= 1000
			if quoted := r.RatioP99 != 0; quoted != alike {
				t.Errorf("placed %s, %d commits, %d rounds, with a ratio of p99 of %v", r.Placement, r.Commits, r.FloorRounds, r.RatioP99)
			}
			// A plausible size, also with the race detector; the region is larger.
			if r.Resident <= 0 || r.Resident > 128<<20 {
				t.Errorf("%d bytes beside the region", r.Resident)
			}
			if left, _ := os.ReadDir(o.Dir); len(left) > 0 {
				t.Errorf("%v are left", left)
			}
			var text bytes.Buffer
			if err := r.Print(&text); err != nil || !strings.Contains(text.String(), "both regions are identical") {
				t.Errorf("%v: %s", err, text.String())
			}
		})
	}
}

// The floor sends as much as a transaction holds, also where that is more than a
// message over the wire may have from a stranger.
func TestCommitFloorSize(t *testing.T) {
	o := shortCommit(t)
	o.Size, o.RegionSize, o.JournalSize, o.Duration = 2*maxMessage, 16<<20, 16<<20, 20*time.Millisecond
	if _, err := Commit(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	stranger := &farEnd{links: []link{nil}}
	if err := stranger.begin(work{Size: o.Size}); err == nil {
		t.Error("a stranger may have as much")
	}
}

// The kernel lists a mapping by its file's real name: by another one for the
// directory, the region would count as the program's memory.
func TestCommitMemoryBesideRegion(t *testing.T) {
	o := shortCommit(t)
	o.Placement = Free
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(o.Dir, link); err != nil {
		t.Fatal(err)
	}
	o.Dir = link
	if _, err := Commit(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if _, err := residentBeside(filepath.Join(link, "none")); err == nil {
		t.Error("memory beside a file that is not mapped")
	}
}

// Whether polling is compared with polling: never where one that polls keeps the
// other from answering.
func TestCommitFloorPolls(t *testing.T) {
	for _, c := range []struct {
		poll      time.Duration
		placement Placement
		want      bool
	}{{0, Apart, runtime.NumCPU() > 1}, {0, Together, false}, {PollOff, Apart, false}} {
		o := CommitOptions{Size: 2 * maxMessage, Poll: c.poll, Placement: c.placement}
		if got := o.ping(); got.Poll != c.want || got.Size != o.Size {
			t.Errorf("poll %v, placed %s: %+v", c.poll, c.placement, got)
		}
	}
}

// TestCommitAsync: what is still on its way when the callers are back counts as
// time.
func TestCommitAsync(t *testing.T) {
	o := shortCommit(t)
	o.Ack = nvmmirror.AckAsync
	p, err := startPair(t.Context(), o, o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer p.end()
	p.load = newLoad(p.primary, o)
	m := &measured{o: o, ping: newHistogram()}
	if err := p.commits(t.Context(), m, 20*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	s, err := p.secondary(false)
	if st := p.primary.Status(); err != nil || s.Applied < st.Committed {
		t.Errorf("a slice is over with %d applied of %d committed: %v", s.Applied, st.Committed, err)
	}
}

func TestCommitJSON(t *testing.T) {
	b, err := json.Marshal(CommitResult{})
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	for _, key := range strings.Fields("p50_us p99_us commits_per_s mb_per_s floor_p50_us floor_mb_per_s ratio_p50 ratio_mb rss_bytes cpu_s_per_gib") {
		if _, ok := got[key]; !ok {
			t.Errorf("no key %s in %s", key, b)
		}
	}
}

// Regions that differ, and a transaction that is not there, are found.
func TestCommitCompares(t *testing.T) {
	for _, what := range []string{"data", "table"} {
		t.Run(what, func(t *testing.T) {
			o := shortCommit(t)
			p, err := startPair(t.Context(), o, o.Dir)
			if err != nil {
				t.Fatal(err)
			}
			defer p.end()
			p.load = newLoad(p.primary, o)
			if err := p.load.run(t.Context(), 5*time.Millisecond); err != nil {
				t.Fatal(err)
			}
			i, err := nvmmirror.Inspect(p.region[1])
			if err != nil {
				t.Fatal(err)
			}
			// A byte far from those that were written.
			at := i.Data.Offset + o.RegionSize - 1
			if what == "table" {
				at = i.Table.Offset + o.RegionSize/4096*16 - 1
			}
			f, err := os.OpenFile(p.region[1], os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			var was [1]byte
			if _, err := f.ReadAt(was[:], at); err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte{was[0] ^ 1}, at); err != nil {
				t.Fatal(err)
			}
			if err := p.compare(t.Context()); err == nil || !strings.Contains(err.Error(), "differ") {
				t.Errorf("a byte differs, and: %v", err)
			}
		})
	}
}

func TestCommitOptions(t *testing.T) {
	for option, change := range map[string]func(*CommitOptions){
		"size":         func(o *CommitOptions) { o.Size = 0 },
		"committers":   func(o *CommitOptions) { o.Committers = 0 },
		"ack":          func(o *CommitOptions) { o.Ack = "all" },
		"transport":    func(o *CommitOptions) { o.Transport = MD5User },
		"connections":  func(o *CommitOptions) { o.Connections = 0 },
		"placement":    func(o *CommitOptions) { o.Placement = "anywhere" },
		"poll":         func(o *CommitOptions) { o.Poll = time.Minute },
		"region-size":  func(o *CommitOptions) { o.RegionSize = 5000 },
		"journal-size": func(o *CommitOptions) { o.JournalSize = 1 << 20 },
		"duration":     func(o *CommitOptions) { o.Duration = 0 },
	} {
		o := shortCommit(t)
		change(&o)
		_, err := Commit(t.Context(), o)
		var bad *OptionError
		if !errors.As(err, &bad) || bad.Option != option {
			t.Errorf("%s: %v", option, err)
		}
	}
	o := shortCommit(t)
	var bad *OptionError
	if o.Size = int(o.JournalSize / 2); !errors.As(o.Check(), &bad) || bad.Option != "size" {
		t.Errorf("a transaction that the journal does not take: %v", o.Check())
	}
	o = shortCommit(t)
	o.RegionSize = 1 << 45
	if _, err := Commit(t.Context(), o); err == nil || !strings.Contains(err.Error(), "choose a smaller") {
		t.Errorf("regions that do not fit: %v", err)
	}
}

func TestCommitInterrupted(t *testing.T) {
	o := shortCommit(t)
	o.Duration = time.Minute
	ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
	defer cancel()
	if _, err := Commit(ctx, o); err == nil {
		t.Error("it succeeded")
	}
	if left, _ := os.ReadDir(o.Dir); len(left) > 0 {
		t.Errorf("%v are left", left)
	}
}

// A secondary whose process is killed, as by a kernel short of memory, ends the
// measurement: commits waited for it without end.
func TestCommitSecondaryKilled(t *testing.T) {
	o := shortCommit(t)
	o.Duration = 10 * time.Minute
	p, err := startPair(t.Context(), o, o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := p.run(t.Context())
		ended <- err
	}()
	for deadline := time.Now().Add(stateTime); p.primary.Status().Counters.Commits < 100; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no commits")
		}
	}
	if err := p.child.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if !errors.Is(err, errGone) {
			t.Errorf("%v", err)
		}
	case <-time.After(stateTime):
		t.Fatal("it goes on")
	}
	if err := p.end(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("how the secondary ended: %v", err)
	}
}

// The rate is that of all commits in all of the time: a commit that begins in the
// warm-up takes a long part of a slice where many long ones are outstanding.
func TestCommitRate(t *testing.T) {
	path := filepath.Join(directory(t), "r")
	if err := nvmmirror.Create(path, nvmmirror.CreateOptions{Size: 4 << 20, JournalSize: 2 << 20, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	v, err := nvmmirror.Open(path, nvmmirror.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	o := shortCommit(t)
	o.Committers = 4
	l := newLoad(v, o)
	for range 2 {
		if err := l.run(t.Context(), 10*time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	var all int64
	for c := range l.of {
		all += l.of[c].n
	}
	r := (&measured{o: o, ping: newHistogram()}).result(l)
	if got := r.Rate * r.Seconds; math.Abs(got-float64(all)) > 0.5 || r.Seconds < 0.02 || r.Commits >= all {
		t.Errorf("%.1f commits in %.3f s, %d recorded; %d were made", got, r.Seconds, r.Commits, all)
	}
	// What people read has the same count beside the same time.
	r.Host = &Host{}
	var text strings.Builder
	if err := r.Print(&text); err != nil || !strings.HasPrefix(text.String(), fmt.Sprintf("%d commits of %d bytes, %d of them recorded, ", all, o.Size, r.Commits)) {
		t.Errorf("%v: %s", err, text.String())
	}
}

// lateEnd answers at once, but for the last message.
type lateEnd struct {
	rawLink
	n    uint64
	late time.Duration
}

func (l *lateEnd) send(p []byte) error {
	if p[0] == 0 {
		time.Sleep(l.late)
	}
	return nil
}

func (l *lateEnd) some(p []byte) (int, error) {
	binary.LittleEndian.PutUint64(p, l.n)
	l.n++
	return len(p), nil
}

// TestFloorRate: what ends a slice of the floor is in the count and the time, or in
// neither: of ten long round trips it would be a tenth.
func TestFloorRate(t *testing.T) {
	l := &lateEnd{late: time.Second}
	begin := time.Now()
	r, err := driveRounds(l, work{Size: 8, Verify: VerifyNone}, 10*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if beside := time.Since(begin) - r.took; beside < l.late {
		t.Errorf("%d round trips are recorded, and %v of the last one's time beside theirs", r.latency.TotalCount(), l.late-beside)
	}
}
