// Package parts splits work on much log between goroutines: what recovery has
// to read and write, memory gives to several processors faster than to one.
package parts

import (
	"runtime"
	"sync"
)

const (
	least = 4 << 20 // bytes that are worth a goroutine: half a millisecond's work
	most  = 8       // more do not get more out of memory
)

// Of is into how many parts work on so many bytes of log is split.
func Of(bytes int64) int {
	return int(max(min(bytes/least, most, int64(runtime.GOMAXPROCS(0))), 1))
}

// Do calls f for each of n parts, one of them in the caller's goroutine, and
// returns the error of the first that has one.
func Do(n int, f func(part int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := 1; i < n; i++ {
		wg.Go(func() { errs[i] = f(i) })
	}
	errs[0] = f(0)
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
