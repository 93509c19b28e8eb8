package chaos

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/internal/admin"
	"github.com/nvmmirror/nvmmirror/internal/faultwire"
)

// planned is the one episode whose change of roles is no failover.
const planned = "planned switch-over"

// blockEpisodes are for policy block. Where the survivor is promoted with
// promote, it must be possible; heal follows each.
var blockEpisodes = []episode{
	{"kill primary", 8, func(c *chaos) {
		c.primary.kill()
		c.takeOver()
	}},
	{"stop primary", 6, func(c *chaos) {
		c.primary.signal(unix.SIGSTOP)
		c.takeOver()
	}},
	{"cut both ways", 4, func(c *chaos) {
		c.wire.SetCut(true)
		c.takeOver()
	}},
	{"cut from primary", 3, func(c *chaos) {
		c.from(c.primary).SetCut(true)
		c.takeOver()
	}},
	{"cut to primary", 3, func(c *chaos) {
		c.from(c.secondary).SetCut(true)
		c.takeOver()
	}},
	{"stop primary, continue at the promotion", 4, func(c *chaos) {
		c.primary.signal(unix.SIGSTOP)
		hold(c.t, c.upTo(chaosTimeout))
		asked := make(chan error, 1)
		go func() { asked <- c.tryPromote(c.secondary) }()
		hold(c.t, c.upTo(chaosTimeout))
		c.primary.signal(unix.SIGCONT)
		<-asked // may be refused: they may have found each other
	}},
	{"kill primary, restart at the promotion", 4, func(c *chaos) {
		c.primary.kill()
		c.primary.launch()
		hold(c.t, c.upTo(chaosTimeout))
		c.tryPromote(c.secondary) // may be refused: they may have found each other
	}},
	{"kill both, one at its promotion", 3, func(c *chaos) {
		c.primary.kill()
		c.killAt(c.secondary, 2*chaosTimeout)
	}},
	{"cut, kill the new primary", 3, func(c *chaos) {
		c.wire.SetCut(true)
		c.takeOver()
		c.secondary.kill()
		c.wire.SetCut(false)
		hold(c.t, c.upTo(2*chaosTimeout)) // the stale primary, alone
	}},
	{"kill primary, then the new one", 3, func(c *chaos) {
		c.primary.kill()
		c.takeOver()
		c.secondary.kill()
		c.primary.start()
		hold(c.t, c.upTo(2*chaosTimeout))
	}},
	{"disturb the rejoin", 5, func(c *chaos) {
		c.primary.kill()
		c.takeOver()
		c.disturbRejoin(c.secondary, c.primary)
	}},
	{"kill secondary", 2, func(c *chaos) {
		c.secondary.kill()
		hold(c.t, c.upTo(2*chaosTimeout))
	}},
	{"stop secondary", 2, func(c *chaos) {
		c.secondary.signal(unix.SIGSTOP)
		hold(c.t, c.upTo(2*chaosTimeout))
	}},
	{"kill both", 2, func(c *chaos) {
		c.primary.kill()
		c.secondary.kill()
	}},
	{"full file systems, kill primary", 3, func(c *chaos) {
		c.fill()
		c.primary.kill()
		c.takeOver()
		c.primary.start()
	}},
	{"full file systems, kill secondary", 2, func(c *chaos) {
		c.fill()
		c.secondary.kill()
		c.secondary.start()
	}},
	{"flap", 2, func(c *chaos) { c.flap() }},
	{"stop and start primary", 1, func(c *chaos) {
		c.primary.stop()
		c.takeOver()
	}},
	{planned, 3, switchOver},
}

// aloneEpisodes are for policy alone: the primary holds the title.
var aloneEpisodes = []episode{
	{"kill secondary", 3, func(c *chaos) {
		c.secondary.kill()
		c.crowd.more(between) // goes alone
	}},
	{"kill primary", 3, func(c *chaos) {
		c.primary.kill()
		hold(c.t, c.upTo(2*chaosTimeout))
		c.mustNot(c.secondary)
	}},
	{"kill secondary, then primary", 3, func(c *chaos) {
		c.secondary.kill()
		c.crowd.more(between)
		c.primary.kill()
		c.secondary.start()
		c.mustNot(c.secondary)
	}},
	{"stop primary", 2, func(c *chaos) {
		c.primary.signal(unix.SIGSTOP)
		hold(c.t, c.upTo(3*chaosTimeout))
		c.mustNot(c.secondary)
	}},
	{"stop secondary", 2, func(c *chaos) {
		c.secondary.signal(unix.SIGSTOP)
		c.crowd.more(between)
	}},
	{"cut both ways", 3, func(c *chaos) {
		c.wire.SetCut(true)
		c.crowd.more(between)
		c.mustNot(c.secondary)
	}},
	{"cut from primary", 2, func(c *chaos) {
		c.from(c.primary).SetCut(true)
		c.crowd.more(between)
		c.mustNot(c.secondary)
	}},
	{"cut to primary", 2, func(c *chaos) {
		c.from(c.secondary).SetCut(true)
		c.crowd.more(between)
		c.mustNot(c.secondary)
	}},
	{"kill both", 2, func(c *chaos) {
		c.primary.kill()
		c.secondary.kill()
	}},
	{"full file systems, kill both", 2, func(c *chaos) {
		c.fill()
		c.secondary.kill()
		c.crowd.more(between) // goes alone
		c.primary.kill()
	}},
	{"flap", 2, func(c *chaos) { c.flap() }},
	{planned, 5, switchOver},
}

