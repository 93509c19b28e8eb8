package vm

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// killRounds is how often the guest is killed: under load, except in the rounds
// of earlyKills, where that comes at some moment of the recovery before.
const killRounds = 12

const (
	patience = 30 * time.Second // for each thing that recovery waits for
	killTime = 3 * time.Second  // the moment of a kill is drawn from so much
)

var earlyKills = []int{4, 9} // after a restart of the pair, and in a failover

// kills is a guest that is killed under load again and again, and what the
// host knows to be acknowledged.
type kills struct {
	*machine
	bin   string
	seed  uint64
	rng   *rand.Rand
	acked map[string]uint64 // by key, see the command load

	afterLoad                    bool // the last kill came under load
	heard, unheard               int  // transactions acknowledged, and found beyond them
	promoted, restarted, refused int
	inRecovery                   int
}

// testKills kills the guest at random moments, boots it again on the same
// NVDIMMs, and lets it recover and compare.
func testKills(t *testing.T, k *Kernel, bin string, failures *strings.Builder) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := &kills{machine: newMachine(t, k, failures), bin: bin, seed: seed, rng: rand.New(rand.NewPCG(seed, 0)), acked: map[string]uint64{}}
	start := time.Now()
	for n := range killRounds + 1 {
		if n > 0 {
			r.boot()
			r.mount()
		}
		r.round(n)
	}
	t.Logf("%d kills, %d of them in recovery; %d transactions acknowledged over the serial line, %d more found; the pair restarted %d times, failed over %d times, refused %d; %v",
		killRounds, r.inRecovery, r.heard, r.unheard, r.restarted, r.promoted, r.refused, time.Since(start).Round(time.Second))
	if r.promoted == 0 || r.restarted == 0 {
		t.Error("the pair never failed over, or never restarted")
	}
}

// round recovers, compares, and kills the guest under load; the last one ends
// with a clean close. Some rounds are killed on the way.
func (r *kills) round(n int) {
	r.t.Helper()
	first, last := n == 0, n == killRounds
	failover := n%2 == 1
	early := slices.Contains(earlyKills, n)
	command := fmt.Sprintf("%s/load -seed %d -patience %v -devdax %s -acknowledged %s -create=%v -failover=%v -idle=%v",
		r.bin, r.seed, r.within(patience), r.device, r.known(), first, failover, last)
	limit := r.within(3 * patience)
	ctx, cancel := context.WithTimeoutCause(r.t.Context(), limit, fmt.Errorf("not done within %v", limit))
	defer cancel()
	var timer *time.Timer
	kill := func() {
		most := float64(killTime) * max(1, float64(r.took)/float64(quietBoot))
		timer = time.AfterFunc(time.Duration(r.rng.Float64()*most), r.Kill)
	}
	if early {
		kill()
	}
	loading := false
	before, began := r.heard, time.Now()
	var recovered time.Duration
	var problem []string
	status, err := r.Run(ctx, command, func(line string) {
		word, rest, _ := strings.Cut(line, " ")
		switch word {
		case "ack", "found":
			if err := r.note(word, rest); err != nil {
				problem = append(problem, err.Error())
			}
		case "restarted":
			r.restarted++
		case "promoted":
			r.promoted++
		case "refused":
			r.refused++
			if r.afterLoad {
				problem = append(problem, line)
			}
		case "loading":
			loading = true
			recovered = time.Since(began)
			if !last && !early {
				kill()
			}
		default:
			problem = append(problem, line)
		}
	})
	if timer != nil {
		timer.Stop()
	}
	ended := errors.Is(err, ErrEnded) && !last || err == nil && status == 0 && last
	if !ended || len(problem) > 0 {
		r.fatalf("round %d of seed %d: status %d, %v\n%s\n%s", n, r.seed, status, err, command, strings.Join(problem, "\n"))
	}
	if last {
		return
	}
	if !loading {
		r.inRecovery++
	}
	r.afterLoad = loading
	r.t.Logf("kill %2d: booted in %v, recovered and compared in %v (failover %v), %d acknowledged after that",
		n+1, r.took.Round(time.Millisecond), recovered.Round(time.Millisecond), failover, r.heard-before)
}

// known is what must be there.
func (r *kills) known() string {
	var list []string
	for _, key := range slices.Sorted(maps.Keys(r.acked)) {
		list = append(list, fmt.Sprintf("%s=%d", key, r.acked[key]))
	}
	return "'" + strings.Join(list, ",") + "'"
}

// note takes in one line. What recovery reported is there from then on, as if
// it had been acknowledged.
func (r *kills) note(word, rest string) error {
	var key string
	var n uint64
	if _, err := fmt.Sscan(rest, &key, &n); err != nil {
		return fmt.Errorf("%s %s: %w", word, rest, err)
	}
	was := r.acked[key]
	switch {
	case word == "found" && n < was:
		return fmt.Errorf("%s: %d found, %d were acknowledged: LOST", key, n, was)
	case word == "ack" && n <= was, word == "ack" && n != was+1 && !strings.HasSuffix(key, ".tx"):
		return fmt.Errorf("%s: %d is acknowledged after %d", key, n, was)
	case word == "found":
		r.unheard += int(n - was)
	}
	if word == "ack" {
		r.heard++
	}
	r.acked[key] = n
	return nil
}
