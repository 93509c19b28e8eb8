package nvmmirror

import (
	"errors"
	"fmt"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// Errors of opening a region. All name the file; test with errors.Is and
// errors.As.
var (
	// ErrNotRegion: the file does not hold nvmmirror metadata.
	ErrNotRegion = errors.New("not an nvmmirror region")
	// ErrInUse: another process, or this one, has the region open.
	ErrInUse = pmem.ErrInUse
)

// Errors of a volume in use.
var (
	// ErrOutcomeUnknown: Commit's wait ended early. The transaction may or
	// may not survive.
	ErrOutcomeUnknown = journal.ErrOutcomeUnknown
	// ErrTooLarge: a transaction with its headers is larger than a quarter
	// of the journal, or than 64 MiB.
	ErrTooLarge = journal.ErrTooLarge
	// ErrUnreadable: what a transaction writes is memory that cannot be read, such as a
	// mapped file that was truncated. Nothing of it was written.
	ErrUnreadable = journal.ErrUnreadable
	// ErrClosed: the volume, or the transaction, has been closed.
	ErrClosed = errors.New("closed")
	// ErrOutOfRange: before the volume's start, or beyond its end.
	ErrOutOfRange = errors.New("outside of the volume")
	// ErrNoLease: the peer has not been heard of for the read lease, and
	// may have been promoted. Reads resume with the peer, or alone.
	ErrNoLease = errors.New("not read: no peer in sync has answered within the read lease, and this node does not serve alone: reconnect the peer, or continue alone")
)

// SizeError: a region cannot be created with such a size.
type SizeError struct{ Path, Problem string }

func (e *SizeError) Error() string { return e.Path + ": " + e.Problem }

// DamageError: the journal is damaged below what was acknowledged.
type DamageError = journal.DamageError

// ErrNotPrimary: only the primary writes and reads.
type ErrNotPrimary = replicate.ErrNotPrimary

// RefusedError: a change of role that could lose data was refused.
type RefusedError = replicate.RefusedError

// CorruptError: bytes at rest do not match their checksums, or cannot be read, and
// nothing here can repair them.
type CorruptError struct {
	What   string // such as "block 17"
	Detail string
	Err    error // a [*pmem.FaultError] where they cannot be read
}

func (e *CorruptError) Unwrap() error { return e.Err }

func (e *CorruptError) Error() string { return fmt.Sprintf("%s: corrupt (%s)", e.What, e.Detail) }

// LengthError: the file is shorter, in bytes, than its metadata says.
type LengthError struct{ Have, Want int64 }

func (e *LengthError) Error() string {
	return fmt.Sprintf("the file has %d bytes, its metadata says %d: it was cut off or copied in part; restore it, or create it anew and let the peer fill it", e.Have, e.Want)
}

// WeakerError: the region lies on memory that loses more than the one it was created
// on. Nothing was changed.
type WeakerError struct {
	Created, Have pmem.Class
	Device        bool // and not a file
}

func (e *WeakerError) Error() string {
	if e.Device {
		return fmt.Sprintf("the region was created on %v memory, and this device is %v: earlier builds took every devdax device for persistent; a power failure empties it, so let the peer fill a region on another medium, or create one here anew with --emulate", e.Created, e.Have)
	}
	return fmt.Sprintf("the region was created on %v memory, the file lies on %v, which loses more: move it back, or create a new region there and let the peer fill it", e.Created, e.Have)
}

// ShutdownError: the device counts another number of dirty shutdowns than when
// the region, which was not closed cleanly, was last open: what was flushed may
// have been lost.
type ShutdownError struct{ Have, Want uint64 }

func (e *ShutdownError) Error() string {
	return fmt.Sprintf("the device counts %d dirty shutdowns, %d when the region was last open: flushed data may be lost; replace this region and let the peer fill it", e.Have, e.Want)
}
