// Package replicate mirrors a region's journal to a peer: the wire, the rules
// (epochs, title, handshake), and the two ends of a session.
//
// # Goroutines
//
// A [Pair] has one goroutine, run, that owns the connection slot: it dials,
// takes what the listener accepts, runs one session at a time, each in a
// goroutine that it joins before the next, and between sessions does what
// changes the node's role. A dial has a goroutine, which run joins. The accept
// loop has a few, each of which reads a connection's first message before it
// offers the connection; it joins them. A session's lanes have one each, and one
// that dials them, which the session joins. A demotion that waits for the peer has
// one, which ends with that wait. The committers of a primary in sync drive its
// session themselves.
//
// # What always holds
//
//   - All receivers of an old session have ended before a new one starts, and
//     before the role changes.
//   - A new epoch is durable here before the first segment under it is
//     written, and durable at the peer before the peer takes that segment.
//   - The title is given up durably by one side before the other takes it.
//   - On a primary required is true whenever the last history entry says that
//     both acknowledge; it turns false only after an entry without the peer is
//     durable.
package replicate

import (
	"context"
	"errors"
	"math"
	"net/netip"
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
	Lanes     int                 // connections for long segments, at most; both ends use the smaller number
	BusyPoll  time.Duration       // before a receiver sleeps
	Async     bool
	Alone     bool // on peer loss; else block
	Log       *zap.Logger
	// Clock is what leases are counted by: nil: CLOCK_BOOTTIME.
	Clock func() time.Duration
	// Diagnose says what the kernel's counters tell about connections that
	// do not come about, "" for nothing. It may be nil.
	Diagnose func() string
}

// Counters count what status and metrics show.
type Counters struct {
	CRCFailures  atomic.Uint64 // segments, frames and bodies of messages whose checksum failed here
	Resends      atomic.Uint64 // requests of the peer for log that it was sent damaged
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
	started   time.Duration // by now()
	counters  Counters
	frames    refusals // of damaged frames, which are logged likewise

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	ln     transport.Listener
	offers chan *session // accepted, hello read
	calls  chan *call    // work between sessions
	kick   chan struct{} // look at requests now

	// Read by committers and readers.
	current      atomic.Pointer[session] // that runs, for lanes to find
	insync       atomic.Pointer[session] // set by join; only the role's holder uses it
	follower     atomic.Pointer[session] // of async mode: wake it for new log
	mode         atomic.Pointer[mode]    // see change
	pin          atomic.Uint64           // the ring is kept from here on; max: no one needs it
	peerAcked    atomic.Uint64           // what the peer has persisted, or says is acknowledged
	leaseUntil   atomic.Int64            // by now(); of reads on a primary that requires its peer
	lastAnswer   atomic.Int64            // by now(); of a secondary's last echo
	sessionEnded atomic.Int64            // by now(); when the last session ended
	copied       atomic.Int64            // bytes of a full copy so far
	copyID       uint64                  // of the full copies that this process makes
	have         copied                  // of one that was cut off: the session's

	// Changed by run, by the session goroutine that it waits for, and by who has
	// the committer's role; the atomics are read, and wantTitle and claim set, by
	// anyone.
	ready     chan struct{} // closed once the node serves, or will not as it is
	readied   sync.Once
	wantTitle atomic.Bool          // a promotion waits for the title
	claim     atomic.Pointer[call] // a promotion of a blank node, for the session to do
	looking   atomic.Bool          // a restarted primary that needs nobody: it looks for its peer first
	rival     atomic.Bool          // the peer was another primary at the last handshake
	fresh     bool                 // a primary that has not minted an epoch since it started
	sessions  int                  // so far
	unsound   journal.LSN          // log below is not sent: it is damaged here
	lost      time.Duration        // by now(); when a peer that had joined was last heard of
	told      []string             // handshakes, and without figures why it cannot be reached or sessions end, as logged since one worked

	mu      sync.Mutex
	phase   Phase
	reason  string
	verdict Verdict
	said    refusal // the last one of a connection that the peer made
	differs string  // in what the peer is configured differently
	wanted  []int64 // blocks to fetch from the peer
	asked   []int64 // those that a session has asked for
}

// mode is what a node is and does. It changes as a whole: who looks meanwhile,
// as readers and checkpoints do, sees no half of a change.
type mode struct {
	role     Role
	required bool // acknowledgements need the peer
	serving  bool // transactions are taken
}

// change changes the mode. The caller has the role, or its session has closed
// the committer.
func (p *Pair) change(f func(*mode)) {
	m := *p.mode.Load()
	f(&m)
	p.mode.Store(&m)
}

// Phase is the peer's state, as status and metrics show it.
type Phase string

const (
	PhaseNone      Phase = "none"        // standalone
	PhaseLost      Phase = "lost"        // no session
	PhaseConnected Phase = "connected"   // and nothing is shipped
	PhaseCatchUp   Phase = "catching-up" // by the log
	PhaseResync    Phase = "resyncing"   // by a full copy
	PhaseInSync    Phase = "in-sync"
	PhaseRefused   Phase = "refused" // by the last handshake
)

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

// New makes a node's end of a pair. Listen and Start must follow, and Close, also where
// they fail.
func New(node Node, cfg Config) *Pair {
	p := &Pair{
		cfg: cfg, node: node, log: cfg.Log,
		offers: make(chan *session), calls: make(chan *call), kick: make(chan struct{}, 1),
		phase: PhaseLost, reason: "not connected yet",
		copyID: NewNodeID(),
	}
	if p.cfg.Clock == nil {
		p.cfg.Clock = boottime
	}
	p.started, p.lost = p.now(), p.now()
	if p.log == nil {
		p.log = zap.NewNop()
	}
	if cfg.Transport == nil {
		p.phase, p.reason = PhaseNone, "standalone"
	}
	p.ready = make(chan struct{})
	p.heartbeat, p.lease = Timing(cfg.Timeout)
	p.mode.Store(new(mode))
	p.pin.Store(math.MaxUint64)
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

// Timing is the heartbeat interval and the read lease that follow from the
// peer timeout.
func Timing(timeout time.Duration) (heartbeat, lease time.Duration) {
	return timeout / 5, timeout / 2
}

// Listen takes the address of a node that has a peer: what most often keeps one
// from starting, before anything of the region has changed.
func (p *Pair) Listen() (err error) {
	if p.cfg.Transport != nil {
		p.ln, err = p.cfg.Transport.Listen(p.cfg.Listen)
	}
	return err
}

// Start resumes the role that the region remembers, and looks for the peer. A
// node that has one listens already.
func (p *Pair) Start() error {
	if err := p.resume(); err != nil {
		return err
	}
	if p.ln != nil {
		p.wg.Go(p.accept)
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
