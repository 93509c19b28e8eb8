package replicate

import (
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// Node is one node's region as replication sees it. The root package's Volume
// implements it.
//
// The owner of the log is on a primary the holder of the committer's role, on
// a secondary the session. Only it calls Apply, AcceptLoss, Truncate, Extend,
// StartCopy, CopyBlocks and FinishCopy.
type Node interface {
	Memory() pmem.Memory
	// State is a copy of the durable state.
	State() State
	// Update changes the state: durable in both metadata copies when it
	// returns, unchanged where it fails.
	Update(func(*State) error) error
	Geometry() Geometry
	Log() *journal.Log
	Committer() *journal.Committer
	// Checkpoint is the LSN from which recovery would read the log.
	Checkpoint() journal.LSN
	// Fail notes that the log could not be made durable: nothing is
	// acknowledged from here until the region is opened anew. Failed is why
	// that is so.
	Fail(err error)
	Failed() error
	// Applied is the LSN up to which the data holds the log.
	Applied() journal.LSN
	// Damaged reports whether recovery found log missing below what was
	// acknowledged, or the peer held it, and it has not been brought back since.
	Damaged() bool
	// Lost notes durably that log up to an LSN beyond this node's end was, or may
	// have been, acknowledged: it is damaged until that is brought back.
	Lost(upTo journal.LSN) error
	// AcceptLoss gives up the log that is damaged, as an operator forced it, and
	// starts the log over beyond its ring. f, which begins an epoch where the
	// damage does, becomes durable with it. The caller has the role.
	AcceptLoss(f func(*State) error) error
	// Apply makes the log visible up to an LSN, at most its end.
	Apply(upTo journal.LSN) error
	// Truncate drops the log from lsn on: nothing of it was applied. The
	// history, which makes what is dropped invalid, is durable.
	Truncate(lsn journal.LSN, chain uint32) error
	// Extend moves the log's end over whole segments that follow, as recovery
	// does: log behind damage that was brought back.
	Extend() error

	// ReadBlocks reads len(info) blocks from first on into dst, and what the
	// table says of each into info. applied is the LSN of what was read. A
	// block that fails its checksum is an error, and the last that info and applied
	// tell of: zero, unless it counts as damaged only because it was unverified and
	// differed from the peer's.
	ReadBlocks(first int64, dst []byte, info []BlockInfo) (applied journal.LSN, err error)
	// Entries is what the table says of len(info) blocks from first on, unread. applied
	// is the LSN of the data then.
	Entries(first int64, info []BlockInfo) (applied journal.LSN, err error)
	// Doubtful are blocks that are known to be damaged, or not verified since a crash, at
	// most so many.
	Doubtful(most int) []int64
	// StartCopy makes r durable with the state that f leaves, then starts
	// the log over at r.Fork. keep: the copy leaves out blocks that are here.
	StartCopy(r Resync, keep bool, f func(*State)) error
	// CopyBlocks stores len(info) blocks of a full copy, already verified. It
	// does not keep src or info.
	CopyBlocks(first int64, src []byte, info []BlockInfo) error
	// FinishCopy makes durable what was copied and applied, then clears the
	// record.
	FinishCopy() error
	// Repaired is the peer's answer to Pair.RequestBlock, or why there is none. Where
	// the peer's block counts as damaged only because it was unverified and differed
	// from the one here, info tells of it, else it is zero. It does not keep data.
	Repaired(block int64, data []byte, info BlockInfo, applied journal.LSN, err error)
}

// BlockInfo is what the block table says of a block.
type BlockInfo struct {
	LSN journal.LSN // after the segment of the last change
	CRC uint32
	// Unverified: the checksum was taken anew after a crash, and has not
	// been compared with the peer's since.
	Unverified bool
	// Damaged: the block was found damaged, or its entry is. Only Entries says so.
	Damaged bool
}
