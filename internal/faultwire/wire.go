package faultwire

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
)

// ErrNotPermitted says that this process may not create namespaces or TUN
// devices here. The error that wraps it names the step and the kernel's answer.
var ErrNotPermitted = errors.New("faultwire: not permitted (needs root with CAP_SYS_ADMIN, CAP_NET_ADMIN and /dev/net/tun)")

// ErrClosed is returned by the methods of a closed wire and of its parts.
var ErrClosed = errors.New("faultwire: the wire is closed")

// Limits of Config.MTU: IPv6 needs 1280, and a packet's length has 16 bits.
const (
	MinMTU     = 1280
	MaxMTU     = 65535
	DefaultMTU = 1500
)

// Config describes a wire.
type Config struct {
	// MTU of both devices; 0 means DefaultMTU.
	MTU int
	// Seed of every choice that the wire makes; 0 draws one.
	Seed uint64
	// Logf, where set, is told the seed once.
	Logf func(format string, args ...any)
}

// Wire is a pair of namespaces and the two directions between them.
type Wire struct {
	A, B       *Host
	AtoB, BtoA *Direction

	seed  uint64
	close sync.Once
	err   error // what close found; written inside close only
}

// New creates the two namespaces, joins them and starts to relay, faithfully
// until a plan is set.
func New(cfg Config) (_ *Wire, err error) {
	if cfg.MTU == 0 {
		cfg.MTU = DefaultMTU
	}
	if cfg.MTU < MinMTU || cfg.MTU > MaxMTU {
		return nil, fmt.Errorf("faultwire: MTU %d is outside %d..%d", cfg.MTU, MinMTU, MaxMTU)
	}
	if cfg.Seed == 0 {
		cfg.Seed = rand.Uint64()
	}
	if cfg.Logf != nil {
		cfg.Logf("faultwire: seed %#x", cfg.Seed)
	}
	w := &Wire{seed: cfg.Seed}
	if w.A, err = newHost("A", addrA4, addrA6, cfg.MTU); err != nil {
		return nil, err
	}
	if w.B, err = newHost("B", addrB4, addrB6, cfg.MTU); err != nil {
		w.A.close()
		return nil, err
	}
	w.AtoB = newDirection("A to B", w.A.port, w.B.port, cfg.MTU, cfg.Seed, 0)
	w.BtoA = newDirection("B to A", w.B.port, w.A.port, cfg.MTU, cfg.Seed, 1)
	return w, nil
}

// Seed is what Config.Seed must be to repeat this wire's choices.
func (w *Wire) Seed() uint64 { return w.seed }

// SetPlan sets the same plan for both directions.
func (w *Wire) SetPlan(p Plan) {
	w.AtoB.SetPlan(p)
	w.BtoA.SetPlan(p)
}

// SetCut cuts (or heals) both directions.
func (w *Wire) SetCut(cut bool) {
	w.AtoB.SetCut(cut)
	w.BtoA.SetCut(cut)
}

// Close ends the relay and removes the devices. The namespaces go with the last
// socket and process in them. Packets still held or delayed are lost.
func (w *Wire) Close() error {
	w.close.Do(func() {
		// Both relays end before a device closes: each writes to the other's.
		w.AtoB.stop()
		w.BtoA.stop()
		w.err = errors.Join(w.A.close(), w.B.close())
	})
	return w.err
}
