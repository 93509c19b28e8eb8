package faultwire

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// testSegment builds a valid segment from A to B with sequence number seq.
func testSegment(v6 bool, seq uint32, payload, digest []byte) []byte {
	var head []byte
	if v6 {
		head = make([]byte, ip6Header+tcpMinHeader)
		head[0], head[6], head[7] = 6<<4, protoTCP, 64
		copy(head[8:], addrA6.Addr().AsSlice())
		copy(head[24:], addrB6.Addr().AsSlice())
	} else {
		head = make([]byte, ip4MinHeader+tcpMinHeader)
		head[0], head[8], head[9] = 4<<4|ip4MinHeader/4, 64, protoTCP
		copy(head[12:], addrA4.Addr().AsSlice())
		copy(head[16:], addrB4.Addr().AsSlice())
	}
	l := layout{v6: v6, tcp: len(head) - tcpMinHeader, end: len(head)}
	t := head[l.tcp:]
	binary.BigEndian.PutUint16(t, 4000)
	binary.BigEndian.PutUint16(t[2:], 7447)
	binary.BigEndian.PutUint32(t[4:], seq)
	binary.BigEndian.PutUint32(t[8:], 77)
	t[12] = tcpMinHeader / 4 << 4
	binary.BigEndian.PutUint16(t[14:], 1024)
	setLength(head, l)
	like, ok := ParseSegment(head)
	if !ok {
		panic("the test's template is no segment")
	}
	return forge(like, flagACK, payload, digest)
}

func checksumRight(p []byte) bool {
	l, ok := locate(p)
	return ok && tcpChecksum(p, l) == 0
}

func TestSegmentRoundTrip(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		digest := bytes.Repeat([]byte{0xd5}, 16)
		raw := testSegment(v6, 1<<32-3, []byte("hello"), digest)
		got, ok := ParseSegment(raw)
		if !ok {
			t.Fatal("not recognised")
		}
		src, dst := addrA4, addrB4
		if v6 {
			src, dst = addrA6, addrB6
		}
		want := Segment{
			Raw: raw, Src: netip.AddrPortFrom(src.Addr(), 4000), Dst: netip.AddrPortFrom(dst.Addr(), 7447),
			Seq: 1<<32 - 3, Flags: flagACK, Payload: []byte("hello"), Digest: digest,
		}
		if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); d != "" {
			t.Error(d)
		}
		if got.End() != 2 {
			t.Errorf("End is %d; sequence numbers wrap", got.End())
		}
		if !checksumRight(raw) {
			t.Error("wrong checksum")
		}
	}
}

// drawSegment draws a segment whose payload has what each corruption needs.
func drawSegment(t *rapid.T) ([]byte, layout, *rand.Rand) {
	var digest []byte
	if rapid.Bool().Draw(t, "signed") {
		digest = rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "digest")
	}
	payload := rapid.SliceOfN(rapid.Byte(), 1, 200).Draw(t, "payload")
	p := testSegment(rapid.Bool().Draw(t, "v6"), rapid.Uint32().Draw(t, "seq"), payload, digest)
	l, ok := locate(p)
	if !ok {
		t.Fatal("not recognised")
	}
	return p, l, rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
}

// Swap and Add must be invisible to the checksum, touch payload only, and
// change it whenever they say so.
func TestNeutralCorruptionPassesTheChecksum(t *testing.T) {
	for f, changedWords := range map[Fault]int{Swap: 2, Add: 2} {
		t.Run(f.String(), func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				p, l, rng := drawSegment(t)
				before := bytes.Clone(p)
				q, done := corrupt(f, p, l, &Plan{}, rng)
				if done == bytes.Equal(before, q) {
					t.Fatalf("done is %v, changed is %v", done, !done)
				}
				if !bytes.Equal(before[:l.payload], q[:l.payload]) {
					t.Fatal("a header was changed")
				}
				if !checksumRight(q) {
					t.Fatal("the checksum sees it")
				}
				words := 0
				for i := l.payload; i+1 < l.end; i += 2 {
					if !bytes.Equal(before[i:i+2], q[i:i+2]) {
						words++
					}
				}
				if done && words != changedWords {
					t.Fatalf("%d words were changed, want %d", words, changedWords)
				}
			})
		})
	}
}

func TestNeutralCorruptionLeavesWhatItCannotChange(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, b := range [][]byte{nil, {1}, {1, 2}, {1, 2, 3}, {7, 7, 7, 7, 7, 7}} {
		if c := bytes.Clone(b); swapWords(c, rng) || !bytes.Equal(b, c) {
			t.Errorf("swap of %v gave %v", b, c)
		}
	}
	for _, b := range [][]byte{nil, {1}, {1, 2}, {1, 2, 3}, {0, 0, 0, 0}, {0xff, 0xff, 0xff, 0xff}} {
		if c := bytes.Clone(b); addWords(c, rng) || !bytes.Equal(b, c) {
			t.Errorf("add to %v gave %v", b, c)
		}
	}
}

