package bench

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// Print shows the result to people.
func (r *WireResult) Print(to io.Writer) error {
	fmt.Fprintf(to, "driver %s: %s, %d processors, Linux %s, load %s\n", r.Driver.Name, r.Driver.CPU, r.Driver.Processors, r.Driver.Kernel, r.Driver.Load)
	if r.Other != nil && *r.Other != *r.Driver {
		fmt.Fprintf(to, "other  %s: %s, %d processors, Linux %s, load %s\n", r.Other.Name, r.Other.CPU, r.Other.Processors, r.Other.Kernel, r.Other.Load)
	}
	fmt.Fprintf(to, "%.2g s each; compared at the receiver: round trips and warm-up wholly, timed streams %s\n", r.Seconds, r.Verified)
	for i := range r.Paths {
		if err := r.Paths[i].print(to); err != nil {
			return err
		}
	}
	return nil
}

func (p *WirePath) print(to io.Writer) error {
	fmt.Fprintf(to, "\n== %s, MTU %d, %s\n", p.Name, p.MTU, p.Congestion)
	var measured []WireTransport
	for _, t := range p.Transports {
		if t.Skipped != "" {
			fmt.Fprintf(to, "%s is skipped: %s\n", t.Transport, t.Skipped)
		} else {
			measured = append(measured, t)
		}
	}
	for _, wait := range []string{"sleeping", "polling"} {
		if err := printRoundTrips(to, measured, wait, p.Placement); err != nil {
			return err
		}
	}
	if err := printThroughput(to, measured); err != nil {
		return err
	}
	fmt.Fprintf(to, "\npeak resident memory, MiB (driver, other)\n")
	w := newTable(to)
	for _, t := range measured {
		fmt.Fprintf(w, "%s\t%.1f\t%.1f\t\n", t.Transport, float64(t.PeakDriver)/(1<<20), float64(t.PeakOther)/(1<<20))
	}
	return w.Flush()
}

func newTable(to io.Writer) *tabwriter.Writer {
	return tabwriter.NewWriter(to, 0, 0, 2, ' ', tabwriter.AlignRight)
}

func printRoundTrips(to io.Writer, transports []WireTransport, wait string, placement Placement) error {
	var sizes []int
	for _, t := range transports {
		for _, r := range t.RoundTrips {
			if r.Wait == wait && !slices.Contains(sizes, r.Size) {
				sizes = append(sizes, r.Size)
			}
		}
	}
	if len(sizes) == 0 {
		return nil
	}
	fmt.Fprintf(to, "\nround trip, %s, ends placed %s, µs (p50 / p99 / p99.9): bytes out, 8 back\n", wait, placement)
	w := newTable(to)
	fmt.Fprint(w, "bytes\t")
	for _, t := range transports {
		fmt.Fprintf(w, "%s\t", t.Transport)
	}
	fmt.Fprintln(w)
	for _, size := range sizes {
		fmt.Fprintf(w, "%d\t", size)
		for _, t := range transports {
			for _, r := range t.RoundTrips {
				if r.Size == size && r.Wait == wait {
					fmt.Fprintf(w, "%.1f / %s / %s\t", r.P50, r.tail(0.99, r.P99), r.tail(0.999, r.P999))
				}
			}
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}

// tail is a quantile where it tells something.
func (l Latency) tail(q, v float64) string {
	if !l.Tells(q) {
		return "–"
	}
	return fmt.Sprintf("%.1f", v)
}

func printThroughput(to io.Writer, transports []WireTransport) error {
	if !slices.ContainsFunc(transports, func(t WireTransport) bool { return len(t.Throughput) > 0 }) {
		return nil
	}
	fmt.Fprintf(to, "\nthroughput; for each GiB: CPU seconds (user + system, softirq of the whole machine), context switches, system calls on the connections; most kernel socket memory\n")
	w := newTable(to)
	fmt.Fprintln(w, "\t\t\tsender\t\t\t\t\treceiver\t\t\t\t\t")
	const columns = "user+sys\tsoftirq\tswitches\tcalls\tKiB\t"
	fmt.Fprintln(w, "\tconnections\tMB/s\t"+columns+columns)
	for _, t := range transports {
		for _, r := range t.Throughput {
			fmt.Fprintf(w, "%s\t%d\t%.0f\t", t.Transport, r.Connections, r.MB)
			for _, u := range []EndUse{r.Driver, r.Other} {
				fmt.Fprintf(w, "%.2f+%.2f\t%.2f\t%.0f\t%.0f\t%d\t", u.User, u.System, u.Softirq, u.Switches, u.Calls, u.Sockets>>10)
			}
			fmt.Fprintln(w)
		}
	}
	return w.Flush()
}
