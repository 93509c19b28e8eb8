package chaos

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/admin"
)

const (
	chaosTimeout = 150 * time.Millisecond // of the peers
	// progressTime bounds how long a node that can be promoted, or clients
	// whose pair is healed, may take.
	progressTime = 15 * time.Second
	between      = 30 // operations of clients around each fault
)

// chaos is a pair with clients, and somebody who breaks it.
type chaos struct {
	*pair
	h     *history
	crowd *crowd
	rng   *rand.Rand

	primary, secondary *node // in sync, at the start of an episode
	promotions         int   // that moved the role to the other node, of its title
	failovers          int   // of those, by faults
	counts             map[string]int
}

func newChaos(t *testing.T, policy nvmmirror.OnPeerLoss) *chaos {
	t.Helper()
	seed := seedOf(t)
	h := newHistory()
	h.begin("a") // newPair promotes it
	p := newPair(t, pairConfig{policy: policy, timeout: chaosTimeout, size: registerCount * registerEvery, journal: nvmmirror.MinJournal, seed: seed})
	h.proven()
	c := &chaos{pair: p, h: h, rng: rand.New(rand.NewPCG(seed, 2)), counts: map[string]int{}}
	c.crowd = startCrowd(p, h, seed)
	c.primary, c.secondary = p.a, p.b
	// Last of all, and where the test fails in its middle: what the clients saw.
	t.Cleanup(func() {
		c.crowd.end()
		if t.Failed() && !h.checked {
			h.check(t, p.dir)
		}
	})
	return c
}

// promote promotes a node, unforced. It must come about: the node holds the
// title, and its primary is gone for it.
func (c *chaos) promote(n *node) {
	c.t.Helper()
	for deadline := time.Now().Add(progressTime); ; time.Sleep(time.Millisecond) {
		err := c.tryPromote(n)
		if err == nil {
			return
		}
		n.alive()
		if time.Now().After(deadline) {
			c.t.Fatalf("%s is not promoted within %v: %v; %+v", n.name, progressTime, err, n.status())
		}
	}
}

// tryPromote asks for a promotion once.
func (c *chaos) tryPromote(n *node) error {
	ctx, cancel := context.WithTimeout(c.t.Context(), progressTime)
	defer cancel()
	c.h.begin(n.name)
	_, err := n.admin.Promote(ctx, false)
	switch {
	case err == nil:
		c.h.proven()
		c.h.note("%s promoted", n.name)
		c.crowd.aim(n)
	case refused(err):
		c.h.withdrawn()
	}
	return err
}

func refused(err error) bool {
	var e *admin.Error
	return errors.As(err, &e) && (e.Kind == admin.KindRefused || e.Kind == admin.KindUnreachable)
}

// up to d, from the seed.
func (c *chaos) upTo(d time.Duration) time.Duration { return time.Duration(c.rng.Int64N(int64(d))) }

// heal makes everything whole, waits until the pair is in sync and clients
// make progress, and sees who is primary now.
func (c *chaos) heal() {
	c.t.Helper()
	c.wire.SetCut(false)
	nodes := []*node{c.a, c.b}
	if c.rng.IntN(2) == 0 {
		slices.Reverse(nodes)
	}
	for _, n := range nodes {
		if !n.running() {
			n.launch()
		} else if n.stopped {
			n.signal(unix.SIGCONT)
		}
	}
	for _, n := range nodes {
		n.answers()
	}
	was := c.primary
	c.primary, c.secondary = c.inSync()
	if c.primary != was {
		c.promotions++
	}
	c.h.primaryIs(c.primary.name)
	c.crowd.aim(c.primary)
	c.h.note("healed, %s is primary", c.primary.name)
	c.crowd.more(between)
	for _, n := range nodes {
		n.fs.drain() // last: a pair comes back on full file systems too
	}
}

// episode is one way to break a pair that is in sync.
type episode struct {
	name   string
	weight int
	run    func(c *chaos)
}

// run has every episode once, in any order, and then draws by weight, until
// enough holds.
func (c *chaos) run(episodes []episode, enough func() bool) {
	c.t.Helper()
	defer c.crowd.idle.Store(false)
	for once := c.rng.Perm(len(episodes)); !enough(); {
		at := c.draw(episodes)
		if len(once) > 0 {
			at, once = once[0], once[1:]
		}
		e := &episodes[at]
		was := c.primary
		// Epochs under which nothing is written are a case of their own.
		idle := c.rng.IntN(5) == 0
		c.crowd.idle.Store(idle)
		c.h.note("%s (primary %s, clients idle: %v)", e.name, was.name, idle)
		c.counts[e.name]++
		e.run(c)
		c.heal()
		if c.primary != was && e.name != planned {
			c.failovers++
		}
	}
}

func (c *chaos) draw(episodes []episode) int {
	sum := 0
	for i := range episodes {
		sum += episodes[i].weight
	}
	n := c.rng.IntN(sum)
	for i := range episodes {
		if n -= episodes[i].weight; n < 0 {
			return i
		}
	}
	panic("no episode of that weight")
}

// finish reads everything at both nodes, compares them, and checks what the
// clients saw from the beginning.
func (c *chaos) finish() {
	c.t.Helper()
	c.crowd.end()
	c.readAll()
	switchOver(c)
	c.primary, c.secondary = c.inSync()
	c.readAll()
	c.identical()
	c.h.check(c.t, c.dir)
	kinds := slices.Sorted(maps.Keys(c.counts))
	for i, k := range kinds {
		kinds[i] = fmt.Sprintf("%s %d", k, c.counts[k])
	}
	c.t.Logf("%d failovers, %d promotions in all, in %.0f s: %s", c.failovers, c.promotions, time.Since(c.h.start).Seconds(), strings.Join(kinds, ", "))
}

// readAll reads each register at the primary, as one more client.
func (c *chaos) readAll() {
	c.t.Helper()
	for r := range registerCount {
		poll(c.t, progressTime, fmt.Sprintf("register %d is read", r), func() (bool, string) {
			o := operation{Client: clients, Node: c.primary.name, Register: r}
			c.crowd.operate(c.primary.admin, &o)
			c.h.add(o)
			return o.Outcome == done, o.Error
		})
	}
}

// chaosTime is how long the run goes on at least.
func chaosTime(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv(envTime)
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("%s: %v", envTime, err)
	}
	return d
}

// Policy block: the survivor is promoted, of its title and unforced, over and
// over. At least 200 failovers at full length.
func TestChaosBlock(t *testing.T) {
	c := newChaos(t, nvmmirror.Block)
	least, until := sized(200, 6), time.Now().Add(chaosTime(t))
	c.run(blockEpisodes, func() bool { return c.failovers >= least && time.Now().After(until) })
	c.finish()
}

// Policy alone: the primary goes on without its peer, which cannot be promoted
// meanwhile.
func TestChaosAlone(t *testing.T) {
	c := newChaos(t, nvmmirror.Alone)
	least, until, n := sized(40, 5), time.Now().Add(chaosTime(t)/4), 0
	c.run(aloneEpisodes, func() bool { n++; return n > least && time.Now().After(until) })
	c.finish()
}
