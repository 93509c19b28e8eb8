package parts

import (
	"errors"
	"runtime"
	"sync/atomic"
	"testing"
)

func TestOf(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	for bytes, want := range map[int64]int{0: 1, least: 1, 2*least - 1: 1, 2 * least: 2, 3 * least: 3, 100 * least: 4} {
		if got := Of(bytes); got != want {
			t.Errorf("%d bytes: %d parts, not %d", bytes, got, want)
		}
	}
}

func TestDo(t *testing.T) {
	for n := 1; n < 5; n++ {
		var done atomic.Int64
		if err := Do(n, func(part int) error { done.Add(1 << part); return nil }); err != nil || done.Load() != 1<<n-1 {
			t.Errorf("%d parts: %b, %v", n, done.Load(), err)
		}
	}
	one, two := errors.New("one"), errors.New("two")
	if err := Do(4, func(part int) error { return []error{nil, one, two, nil}[part] }); err != one {
		t.Errorf("error %v, not that of the first part that has one", err)
	}
}
