package report

import (
	"fmt"
	"math"
	"strconv"

	"github.com/nvmmirror/nvmmirror/internal/bench"
)

func bytesText(n int) string {
	switch {
	case n >= 1<<20 && n%(1<<20) == 0:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 1<<10 && n%(1<<10) == 0:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d B", n)
}

func commitText(c bench.CommitOptions) string {
	poll, committers, placement := "auto", "1 committer", ""
	if c.Poll == bench.PollOff {
		poll = "off"
	}
	if c.Connections > 1 {
		placement = fmt.Sprintf(", %d connections", c.Connections)
	}
	if c.Committers > 1 {
		committers = fmt.Sprintf("%d committers", c.Committers)
	}
	if c.Placement != bench.Auto {
		placement += ", " + string(c.Placement)
	}
	return fmt.Sprintf("commits of %s over %s, %s, poll %s%s", bytesText(c.Size), c.Transport, committers, poll, placement)
}

// number has at least three digits.
func number(v float64) string {
	if v == 0 || math.IsNaN(v) || math.IsInf(v, 0) {
		return strconv.FormatFloat(v, 'f', -1, 64)
	}
	digits := max(0, 2-int(math.Floor(math.Log10(math.Abs(v)))))
	if math.Abs(v) >= 1000 {
		return grouped(int64(math.Round(v)))
	}
	return strconv.FormatFloat(v, 'f', digits, 64)
}

func mib(n int64) string { return fmt.Sprintf("%.1f", float64(n)/(1<<20)) }

// grouped has thousands apart.
func grouped(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
