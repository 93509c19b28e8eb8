package main

import (
	"context"
	"slices"
	"time"
)

// median of values that need not be in order.
func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// timed does op again and again for d and returns the median of how long each
// took, in µs, and how many there were. The first tenth of the time is not
// measured.
func timed(ctx context.Context, d time.Duration, op func() error) (p50 float64, n int64, err error) {
	var took []float64
	start := time.Now()
	for ; ctx.Err() == nil; n++ {
		begin := time.Since(start)
		if begin > d && len(took) > 0 {
			return median(took), n, nil
		}
		if err := op(); err != nil {
			return 0, n, err
		}
		if begin >= d/10 {
			took = append(took, float64((time.Since(start)-begin).Nanoseconds())/1e3)
		}
	}
	return 0, n, context.Cause(ctx)
}
