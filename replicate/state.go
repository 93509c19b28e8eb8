package replicate

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/nvmmirror/nvmmirror/journal"
)

// UUID names a lineage: all states of a volume that grew out of one another.
// The zero UUID is a blank node's.
type UUID [16]byte

// newUUID is a random (version 4) UUID.
func newUUID() (u UUID) {
	rand.Read(u[:]) // never fails: crypto/rand
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

// NewNodeID is a random node id, never 0.
func NewNodeID() uint64 {
	var b [8]byte
	rand.Read(b[:])
	return binary.LittleEndian.Uint64(b[:]) | 1
}

func (u UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// MarshalText writes the UUID as 32 hexadecimal digits.
func (u UUID) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, u[:]), nil }

// UnmarshalText is the reverse of MarshalText.
func (u *UUID) UnmarshalText(b []byte) error {
	if len(b) != 32 {
		return fmt.Errorf("lineage %q is not 32 hexadecimal digits", b)
	}
	_, err := hex.Decode(u[:], b)
	return err
}

// Role is what a node is in its pair.
type Role uint8

const (
	// Secondary takes the primary's log. A blank node is one too.
	Secondary Role = iota
	// Primary acknowledges.
	Primary
)

func (r Role) String() string {
	if r == Primary {
		return "primary"
	}
	return "secondary"
}

// MarshalText is String.
func (r Role) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText is the reverse of MarshalText.
func (r *Role) UnmarshalText(b []byte) error {
	switch string(b) {
	case "primary":
		*r = Primary
	case "secondary":
		*r = Secondary
	default:
		return fmt.Errorf("role %q is neither primary nor secondary", b)
	}
	return nil
}

// Resync is the durable record that precedes the first block that a full copy
// overwrites. While it stands the node is inconsistent: not promoted, not
// read.
type Resync struct {
	Fork  journal.LSN   `json:"fork"` // the log starts over here
	Base  journal.LSN   `json:"base"` // of the source's ring
	Chain uint32        `json:"chain"`
	Epoch journal.Epoch `json:"epoch"`
}

// State is what a node durably knows about itself and its pair: all that the
// rules of replication look at and change.
type State struct {
	Lineage UUID
	Node    uint64
	Peer    uint64 // the last peer's node id, 0 for none
	Role    Role
	Title   bool // the right to proceed without the other
	Alone   bool // policy on peer loss: go on alone; else block
	Lease   time.Duration
	// Acked is known to be acknowledged by all required nodes. It is durable
	// here: below it, log that is not valid is damage. A node that joins, or
	// takes the title, notes the end of the log that it has then, since hints in
	// log that the other wrote alone do not bind it (journal.Entry.Binds).
	Acked   journal.LSN
	History journal.History
	Resync  *Resync
}

// Blank reports whether the node belongs to no lineage yet.
func (s *State) Blank() bool { return s.Lineage == UUID{} }

// Clone is a copy that shares nothing.
func (s *State) Clone() State {
	c := *s
	c.History = append(journal.History(nil), s.History...)
	if s.Resync != nil {
		r := *s.Resync
		c.Resync = &r
	}
	return c
}

// Geometry is what two regions must have in common to mirror each other.
type Geometry struct {
	Size    int64 `json:"size"`    // of the volume, bytes
	Journal int64 `json:"journal"` // of the ring, bytes
	Block   int64 `json:"block"`   // bytes
}
