package faultwire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// ErrNotCaptured says that no packet of the wanted connection is in the
// capture, so that nothing can be forged after its likeness.
var ErrNotCaptured = errors.New("faultwire: no packet of this connection captured")

// Capture keeps the newest n packets of this direction as they were sent,
// before any fault; 0 ends it. Earlier ones are forgotten.
func (d *Direction) Capture(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ring.resize(n)
}

// Captured returns copies of the captured TCP segments, oldest first.
func (d *Direction) Captured() []Segment {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []Segment
	d.ring.each(func(p []byte) {
		if s, ok := ParseSegment(bytes.Clone(p)); ok {
			all = append(all, s)
		}
	})
	return all
}

// Inject hands a third party's packet to this direction's receiver, past the
// plan and past a cut.
func (d *Direction) Inject(raw []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.inject(raw)
}

func (d *Direction) inject(raw []byte) error {
	if d.stopped {
		return ErrClosed
	}
	if err := d.out.write(raw); err != nil {
		return fmt.Errorf("faultwire: inject %s: %w", d.name, err)
	}
	d.stats.Injected++
	d.stats.Delivered++
	d.notify()
	return nil
}

// Forge injects what build makes of the connection's segment that lies
// furthest in the capture's sequence space. No packet passes in this direction
// between that look and the injection, so that its End is the sequence number
// that the receiver waits for, unless something before it was lost. What build
// gets is valid until it returns.
func (d *Direction) Forge(src, dst netip.AddrPort, build func(newest Segment) []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var newest Segment
	d.ring.each(func(p []byte) {
		s, ok := ParseSegment(p)
		if !ok || s.Src != src || s.Dst != dst {
			return
		}
		// Sequence numbers wrap: what is ahead is the sign of the difference.
		if newest.Raw == nil || int32(s.End()-newest.End()) >= 0 {
			newest = s
		}
	})
	if newest.Raw == nil {
		return fmt.Errorf("%w: %v to %v", ErrNotCaptured, src, dst)
	}
	return d.inject(build(newest))
}

// ForgeRST builds the reset that the sender of a segment could send next, with
// the right sequence number and, where the segment was signed, the given
// digest (nil: no signature at all).
func ForgeRST(like Segment, digest []byte) []byte {
	return forge(like, flagRST|flagACK, nil, digest)
}

// ForgeData builds the data that the sender of a segment could send next.
func ForgeData(like Segment, payload, digest []byte) []byte {
	return forge(like, flagPSH|flagACK, payload, digest)
}

// forge writes a packet with valid lengths and checksums; only the signature
// is not the sender's.
func forge(like Segment, flags uint8, payload, digest []byte) []byte {
	from, ok := locate(like.Raw)
	if !ok {
		return nil
	}
	options := 0
	if digest != nil {
		options = md5OptionLen + 2 // two NOPs make it a multiple of four
	}
	l := layout{v6: from.v6, tcp: from.tcp, payload: from.tcp + tcpMinHeader + options}
	l.end = l.payload + len(payload)
	p := make([]byte, l.end)
	copy(p, like.Raw[:from.tcp+tcpMinHeader])
	t := p[l.tcp:]
	binary.BigEndian.PutUint32(t[4:], like.End())
	t[12] = byte((tcpMinHeader + options) / 4 << 4)
	t[13] = flags
	if digest != nil {
		o := t[tcpMinHeader:]
		o[0], o[1], o[2], o[3] = optNop, optNop, optMD5, md5OptionLen
		copy(o[4:options], digest)
	}
	copy(p[l.payload:], payload)
	setLength(p, l)
	setTCPChecksum(p, l)
	return p
}