func TestFlipIsOneBitAndSeen(t *testing.T) {
	for _, header := range []bool{false, true} {
		rapid.Check(t, func(t *rapid.T) {
			p, l, rng := drawSegment(t)
			before := bytes.Clone(p)
			q, done := corrupt(Flip, p, l, &Plan{Flip: Rule{Any: header}}, rng)
			flipped, first := 0, -1
			for i := range q {
				n := bits.OnesCount8(before[i] ^ q[i])
				flipped += n
				if n > 0 {
					first = i
				}
			}
			if !done || flipped != 1 {
				t.Fatalf("done %v, %d bits flipped", done, flipped)
			}
			if first < l.tcp || !header && first < l.payload {
				t.Fatalf("flipped byte %d, TCP begins at %d, payload at %d", first, l.tcp, l.payload)
			}
			// The layout as it was: a flipped header length is no excuse.
			if tcpChecksum(q, l) == 0 {
				t.Fatal("the checksum does not see it")
			}
		})
	}
}

func TestTruncateShortens(t *testing.T) {
	for _, fix := range []bool{false, true} {
		rapid.Check(t, func(t *rapid.T) {
			p, l, rng := drawSegment(t)
			before := bytes.Clone(p)
			q, done := corrupt(Truncate, p, l, &Plan{FixLength: fix}, rng)
			if !done || len(q) >= len(before) || len(q) < l.payload {
				t.Fatalf("done %v, %d of %d bytes left, payload begins at %d", done, len(q), len(before), l.payload)
			}
			if _, whole := locate(q); whole != fix {
				t.Fatalf("the IP header agrees with the length: %v, want %v", whole, fix)
			}
			if fix && !l.v6 && fold16(sum16(0, q[:l.tcp])) != 0xffff {
				t.Fatal("wrong IP header checksum")
			}
			if !bytes.Equal(before[l.tcp:len(q)], q[l.tcp:]) {
				t.Fatal("what is left was changed")
			}
		})
	}
}

// Packets come from outside this process: no bytes may make a parser panic.
func TestParseAnything(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var p []byte
		if rapid.Bool().Draw(t, "random") {
			p = rapid.SliceOfN(rapid.Byte(), 0, 120).Draw(t, "bytes")
		} else {
			p, _, _ = drawSegment(t)
			for range rapid.IntRange(1, 4).Draw(t, "changes") {
				p[rapid.IntRange(0, min(len(p), 90)-1).Draw(t, "at")] = rapid.Byte().Draw(t, "byte")
			}
			p = p[:rapid.IntRange(0, len(p)).Draw(t, "cut")]
		}
		if s, ok := ParseSegment(p); ok && len(s.Payload) > len(p) {
			t.Fatal("more payload than packet")
		}
	})
}

func TestLocateRefuses(t *testing.T) {
	base := testSegment(false, 1, []byte("payload"), nil)
	for name, change := range map[string]func(p []byte){
		"version":              func(p []byte) { p[0] = 5<<4 | 5 },
		"another protocol":     func(p []byte) { p[9] = 17 },
		"more fragments":       func(p []byte) { p[6] |= 0x20 },
		"a later fragment":     func(p []byte) { p[7] = 1 },
		"length beyond packet": func(p []byte) { p[3]++ },
		"length within header": func(p []byte) { p[3] = ip4MinHeader },
		"short IP header":      func(p []byte) { p[0] = 4<<4 | 4 },
		"short TCP header":     func(p []byte) { p[ip4MinHeader+12] = 4 << 4 },
		"TCP header too long":  func(p []byte) { p[ip4MinHeader+12] = 15 << 4 },
	} {
		p := bytes.Clone(base)
		change(p)
		if _, ok := locate(p); ok {
			t.Errorf("%s: taken for a whole TCP segment", name)
		}
	}
	if _, ok := locate(base); !ok {
		t.Error("the base is refused too")
	}
}

func TestMD5DigestAmongOptions(t *testing.T) {
	digest := bytes.Repeat([]byte{9}, 16)
	option := append([]byte{optMD5, md5OptionLen}, digest...)
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	for name, c := range map[string]struct {
		opts []byte
		want []byte
	}{
		"none":            {nil, nil},
		"alone":           {option, digest},
		"after others":    {join([]byte{optNop, 2, 4, 5, 180}, option), digest},
		"behind the end":  {join([]byte{optEnd}, option), nil},
		"length zero":     {join([]byte{3, 0}, option), nil},
		"cut short":       {option[:10], nil},
		"kind alone":      {[]byte{optMD5}, nil},
		"of wrong length": {[]byte{optMD5, 4, 1, 2}, nil},
	} {
		if got := md5Digest(c.opts); !bytes.Equal(got, c.want) {
			t.Errorf("%s: got %v, want %v", name, got, c.want)
		}
	}
}
