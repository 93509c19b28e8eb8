package report

import (
	"image/color"
	"math"
	"slices"

	"github.com/HdrHistogram/hdrhistogram-go"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg/draw"

	"github.com/nvmmirror/nvmmirror/internal/bench"
)

// looks are of transports, in every chart the same.
var looks = map[bench.Transport]struct {
	color color.Color
	shape draw.GlyphDrawer
	open  draw.GlyphDrawer // of a floor beside a mirror
}{
	bench.Plain:     {black, draw.CircleGlyph{}, draw.RingGlyph{}},
	bench.MD5Sig:    {vermilion, draw.BoxGlyph{}, draw.SquareGlyph{}},
	bench.MD5User:   {skyBlue, draw.CrossGlyph{}, draw.CrossGlyph{}},
	bench.MD5Kernel: {purple, draw.PlusGlyph{}, draw.PlusGlyph{}},
	bench.CRC32C:    {green, draw.RingGlyph{}, draw.RingGlyph{}},
	bench.TLS:       {blue, draw.PyramidGlyph{}, draw.TriangleGlyph{}},
}

// chart is a figure with a name for its file.
type chart struct {
	file, alt string
	panels    []panel
}

// lineOf is a transport's series with no points so far.
func lineOf(t bench.Transport) series {
	l := looks[t]
	return series{name: string(t), color: l.color, shape: l.shape}
}

func keep(lines []series, s series) []series {
	if len(s.xy) == 0 {
		return lines
	}
	return append(lines, s)
}

func sizeTicks(sizes []int) (ticks []plot.Tick) {
	for _, n := range sizes {
		ticks = append(ticks, plot.Tick{Value: float64(n), Label: bytesText(n)})
	}
	return ticks
}

func (r *Report) roundTripChart(i int) chart {
	p := &r.Paths[i]
	c := chart{file: "round-trip-" + pathFile(p) + ".svg", alt: "Round trip by message size, " + pathText(p)}
	for _, wait := range []string{"sleeping", "polling"} {
		g := panel{title: wait, x: "message size", y: "round trip, p50, µs", ticks: sizeTicks(sizesOf(p))}
		for _, t := range p.Transports {
			s := lineOf(t.Transport)
			for _, rt := range t.RoundTrips {
				if rt.Wait == wait {
					s.xy = append(s.xy, plotter.XY{X: float64(rt.Size), Y: rt.P50})
				}
			}
			g.lines = keep(g.lines, s)
		}
		c.panels = append(c.panels, g)
	}
	return c
}

// tailChart is the whole distribution of one size, as far as there are at least
// ten round trips beyond.
func (r *Report) tailChart(i, size int) (chart, error) {
	p := &r.Paths[i]
	c := chart{file: "tail-" + pathFile(p) + ".svg", alt: "Round trips of " + bytesText(size) + " by percentile, " + pathText(p)}
	quantiles := []float64{0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999}
	var ticks []plot.Tick
	for _, t := range []struct {
		q    float64
		text string
	}{{0.5, "50 %"}, {0.9, "90 %"}, {0.99, "99 %"}, {0.999, "99.9 %"}, {0.9999, "99.99 %"}} {
		ticks = append(ticks, plot.Tick{Value: 1 / (1 - t.q), Label: t.text})
	}
	for _, wait := range []string{"sleeping", "polling"} {
		g := panel{title: bytesText(size) + ", " + wait, x: "percentile", y: "round trip, µs", ticks: ticks}
		for _, t := range p.Transports {
			s := lineOf(t.Transport)
			for _, rt := range t.RoundTrips {
				if rt.Wait != wait || rt.Size != size {
					continue
				}
				h, err := hdrhistogram.Decode([]byte(rt.HDR))
				if err != nil {
					return c, err
				}
				for _, q := range quantiles {
					if rt.Tells(q) {
						s.xy = append(s.xy, plotter.XY{X: 1 / (1 - q), Y: float64(h.ValueAtQuantile(q*100)) / 1e3})
					}
				}
			}
			g.lines = keep(g.lines, s)
		}
		c.panels = append(c.panels, g)
	}
	return c, nil
}

// connectionsChart has a panel for each path, of f over connections.
func (r *Report) connectionsChart(file, alt, y string, f func(bench.Throughput) float64) chart {
	c := chart{file: file, alt: alt}
	for i := range r.Paths {
		p := &r.Paths[i]
		g := panel{title: pathText(p), x: "connections", y: y}
		for _, n := range connectionsOf(p) {
			g.ticks = append(g.ticks, plot.Tick{Value: float64(n), Label: grouped(int64(n))})
		}
		for _, t := range p.Transports {
			s := lineOf(t.Transport)
			for _, m := range t.Throughput {
				if v := f(m); v > 0 {
					s.xy = append(s.xy, plotter.XY{X: float64(m.Connections), Y: v})
				}
			}
			g.lines = keep(g.lines, s)
		}
		c.panels = append(c.panels, g)
	}
	return c
}

// cpuChart is of streams over one connection.
func (r *Report) cpuChart() chart {
	c := chart{file: "cpu.svg", alt: "CPU seconds for each GiB"}
	for i := range r.Paths {
		p := &r.Paths[i]
		g := panel{title: pathText(p) + ", 1 connection", x: "CPU seconds for each GiB"}
		user, system, softirq := part{name: "user", color: skyBlue}, part{name: "system", color: orange}, part{name: "softirq (machine)", color: black}
		for _, t := range p.Transports {
			for _, m := range t.Throughput {
				if m.Connections != 1 {
					continue
				}
				g.rows = append(g.rows, string(t.Transport)+" sender", string(t.Transport)+" receiver", string(t.Transport)+" machine")
				user.values = append(user.values, m.Driver.User, m.Other.User, 0)
				system.values = append(system.values, m.Driver.System, m.Other.System, 0)
				softirq.values = append(softirq.values, 0, 0, m.Driver.Softirq)
			}
		}
		g.parts = []part{user, system, softirq}
		c.panels = append(c.panels, g)
	}
	return c
}

