// Package journal is the ordered log of a region: a ring of segments in
// persistent memory, group commit into it, and the scan by which recovery and
// inspections find where it ends.
//
// # Segment
//
// A segment is one group commit. It starts at an LSN divisible by 64 and is
// contiguous in the ring:
//
//	 0  magic     u32  "NVMS"
//	 4  version   u16  1
//	 6  kind      u16  1 data, 2 padding
//	 8  lsn       u64  position of this header
//	16  epoch     u64  counter
//	24  node      u64  the node that minted the epoch
//	32  acked     u64  what all required nodes had acknowledged when it was written
//	40  length    u32  of the whole segment, divisible by 64
//	44  count     u32  transactions
//	48  prev      u32  CRC field of the previous segment's header
//	52  body CRC  u32  CRC32C of the bytes from 64 to length; 0 for padding
//	56  reserved  u32  0
//	60  CRC       u32  CRC32C of the bytes 0 to 60
//	64  records, zeros up to length
//
// All integers are little-endian. A record is {offset u64, length u32, flags
// u32} and length bytes, padded with zeros to 8; flag bit 0 marks the last
// record of a transaction. A padding segment fills the ring up to its end: only
// its header is sent on the wire, the rest is zeros.
//
// The header has a checksum of its own so that a receiver can judge it before
// it places anything. Version and magic are compared apart: a newer version is
// not corruption. prev chains the log: a segment is valid only behind the very
// segment that it was written behind.
package journal

import (
	"encoding/binary"
	"fmt"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
)

const (
	// HeaderSize is the length of a segment's header in bytes.
	HeaderSize = 64
	// Align divides every LSN and every segment's length.
	Align = 64
	// RecordHeaderSize is the length of a record's header in bytes.
	RecordHeaderSize = 16
	// Version is the segment format that this code writes.
	Version = 1
	// Magic starts every segment: "NVMS".
	Magic = 0x534d564e

	recordAlign   = 8
	flagLast      = 1
	kindData      = 1
	kindPad       = 2
	headerCRCOff  = 60
	maxSegment    = 64 << 20
	ringToSegment = 4 // a segment fills at most this part of the ring
)

// Header is a decoded segment header.
type Header struct {
	LSN     LSN
	Epoch   Epoch
	Acked   LSN
	Length  uint32
	Count   uint32
	Prev    uint32
	BodyCRC uint32
	CRC     uint32
	Pad     bool
}

// End is the LSN after the segment.
func (h *Header) End() LSN { return h.LSN + LSN(h.Length) }

// WireLength is how many bytes of the segment cross the wire.
func (h *Header) WireLength() uint32 {
	if h.Pad {
		return HeaderSize
	}
	return h.Length
}

// encode writes the header with its checksum into b and keeps it in h.CRC.
func (h *Header) encode(b []byte) {
	_ = b[HeaderSize-1]
	le := binary.LittleEndian
	kind := uint16(kindData)
	if h.Pad {
		kind = kindPad
	}
	le.PutUint32(b[0:], Magic)
	le.PutUint16(b[4:], Version)
	le.PutUint16(b[6:], kind)
	le.PutUint64(b[8:], uint64(h.LSN))
	le.PutUint64(b[16:], h.Epoch.Counter)
	le.PutUint64(b[24:], h.Epoch.Node)
	le.PutUint64(b[32:], uint64(h.Acked))
	le.PutUint32(b[40:], h.Length)
	le.PutUint32(b[44:], h.Count)
	le.PutUint32(b[48:], h.Prev)
	le.PutUint32(b[52:], h.BodyCRC)
	le.PutUint32(b[56:], 0)
	h.CRC = crc32c.Sum(b[:headerCRCOff])
	le.PutUint32(b[headerCRCOff:], h.CRC)
}

