//go:build !amd64 && !arm64

package pmem

func availableFlushes() []flushOp { return nil }

func availableWidths() []ntWidth { return nil }
