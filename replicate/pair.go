// Package replicate mirrors a region's journal to a peer: the wire, the rules
// (epochs, title, handshake), and the two ends of a session.
//
// # Goroutines
//
// A [Pair] has one goroutine, run, that owns the connection slot: it dials,
// takes what the listener accepts, runs one session at a time, each in a
// goroutine that it joins before the next, and between sessions does what
// changes the node's role. The accept loop reads a connection's first message
// before it offers the connection. Nothing else runs, except that the
// committers of a primary in sync drive its session themselves.
//
// # What always holds
//
//   - All receivers of an old session have ended before a new one starts, and
//     before the role changes.
//   - A new epoch is durable here before the first segment under it is
//     written, and durable at the peer before the peer takes that segment.
//   - The title is given up durably by one side before the other takes it.
//   - required is true whenever the last history entry says that both
//     acknowledge; it turns false only after an entry without the peer is
//     durable.
package replicate

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// Config is how a node reaches its peer, and what it promises.
type Config struct {
	Listen    netip.AddrPort
	Peer      netip.AddrPort
	Transport transport.Transport // nil: standalone
	Timeout   time.Duration       // of the peer
	BusyPoll  time.Duration       // before a receiver sleeps
	Async     bool
	Alone     bool // on peer loss; else block
	Log       *zap.Logger
	// Diagnose says what the kernel's counters tell about connections that
	// do not come about, "" for nothing. It may be nil.
	Diagnose func() string
}

// Counters count what status and metrics show.
type Counters struct {
	CRCFailures  atomic.Uint64 // frames and messages whose checksum failed here
	Resends      atomic.Uint64 // frames sent again
	Reconnects   atomic.Uint64 // sessions after the first
	Refused      atomic.Uint64 // handshakes that ended in refusal
	DialFailures atomic.Uint64
}

// Pair is one node's end of a mirrored pair, or a standalone node.
type Pair struct {
	cfg       Config
	log       *zap.Logger
	node      Node
	heartbeat time.Duration
	lease     time.Duration
	started   time.Duration // boottime
	counters  Counters

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	ln     transport.Listener
	offers chan *session // accepted, hello read
	calls  chan *call    // work between sessions
	kick   chan struct{} // look at requests now

	// Read by committers and readers.
	insync     atomic.Pointer[session] // set by join; only the role's holder uses it
	follower   atomic.Pointer[session] // of async mode: wake it for new log
	required   atomic.Bool             // acknowledgements need the peer
	pin        atomic.Uint64           // the ring is kept from here on; max: no one needs it
	peerAcked  atomic.Uint64           // what the peer has persisted, or says is acknowledged
	leaseUntil atomic.Int64            // boottime; of reads on a primary that requires its peer
	lastAnswer atomic.Int64            // boottime; of a secondary's last echo
	role       atomic.Uint32
	copied     atomic.Int64 // bytes of a full copy so far

	// Of run, and of the session goroutine that it waits for.
	ready     chan struct{} // closed once the node serves, or will not as it is
	readied   sync.Once
	wantTitle atomic.Bool // a promotion waits for the title
	serving   atomic.Bool
	fresh     bool          // a primary that has not minted an epoch since it started
	sessions  int           // so far
	lost      time.Duration // boottime; when the peer was last heard of

	mu      sync.Mutex
	phase   phase
	reason  string
	verdict Verdict
	wanted  []uint32 // blocks to fetch from the peer
}

type phase uint8

const (
	phaseNone phase = iota // standalone
	phaseLost
	phaseConnected
	phaseCatchUp
	phaseResync
	phaseInSync
	phaseRefused
)

func (p phase) String() string {
	return [...]string{"none", "lost", "connected", "catching-up", "resyncing", "in-sync", "refused"}[p]
}

// dialTime is the longest that a dial waits: a wrong key, which is only seen by
// there being no answer, is to be reported within seconds.
const dialTime = 2 * time.Second

// errAgain: the session ended well, decide again at once.
var errAgain = errors.New("deciding again")

// ErrNotPrimary: only a primary writes and reads. It names who is.
type ErrNotPrimary struct{ Primary string }

func (e *ErrNotPrimary) Error() string {
	if e.Primary == "" {
		return "this node is a secondary, and no primary is known; promote one of the nodes"
	}
	return "this node is a secondary; the primary is " + e.Primary
}

