package main

import (
	"context"
	"time"
)

const size = 64 // bytes of a write

// peer is something that makes a write safe, and one client of it.
type peer interface {
	name() string
	// round writes for d, one write after the other, and returns the median
	// time in µs of one.
	round(ctx context.Context, d time.Duration) (p50 float64, err error)
	// verify proves, after all rounds, that the peer did what is claimed, and
	// says how.
	verify(ctx context.Context) (string, error)
	close()
}
