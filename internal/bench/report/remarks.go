package report

import (
	"fmt"

	"github.com/nvmmirror/nvmmirror/internal/bench"
)

// beside is each transport's figures divided by those of plain TCP.
func (r *Report) beside(p *page, w *bench.WirePath, of []bench.WireTransport) {
	var plain *bench.WireTransport
	for i := range of {
		if of[i].Transport == bench.Plain {
			plain = &of[i]
		}
	}
	if plain == nil || len(of) < 2 {
		return
	}
	var head []string
	var figures []func(*bench.WireTransport) float64
	for _, size := range []int{64, 64 << 10} {
		for _, wait := range []string{"sleeping", "polling"} {
			head = append(head, fmt.Sprintf("p50 %s %s", bytesText(size), wait))
			figures = append(figures, func(t *bench.WireTransport) float64 { return p50(t, size, wait) })
		}
	}
	for _, n := range []int{1, 2} {
		head = append(head, fmt.Sprintf("MB/s over %d", n))
		figures = append(figures, func(t *bench.WireTransport) float64 { return throughput(t, n).MB })
	}
	head = append(head, "CPU for each GiB", "system calls on the connection")
	figures = append(figures,
		func(t *bench.WireTransport) float64 { return cpu(throughput(t, 1)) },
		func(t *bench.WireTransport) float64 {
			m := throughput(t, 1)
			return m.Driver.Calls + m.Other.Calls
		},
		func(t *bench.WireTransport) float64 { return float64(t.PeakDriver + t.PeakOther) })
	head = append(head, "peak memory")
	rows := [][]string{}
	for i := range of {
		if of[i].Transport == bench.Plain {
			continue
		}
		row := []string{string(of[i].Transport)}
		for _, f := range figures {
			row = append(row, ratio(f(&of[i]), f(plain)))
		}
		rows = append(rows, row)
	}
	p.line("The same as multiples of plain TCP's figure; CPU, calls and memory of both ends, CPU and calls over 1 connection\n")
	p.table(append([]string{""}, head...), rows)
}

func p50(t *bench.WireTransport, size int, wait string) float64 {
	for _, m := range t.RoundTrips {
		if m.Size == size && m.Wait == wait {
			return m.P50
		}
	}
	return 0
}

func throughput(t *bench.WireTransport, connections int) bench.Throughput {
	for _, m := range t.Throughput {
		if m.Connections == connections {
			return m
		}
	}
	return bench.Throughput{}
}

func cpu(m bench.Throughput) float64 {
	return m.Driver.User + m.Driver.System + m.Other.User + m.Other.System
}

// ratio is empty where one of the two was not measured.
func ratio(a, b float64) string {
	if a <= 0 || b <= 0 {
		return ""
	}
	return fmt.Sprintf("%.2f", a/b)
}

func (r *Report) commitTables(p *page, charts map[string]chart) {
	if len(r.Commits) == 0 {
		return
	}
	p.line("## Commits of a mirrored pair\n")
	p.line("Two processes on this machine over loopback, acknowledged by both, each commit timed from call to return; afterwards both regions were compared byte for byte and were the same. The raw floor is taken in turns with the commits, between the same two processes, placed alike: the commit's bytes out and 8 back over one bare socket, one thread at each end, and for MB/s a bare stream. *Ratio*: the mirror's figure divided by the floor's. A latency is compared where one commit is outstanding, a p99 where mirror and floor have a thousand each, a rate from 64 KiB.\n")
	for _, name := range []string{"commit-latency", "commit-throughput"} {
		if c, ok := charts[name]; ok {
			p.chart(c)
		}
	}
	var rows [][]string
	for _, m := range r.Commits {
		// Latencies are compared where as many are outstanding, tails where
		// there are enough of both, rates where bytes are what takes time.
		var floor, half, tail, rate string
		if m.Committers == 1 {
			floor, half = percentiles(bench.Latency{Count: m.FloorRounds, P50: m.FloorP50, P99: m.FloorP99, P999: m.FloorP999}), fmt.Sprintf("%.2f", m.RatioP50)
		}
		if m.RatioP99 > 0 {
			tail = fmt.Sprintf("%.2f", m.RatioP99)
		}
		if m.Size >= 64<<10 {
			rate = fmt.Sprintf("%.2f", m.RatioMB)
		}
		rows = append(rows, []string{
			m.Transport, bytesText(m.Size), fmt.Sprint(m.Committers), fmt.Sprint(m.Connections), m.Poll, m.Placement,
			percentiles(bench.Latency{Count: m.Commits, P50: m.P50, P99: m.P99, P999: m.P999}),
			floor, half, tail,
			number(m.Rate), number(m.MB), number(m.FloorMB), rate,
			number(m.CPU), mib(max(0, m.ResidentPrimary-m.Own)) + " / " + mib(m.ResidentSecondary),
		})
	}
	p.table([]string{
		"transport", "bytes", "committers", "connections", "poll", "placed", "p50 / p99 / p99.9, µs", "floor's", "ratio p50", "ratio p99",
		"commits/s", "MB/s", "floor MB/s", "ratio MB/s", "CPU s/GiB", "memory beside the region, MiB",
	}, rows)
	p.line("Memory is of primary / secondary, the primary's less this measurement's own histograms and buffers. Commits that wait poll for as long as the mirror does by default (*auto*), then sleep; *off* sleeps at once.\n")
}
