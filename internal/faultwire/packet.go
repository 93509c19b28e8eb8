package faultwire

import (
	"encoding/binary"
	"net/netip"
)

// TCP header flags.
const (
	flagFIN = 1 << iota
	flagSYN
	flagRST
	flagPSH
	flagACK
)

const (
	protoTCP     = 6
	ip4MinHeader = 20
	ip6Header    = 40
	tcpMinHeader = 20

	optEnd = 0
	optNop = 1
	optMD5 = 19 // RFC 2385: kind, length 18, 16 bytes of digest

	md5OptionLen = 18
)

// layout is where the parts of a TCP segment lie in a packet.
type layout struct {
	v6      bool
	tcp     int // start of the TCP header, also the IP header's length
	payload int
	end     int
}

// locate finds the TCP segment in a whole, unfragmented packet.
func locate(p []byte) (l layout, ok bool) {
	if len(p) < ip4MinHeader {
		return l, false
	}
	switch p[0] >> 4 {
	case 4:
		l.tcp = int(p[0]&0x0f) * 4
		l.end = int(binary.BigEndian.Uint16(p[2:]))
		const moreOrOffset = 0x3fff
		if p[9] != protoTCP || binary.BigEndian.Uint16(p[6:])&moreOrOffset != 0 || l.tcp < ip4MinHeader {
			return l, false
		}
	case 6:
		if len(p) < ip6Header || p[6] != protoTCP {
			return l, false
		}
		l.v6 = true
		l.tcp = ip6Header
		l.end = ip6Header + int(binary.BigEndian.Uint16(p[4:]))
	default:
		return l, false
	}
	if l.end > len(p) || l.end < l.tcp+tcpMinHeader {
		return l, false
	}
	l.payload = l.tcp + int(p[l.tcp+12]>>4)*4
	return l, l.payload >= l.tcp+tcpMinHeader && l.payload <= l.end
}

// Segment is a TCP segment seen on the wire.
type Segment struct {
	Raw      []byte // the whole packet
	Src, Dst netip.AddrPort
	Seq      uint32
	Flags    uint8
	Payload  []byte // within Raw
	Digest   []byte // within Raw: the 16 bytes of the MD5 option, nil without one
}

// ParseSegment reads a packet; it is false for anything but whole TCP.
func ParseSegment(raw []byte) (Segment, bool) {
	l, ok := locate(raw)
	if !ok {
		return Segment{}, false
	}
	t := raw[l.tcp:]
	src, dst := addresses(raw, l.v6)
	return Segment{
		Raw:     raw,
		Src:     netip.AddrPortFrom(src, binary.BigEndian.Uint16(t)),
		Dst:     netip.AddrPortFrom(dst, binary.BigEndian.Uint16(t[2:])),
		Seq:     binary.BigEndian.Uint32(t[4:]),
		Flags:   t[13],
		Payload: raw[l.payload:l.end],
		Digest:  md5Digest(raw[l.tcp+tcpMinHeader : l.payload]),
	}, true
}

// End is the sequence number that follows the segment.
func (s *Segment) End() uint32 {
	n := uint32(len(s.Payload))
	if s.Flags&flagSYN != 0 {
		n++
	}
	if s.Flags&flagFIN != 0 {
		n++
	}
	return s.Seq + n
}

func addresses(p []byte, v6 bool) (src, dst netip.Addr) {
	if v6 {
		return netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
	}
	return netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
}

// md5Digest finds the digest among TCP options.
func md5Digest(opts []byte) []byte {
	for len(opts) > 0 {
		switch opts[0] {
		case optEnd:
			return nil
		case optNop:
			opts = opts[1:]
			continue
		}
		if len(opts) < 2 || opts[1] < 2 || int(opts[1]) > len(opts) {
			return nil
		}
		if opts[0] == optMD5 && opts[1] == md5OptionLen {
			return opts[2:md5OptionLen]
		}
		opts = opts[opts[1]:]
	}
	return nil
}

// sum16 adds up b as the Internet checksum does, without folding.
func sum16(sum uint64, b []byte) uint64 {
	for len(b) >= 4 {
		sum += uint64(binary.BigEndian.Uint32(b))
		b = b[4:]
	}
	if len(b) >= 2 {
		sum += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		sum += uint64(b[0]) << 8
	}
	return sum
}

func fold16(sum uint64) uint16 {
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// tcpChecksum computes what the checksum field must hold; computed over a
// segment with the field in place it is 0 exactly when the checksum is right.
func tcpChecksum(p []byte, l layout) uint16 {
	first := 12 // IPv4 addresses
	if l.v6 {
		first = 8
	}
	pseudo := sum16(protoTCP+uint64(l.end-l.tcp), p[first:addressEnd(l.v6)])
	return ^fold16(sum16(pseudo, p[l.tcp:l.end]))
}

func addressEnd(v6 bool) int {
	if v6 {
		return ip6Header
	}
	return ip4MinHeader
}

// setLength makes the IP header say where the packet ends.
func setLength(p []byte, l layout) {
	if l.v6 {
		binary.BigEndian.PutUint16(p[4:], uint16(l.end-ip6Header))
		return
	}
	binary.BigEndian.PutUint16(p[2:], uint16(l.end))
	binary.BigEndian.PutUint16(p[10:], 0)
	binary.BigEndian.PutUint16(p[10:], ^fold16(sum16(0, p[:l.tcp])))
}

func setTCPChecksum(p []byte, l layout) {
	at := l.tcp + 16
	binary.BigEndian.PutUint16(p[at:], 0)
	binary.BigEndian.PutUint16(p[at:], tcpChecksum(p, l))
}
