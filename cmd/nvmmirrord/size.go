package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// size is a flag of bytes, such as 4096, 64KiB or 1GiB.
type size int64

var sizeUnits = []struct {
	suffix string
	shift  uint
}{{"TiB", 40}, {"GiB", 30}, {"MiB", 20}, {"KiB", 10}, {"B", 0}}

// Set implements pflag.Value.
func (s *size) Set(text string) error {
	number, shift := text, uint(0)
	for _, u := range sizeUnits {
		if n, ok := strings.CutSuffix(text, u.suffix); ok {
			number, shift = n, u.shift
			break
		}
	}
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil {
		return fmt.Errorf("%q is not a size such as 4096, 64KiB, 16MiB or 1GiB", text)
	}
	if n > math.MaxInt64>>shift {
		return fmt.Errorf("%q is too large", text)
	}
	*s = size(n << shift)
	return nil
}

// String implements pflag.Value: the largest unit that divides the size.
func (s *size) String() string {
	for _, u := range sizeUnits {
		if n := int64(*s); n != 0 && u.shift > 0 && n&(1<<u.shift-1) == 0 {
			return strconv.FormatInt(n>>u.shift, 10) + u.suffix
		}
	}
	return strconv.FormatInt(int64(*s), 10)
}

// Type implements pflag.Value.
func (s *size) Type() string { return "size" }