func (r *Report) memoryChart(i int) chart {
	p := &r.Paths[i]
	c := chart{file: "memory.svg", alt: "Peak resident memory of each process, " + pathText(p)}
	g := panel{title: pathText(p), x: "peak resident memory, MiB"}
	sender, receiver := part{name: "sender", color: skyBlue}, part{name: "receiver", color: orange}
	const mib = 1 << 20
	for _, t := range p.Transports {
		if t.PeakDriver > 0 {
			g.rows = append(g.rows, string(t.Transport)+" sender", string(t.Transport)+" receiver")
			sender.values = append(sender.values, float64(t.PeakDriver)/mib, 0)
			receiver.values = append(receiver.values, 0, float64(t.PeakOther)/mib)
		}
	}
	g.parts = []part{sender, receiver}
	c.panels = []panel{g}
	return c
}

// commitChart is latency of one committer by size, mirror beside floor, for
// each way to wait.
func (r *Report) commitChart() chart {
	c := chart{file: "commit-latency.svg", alt: "Mirrored commits of one committer beside the raw round trip, by size"}
	for _, k := range []struct{ title, poll, placement string }{
		{"polling", "auto", ""}, {"sleeping, nodes apart", "off", string(bench.Apart)}, {"sleeping, nodes together", "off", string(bench.Together)},
	} {
		g := panel{title: k.title, x: "bytes of a commit", y: "p50, µs"}
		c.panels = r.commitLines(c.panels, g, func(m *bench.CommitResult) bool {
			return m.Committers == 1 && m.Poll == k.poll && (k.placement == "" || m.Placement == k.placement)
		}, func(m *bench.CommitResult) (float64, float64) { return m.P50, m.FloorP50 })
	}
	return c
}

// rateChart is payload by size, of one committer and of the most.
func (r *Report) rateChart() chart {
	c := chart{file: "commit-throughput.svg", alt: "Payload of mirrored commits beside the raw stream, by size"}
	most := 0
	for _, m := range r.Commits {
		most = max(most, m.Committers)
	}
	for _, n := range []int{1, most} {
		g := panel{title: grouped(int64(n)) + " committers, polling", x: "bytes of a commit", y: "MB/s"}
		if n == 1 {
			g.title = "1 committer, polling"
		}
		c.panels = r.commitLines(c.panels, g, func(m *bench.CommitResult) bool { return m.Committers == n && m.Poll == "auto" },
			func(m *bench.CommitResult) (float64, float64) { return m.MB, m.FloorMB })
		if most == 1 {
			break
		}
	}
	return c
}

func (r *Report) commitLines(panels []panel, g panel, take func(*bench.CommitResult) bool, of func(*bench.CommitResult) (mirror, floor float64)) []panel {
	sizes := map[int]bool{}
	for _, t := range bench.PairTransports() {
		mirror, floor := lineOf(t), lineOf(t)
		mirror.name, floor.name = string(t)+", mirror", string(t)+", raw floor"
		floor.dashed, floor.shape = true, looks[t].open
		for _, m := range r.Commits {
			if m.Transport != string(t) || m.Connections != 1 || !take(m) {
				continue
			}
			a, b := of(m)
			x := float64(m.Size)
			mirror.xy, floor.xy = append(mirror.xy, plotter.XY{X: x, Y: a}), append(floor.xy, plotter.XY{X: x, Y: b})
			if !sizes[m.Size] {
				sizes[m.Size] = true
				g.ticks = append(g.ticks, sizeTicks([]int{m.Size})...)
			}
		}
		g.lines = keep(keep(g.lines, mirror), floor)
	}
	if len(g.lines) == 0 {
		return panels
	}
	return append(panels, g)
}

// socketKiB is what both ends' kernels held.
func socketKiB(m bench.Throughput) float64 {
	return math.Round(float64(m.Driver.Sockets+m.Other.Sockets) / (1 << 10))
}

// charts are those that the report has figures for.
func (r *Report) charts() (map[string]chart, error) {
	all := map[string]chart{}
	add := func(name string, c chart) {
		c.panels = slices.DeleteFunc(c.panels, func(p panel) bool { return len(p.lines)+len(p.rows) == 0 })
		if len(c.panels) > 0 {
			all[name] = c
		}
	}
	for i := range r.Paths {
		name := pathFile(&r.Paths[i])
		add("round-trip-"+name, r.roundTripChart(i))
		tail, err := r.tailChart(i, tailSize)
		if err != nil {
			return nil, err
		}
		add("tail-"+name, tail)
		if i == 0 {
			add("memory", r.memoryChart(i))
		}
	}
	add("throughput", r.connectionsChart("throughput.svg", "Throughput by connections", "MB/s", func(m bench.Throughput) float64 { return m.MB }))
	add("sockets", r.connectionsChart("sockets.svg", "Kernel socket memory of both ends by connections", "kernel socket memory, KiB", socketKiB))
	add("cpu", r.cpuChart())
	add("commit-latency", r.commitChart())
	add("commit-throughput", r.rateChart())
	return all, nil
}
