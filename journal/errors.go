package journal

import (
	"errors"
	"fmt"
)

// FormatKind says why bytes are not a valid segment.
type FormatKind uint8

const (
	// NoSegment: no segment header here; the log was never written so far.
	NoSegment FormatKind = iota + 1
	// BadCRC: the checksum of header or body does not match.
	BadCRC
	// Newer: a format version that this program does not know.
	Newer
	// BadField: checksums match, yet a field has no meaning.
	BadField
	// Stale: a valid segment of another place: an earlier lap of the ring.
	Stale
	// WrongEpoch: an epoch that the history does not assign to this LSN.
	WrongEpoch
	// WrongChain: not written behind the segment that is before it.
	WrongChain
)

func (k FormatKind) String() string {
	switch k {
	case NoSegment:
		return "no segment"
	case BadCRC:
		return "bad checksum"
	case Newer:
		return "newer format"
	case BadField:
		return "bad field"
	case Stale:
		return "stale"
	case WrongEpoch:
		return "foreign epoch"
	case WrongChain:
		return "broken chain"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// FormatError is why the bytes at LSN are not a valid segment.
type FormatError struct {
	Kind   FormatKind
	LSN    LSN
	Detail string
}

func (e *FormatError) Error() string {
	s := fmt.Sprintf("journal: LSN %d: %s", e.LSN, e.Kind)
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	return s
}

// isNewer reports whether err says that the journal needs a newer program.
func isNewer(err error) bool {
	var f *FormatError
	return errors.As(err, &f) && f.Kind == Newer
}

var (
	errNoSegment = &FormatError{Kind: NoSegment}
	errHeaderCRC = &FormatError{Kind: BadCRC, Detail: "segment header"}
)

// DamageError reports an invalid segment below a position that every required
// node had acknowledged: committed transactions are unreadable here. The peer
// can repair it.
type DamageError struct {
	At    LSN // the first invalid segment
	Acked LSN // known to be acknowledged up to here
	Why   error
}

func (e *DamageError) Error() string {
	return fmt.Sprintf("journal: damaged at LSN %d, below %d which was acknowledged: up to %d bytes of committed log are unreadable here; repair from the peer (%v)",
		e.At, e.Acked, e.Acked-e.At, e.Why)
}

func (e *DamageError) Unwrap() error { return e.Why }

var (
	// ErrTooLarge: a transaction does not fit into one segment.
	ErrTooLarge = errors.New("journal: transaction is larger than a segment may be")
	// ErrUnreadable: a buffer of the transaction is memory that cannot be read, such as
	// a mapped file that was truncated.
	ErrUnreadable = errors.New("journal: the data to commit is memory that cannot be read")
	// ErrOutcomeUnknown: the wait for acknowledgements ended early. The
	// transaction may or may not survive.
	ErrOutcomeUnknown = errors.New("outcome unknown: the transaction may or may not have been made durable on every required node")
)
