package faultwire

import (
	"encoding/binary"
	"math/rand/v2"
)

// swapWords exchanges two neighbouring 16-bit words of a payload. Words are
// counted from the payload's start, which is how TCP's checksum counts them, as
// headers are multiples of four bytes. It is false, and nothing changed, where
// all words are equal.
func swapWords(b []byte, rng *rand.Rand) bool {
	pairs := len(b)/2 - 1
	if pairs < 1 {
		return false
	}
	start := rng.IntN(pairs)
	for k := range pairs {
		w := b[2*((start+k)%pairs):][:4]
		if w[0] != w[2] || w[1] != w[3] {
			w[0], w[1], w[2], w[3] = w[2], w[3], w[0], w[1]
			return true
		}
	}
	return false
}

// addWords adds 1 to one word and takes 1 from another. Neither wraps, so that
// the plain sum of the words stays what it was, and with it every checksum made
// from that sum. It is false, and nothing changed, where no two words allow it.
func addWords(b []byte, rng *rand.Rand) bool {
	words := len(b) / 2
	if words < 2 {
		return false
	}
	find := func(except int, barred uint16) int {
		start := rng.IntN(words)
		for k := range words {
			i := (start + k) % words
			if i != except && binary.BigEndian.Uint16(b[2*i:]) != barred {
				return i
			}
		}
		return -1
	}
	up := find(-1, 0xffff)
	if up < 0 {
		return false
	}
	down := find(up, 0)
	if down < 0 {
		return false
	}
	binary.BigEndian.PutUint16(b[2*up:], binary.BigEndian.Uint16(b[2*up:])+1)
	binary.BigEndian.PutUint16(b[2*down:], binary.BigEndian.Uint16(b[2*down:])-1)
	return true
}

func flipBit(b []byte, rng *rand.Rand) bool {
	if len(b) == 0 {
		return false
	}
	i := rng.IntN(len(b) * 8)
	b[i/8] ^= 1 << (i % 8)
	return true
}

// truncate returns the packet without the end of its payload. With fixLength
// the IP header agrees, and TCP's checksum is left to find it (which one cut in
// 65536 escapes, as any damage that is not made for the checksum).
func truncate(p []byte, l layout, fixLength bool, rng *rand.Rand) ([]byte, bool) {
	if l.end == l.payload {
		return p, false
	}
	l.end = l.payload + rng.IntN(l.end-l.payload)
	p = p[:l.end]
	if fixLength {
		setLength(p, l)
	}
	return p, true
}

// corrupt applies one corrupting fault to a packet in place.
func corrupt(f Fault, p []byte, l layout, plan *Plan, rng *rand.Rand) ([]byte, bool) {
	payload := p[l.payload:l.end]
	switch f {
	case Truncate:
		return truncate(p, l, plan.FixLength, rng)
	case Flip:
		if plan.Flip.Any {
			payload = p[l.tcp:l.end]
		}
		return p, flipBit(payload, rng)
	case Swap:
		return p, swapWords(payload, rng)
	case Add:
		return p, addWords(payload, rng)
	}
	return p, false
}
