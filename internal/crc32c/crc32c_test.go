package crc32c

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"testing"

	"pgregory.net/rapid"
)

func TestSumIsCastagnoli(t *testing.T) {
	// RFC 3720, B.4: 32 bytes of zeros.
	if got := Sum(make([]byte, 32)); got != 0x8a9136aa {
		t.Fatalf("Sum(32 zeros) = %#x", got)
	}
}

// TestUpdate compares with the standard library, at each length up to some
// folds, wherever the bytes lie, and on long ones.
func TestUpdate(t *testing.T) {
	t.Logf("this CPU and build fold: %t", folds)
	p := make([]byte, 3*maxCall+300)
	for i := range p {
		p[i] = byte(i * i >> 3)
	}
	check := func(t rapid.TB, crc uint32, p []byte) {
		if got, want := Update(crc, p), crc32.Update(crc, table, p); got != want {
			t.Fatalf("Update(%#x, %d bytes) = %#x, want %#x", crc, len(p), got, want)
		}
	}
	for n := range 5 * 256 {
		check(t, 0, p[n%64:][:n])
		check(t, 0xffffffff, p[:n])
	}
	for n := maxCall - 2; n <= len(p); n += maxCall {
		for i := range min(260, len(p)-n) {
			check(t, uint32(i), p[:n+i])
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		crc := rapid.Uint32().Draw(t, "crc")
		from := rapid.IntRange(0, len(p)).Draw(t, "from")
		to := rapid.IntRange(from, len(p)).Draw(t, "to")
		check(t, crc, p[from:to])
	})
}

func TestCombineAndPatch(t *testing.T) {
	memory := make([]byte, 18000)
	for i := range memory {
		memory[i] = byte(i * i >> 3)
	}
	rapid.Check(t, func(t *rapid.T) {
		// Lengths by themselves: rapid's own slices are short.
		whole := bytes.Clone(memory[:rapid.IntRange(0, len(memory)).Draw(t, "whole")])
		k := rapid.IntRange(0, len(whole)).Draw(t, "a")
		a, b := whole[:k], whole[k:]
		want := crc32.Checksum(whole, table)
		if got := Combine(Sum(a), Sum(b), int64(len(b))); got != want {
			t.Fatalf("Combine = %#x, want %#x", got, want)
		}
		if got := Update(Sum(a), b); got != want {
			t.Fatalf("Update = %#x, want %#x", got, want)
		}
		if len(whole) == 0 {
			return
		}
		lo := rapid.IntRange(0, len(whole)-1).Draw(t, "lo")
		hi := rapid.OneOf(rapid.IntRange(lo, min(lo+600, len(whole))), rapid.IntRange(lo, len(whole))).Draw(t, "hi")
		repl := bytes.Clone(whole[len(whole)-hi+lo:])
		for i := range min(len(repl), 64) {
			repl[i] = rapid.Byte().Draw(t, "repl")
		}
		tail := int64(len(whole) - hi)
		got, std := Patch(want, whole[lo:hi], repl, tail), patch(want, whole[lo:hi], repl, tail)
		copy(whole[lo:hi], repl)
		if want := crc32.Checksum(whole, table); got != want || std != want {
			t.Fatalf("Patch = %#x, patch = %#x, want %#x", got, std, want)
		}
	})
}

// TestPatchPlaces changes pieces of a block, at places all over it.
func TestPatchPlaces(t *testing.T) {
	block := make([]byte, BlockSize)
	for i := range block {
		block[i] = byte(i * i >> 3)
	}
	repl := bytes.Repeat([]byte{0xa5, 0x0f, 0x77}, 200)
	was := Sum(block)
	for _, n := range []int{0, 1, 7, 8, 9, 63, 64, 65, 511, 512, 513} {
		for lo := 0; lo+n <= len(block); lo += 1 + lo%61 {
			changed := bytes.Clone(block)
			copy(changed[lo:], repl[:n])
			if got, want := Patch(was, block[lo:lo+n], repl[:n], int64(len(block)-lo-n)), Sum(changed); got != want {
				t.Fatalf("%d bytes at %d: Patch = %#x, want %#x", n, lo, got, want)
			}
		}
	}
}

func TestSumWords(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		words := rapid.SliceOfN(rapid.Uint64(), 0, 5).Draw(t, "words")
		var p []byte
		for _, w := range words {
			p = binary.LittleEndian.AppendUint64(p, w)
		}
		if got, std, want := SumWords(words...), slicingBy8(words), crc32.Checksum(p, table); got != want || std != want {
			t.Fatalf("SumWords = %#x, slicingBy8 = %#x, want %#x", got, std, want)
		}
	})
}

func BenchmarkPatch64(b *testing.B) {
	old, repl := make([]byte, 64), make([]byte, 64)
	for i := range repl {
		repl[i] = byte(i)
	}
	var c uint32
	for b.Loop() {
		c = Patch(c, old, repl, 1000)
	}
}
func TestCombineBlock(t *testing.T) {
	p := make([]byte, 3*BlockSize)
	for i := range p {
		p[i] = byte(i * i >> 3)
	}
	for n := 0; n <= len(p)-BlockSize; n += 511 {
		a, b := Sum(p[:n]), Sum(p[n:n+BlockSize])
		if got, want := CombineBlock(a, b), Sum(p[:n+BlockSize]); got != want {
			t.Fatalf("%d bytes and a block: %08x, want %08x", n, got, want)
		}
	}
}

// BenchmarkSum reads memory that is in a cache, and memory that is not.
func BenchmarkSum(b *testing.B) {
	memory := make([]byte, 256<<20)
	for i := range memory {
		memory[i] = byte(i * i >> 3)
	}
	for _, n := range []int{64, 256, 4096, 64 << 10} {
		for name, sum := range map[string]func([]byte) uint32{
			"this": Sum,
			"std":  func(p []byte) uint32 { return crc32.Checksum(p, table) },
		} {
			b.Run(fmt.Sprintf("%d/cached/%s", n, name), func(b *testing.B) {
				b.SetBytes(int64(n))
				for b.Loop() {
					sum(memory[:n])
				}
			})
			b.Run(fmt.Sprintf("%d/memory/%s", n, name), func(b *testing.B) {
				b.SetBytes(int64(n))
				for at := 0; b.Loop(); at = (at + n) % len(memory) {
					sum(memory[at : at+n])
				}
			})
		}
	}
}
