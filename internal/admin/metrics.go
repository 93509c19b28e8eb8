package admin

import (
	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/replicate"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// metric is a figure of the status, or of the kernel's counters.
type metric struct {
	name, help string
	counts     bool // it only grows; else it is a gauge
	of         func(*nvmmirror.Status, *transport.Counters) float64
}

type (
	st = *nvmmirror.Status
	kc = *transport.Counters
)

func counter(name, help string, of func(st, kc) float64) metric {
	return metric{"nvmmirror_" + name, help, true, of}
}

func gauge(name, help string, of func(st, kc) float64) metric {
	return metric{"nvmmirror_" + name, help, false, of}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// peerStates are all that Status.Peer can be.
var peerStates = []replicate.Phase{
	replicate.PhaseNone, replicate.PhaseLost, replicate.PhaseConnected, replicate.PhaseCatchUp, replicate.PhaseResync, replicate.PhaseInSync, replicate.PhaseRefused,
}

// resync is the progress of a full copy, of zeros where there is none.
func resync(s st) nvmmirror.Progress {
	if s.Resync == nil {
		return nvmmirror.Progress{}
	}
	return *s.Resync
}

var metrics = []metric{
	counter("commits_total", "Transactions acknowledged.", func(s st, _ kc) float64 { return float64(s.Counters.Commits) }),
	counter("committed_bytes_total", "Bytes of log records acknowledged.", func(s st, _ kc) float64 { return float64(s.Counters.CommittedBytes) }),
	counter("reads_total", "Reads.", func(s st, _ kc) float64 { return float64(s.Counters.Reads) }),
	counter("checkpoints_total", "Checkpoints.", func(s st, _ kc) float64 { return float64(s.Counters.Checkpoints) }),
	counter("crc_failures_total", "Frames and messages from the peer whose checksum failed here.", func(s st, _ kc) float64 { return float64(s.Counters.CRCFailures) }),
	counter("resends_total", "Times that log was sent again.", func(s st, _ kc) float64 { return float64(s.Counters.Resends) }),
	counter("reconnects_total", "Sessions with the peer after the first.", func(s st, _ kc) float64 { return float64(s.Counters.Reconnects) }),
	counter("dial_failures_total", "Connections to the peer that did not come about.", func(s st, _ kc) float64 { return float64(s.Counters.DialFailures) }),
	counter("refused_handshakes_total", "Handshakes that ended in refusal.", func(s st, _ kc) float64 { return float64(s.Counters.Refused) }),
	counter("bad_blocks_total", "Blocks that failed their checksum.", func(s st, _ kc) float64 { return float64(s.Counters.BadBlocks) }),
	counter("repaired_blocks_total", "Blocks repaired, from the peer or of a damaged entry alone.", func(s st, _ kc) float64 { return float64(s.Counters.RepairedBlocks) }),
	counter("scrubbed_blocks_total", "Blocks verified in the background, each once a day.", func(s st, _ kc) float64 { return float64(s.Counters.ScrubbedBlocks) }),
	counter("metadata_repairs_total", "Metadata copies repaired from the other.", func(s st, _ kc) float64 { return float64(s.Counters.MetadataRepairs) }),
	gauge("unverified_blocks", "Blocks not compared with the peer since a crash.", func(s st, _ kc) float64 { return float64(s.Counters.UnverifiedBlocks) }),
	gauge("committed_lsn", "End of the local journal.", func(s st, _ kc) float64 { return float64(s.Committed) }),
	gauge("acked_lsn", "All required nodes hold the journal up to here.", func(s st, _ kc) float64 { return float64(s.Acked) }),
	gauge("applied_lsn", "The data holds the journal up to here.", func(s st, _ kc) float64 { return float64(s.Applied) }),
	gauge("checkpoint_lsn", "Recovery would start here.", func(s st, _ kc) float64 { return float64(s.Ckpt) }),
	gauge("epoch", "Counter of the epoch.", func(s st, _ kc) float64 { return float64(s.Epoch.Counter) }),
	gauge("primary", "1 on the primary.", func(s st, _ kc) float64 { return truth(s.Role == "primary") }),
	gauge("title", "1 where the node holds the title.", func(s st, _ kc) float64 { return truth(s.Title) }),
	gauge("serving", "1 on a primary that takes transactions; after a restart it looks for its peer first. Their commits may wait for it all the same: see nvmmirror_commits_waiting.", func(s st, _ kc) float64 { return truth(s.Serving) }),
	gauge("in_sync", "1 where the peer is in sync.", func(s st, _ kc) float64 { return truth(s.Peer == replicate.PhaseInSync) }),
	gauge("commits_waiting", "1 on a primary whose commits wait for the peer.", func(s st, _ kc) float64 { return truth(s.Waiting) }),
	gauge("persistence_failed", "1 where this node acknowledges nothing until it is restarted.", func(s st, _ kc) float64 { return truth(s.Failed != "") }),
	gauge("journal_damaged", "1 where committed log is unreadable here.", func(s st, _ kc) float64 { return truth(s.Damaged) }),
	gauge("resync_done_bytes", "Bytes of a full copy that is under way; 0 where none is.", func(s st, _ kc) float64 { return float64(resync(s).Done) }),
	gauge("resync_total_bytes", "What a full copy that is under way has to copy; 0 where none is.", func(s st, _ kc) float64 { return float64(resync(s).Total) }),
	gauge("connections", "Connections for long transactions that are up.", func(s st, _ kc) float64 { return float64(s.Lanes) }),
	gauge("degraded", "Number of reasons that status lists under degraded.", func(s st, _ kc) float64 { return float64(len(s.Degraded)) }),
	gauge("volume_bytes", "Size of the volume.", func(s st, _ kc) float64 { return float64(s.Size) }),
	gauge("journal_bytes", "Size of the journal.", func(s st, _ kc) float64 { return float64(s.Journal) }),
}

// kernelMetrics are those of the network namespace, since boot.
var kernelMetrics = []metric{
	counter("kernel_tcp_md5_failures_total", "Kernel: segments whose TCP MD5 signature did not verify.", func(_ st, c kc) float64 { return float64(c.MD5Failure) }),
	counter("kernel_tcp_md5_not_found_total", "Kernel: unsigned segments where a signature was required.", func(_ st, c kc) float64 { return float64(c.MD5NotFound) }),
	counter("kernel_tcp_md5_unexpected_total", "Kernel: signed segments for a socket without a key.", func(_ st, c kc) float64 { return float64(c.MD5Unexpected) }),
	counter("kernel_tcp_retransmitted_segments_total", "Kernel: TCP segments sent again.", func(_ st, c kc) float64 { return float64(c.RetransSegs) }),
	counter("kernel_tcp_checksum_errors_total", "Kernel: TCP segments dropped for their own checksum.", func(_ st, c kc) float64 { return float64(c.InCsumErrors) }),
}
