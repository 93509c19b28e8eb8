package bench

import (
	"fmt"
	"io"
	"text/tabwriter"
)

// Print shows the result to people.
func (r *CommitResult) Print(to io.Writer) error {
	w := tabwriter.NewWriter(to, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(to, "%.0f commits of %d bytes, %d of them recorded, %d outstanding, ack %s, %s, connections %d, poll %s, placed %s, %s memory, %.1f s\n",
		r.Rate*r.Seconds, r.Size, r.Commits, r.Committers, r.Ack, r.Transport, r.Connections, r.Poll, r.Placement, r.Class, r.Seconds)
	fmt.Fprintf(to, "%s, %d processors, Linux %s, load %s\n\n", r.Host.CPU, r.Host.Processors, r.Host.Kernel, r.Host.Load)
	row := func(name, format string, mirror, floor, ratio float64) {
		fmt.Fprintf(w, "%s\t"+format+"\t"+format+"\t%.2f\t\n", name, mirror, floor, ratio)
	}
	// The floor has one message outstanding: more commits at a time have no ratio.
	alone := func(name, format string, mirror, floor, ratio float64) {
		if ratio == 0 || r.Committers > 1 {
			fmt.Fprintf(w, "%s\t"+format+"\t"+format+"\t\t\n", name, mirror, floor)
			return
		}
		row(name, format, mirror, floor, ratio)
	}
	fmt.Fprintf(w, "\tmirror\traw floor\tratio\t\n")
	alone("p50, µs", "%.2f", r.P50, r.FloorP50, r.RatioP50)
	alone("p99, µs", "%.2f", r.P99, r.FloorP99, r.RatioP99)
	alone("p99.9, µs", "%.2f", r.P999, r.FloorP999, 0)
	alone("max, µs", "%.2f", r.Max, r.FloorMax, 0)
	alone("commits or round trips a second", "%.0f", r.Rate, r.FloorRate, r.Rate/r.FloorRate)
	row("MB/s, the floor's as a stream", "%.1f", r.MB, r.FloorMB, r.RatioMB)
	row("CPU seconds per GiB, both ends", "%.2f", r.CPU, r.FloorCPU, r.RatioCPU)
	if err := w.Flush(); err != nil {
		return err
	}
	const mib = 1 << 20
	_, err := fmt.Fprintf(to, "\nmemory beside the region: primary %.1f MiB (up to %.1f of them this measurement's own), secondary %.1f MiB; %.3f allocations per commit\nboth regions are identical\n",
		float64(r.ResidentPrimary)/mib, float64(r.Own)/mib, float64(r.ResidentSecondary)/mib, r.Allocs)
	return err
}