// takeOver promotes the secondary and lets clients work with it.
func (c *chaos) takeOver() {
	c.t.Helper()
	c.promote(c.secondary)
	c.crowd.more(between)
}

// fill takes all space on the file systems of one node or of both: its region,
// log, configuration and socket lie there. Regions are allocated in full when
// they are created, so whoever is at work does not notice, and whoever starts
// finds all that it needs. heal gives the space back when all is well.
func (c *chaos) fill() {
	c.t.Helper()
	which := 1 + c.rng.IntN(3)
	for i, n := range []*node{c.a, c.b} {
		if which&(1<<i) != 0 {
			n.fs.fill()
			c.h.note("the file system of %s is full", n.name)
		}
	}
	c.crowd.more(between)
}

// from is the direction of a node's packets.
func (c *chaos) from(n *node) *faultwire.Direction {
	if n == c.a {
		return c.wire.AtoB
	}
	return c.wire.BtoA
}

// killAt kills a node while it is being promoted, or shortly before or after.
func (c *chaos) killAt(n *node, within time.Duration) {
	c.t.Helper()
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		for n.running() {
			if err := c.tryPromote(n); err == nil || !refused(err) {
				return // promoted, or nobody knows
			}
		}
	}()
	hold(c.t, c.upTo(within))
	n.kill()
	<-asked
}

// mustNot checks that a node without the title is not promoted unforced.
func (c *chaos) mustNot(n *node) {
	c.t.Helper()
	var e *admin.Error
	if err := c.tryPromote(n); !errors.As(err, &e) || e.Kind != admin.KindRefused {
		c.t.Errorf("%s, without the title, was to be promoted: %v", n.name, err)
	}
}

// disturbRejoin starts a follower over a wire so slow that each step of its
// handshake and its join can be hit, and cuts the wire or kills a node there.
func (c *chaos) disturbRejoin(lead, follower *node) {
	c.t.Helper()
	const delay = chaosTimeout / 20
	slow := faultwire.Rule{Every: 1, Any: true}
	c.wire.SetPlan(faultwire.Plan{Delay: slow, DelayFor: delay})
	follower.start()
	hold(c.t, c.upTo(16*delay))
	switch c.rng.IntN(4) {
	case 0:
		lead.kill()
	case 1:
		follower.kill()
	case 2:
		c.from(lead).SetCut(true)
	case 3:
		c.from(follower).SetCut(true)
	}
	hold(c.t, c.upTo(2*chaosTimeout))
	c.wire.SetPlan(faultwire.Plan{})
}

// flap cuts and heals the link a few times, for less than it takes to notice
// and for more.
func (c *chaos) flap() {
	for range 2 + c.rng.IntN(4) {
		switch c.rng.IntN(3) {
		case 0:
			c.wire.SetCut(true)
		case 1:
			c.wire.AtoB.SetCut(true)
		case 2:
			c.wire.BtoA.SetCut(true)
		}
		hold(c.t, c.upTo(3*chaosTimeout/2))
		c.wire.SetCut(false)
		hold(c.t, c.upTo(chaosTimeout/2))
	}
}

// switchOver moves the role by plan, under load. A pair that falls apart in the
// middle of it may leave the title where it was: then that node is promoted
// again.
func switchOver(c *chaos) {
	c.t.Helper()
	poll(c.t, progressTime, c.primary.name+" is demoted", func() (bool, string) {
		_, err := c.primary.admin.Demote(c.t.Context())
		return err == nil, fmt.Sprint(err)
	})
	poll(c.t, progressTime, "one of two secondaries is promoted", func() (bool, string) {
		err := c.tryPromote(c.secondary)
		if refused(err) && !c.secondary.status().Title && c.primary.status().Title {
			err = c.tryPromote(c.primary)
		}
		return err == nil, fmt.Sprint(err)
	})
}