// DecodeHeader decodes the segment header at the start of b. The error is a
// [*FormatError] of kind NoSegment, BadCRC, Newer or BadField. It judges the
// header alone: place, epoch, chain and body are the caller's.
func DecodeHeader(b []byte, h *Header) error {
	le := binary.LittleEndian
	if len(b) < HeaderSize || le.Uint32(b) != Magic {
		return errNoSegment
	}
	h.CRC = le.Uint32(b[headerCRCOff:])
	if crc32c.Sum(b[:headerCRCOff]) != h.CRC {
		return errHeaderCRC
	}
	if v := le.Uint16(b[4:]); v != Version {
		return &FormatError{Kind: Newer, Detail: fmt.Sprintf("segment format %d, this program reads %d", v, Version)}
	}
	kind := le.Uint16(b[6:])
	h.Pad = kind == kindPad
	h.LSN = LSN(le.Uint64(b[8:]))
	h.Epoch = Epoch{le.Uint64(b[16:]), le.Uint64(b[24:])}
	h.Acked = LSN(le.Uint64(b[32:]))
	h.Length = le.Uint32(b[40:])
	h.Count = le.Uint32(b[44:])
	h.Prev = le.Uint32(b[48:])
	h.BodyCRC = le.Uint32(b[52:])
	switch {
	case kind != kindData && kind != kindPad:
		return &FormatError{Kind: BadField, Detail: fmt.Sprintf("segment kind %d", kind)}
	case h.Length < HeaderSize || h.Length%Align != 0 || uint64(h.LSN)%Align != 0:
		return &FormatError{Kind: BadField, Detail: fmt.Sprintf("length %d at LSN %d", h.Length, h.LSN)}
	case h.LSN+LSN(h.Length) < h.LSN:
		return &FormatError{Kind: BadField, Detail: fmt.Sprintf("length %d overflows LSN %d", h.Length, h.LSN)}
	}
	return nil
}

// Record is one write of a transaction: Data goes to Off of the volume.
type Record struct {
	Off  int64
	Data []byte
	Last bool // the transaction's last record
}

// Records steps through the records of a segment's body without allocating.
type Records struct {
	rest []byte
	size int
}

// NewRecords reads the records in body, the bytes behind a data segment's
// header. Their data are parts of it.
func NewRecords(body []byte) Records { return Records{body, len(body)} }

// Position is where the next record starts in the body.
func (r *Records) Position() int { return r.size - len(r.rest) }

// Next is the next record. ok is false at the end, where err says whether the
// body was well formed.
func (r *Records) Next() (rec Record, ok bool, err error) {
	if len(r.rest) < RecordHeaderSize {
		return Record{}, false, r.finish()
	}
	le := binary.LittleEndian
	n := le.Uint32(r.rest[8:])
	if n == 0 { // a record is never empty: the rest is padding
		return Record{}, false, r.finish()
	}
	flags := le.Uint32(r.rest[12:])
	size := recordSize(int(n))
	if size > len(r.rest) || flags&^flagLast != 0 || int64(le.Uint64(r.rest)) < 0 {
		return Record{}, false, &FormatError{Kind: BadField, Detail: fmt.Sprintf("record of %d bytes, flags %#x, in the last %d bytes of a segment", n, flags, len(r.rest))}
	}
	rec = Record{
		Off:  int64(le.Uint64(r.rest)),
		Data: r.rest[RecordHeaderSize : RecordHeaderSize+int(n) : RecordHeaderSize+int(n)],
		Last: flags&flagLast != 0,
	}
	r.rest = r.rest[size:]
	return rec, true, nil
}

func (r *Records) finish() error {
	b, other := r.rest, uint64(0)
	for ; len(b) >= 8; b = b[8:] {
		other |= binary.LittleEndian.Uint64(b)
	}
	for _, c := range b {
		other |= uint64(c)
	}
	if other != 0 {
		return &FormatError{Kind: BadField, Detail: "bytes behind the last record"}
	}
	return nil
}

// recordSize is the room that a record of n data bytes takes.
func recordSize(n int) int {
	return RecordHeaderSize + (n+recordAlign-1)&^(recordAlign-1)
}

// roundUp rounds n up to whole lines.
func roundUp(n int) int { return (n + Align - 1) &^ (Align - 1) }

func putRecordHeader(b []byte, w *Write, last bool) {
	le := binary.LittleEndian
	var flags uint32
	if last {
		flags = flagLast
	}
	le.PutUint64(b, uint64(w.Off))
	le.PutUint32(b[8:], uint32(len(w.Data)))
	le.PutUint32(b[12:], flags)
}
