package crc32c

import (
	"unsafe"

	"golang.org/x/sys/cpu"
)

// What a small commit sums: calls of the standard library take longer than the
// instructions that they come to.

var (
	sumsWords = cpu.X86.HasSSE42
	patches   = cpu.X86.HasSSE42 && cpu.X86.HasPCLMULQDQ
)

// patchMax is the length up to which one pass over a change, 8 bytes in three
// cycles, takes no longer than two folds.
const patchMax = 512

// shortPatch is what a short change of a block changes in its checksum.
func shortPatch(old, new []byte, tail int64) (delta uint32, ok bool) {
	n := len(old)
	if !patches || n == 0 || n > patchMax || n != len(new) || tail > BlockSize {
		return 0, false
	}
	return changed(unsafe.Pointer(&old[0]), unsafe.Pointer(&new[0]), uintptr(n), small[tail]), true
}

// fewWords is SumWords.
func fewWords(words []uint64) (sum uint32, ok bool) {
	if !sumsWords || len(words) == 0 {
		return 0, false
	}
	return sumWords(&words[0], len(words)), true
}

//go:noescape
func sumWords(p *uint64, n int) uint32

// changed is r(old ^ new) times shift times x^32.
//
//go:noescape
func changed(old, new unsafe.Pointer, n uintptr, shift uint32) uint32
