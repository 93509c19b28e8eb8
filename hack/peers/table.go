package main

import (
	"fmt"
	"io"
	"text/tabwriter"
)

// row is one comparison.
type row struct {
	peer, work   string
	theirs, ours float64
	unit         string
	// target is what ours / theirs may be at most, or must be at least.
	target  float64
	atLeast bool
}

func (r *row) ratio() float64 { return r.ours / r.theirs }

func (r *row) met() string {
	if r.atLeast && r.ratio() >= r.target || !r.atLeast && r.ratio() <= r.target {
		return "yes"
	}
	return "no"
}

// printTable prints one table in Markdown, aligned for reading as it is.
func printTable(to io.Writer, rows []row) error {
	if len(rows) == 0 {
		_, err := fmt.Fprintln(to, "nothing was measured")
		return err
	}
	w := tabwriter.NewWriter(to, 0, 0, 1, ' ', 0)
	fmt.Fprintln(w, "| peer\t| work\t| peer's\t| nvmmirror's\t| ratio\t| target\t| met\t|")
	fmt.Fprintln(w, "|---\t|---\t|---\t|---\t|---\t|---\t|---\t|")
	for _, r := range rows {
		sign := "≤"
		if r.atLeast {
			sign = "≥"
		}
		fmt.Fprintf(w, "| %s\t| %s\t| %s %s\t| %s %s\t| %.2f\t| %s %g\t| %s\t|\n",
			r.peer, r.work, figure(r.theirs), r.unit, figure(r.ours), r.unit, r.ratio(), sign, r.target, r.met())
	}
	return w.Flush()
}

// figure shows three digits that matter, or all of a large number.
func figure(v float64) string {
	switch {
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}