// New makes a node's end of a pair. Start must follow.
func New(node Node, cfg Config) *Pair {
	p := &Pair{
		cfg: cfg, node: node, log: cfg.Log,
		offers: make(chan *session), calls: make(chan *call), kick: make(chan struct{}, 1),
		started: boottime(), lost: boottime(), phase: phaseLost, reason: "not connected yet",
	}
	if p.log == nil {
		p.log = zap.NewNop()
	}
	if cfg.Transport == nil {
		p.phase, p.reason = phaseNone, "standalone"
	}
	p.ready = make(chan struct{})
	p.heartbeat, p.lease = Timing(cfg.Timeout)
	p.pin.Store(math.MaxUint64)
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

// Timing is the heartbeat interval and the read lease that follow from the
// peer timeout.
func Timing(timeout time.Duration) (heartbeat, lease time.Duration) {
	return timeout / 5, timeout / 2
}

// Start resumes the role that the region remembers, and looks for the peer.
func (p *Pair) Start() error {
	if p.cfg.Transport != nil {
		ln, err := p.cfg.Transport.Listen(p.cfg.Listen)
		if err != nil {
			return err
		}
		p.ln = ln
		p.wg.Go(p.accept)
	}
	if err := p.resume(); err != nil {
		if p.ln != nil {
			p.ln.Close()
		}
		p.cancel()
		p.wg.Wait()
		return err
	}
	p.wg.Go(p.run)
	return nil
}

// Close ends the session and all goroutines. The role stays.
func (p *Pair) Close() {
	p.cancel()
	if p.ln != nil {
		p.ln.Close()
	}
	p.wg.Wait()
	p.failRepairs()
}

// Addr is where the node listens; the zero AddrPort where it is standalone.
func (p *Pair) Addr() netip.AddrPort {
	if p.ln == nil {
		return netip.AddrPort{}
	}
	return p.ln.Addr()
}

// accept reads the first message of each connection that comes in, so that
// nothing but a peer that speaks the protocol can end a session.
func (p *Pair) accept() {
	slots := make(chan struct{}, 4)
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := p.ln.Accept()
		if err != nil {
			if p.ctx.Err() != nil {
				return
			}
			p.log.Warn("accept", zap.Error(err))
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			s := newSession(p, conn)
			ctx, cancel := context.WithTimeoutCause(p.ctx, p.cfg.Timeout, errSilent)
			defer cancel()
			s.ctx = ctx
			stop := context.AfterFunc(p.ctx, conn.Wake)
			defer stop()
			if err := s.readHello(); err != nil {
				p.log.Warn("connection refused", zap.Stringer("from", conn.RemoteAddr()), zap.Error(err))
				p.noteReason(err.Error())
				conn.Close()
				return
			}
			select {
			case p.offers <- s:
			case <-p.ctx.Done():
				conn.Close()
			}
		})
	}
}

// call is work for the run goroutine, between sessions.
type call struct {
	f    func() error
	done chan error
}

// between runs f while no session runs, and none is accepted.
func (p *Pair) between(ctx context.Context, f func() error) error {
	c := &call{f: f, done: make(chan error, 1)}
	select {
	case p.calls <- c:
		return <-c.done
	case <-ctx.Done():
		return ctx.Err()
	case <-p.ctx.Done():
		return errors.New("the node is being closed")
	}
}

// run owns the connection slot.
func (p *Pair) run() {
	var backoff time.Duration
	for p.ctx.Err() == nil {
		s := p.connect(backoff)
		for s != nil {
			var next *session
			var err error
			next, err = p.supervise(s)
			switch {
			case next != nil:
			case errors.Is(err, errAgain):
				backoff = 0
			case p.Phase() == "refused":
				backoff = p.cfg.Timeout
			default:
				backoff = min(2*backoff+p.cfg.Timeout/50, p.cfg.Timeout)
			}
			s = next
		}
	}
}

