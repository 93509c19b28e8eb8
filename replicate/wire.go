package replicate

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
)

// The wire carries two kinds of things, each behind a 64-byte header that has
// a checksum of its own: segments, exactly as they stand in the ring, and
// messages. A segment of at most MaxFrame bytes is its own frame. A longer one
// travels as Frame messages, each with a piece of it.
//
// A message:
//
//	 0  magic     u32  "NVMW"
//	 4  version   u16  1
//	 6  type      u16
//	 8  session   u64  the session's id, the same on both ends
//	16  a         u64  \
//	24  b         u64   } by type
//	32  c         u64  /
//	40  d         u64 /
//	48  length    u32  of the body
//	52  body CRC  u32  CRC32C of the body
//	56  reserved  u32  0
//	60  CRC       u32  CRC32C of the bytes 0 to 60
//	64  body
//
// All integers are little-endian. Bodies are JSON, except those of Frame (a piece
// of a segment), Spread (a segment's header), Blocks (block data), BlockMissing
// and Bye (text).
const (
	wireMagic   = 0x574d564e // "NVMW"
	wireVersion = 1
	headerSize  = 64

	// MaxFrame is the longest piece of log that one frame carries, in bytes.
	MaxFrame = journal.PieceSize
	// maxBody bounds what a peer can make this node allocate.
	maxBody = 256 << 10
	// BlockSize is the unit of the block table and of copies, in bytes.
	BlockSize = 4096
	// blocksPerMessage bounds a Blocks body to a frame's size.
	blocksPerMessage = MaxFrame / BlockSize
	// blocksPerLook is how much of the block table is looked at at once, so that the
	// log has its turn.
	blocksPerLook = 4 << 10
)

type messageType uint16

const (
	// msgHello {body: hello}: who the sender is. First on both sides.
	msgHello messageType = iota + 1
	// msgChain {a: LSN, b: checksum, c: 1 if known}: the log before the
	// common LSN.
	msgChain
	// msgVerdict {body: verdict}: the sender's decision; both must agree.
	msgVerdict
	// msgFollow {body: follow}: the source tells the other what to follow.
	msgFollow
	// msgFollowed {a: LSN that the log ends at, b: checkpoint}: done, durably. At the
	// start of a full copy of which the follower has something {body: claim}.
	msgFollowed
	// msgJoin {body: join}: an epoch history, policy and the title.
	msgJoin
	// msgJoined {a: 1 if the title was given up, or a volume's beginning left to
	// the other}: done, durably.
	msgJoined
	// msgHeartbeat {a: sender's clock in ns, b: acknowledged up to}.
	msgHeartbeat
	// msgAck {a: persisted LSN, b: checkpoint LSN, c: echo of the latest
	// heartbeat's clock, d: epoch counter}.
	msgAck
	// msgResend {a: LSN}: a frame failed its checksum; go back to there. With
	// {b: LSN of the segment, c: 1} only the piece at a, by the lanes.
	msgResend
	// msgFrame {a: LSN of the first byte; body: a piece of a segment}.
	msgFrame
	// msgBlocks {a: first block, b: blocks, c: LSN of the source's data;
	// body: per block {LSN u64, CRC u32, flags u32: 1 unverified}, then the
	// blocks}.
	msgBlocks
	// msgBlocksDone {a: LSN of the source's data at the end}.
	msgBlocksDone
	// msgBlockRequest {a: block}.
	msgBlockRequest
	// msgBlockMissing {a: block, b: 1 where the body begins with what msgBlocks says of
	// a block: it differs from the receiver's, and neither was verified since a crash,
	// c: LSN of the sender's data}: the sender cannot help; body: why.
	msgBlockMissing
	// msgBye {body: text}: the sender ends the session, and why.
	msgBye
	// msgLane {}: this connection is to be a lane of a session. First on both
	// sides of it; then only frames follow.
	msgLane
	// msgSpread {a: LSN, body: a segment's header}: the segment comes by the
	// lanes.
	msgSpread
	// msgSame {a: first block, b: blocks, c: checksum of what the source's table says of
	// them, which the follower's must say}: in the place of blocks of a full copy that
	// the follower has.
	msgSame
)

// message is a decoded message header.
type message struct {
	typ        messageType
	session    uint64
	a, b, c, d uint64
	length     uint32
	bodyCRC    uint32
}

func (m *message) encode(p []byte) {
	_ = p[headerSize-1]
	le := binary.LittleEndian
	le.PutUint32(p[0:], wireMagic)
	le.PutUint16(p[4:], wireVersion)
	le.PutUint16(p[6:], uint16(m.typ))
	le.PutUint64(p[8:], m.session)
	le.PutUint64(p[16:], m.a)
	le.PutUint64(p[24:], m.b)
	le.PutUint64(p[32:], m.c)
	le.PutUint64(p[40:], m.d)
	le.PutUint32(p[48:], m.length)
	le.PutUint32(p[52:], m.bodyCRC)
	le.PutUint32(p[56:], 0)
	le.PutUint32(p[60:], crc32c.Sum(p[:60]))
}

