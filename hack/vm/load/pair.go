package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// pair is two nodes in this process, connected over loopback with TCP_MD5SIG.
type pair struct {
	run   *run
	paths [2]string
	nodes [2]*volume
}

const peerTimeout = 3 * time.Second

// The guest has no other programs: two ports of nobody.
var addresses = [2]string{"127.0.0.1:7447", "127.0.0.1:7448"}

func (p *pair) open(i int) error {
	p.nodes[i] = &volume{name: "pair", path: p.paths[i], run: p.run}
	return p.nodes[i].open(&nvmmirror.Peer{
		Listen: addresses[i], Address: addresses[1-i], Key: []byte("a key of both"), Timeout: peerTimeout,
	})
}

// verify brings the pair to service and compares what it holds. It returns the
// primary. After a failover this is the former secondary, compared before the
// former primary was there.
func (p *pair) verify() (*volume, error) {
	at, err := p.formerPrimary()
	if err != nil {
		return nil, err
	}
	if p.run.failover && at >= 0 {
		if primary, err := p.failOver(1 - at); primary != nil || err != nil {
			return primary, err
		}
	}
	for i := range p.nodes {
		if p.nodes[i] == nil {
			if err := p.open(i); err != nil {
				return nil, err
			}
		}
	}
	if at < 0 { // blank
		at = 0
		if err := p.promote(at); err != nil {
			return nil, err
		}
	}
	if err := p.inSync(); err != nil {
		return nil, err
	}
	p.run.say("restarted %s", p.paths[at])
	return p.nodes[at], p.nodes[at].verify()
}

// failOver promotes the former secondary. It may be refused, and returns nil,
// where the crash before came so early that no node had the title.
func (p *pair) failOver(to int) (*volume, error) {
	if err := p.open(to); err != nil {
		return nil, err
	}
	err := p.promote(to)
	if refused := new(nvmmirror.RefusedError); errors.As(err, &refused) {
		p.run.say("refused %v", refused)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := p.nodes[to].verify(); err != nil {
		return nil, err
	}
	if err := p.open(1 - to); err != nil {
		return nil, err
	}
	if err := p.inSync(); err != nil {
		return nil, err
	}
	p.run.say("promoted %s", p.paths[to])
	return p.nodes[to], nil
}

// formerPrimary is the node whose region remembers that role, the one of the
// newer epoch where both do, and -1 where neither has a lineage yet.
func (p *pair) formerPrimary() (int, error) {
	at, epoch := -1, uint64(0)
	for i, path := range p.paths {
		ins, err := nvmmirror.Inspect(path)
		if err != nil {
			return 0, err
		}
		if e := ins.History.Last().Epoch.Counter; ins.Role == replicate.Primary && e >= epoch {
			at, epoch = i, e
		}
	}
	return at, nil
}

func (p *pair) promote(i int) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := p.nodes[i].Promote(ctx, false); err != nil {
		return fmt.Errorf("promote %s: %w", p.paths[i], err)
	}
	return nil
}

func (p *pair) inSync() error {
	for end := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		a, b := p.nodes[0].Status(), p.nodes[1].Status()
		if a.Peer == "in-sync" && b.Peer == "in-sync" {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("not in sync: %s: %s (%s); %s: %s (%s)", p.paths[0], a.Peer, a.Reason, p.paths[1], b.Peer, b.Reason)
		}
	}
}