// connect waits for a connection: dialled after delay, or accepted. It is nil
// where none came about; other work may have been done meanwhile.
func (p *Pair) connect(delay time.Duration) *session {
	ctx, cancel := context.WithCancel(p.ctx)
	defer cancel()
	type result struct {
		conn transport.Conn
		err  error
	}
	dialed := make(chan result, 1)
	if p.cfg.Transport != nil {
		if !p.firstToDial() {
			delay += min(p.cfg.Timeout, dialTime) / 10
		}
		p.wg.Go(func() {
			if !wait(ctx, delay) {
				dialed <- result{nil, ctx.Err()}
				return
			}
			ctx, cancel := context.WithTimeout(ctx, min(p.cfg.Timeout, dialTime))
			defer cancel()
			conn, err := p.cfg.Transport.Dial(ctx, p.cfg.Listen.Addr(), p.cfg.Peer)
			dialed <- result{conn, err}
		})
	}
	abandon := func() {
		cancel()
		if p.cfg.Transport != nil {
			if r := <-dialed; r.conn != nil {
				r.conn.Close()
			}
		}
	}
	var alone <-chan time.Time
	if d, ok := p.untilAlone(); ok {
		t := time.NewTimer(d)
		defer t.Stop()
		alone = t.C
	}
	select {
	case s := <-p.offers:
		abandon()
		return s
	case r := <-dialed:
		if r.err != nil {
			p.counters.DialFailures.Add(1)
			p.notePeerLost(r.err)
			return nil
		}
		s := newSession(p, r.conn)
		s.dialed = true
		return s
	case c := <-p.calls:
		abandon()
		c.done <- c.f()
	case <-alone:
		abandon()
		if err := p.goAlone("peer lost"); err != nil {
			p.log.Error("going alone failed", zap.Error(err))
		}
	case <-p.kick:
		abandon()
		p.failRepairs()
	case <-p.ctx.Done():
		abandon()
	}
	return nil
}

