package report

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nvmmirror/nvmmirror/internal/bench"
)

// page is a Markdown document that is being written.
type page struct{ strings.Builder }

func (p *page) line(format string, args ...any) { fmt.Fprintf(p, format+"\n", args...) }

func (p *page) table(head []string, rows [][]string) {
	p.line("| %s |", strings.Join(head, " | "))
	p.line("|%s", strings.Repeat("---|", len(head)))
	for _, row := range rows {
		p.line("| %s |", strings.Join(row, " | "))
	}
	p.line("")
}

func (p *page) chart(c chart) { p.line("![%s](%s)\n", c.alt, c.file) }

func pathText(p *bench.WirePath) string {
	if p.Name == "loopback" {
		return "loopback"
	}
	return fmt.Sprintf("veth, MTU %d", p.MTU)
}

func pathFile(p *bench.WirePath) string {
	if p.Name == "loopback" {
		return p.Name
	}
	return fmt.Sprintf("mtu%d", p.MTU)
}

func sizesOf(p *bench.WirePath) (all []int) {
	for _, t := range p.Transports {
		for _, r := range t.RoundTrips {
			all = append(all, r.Size)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func connectionsOf(p *bench.WirePath) (all []int) {
	for _, t := range p.Transports {
		for _, r := range t.Throughput {
			all = append(all, r.Connections)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// measured are a path's transports that were not skipped.
func measured(p *bench.WirePath) (all []bench.WireTransport) {
	for _, t := range p.Transports {
		if t.Skipped == "" {
			all = append(all, t)
		}
	}
	return all
}

// markdown is the report, which shows charts.
func (r *Report) markdown(charts map[string]chart) string {
	p := &page{}
	p.line("# The wire and the mirror, measured\n")
	p.line("Made by `nvmmirrord bench report DIR --duration %v`, version %s, on %s, in %v. All figures are in [report.json](report.json).\n",
		time.Duration(r.Duration*float64(time.Second)), r.Version, r.Started.Format("2006-01-02 15:04 MST"), time.Duration(r.Took*float64(time.Second)).Round(time.Second))
	r.machine(p)
	r.terms(p)
	for i := range r.Paths {
		r.path(p, i, charts)
	}
	r.wireCharts(p, charts)
	r.commitTables(p, charts)
	if len(r.Left) > 0 {
		p.line("## Left out\n")
		for _, l := range r.Left {
			kind := "skipped"
			if l.Failed {
				kind = "**failed**"
			}
			p.line("- %s, %s: %s", l.What, kind, l.Why)
		}
		p.line("")
	}
	return strings.TrimRight(p.String(), "\n") + "\n"
}

func (r *Report) machine(p *page) {
	p.line("## The machine\n")
	h := r.Host
	kind := "no hypervisor seen"
	if h.Virtual {
		kind = "a virtual machine"
	}
	rows := [][]string{
		{"processor", fmt.Sprintf("%s, %d processors, %s", h.CPU, h.Processors, kind)},
		{"memory", fmt.Sprintf("%.1f GiB", float64(h.Memory)/(1<<30))},
		{"kernel", "Linux " + h.Kernel},
		{"Go", h.Go},
		{"congestion control", fmt.Sprintf("the system's %s; the sockets' %s", h.Congestion, r.congestion())},
		{"load average", fmt.Sprintf("%s before, %s after", h.Load, r.LoadAfter)},
		{"other work in the second before", fmt.Sprintf("%.2f processors of %d", r.Busy, h.Processors)},
	}
	for i := range r.Paths {
		rows = append(rows, []string{"path", fmt.Sprintf("%s, MTU %d", r.Paths[i].Name, r.Paths[i].MTU)})
	}
	p.table([]string{"", ""}, rows)
	if r.Busy > 0.1 {
		p.line("**The machine was not quiet**: other work ran when this began, and is in the figures.\n")
	}
}

func (r *Report) congestion() string {
	var all []string
	for i := range r.Paths {
		if c := r.Paths[i].Congestion; !slices.Contains(all, c) {
			all = append(all, c)
		}
	}
	if len(all) == 0 {
		return "not asked for"
	}
	return strings.Join(all, ", ")
}

func (r *Report) terms(p *page) {
	p.line("## Terms\n")
	p.line("- *Round trip*: so many bytes out, 8 back, one thread at each end. *Sleeping* ends block in the kernel; *polling* ends ask again and again. A percentile with fewer than ten round trips beyond it is left out.")
	p.line("- *Apart*: each end has one half of the processors, as on two machines. *Together*: both have the same one. *Free*: the scheduler's choice. A wake-up on the same processor and one on another that has gone idle differ so much that figures of sleeping ends mean nothing without it.")
	p.line("- *Throughput*: 64 KiB messages, ends sleeping and free, for %v. What each end uses for a GiB is its process's user and system time; softirq is the whole machine's, which both ends share, and may be in system as well.", time.Duration(r.Duration*float64(time.Second)))
	p.line("- What arrives is compared with what was sent: round trips and each stream's warm-up byte for byte, off the clock; of the timed streams %s.", map[bench.Verify]string{bench.VerifyAll: "everything", bench.VerifySample: "each 16th message"}[r.Verified])
	p.line("")
}

func (r *Report) path(p *page, i int, charts map[string]chart) {
	w := &r.Paths[i]
	p.line("## The wire: %s, MTU %d\n", w.Name, w.MTU)
	for _, t := range w.Transports {
		if t.Skipped != "" {
			p.line("%s is skipped: %s.\n", t.Transport, t.Skipped)
		}
	}
	of := measured(w)
	if len(sizesOf(w)) > 0 {
		p.chart(charts["round-trip-"+pathFile(w)])
		for _, wait := range []string{"sleeping", "polling"} {
			p.line("Round trip in µs, %s, ends placed %s: p50 / p99 / p99.9\n", wait, w.Placement)
			p.roundTrips(w, of, wait)
		}
		if c, ok := charts["tail-"+pathFile(w)]; ok {
			p.chart(c)
		}
	}
	if len(connectionsOf(w)) > 0 {
		p.line("Throughput, and what a GiB costs: sender / receiver\n")
		p.throughput(of)
	}
	r.beside(p, w, of)
}

func (p *page) roundTrips(w *bench.WirePath, of []bench.WireTransport, wait string) {
	head := []string{"size"}
	for _, t := range of {
		head = append(head, string(t.Transport))
	}
	var rows [][]string
	for _, size := range sizesOf(w) {
		row := []string{bytesText(size)}
		for _, t := range of {
			cell := ""
			for _, m := range t.RoundTrips {
				if m.Size == size && m.Wait == wait {
					cell = percentiles(m.Latency)
				}
			}
			row = append(row, cell)
		}
		rows = append(rows, row)
	}
	p.table(head, rows)
}

func percentiles(l bench.Latency) string {
	text := number(l.P50)
	for _, of := range []struct{ q, v float64 }{{0.99, l.P99}, {0.999, l.P999}} {
		if l.Tells(of.q) {
			text += " / " + number(of.v)
		} else {
			text += " / –"
		}
	}
	return text
}

func (p *page) throughput(of []bench.WireTransport) {
	var rows [][]string
	pair := func(f func(bench.EndUse) float64, m bench.Throughput) string {
		return number(f(m.Driver)) + " / " + number(f(m.Other))
	}
	for _, t := range of {
		for _, m := range t.Throughput {
			rows = append(rows, []string{
				string(t.Transport), fmt.Sprint(m.Connections), number(m.MB),
				pair(func(u bench.EndUse) float64 { return u.User }, m), pair(func(u bench.EndUse) float64 { return u.System }, m), number(m.Driver.Softirq),
				pair(func(u bench.EndUse) float64 { return u.Switches }, m), pair(func(u bench.EndUse) float64 { return u.Calls }, m),
				fmt.Sprintf("%d / %d", m.Driver.Sockets>>10, m.Other.Sockets>>10),
			})
		}
	}
	p.table([]string{"", "connections", "MB/s", "user s", "system s", "machine's softirq s", "context switches", "system calls on the connections", "kernel socket memory, KiB"}, rows)
	rows = nil
	for _, t := range of {
		rows = append(rows, []string{string(t.Transport), mib(t.PeakDriver), mib(t.PeakOther)})
	}
	p.line("Most resident memory, MiB\n")
	p.table([]string{"", "sending process", "receiving process"}, rows)
}

func (r *Report) wireCharts(p *page, charts map[string]chart) {
	if _, ok := charts["throughput"]; !ok {
		return
	}
	p.line("## Throughput, CPU and memory\n")
	for _, name := range []string{"throughput", "cpu", "memory", "sockets"} {
		if c, ok := charts[name]; ok {
			p.chart(c)
		}
	}
}
