package faultwire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"
)

// CompareConfig says what CompareTransports sends over which wire.
type CompareConfig struct {
	Bytes int64 // to send by each transport, a multiple of BlockSize; 0 means 16 MiB
	MTU   int   // 0 means DefaultMTU
	// Every swaps one data packet of so many; 0 means 50. From about 10 down
	// signed TCP loses its retransmissions too and spends its time in timeouts.
	Every int
	Seed  uint64 // 0 draws one
	IPv6  bool   // use the IPv6 addresses
	// Logf, where set, is told the seed once.
	Logf func(format string, args ...any)
}

// Transfer is what became of one transport's bytes.
type Transfer struct {
	Bytes     int64  // received
	Blocks    int64  // received, of BlockSize each
	Wrong     int64  // blocks that are not what was sent
	Corrupted uint64 // packets swapped on the way
	// FailuresA and FailuresB are how far TCPMD5Failure rose in the sender's
	// and in the receiver's namespace.
	FailuresA, FailuresB uint64
	Duration             time.Duration
}

// Result is the same transfer over both transports.
type Result struct {
	Every  int
	Plain  Transfer // TCP as it is
	Signed Transfer // TCP with TCP_MD5SIG
}

// Verdict is nil when the measurement shows what TCP_MD5SIG is for: plain TCP
// delivered damage, signed TCP none, and the kernel counted every damaged
// packet.
func (r Result) Verdict() error {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	check(r.Plain.Corrupted > 0 && r.Signed.Corrupted > 0, "the wire corrupted %d plain and %d signed packets: nothing was compared", r.Plain.Corrupted, r.Signed.Corrupted)
	check(r.Plain.Wrong > 0, "plain TCP delivered no wrong block although %d packets were corrupted", r.Plain.Corrupted)
	check(r.Plain.FailuresA+r.Plain.FailuresB == 0, "TCPMD5Failure rose by %d without TCP_MD5SIG", r.Plain.FailuresA+r.Plain.FailuresB)
	check(r.Signed.Wrong == 0, "TCP_MD5SIG delivered %d wrong blocks", r.Signed.Wrong)
	check(r.Signed.FailuresB == r.Signed.Corrupted, "TCPMD5Failure rose by %d at the receiver for %d corrupted packets", r.Signed.FailuresB, r.Signed.Corrupted)
	check(r.Signed.FailuresA == 0, "TCPMD5Failure rose by %d at the sender, to whom nothing corrupted went", r.Signed.FailuresA)
	return errors.Join(errs...)
}

// CompareTransports sends the same patterned blocks from A to B over a wire
// that swaps 16-bit words, by plain TCP and by TCP_MD5SIG, and checks what
// arrives. What it finds is in the Result; an error means that it could not be
// measured. A context with a deadline bounds it: signed TCP over a wire that
// damages too much never ends.
func CompareTransports(ctx context.Context, cfg CompareConfig) (res Result, err error) {
	if cfg.Bytes == 0 {
		cfg.Bytes = 16 << 20
	}
	if cfg.Bytes < 0 || cfg.Bytes%BlockSize != 0 {
		return res, fmt.Errorf("faultwire: %d bytes are no whole number of blocks of %d", cfg.Bytes, BlockSize)
	}
	if cfg.Every == 0 {
		cfg.Every = 50
	}
	w, err := New(Config{MTU: cfg.MTU, Seed: cfg.Seed, Logf: cfg.Logf})
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	res = Result{Every: cfg.Every}
	if cfg.IPv6 && !w.A.Addr6.IsValid() {
		return res, errors.New("faultwire: the kernel has IPv6 off")
	}
	if res.Plain, err = transfer(ctx, w, cfg, false); err != nil {
		return res, fmt.Errorf("faultwire: plain TCP: %w", errors.Join(err, context.Cause(ctx)))
	}
	if res.Signed, err = transfer(ctx, w, cfg, true); err != nil {
		return res, fmt.Errorf("faultwire: TCP_MD5SIG: %w", errors.Join(err, context.Cause(ctx)))
	}
	return res, nil
}

// reading is the counters of both ends and of the wire at one moment.
type reading struct {
	a, b Counters
	wire Stats
}

func read(w *Wire) (r reading, err error) {
	if r.a, err = w.A.Counters(); err != nil {
		return r, err
	}
	r.b, err = w.B.Counters()
	r.wire = w.AtoB.Stats()
	return r, err
}

func transfer(ctx context.Context, w *Wire, cfg CompareConfig, signed bool) (t Transfer, err error) {
	before, err := read(w)
	if err != nil {
		return t, err
	}
	from, to, err := connect(ctx, w, cfg.IPv6, signed)
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, from.Close(), to.Close()) }()
	// A context that ends makes every read and write return.
	defer context.AfterFunc(ctx, func() {
		past := time.Unix(1, 0)
		_ = errors.Join(from.SetDeadline(past), to.SetDeadline(past))
	})()

	w.AtoB.SetPlan(Plan{Swap: Rule{Every: cfg.Every}})
	defer w.AtoB.SetPlan(Plan{})
	start := time.Now()
	sent := make(chan error, 1)
	go func() { sent <- sendBlocks(from, w.Seed(), cfg.Bytes) }()
	t.Bytes, t.Wrong, err = receiveBlocks(to, w.Seed(), cfg.Bytes)
	t.Duration = time.Since(start)
	t.Blocks = t.Bytes / BlockSize
	if err != nil {
		// The sender may be waiting for room that now never comes.
		_ = from.SetDeadline(time.Unix(1, 0))
	}
	if err := errors.Join(err, <-sent); err != nil {
		return t, err
	}
	// Both sockets are still open: a late retransmission that is corrupted too
	// is counted by the kernel like the others. After the plan no more are.
	w.AtoB.SetPlan(Plan{})
	after, err := read(w)
	t.Corrupted = after.wire.Corrupted() - before.wire.Corrupted()
	t.FailuresA = after.a.Rise(before.a, MD5Failure)
	t.FailuresB = after.b.Rise(before.b, MD5Failure)
	return t, err
}

// connect makes a connection from A to B, whose two ends share a key that is
// made for it where it is to be signed.
func connect(ctx context.Context, w *Wire, ipv6, signed bool) (from, to *net.TCPConn, err error) {
	addrA, addrB := w.A.Addr, w.B.Addr
	if ipv6 {
		addrA, addrB = w.A.Addr6, w.B.Addr6
	}
	var key []byte
	if signed {
		key = newKey()
	}
	lc := &net.ListenConfig{Control: socketControl(addrA, key)}
	lc.SetMultipathTCP(false) // an MPTCP socket takes no key
	l, err := w.B.Listen(ctx, lc, "tcp", net.JoinHostPort(addrB.String(), "0"))
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	d := &net.Dialer{Control: socketControl(addrB, key)}
	d.SetMultipathTCP(false)
	c, err := w.A.Dial(ctx, d, "tcp", l.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	// Accept knows no context; a deadline in the past ends it.
	stop := context.AfterFunc(ctx, func() { _ = l.(*net.TCPListener).SetDeadline(time.Unix(1, 0)) })
	defer stop()
	s, err := l.Accept()
	if err != nil {
		return nil, nil, errors.Join(err, c.Close())
	}
	return c.(*net.TCPConn), s.(*net.TCPConn), nil
}