func wait(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// firstToDial reports whether this end's own connection wins over one that
// the peer makes at the same time. The ends' addresses settle it the same way
// on both sides.
func (p *Pair) firstToDial() bool { return p.cfg.Listen.Compare(p.cfg.Peer) < 0 }

// supervise runs a session to its end. A connection that the peer makes
// meanwhile replaces it, and is returned: the peer dials only where it has no
// session. The exception is a connection of ours that may just be on its way.
func (p *Pair) supervise(s *session) (next *session, err error) {
	ctx, cancel := context.WithCancel(p.ctx)
	defer cancel()
	s.ctx = ctx
	stop := context.AfterFunc(ctx, s.conn.Wake)
	defer stop()
	if p.sessions++; p.sessions > 1 {
		p.counters.Reconnects.Add(1)
	}
	done := make(chan error, 1)
	p.wg.Go(func() { done <- p.session(s) })
	var work *call
	for {
		select {
		case err = <-done:
			s.conn.Close()
			p.ended(s, err)
			if work != nil {
				work.done <- work.f()
				err = errAgain
			}
			return next, err
		case o := <-p.offers:
			if !s.established.Load() && s.dialed && p.firstToDial() || next != nil || work != nil {
				o.conn.Close()
				continue
			}
			next = o
			cancel()
		case c := <-p.calls:
			if work != nil {
				c.done <- errors.New("another change of this node's role is under way")
				continue
			}
			work = c
			cancel()
		}
	}
}

// ended notes why a session ended.
func (p *Pair) ended(s *session, err error) {
	p.mu.Lock()
	refused := p.phase == phaseRefused
	if !refused {
		p.phase = phaseLost
		if err != nil && !errors.Is(err, errAgain) && !errors.Is(err, context.Canceled) {
			p.reason = err.Error()
		}
	}
	p.mu.Unlock()
	p.unpin()
	p.failRepairs()
	if err != nil && !errors.Is(err, errAgain) && !errors.Is(err, context.Canceled) {
		p.log.Warn("session ended", zap.Stringer("peer", s.conn.RemoteAddr()), zap.Error(err))
	}
	p.lost = s.heard
}

func (p *Pair) unpin() { p.pin.Store(math.MaxUint64) }

// poke makes the goroutine in charge look at what is wanted.
func (p *Pair) poke() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

func (p *Pair) setPhase(ph phase, reason string) {
	p.mu.Lock()
	p.phase, p.reason = ph, reason
	p.mu.Unlock()
}

func (p *Pair) noteReason(r string) {
	p.mu.Lock()
	if p.phase == phaseLost {
		p.reason = r
	}
	p.mu.Unlock()
}

// notePeerLost says why no connection comes about.
func (p *Pair) notePeerLost(err error) {
	reason := fmt.Sprintf("cannot reach the peer: %v", err)
	var dial *transport.DialError
	told := errors.As(err, &dial) && dial.Rose.Diagnose() != ""
	if p.cfg.Diagnose != nil && !told {
		if d := p.cfg.Diagnose(); d != "" {
			reason += "; " + d
		}
	}
	p.mu.Lock()
	changed := withoutFigures(p.reason) != withoutFigures(reason)
	if p.phase == phaseLost || p.phase == phaseRefused {
		p.phase, p.reason = phaseLost, reason
	}
	p.mu.Unlock()
	if changed {
		p.log.Warn("peer lost", zap.String("reason", reason))
	}
}

// withoutFigures is what stays the same while counters in a reason grow.
func withoutFigures(s string) string {
	return strings.Map(func(r rune) rune {
		if '0' <= r && r <= '9' {
			return -1
		}
		return r
	}, s)
}

// --- what committers and readers see ---

// Progress implements the committer's sink, as far as the pair goes: what all
// required nodes hold, and where the ring must not be written.
func (p *Pair) Progress() (acked, limit journal.LSN) {
	end := p.node.Log().End()
	size := journal.LSN(p.node.Log().Ring().Size())
	limit = p.node.Checkpoint() + size
	if s := p.insync.Load(); s != nil {
		p.progress(s)
		limit = min(limit, s.peerCkpt+size)
		acked = s.acked
	} else if f := p.follower.Load(); f != nil && journal.LSN(p.peerAcked.Load()) < end {
		f.conn.Wake()
	}
	if pin := p.pin.Load(); pin != math.MaxUint64 {
		limit = min(limit, journal.LSN(pin)+size)
	}
	switch {
	case !p.serving.Load():
		acked = 0 // the log is a session's, which applies it itself
	case !p.required.Load():
		acked = end
	}
	return acked, limit
}

// Wait sleeps until Progress may have something.
func (p *Pair) Wait(d time.Duration) bool {
	if s := p.insync.Load(); s != nil {
		s.conn.Wait(len(s.pending) > 0, d)
		return true
	}
	return false
}

// Wake ends a Wait. It reports false where no session could be waiting.
func (p *Pair) Wake() bool {
	if s := p.insync.Load(); s != nil {
		s.conn.Wake()
		return true
	}
	return false
}

// renewLease extends the read lease, counted from when what was answered left.
func (p *Pair) renewLease(sent time.Duration) {
	if until := int64(sent + p.lease); until > p.leaseUntil.Load() {
		p.leaseUntil.Store(until)
	}
}

// Leased reports whether this primary may serve a read that it has just done:
// it is alone by decision, or its lease has not run out, so that no one can
// have been promoted.
func (p *Pair) Leased() bool {
	return !p.required.Load() || int64(boottime()) < p.leaseUntil.Load()
}

// Serving reports whether transactions are taken; on a secondary they are
// refused.
func (p *Pair) Serving() bool { return p.serving.Load() }

// AwaitServing waits until a primary that was restarted serves: until its peer
// has been heard, or it goes on alone by decision. It returns at once on a
// secondary.
func (p *Pair) AwaitServing(ctx context.Context) error {
	if Role(p.role.Load()) != Primary {
		return nil // the committer says so
	}
	select {
	case <-p.ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-p.ctx.Done():
		return errors.New("the node is being closed")
	}
}

func (p *Pair) ackedHint() journal.LSN { return journal.LSN(p.peerAcked.Load()) }

// Acked is the LSN up to which all required nodes are known to hold the log;
// on a secondary what the primary said of it.
func (p *Pair) Acked() journal.LSN {
	end := p.node.Log().End()
	if p.Role() == Primary && !p.required.Load() {
		return end
	}
	return min(end, p.ackedHint())
}

// Role is what the node is now.
func (p *Pair) Role() Role { return Role(p.role.Load()) }

// NotPrimary is the error that says who is.
func (p *Pair) NotPrimary() error { return p.notPrimary() }

// Required reports whether acknowledgements need the peer.
func (p *Pair) Required() bool { return p.required.Load() }

// Status is the pair as status shows it.
type Status struct {
	Phase  string // as Phase
	Reason string
	Rule   Rule  // of the last handshake
	Copied int64 // bytes of a full copy so far
}

// Status is the pair's state now.
func (p *Pair) Status() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	return Status{Phase: p.phase.String(), Reason: p.reason, Rule: p.verdict.Rule, Copied: p.copied.Load()}
}

// Counters are the pair's counters.
func (p *Pair) Counters() *Counters { return &p.counters }

// Phase is the peer's state: in-sync, connected, catching-up, resyncing, lost,
// refused or none.
func (p *Pair) Phase() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.phase.String()
}
