package nvmmirror

import (
	"fmt"
	"net/netip"
	"time"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/replicate"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// Ack says when a commit is acknowledged.
type Ack string

const (
	// AckBoth: after it is durable on both nodes.
	AckBoth Ack = "both"
	// AckAsync: after it is durable here. A failover loses what the peer did
	// not get yet.
	AckAsync Ack = "async"
)

// OnPeerLoss says what a primary does when its peer is lost.
type OnPeerLoss string

const (
	// Block: commits wait. The peer holds the title and can be promoted.
	Block OnPeerLoss = "block"
	// Alone: go on alone. This node holds the title, the peer cannot be
	// promoted unless it is forced.
	Alone OnPeerLoss = "alone"
)

// Options say how to open a volume.
type Options struct {
	Ack        Ack         // "": both
	OnPeerLoss OnPeerLoss  // "": block
	Peer       *Peer       // nil: standalone
	Logger     *zap.Logger // nil: nothing is logged
	// AcceptLoss opens a standalone region also where its journal is damaged
	// below what was acknowledged: what lies behind the damage is lost. Else
	// Open fails with a [*DamageError]. A primary whose peer is required, and may
	// have been promoted, then waits for ContinueAlone.
	AcceptLoss bool

	// Of a simulated node; nil: CLOCK_BOOTTIME, the kernel's.
	clock    func() time.Duration
	counters func() (transport.Counters, error)
}

// Peer is the other node of a pair.
type Peer struct {
	Listen   string        // own address and port, such as "10.0.0.1:7447"
	Address  string        // the peer's
	Key      []byte        // of TCP_MD5SIG, at most 80 bytes, the same on both nodes
	Timeout  time.Duration // after which the peer counts as lost, 50ms to 10min; 0: 1s
	BusyPoll time.Duration // before a wait for the peer sleeps; 0: 50µs, negative: none
	// Connections carry transactions of more than 256 KiB beside the
	// session's own connection, each with a goroutine at both ends: 1 to
	// MaxConnections; 0: 1. Of two nodes that differ the smaller number counts.
	Connections int
	// Transport is the way to the peer, such as [transport.NewTLS] or
	// [transport.NewPlain] makes it; Key is then unused. nil: TCP_MD5SIG.
	Transport transport.Transport
}

// What holds where a Peer says nothing, and how far it may go.
const (
	DefaultTimeout  = time.Second
	DefaultBusyPoll = 50 * time.Microsecond
	MinTimeout      = 50 * time.Millisecond
	MaxTimeout      = 10 * time.Minute
	MaxConnections  = replicate.MaxLanes
)

func (o Options) withDefaults() (Options, error) {
	if o.Ack == "" {
		o.Ack = AckBoth
	}
	if o.OnPeerLoss == "" {
		o.OnPeerLoss = Block
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.Ack != AckBoth && o.Ack != AckAsync {
		return o, fmt.Errorf("ack is %q, not both or async", o.Ack)
	}
	if o.OnPeerLoss != Block && o.OnPeerLoss != Alone {
		return o, fmt.Errorf("on_peer_loss is %q, not block or alone", o.OnPeerLoss)
	}
	if o.Peer != nil {
		p := *o.Peer
		if p.Timeout == 0 {
			p.Timeout = DefaultTimeout
		}
		if p.BusyPoll == 0 {
			p.BusyPoll = DefaultBusyPoll
		}
		if p.Connections == 0 {
			p.Connections = 1
		}
		if p.Connections < 1 || p.Connections > MaxConnections {
			return o, fmt.Errorf("connections is %d, not from 1 to %d", p.Connections, MaxConnections)
		}
		if p.Timeout < MinTimeout || p.Timeout > MaxTimeout {
			return o, fmt.Errorf("peer timeout is %v, not from %v to %v", p.Timeout, MinTimeout, MaxTimeout)
		}
		o.Peer = &p
	}
	return o, nil
}

func (o *Options) timeout() time.Duration {
	if o.Peer == nil {
		return DefaultTimeout
	}
	return o.Peer.Timeout
}

func (o *Options) busyPoll() time.Duration {
	if o.Peer == nil {
		return 0
	}
	return max(0, o.Peer.BusyPoll)
}

// pairConfig resolves the peer's addresses and makes the transport.
func (o *Options) pairConfig(log *zap.Logger) (replicate.Config, error) {
	c := replicate.Config{
		Async: o.Ack == AckAsync, Alone: o.OnPeerLoss == Alone,
		Timeout: o.timeout(), BusyPoll: o.busyPoll(), Log: log, Clock: o.clock,
	}
	if o.Peer == nil {
		return c, nil
	}
	c.Lanes = o.Peer.Connections
	var err error
	if c.Listen, err = netip.ParseAddrPort(o.Peer.Listen); err != nil {
		return c, fmt.Errorf("listen address: %w", err)
	}
	if c.Peer, err = netip.ParseAddrPort(o.Peer.Address); err != nil {
		return c, fmt.Errorf("peer address: %w", err)
	}
	if c.Listen.Addr().IsUnspecified() || c.Peer.Addr().IsUnspecified() || c.Peer.Port() == 0 {
		return c, fmt.Errorf("listen %v and peer %v must be definite addresses: connections are made from the one to the other", c.Listen, c.Peer)
	}
	if c.Listen.Addr().Is4() != c.Peer.Addr().Is4() {
		return c, fmt.Errorf("listen %v and peer %v are not of one address family", c.Listen, c.Peer)
	}
	if c.Listen == c.Peer {
		return c, fmt.Errorf("listen and peer are both %v: a node cannot be its own peer", c.Listen)
	}
	if c.Transport = o.Peer.Transport; c.Transport == nil {
		c.Transport, err = transport.NewMD5Sig(c.Peer.Addr(), o.Peer.Key, transport.Options{UserTimeout: o.Peer.Timeout})
		if err != nil {
			return c, err
		}
	}
	if c.Transport.Name() == transport.NamePlain {
		log.Warn("transport plain: nothing but its address tells the peer from others, and content is in clear; " +
			"corruption that TCP misses is found by checksums of the mirror; for links that nobody else can reach")
	}
	c.Diagnose = diagnose(c.Transport, o.kernel)
	return c, nil
}

// kernel reads the counters of this network namespace.
func (o *Options) kernel() (transport.Counters, error) {
	if o.counters != nil {
		return o.counters()
	}
	return transport.ReadCounters()
}

// diagnose makes what says why no connection comes about: the transport, where
// it knows, and the kernel, which counts here what a peer that signs, or does
// not, does to the other.
func diagnose(t transport.Transport, counters func() (transport.Counters, error)) func() string {
	start, _ := counters() // zeros where /proc does not tell
	own, _ := t.(interface{ Diagnose() string })
	return func() string {
		if own != nil {
			if d := own.Diagnose(); d != "" {
				return d
			}
		}
		now, err := counters()
		if err != nil {
			return ""
		}
		return now.Sub(start).Diagnose()
	}
}

// transportName is "" for a standalone node.
func (o *Options) transportName() string {
	switch {
	case o.Peer == nil:
		return ""
	case o.Peer.Transport == nil:
		return transport.NameMD5Sig
	}
	return o.Peer.Transport.Name()
}

// md5Failures counts, since the volume was opened, the segments whose signature
// did not match, in this network namespace; 0 where the kernel does not tell.
func (v *Volume) md5Failures() uint64 {
	if v.opt.Peer == nil {
		return 0
	}
	now, err := v.opt.kernel()
	if err != nil {
		return 0
	}
	return now.Sub(v.kernelAtStart).MD5Failure
}
