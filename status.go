package nvmmirror

import (
	"fmt"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// Status is the state of a volume, as the daemon's status command shows it.
type Status struct {
	Path      string          `json:"region"`
	Size      int64           `json:"size"`
	Journal   int64           `json:"journal_size"`
	Class     string          `json:"class"`
	Lineage   replicate.UUID  `json:"lineage"`
	Node      string          `json:"node"`
	Role      string          `json:"role"` // primary, secondary
	Peer      replicate.Phase `json:"peer"`
	Reason    string          `json:"reason"` // of the peer's state
	Transport string          `json:"transport,omitempty"`
	Lanes     int             `json:"connections"` // for long transactions, beside the session's own
	Rule      string          `json:"rule,omitempty"`
	Epoch     journal.Epoch   `json:"epoch"`
	Title     bool            `json:"title"`
	Serving   bool            `json:"serving"`
	Ack       Ack             `json:"ack"`          // in force
	OnLoss    OnPeerLoss      `json:"on_peer_loss"` // in force
	Committed LSN             `json:"committed_lsn"`
	Acked     LSN             `json:"acked_lsn"`
	Applied   LSN             `json:"applied_lsn"`
	Ckpt      LSN             `json:"checkpoint_lsn"`
	Waiting   bool            `json:"commits_waiting"`  // for the peer, on a primary
	Failed    string          `json:"failed,omitempty"` // why persistence failed: nothing is acknowledged any more
	Damaged   bool            `json:"journal_damaged"`  // below what was acknowledged
	Degraded  []string        `json:"degraded"`
	Resync    *Progress       `json:"resync,omitempty"`
	Recovery  Recovery        `json:"recovery"`
	Counters  Counters        `json:"counters"`
}

// Progress is that of a full copy.
type Progress struct {
	Done  int64 `json:"done_bytes"`
	Total int64 `json:"total_bytes"`
}

// Counters count since the volume was opened, but for UnverifiedBlocks, which are
// those of now.
type Counters struct {
	Commits          uint64 `json:"commits"`         // acknowledged
	CommittedBytes   uint64 `json:"committed_bytes"` // of their records in the log, headers included
	Reads            uint64 `json:"reads"`           // calls
	Checkpoints      uint64 `json:"checkpoints"`
	CRCFailures      uint64 `json:"crc_failures"` // frames and messages of the peer
	Resends          uint64 `json:"resends"`      // that the peer asked for
	Reconnects       uint64 `json:"reconnects"`   // sessions after the first
	DialFailures     uint64 `json:"dial_failures"`
	Refused          uint64 `json:"refused_handshakes"`
	BadBlocks        uint64 `json:"bad_blocks"`        // found not to match their checksums, or not readable
	RepairedBlocks   uint64 `json:"repaired_blocks"`   // from the peer; of a damaged entry alone, by a change of the block
	UnverifiedBlocks int64  `json:"unverified_blocks"` // not compared with the peer since a crash
	ScrubbedBlocks   uint64 `json:"scrubbed_blocks"`   // verified in the background
	MetadataRepairs  uint64 `json:"metadata_repairs"`  // of one copy from the other
	MD5Failures      uint64 `json:"md5_failures"`      // of the kernel, all connections of the network namespace
}

// Status is the volume's state now.
func (v *Volume) Status() Status {
	v.metaMu.Lock()
	m := v.meta
	v.metaMu.Unlock()
	ps := v.pair.Status()
	last := m.State.History.Last()
	s := Status{
		Path: v.path, Size: m.Size, Journal: m.Journal.Len, Class: v.mem.Class().String(),
		Lineage: m.State.Lineage, Node: fmt.Sprintf("%016x", m.State.Node),
		Role: v.pair.Role().String(), Peer: ps.Phase, Reason: ps.Reason, Transport: v.opt.transportName(), Lanes: ps.Lanes, Rule: string(ps.Rule),
		Epoch: last.Epoch, Title: m.State.Title, Ack: AckBoth, OnLoss: Block,
		Committed: v.journal.End(), Acked: min(v.journal.End(), max(m.State.Acked, v.acked())), Applied: v.Applied(), Ckpt: v.Checkpoint(),
		Degraded: []string{}, Recovery: v.recovery,
	}
	if last.Async {
		s.Ack = AckAsync
	}
	if m.State.Alone {
		s.OnLoss = Alone
	}
	if ps.Phase == replicate.PhaseResync {
		s.Resync = &Progress{ps.Copied, m.Size}
	}
	degraded := func(on bool, format string, args ...any) {
		if on {
			s.Degraded = append(s.Degraded, fmt.Sprintf(format, args...))
		}
	}
	primary := v.pair.Role() == replicate.Primary
	bad, unverified := v.bad.n.Load(), v.unverified.n.Load()
	if err := errOf(v.failed.Load()); err != nil {
		s.Failed = err.Error()
	}
	s.Serving = v.pair.Serving() && s.Failed == ""
	s.Waiting = primary && (v.pair.Required() && ps.Phase != replicate.PhaseInSync || !v.pair.Serving())
	s.Damaged = (*node)(v).Damaged()
	degraded(s.Failed != "", "persistence failed: %s", s.Failed)
	degraded(v.mem.Class() == pmem.Emulated, "emulated memory: nothing survives a reboot")
	degraded(v.opt.Peer == nil, "standalone: one copy only")
	degraded(v.opt.Peer != nil && primary && !last.PeerIn, "alone: the peer is out since LSN %d", last.Start)
	degraded(s.Waiting, "commits wait for the peer")
	degraded(last.Async, "async: a failover loses what the peer did not get yet")
	if v.opt.Peer != nil && ps.Phase != replicate.PhaseInSync {
		degraded(ps.Reason == "", "peer %s", ps.Phase)
		degraded(ps.Reason != "", "peer %s: %s", ps.Phase, ps.Reason)
	}
	degraded(m.State.Resync != nil, "inconsistent: a full copy has not finished")
	degraded(ps.Differs != "", "the nodes are configured differently, and a failover changes what is in force: %s", ps.Differs)
	if d := v.damage.Load(); s.Damaged && d != nil {
		degraded(true, "journal damaged: %v", d)
	}
	degraded(bad > 0, "%d damaged blocks", bad)
	degraded(unverified > 0, "%d blocks not compared with the peer since a crash", unverified)
	pc := v.pair.Counters()
	s.Counters = Counters{
		Commits: v.counters.commits.Load(), CommittedBytes: v.counters.bytes.Load(), Reads: v.counters.reads.Load(),
		Checkpoints: v.counters.checkpts.Load(), CRCFailures: pc.CRCFailures.Load(), Resends: pc.Resends.Load(),
		Reconnects: pc.Reconnects.Load(), DialFailures: pc.DialFailures.Load(), Refused: pc.Refused.Load(),
		BadBlocks: v.counters.badBlocks.Load(), RepairedBlocks: v.counters.repaired.Load(),
		UnverifiedBlocks: unverified, ScrubbedBlocks: v.counters.scrubbed.Load(), MetadataRepairs: v.counters.metaRepairs.Load(),
		MD5Failures: v.md5Failures(),
	}
	return s
}

func errOf(p *error) error {
	if p == nil {
		return nil
	}
	return *p
}
