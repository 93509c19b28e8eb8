// Package crc32c computes CRC-32C (Castagnoli) checksums and does the linear
// algebra on them: joining the checksums of two neighbouring pieces, and
// carrying a block's checksum over a change of some of its bytes without
// reading the rest.
//
// The checksum of equally long inputs is affine over GF(2):
// Sum(a) ^ Sum(b) depends on a ^ b alone. Write r(m) for the checksum without
// its initial and final inversion. Then r is linear, and r(m followed by n
// zero bytes) is r(m)·x^(8n) modulo the polynomial. See Mark Adler's
// crc32_combine in zlib, and R. Williams, "A painless guide to CRC error
// detection algorithms", 1993.
package crc32c

import "hash/crc32"

var table = crc32.MakeTable(crc32.Castagnoli)

// Sum is the CRC-32C of p.
func Sum(p []byte) uint32 { return Update(0, p) }

// maxCall is how many bytes are summed at once: assembly cannot be preempted, and
// where the collector stops all goroutines, they wait for it.
const maxCall = 64 << 10

// Update is the CRC-32C of the bytes that crc covers followed by p.
func Update(crc uint32, p []byte) uint32 {
	if len(p) > maxCall {
		return updateLong(crc, p)
	}
	if crc, p = update(crc, p); len(p) == 0 {
		return crc
	}
	return crc32.Update(crc, table, p)
}

func updateLong(crc uint32, p []byte) uint32 {
	for ; len(p) > maxCall; p = p[maxCall:] {
		crc = Update(crc, p[:maxCall])
	}
	return Update(crc, p)
}

// raw is r(p): linear in p.
func raw(p []byte) uint32 { return ^Update(0xffffffff, p) }

// Combine is the CRC-32C of a piece with checksum a followed by a piece of
// lenB bytes with checksum b.
func Combine(a, b uint32, lenB int64) uint32 { return multiply(a, power(lenB)) ^ b }

// CombineBlock is Combine for a second piece of BlockSize bytes, by tables.
func CombineBlock(a, b uint32) uint32 {
	return behindBlock[0][byte(a)] ^ behindBlock[1][byte(a>>8)] ^ behindBlock[2][byte(a>>16)] ^ behindBlock[3][byte(a>>24)] ^ b
}

// Patch is the checksum of a block after old was replaced by new (of equal
// length) at a place that tail bytes of the block follow; crc is its checksum
// before.
func Patch(crc uint32, old, new []byte, tail int64) uint32 {
	if delta, ok := shortPatch(old, new, tail); ok {
		return crc ^ delta
	}
	return patch(crc, old, new, tail)
}

func patch(crc uint32, old, new []byte, tail int64) uint32 {
	return crc ^ multiply(raw(old)^raw(new), power(tail))
}

// poly is the Castagnoli polynomial, bit-reversed: bit 31 is x^0.
const poly = 0x82f63b78

// timesX is c·x modulo the polynomial, both bit-reversed.
func timesX(c uint32) uint32 { return c>>1 ^ poly&-(c&1) }

// multiply is a·b modulo the polynomial, both bit-reversed. It does the same
// work whatever the operands are: a data-dependent branch would be
// mispredicted every other bit.
func multiply(a, b uint32) uint32 {
	var p uint32
	for range 32 {
		p ^= b & -(a >> 31)
		a <<= 1
		b = timesX(b)
	}
	return p
}

// BlockSize is the unit that CombineBlock joins, in bytes.
const BlockSize = 4096

// small[n+4] is x^(8n) for n from -4 up to a block; doubling[k] is x^(8·2^k);
// behindBlock[k][b] is byte k of a checksum, with value b, moved before a
// block.
var (
	small       [BlockSize + 5]uint32
	doubling    [63]uint32
	behindBlock [4][256]uint32
)

func init() {
	c := uint32(1 << 31)
	for range 32 { // divide by x
		if c>>31 != 0 {
			c = (c^poly)<<1 | 1
		} else {
			c <<= 1
		}
	}
	for n := range small {
		small[n] = c
		for range 8 {
			c = timesX(c)
		}
	}
	doubling[0] = power(1)
	for k := 1; k < len(doubling); k++ {
		doubling[k] = multiply(doubling[k-1], doubling[k-1])
	}
	for k := range behindBlock {
		for b := range behindBlock[k] {
			behindBlock[k][b] = multiply(uint32(b)<<(8*k), power(BlockSize))
		}
	}
}

// power is x^(8n).
func power(n int64) uint32 {
	if n <= BlockSize {
		return small[n+4]
	}
	p := uint32(1 << 31)
	for k := 0; n != 0; k, n = k+1, n>>1 {
		if n&1 != 0 {
			p = multiply(p, doubling[k])
		}
	}
	return p
}

// slicing[k][b] is the checksum step for byte b followed by k zero bytes.
var slicing [8][256]uint32

func init() {
	for b := range 256 {
		c := uint32(b)
		for range 8 {
			c = timesX(c)
		}
		slicing[0][b] = c
	}
	for k := 1; k < 8; k++ {
		for b := range 256 {
			c := slicing[k-1][b]
			slicing[k][b] = c>>8 ^ slicing[0][c&0xff]
		}
	}
}

// SumWords is the CRC-32C of the words, each as 8 little-endian bytes. It does
// for a few words what Sum does for bytes, without making them escape to the
// heap.
func SumWords(words ...uint64) uint32 {
	if sum, ok := fewWords(words); ok {
		return sum
	}
	return slicingBy8(words)
}

// slicingBy8 is SumWords by Intel's method (Kounavis and Berry, 2005).
func slicingBy8(words []uint64) uint32 {
	c := ^uint32(0)
	for _, w := range words {
		w ^= uint64(c)
		c = slicing[7][byte(w)] ^ slicing[6][byte(w>>8)] ^ slicing[5][byte(w>>16)] ^ slicing[4][byte(w>>24)] ^
			slicing[3][byte(w>>32)] ^ slicing[2][byte(w>>40)] ^ slicing[1][byte(w>>48)] ^ slicing[0][byte(w>>56)]
	}
	return ^c
}
