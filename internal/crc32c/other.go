//go:build !amd64

package crc32c

// The standard library does it all here.

const folds = false

func update(crc uint32, p []byte) (sum uint32, rest []byte) { return crc, p }

func shortPatch(old, new []byte, tail int64) (delta uint32, ok bool) { return 0, false }

func fewWords(words []uint64) (sum uint32, ok bool) { return 0, false }
