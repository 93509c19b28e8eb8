package faultwire

import (
	"bytes"
	"testing"
)

// FuzzParseSegment reads any bytes as a packet: what is taken for a segment
// lies within it, and what is rebuilt of it is the same segment with a right
// checksum.
func FuzzParseSegment(f *testing.F) {
	f.Add([]byte{})
	f.Add(append([]byte{0x45, 0, 0, 60, 0, 0, 0x40, 0, 64, 6, 0, 0, 198, 51, 100, 1, 198, 51, 100, 2,
		0x1d, 0x17, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0xa0, 0x18, 1, 0, 0, 0, 0, 0, 1, 1, 19, 18}, make([]byte, 16)...))
	f.Add(append([]byte{0x60, 0, 0, 0, 0, 24, 6, 64}, make([]byte, 56)...))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, ok := ParseSegment(raw)
		if !ok {
			return
		}
		if !s.Src.IsValid() || !s.Dst.IsValid() || len(s.Payload) > len(raw) || s.Digest != nil && len(s.Digest) != 16 {
			t.Fatalf("%+v", s)
		}
		l, _ := locate(raw)
		b := bytes.Clone(raw)
		setLength(b, l)
		setTCPChecksum(b, l)
		if tcpChecksum(b, l) != 0 {
			t.Fatal("the checksum that was set is not right")
		}
		again, ok := ParseSegment(b)
		if !ok || again.Seq != s.Seq || again.Src != s.Src || !bytes.Equal(again.Payload, s.Payload) {
			t.Fatalf("%+v became %+v", s, again)
		}
	})
}