// WireError is why the peer's bytes are not the protocol. The connection ends.
type WireError struct{ Detail string }

func (e *WireError) Error() string { return "peer speaks nonsense: " + e.Detail }

// VersionError: the peer speaks another version of the protocol.
type VersionError struct{ Peer uint16 }

func (e *VersionError) Error() string {
	return fmt.Sprintf("peer speaks protocol version %d, this program %d: run the same release on both nodes", e.Peer, wireVersion)
}

func (m *message) decode(p []byte) error {
	le := binary.LittleEndian
	if le.Uint32(p) != wireMagic {
		if p[0] >= 20 && p[0] <= 23 && p[1] == 3 { // a record of TLS
			return &WireError{"the peer speaks TLS, and this node's transport is another: set the same transport on both nodes"}
		}
		return &WireError{fmt.Sprintf("no message starts with %x", p[:4])}
	}
	if crc32c.Sum(p[:60]) != le.Uint32(p[60:]) {
		return &WireError{"bad checksum of a message header"}
	}
	if v := le.Uint16(p[4:]); v != wireVersion {
		return &VersionError{v}
	}
	m.typ = messageType(le.Uint16(p[6:]))
	m.session = le.Uint64(p[8:])
	m.a, m.b, m.c, m.d = le.Uint64(p[16:]), le.Uint64(p[24:]), le.Uint64(p[32:]), le.Uint64(p[40:])
	m.length = le.Uint32(p[48:])
	m.bodyCRC = le.Uint32(p[52:])
	if m.typ == 0 || m.typ > msgSame {
		return &WireError{fmt.Sprintf("message type %d", m.typ)}
	}
	if m.length > maxBody || m.typ == msgFrame && (m.length == 0 || m.length > MaxFrame) {
		return &WireError{fmt.Sprintf("message of type %d with %d bytes", m.typ, m.length)}
	}
	return nil
}

// hello is the body of msgHello.
type hello struct {
	Side
	Session uint64 `json:"session,string"`  // the sender's half of the session id
	Lanes   int    `json:"lanes,omitempty"` // that the sender wants
	Policy  policy `json:"policy"`          // as configured at the sender
}

// policy is what both nodes' configurations should say alike: what is in force
// is the primary's, so a failover changes it where they do not.
type policy struct {
	Async     bool  `json:"async,omitempty"`
	Alone     bool  `json:"alone,omitempty"`
	TimeoutNS int64 `json:"timeout_ns"`
}

// differs says in what there differs from here; "" where it does not.
func (here policy) differs(there policy) string {
	if there.TimeoutNS == 0 {
		return "" // it does not say
	}
	var all []string
	say := func(what, here, there string) {
		if here != there {
			all = append(all, fmt.Sprintf("%s is %s here and %s there", what, here, there))
		}
	}
	name := func(b bool, yes, no string) string {
		if b {
			return yes
		}
		return no
	}
	say("ack", name(here.Async, "async", "both"), name(there.Async, "async", "both"))
	say("on_peer_loss", name(here.Alone, "alone", "block"), name(there.Alone, "alone", "block"))
	say("timeout", time.Duration(here.TimeoutNS).String(), time.Duration(there.TimeoutNS).String())
	return strings.Join(all, ", ")
}

// follow is the body of msgFollow.
type follow struct {
	Lineage UUID            `json:"lineage"`
	History journal.History `json:"history"`
	From    journal.LSN     `json:"from"`
	Base    journal.LSN     `json:"base"` // of the source's ring
	Chain   uint32          `json:"chain"`
	Full    bool            `json:"full"`
	// Copy is of a full copy: how the source calls those that it makes until it
	// restarts. A follower of before this knows none, 0.
	Copy    uint64 `json:"copy,string,omitempty"`
	Alone   bool   `json:"alone"`
	LeaseNS int64  `json:"lease_ns"`
}

// title says what a join does with the title at the receiver.
type title string

const (
	titleKeep    title = ""
	titleTake    title = "take"    // the sender has given it up
	titleRelease title = "release" // the sender will take it
)

// join is the body of msgJoin.
type join struct {
	History journal.History `json:"history"`
	Alone   bool            `json:"alone"`
	Title   title           `json:"title,omitempty"`
}

// verdict is the body of msgVerdict.
type verdict struct {
	Rule Rule        `json:"rule"`
	From journal.LSN `json:"from"`
}

func unmarshal(typ messageType, body []byte, v any) error {
	if err := json.Unmarshal(body, v); err != nil {
		return &WireError{fmt.Sprintf("body of message type %d: %s", typ, printable(err.Error()))} // it quotes the body
	}
	return nil
}

// printable is a text of the peer's for logs, status and terminals: it may hold
// whatever fits into a message.
func printable[T string | []byte](text T) string {
	const most = 2 << 10
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) { // also what is no UTF-8
			return '?'
		}
		return r
	}, string(text[:min(len(text), most)]))
}
