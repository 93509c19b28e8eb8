package report

import (
	"bytes"
	"fmt"
	"html"
	"image/color"
	"math"
	"regexp"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// Colours of Okabe and Ito, which people with any colour vision tell apart;
// markers and dashes say the same once more.
var (
	black     = color.RGBA{A: 255}
	orange    = color.RGBA{R: 0xe6, G: 0x9f, A: 255}
	skyBlue   = color.RGBA{R: 0x56, G: 0xb4, B: 0xe9, A: 255}
	green     = color.RGBA{G: 0x9e, B: 0x73, A: 255}
	blue      = color.RGBA{G: 0x72, B: 0xb2, A: 255}
	vermilion = color.RGBA{R: 0xd5, G: 0x5e, A: 255}
	purple    = color.RGBA{R: 0xcc, G: 0x79, B: 0xa7, A: 255}
	gridGrey  = color.RGBA{R: 0xdd, G: 0xdd, B: 0xdd, A: 255}
)

const (
	panelWidth   = 3.3 * vg.Inch
	legendWidth  = 1.55 * vg.Inch
	figureHeight = 3.3 * vg.Inch
	textSize     = vg.Length(9)
)

// series is a line with markers; dashed, without filling.
type series struct {
	name   string
	color  color.Color
	shape  draw.GlyphDrawer
	dashed bool
	xy     plotter.XYs
}

// panel is one set of axes, both logarithmic.
type panel struct {
	title, x, y string
	ticks       []plot.Tick // of X; nil: round numbers
	lines       []series
	// Or bars, from top to bottom, of parts one after the other, X linear.
	rows  []string
	parts []part
}

// part is the same part of each bar.
type part struct {
	name   string
	color  color.Color
	values []float64
}

// svg draws panels side by side, with one legend for all at the right.
func svg(panels ...panel) ([]byte, error) {
	height := figureHeight
	for _, p := range panels {
		height = max(height, vg.Length(len(p.rows))*13+60)
	}
	width := vg.Length(len(panels))*panelWidth + legendWidth
	c := vgsvg.New(width, height)
	dc := draw.New(c)
	dc.SetColor(color.White)
	dc.Fill(dc.Rectangle.Path())
	legend := plot.NewLegend()
	legend.Top, legend.Left = true, true
	legend.TextStyle.Font = sans(textSize)
	legend.Padding = 3
	legend.ThumbnailWidth = 22
	known := map[string]bool{}
	// Panels of the same quantity have the same scale.
	low, high := math.Inf(1), math.Inf(-1)
	for _, p := range panels {
		for _, s := range p.lines {
			for _, at := range s.xy {
				low, high = min(low, at.Y), max(high, at.Y)
			}
		}
	}
	row := make([]*plot.Plot, len(panels))
	for i, p := range panels {
		var err error
		row[i], err = p.plot(func(name string, thumb ...plot.Thumbnailer) {
			if !known[name] {
				known[name] = true
				legend.Add(name, thumb...)
			}
		}, low, high)
		if err != nil {
			return nil, fmt.Errorf("chart %q: %w", p.title, err)
		}
	}
	const labels = 14 // wide
	tiles := draw.Tiles{Rows: 1, Cols: len(panels), PadX: 6 + labels, PadLeft: 4 + labels, PadTop: 6, PadBottom: 6, PadRight: 6}
	at := plot.Align([][]*plot.Plot{row}, tiles, draw.Crop(dc, 0, -legendWidth, 0, 0))
	for i, p := range row {
		p.Draw(at[0][i])
		// An axis's own label would get room above the data as well.
		style := p.X.Label.TextStyle
		style.Rotation, style.XAlign, style.YAlign = math.Pi/2, draw.XCenter, draw.YTop
		data := p.DataCanvas(at[0][i])
		dc.FillText(style, vg.Point{X: at[0][i].Min.X - labels, Y: data.Center().Y}, panels[i].y)
	}
	legend.Draw(draw.Crop(dc, width-legendWidth+6, 0, 0, -26))
	var out bytes.Buffer
	if _, err := c.WriteTo(&out); err != nil {
		return nil, err
	}
	return fitText(out.Bytes()), nil
}

var textElement = regexp.MustCompile(`<text ([^>]*font-size:([0-9.]+)px[^>]*)>([^<]*)</text>`)

// fitText gives each text the width that it was laid out with: a browser
// without the font takes another, which may be wider.
func fitText(svg []byte) []byte {
	svg = bytes.ReplaceAll(svg, []byte("font-family:Liberation Sans;"), []byte("font-family:'Liberation Sans',Arial,Helvetica,sans-serif;"))
	return textElement.ReplaceAllFunc(svg, func(element []byte) []byte {
		m := textElement.FindSubmatch(element)
		size, err := strconv.ParseFloat(string(m[2]), 64)
		if err != nil {
			return element
		}
		face := font.DefaultCache.Lookup(sans(vg.Length(size)), vg.Length(size))
		width := face.Width(html.UnescapeString(string(m[3])))
		return fmt.Appendf(nil, `<text textLength="%.1f" lengthAdjust="spacingAndGlyphs" %s>%s</text>`, float64(width), m[1], m[3])
	})
}

func sans(size vg.Length) font.Font {
	return font.Font{Typeface: "Liberation", Variant: "Sans", Size: size}
}

func (p *panel) plot(explain func(string, ...plot.Thumbnailer), low, high float64) (*plot.Plot, error) {
	g := plot.New()
	g.Title.Text, g.Title.Padding = p.title, 6
	g.X.Label.Text = p.x
	g.Title.TextStyle.Font = sans(textSize + 1)
	for _, a := range []*plot.Axis{&g.X, &g.Y} {
		a.Label.TextStyle.Font, a.Tick.Label.Font = sans(textSize), sans(textSize-1)
		a.Label.Padding, a.Padding = 4, 0
	}
	grid := plotter.NewGrid()
	grid.Vertical.Color, grid.Horizontal.Color = gridGrey, gridGrey
	if p.rows != nil {
		grid.Horizontal.Color = nil
		g.Add(grid)
		return g, p.bars(g, explain)
	}
	g.Add(grid)
	for _, s := range p.lines {
		line, marks, err := plotter.NewLinePoints(s.xy)
		if err != nil {
			return nil, err
		}
		line.Color, line.Width = s.color, vg.Points(1.3)
		marks.Color, marks.Shape, marks.Radius = s.color, s.shape, vg.Points(2.8)
		if s.dashed {
			line.Dashes = []vg.Length{4, 3}
		}
		g.Add(line, marks)
		explain(s.name, line, marks)
	}
	g.Y.Scale, g.Y.Tick.Marker = plot.LogScale{}, logTicks{}
	g.Y.Min, g.Y.Max = outward(low, high)
	g.X.Scale, g.X.Tick.Marker = plot.LogScale{}, logTicks{}
	if p.ticks != nil {
		g.X.Tick.Marker = plot.ConstantTicks(p.ticks)
		g.X.Min = min(g.X.Min, p.ticks[0].Value)
		g.X.Max = max(g.X.Max, p.ticks[len(p.ticks)-1].Value)
	}
	// Markers at the edges are whole.
	f := math.Pow(g.X.Max/g.X.Min, 0.03)
	g.X.Min, g.X.Max = g.X.Min/f, g.X.Max*f
	return g, nil
}

func (p *panel) bars(g *plot.Plot, explain func(string, ...plot.Thumbnailer)) error {
	n := len(p.rows)
	names := make([]string, n)
	sums := make([]float64, n)
	var below *plotter.BarChart
	for _, part := range p.parts {
		values := make(plotter.Values, n)
		for i, v := range part.values {
			values[n-1-i] = v // the first at the top
			sums[n-1-i] += v
			names[n-1-i] = p.rows[i]
		}
		b, err := plotter.NewBarChart(values, vg.Points(8))
		if err != nil {
			return err
		}
		b.Color, b.Horizontal, b.LineStyle.Width = part.color, true, 0
		if below != nil {
			b.StackOn(below)
		}
		g.Add(b)
		explain(part.name, b)
		below = b
	}
	xy := make(plotter.XYs, n)
	text := make([]string, n)
	for i, v := range sums {
		xy[i] = plotter.XY{X: v, Y: float64(i)}
		text[i] = number(v)
	}
	labels, err := plotter.NewLabels(plotter.XYLabels{XYs: xy, Labels: text})
	if err != nil {
		return err
	}
	for i := range labels.TextStyle {
		labels.TextStyle[i].Font = sans(textSize - 1)
		labels.TextStyle[i].YAlign = draw.YCenter
	}
	labels.Offset.X = 3
	g.Add(labels)
	g.NominalY(names...)
	g.Y.Padding = 4
	g.Y.Tick.Label.Font = sans(textSize - 1)
	g.Y.Min, g.Y.Max = -0.7, float64(n)-0.3
	g.X.Min = 0
	if g.X.Max *= 1.18; g.X.Max == 0 { // room for the last number
		g.X.Max = 1
	}
	return nil
}

// outward are the round numbers around a range.
func outward(low, high float64) (float64, float64) {
	round := func(v float64, up bool) float64 {
		decade := math.Pow(10, math.Floor(math.Log10(v)))
		steps := []float64{1, 2, 5, 10}
		best := steps[0]
		if up {
			best = 10
		}
		for _, s := range steps {
			if up && s*decade >= v*1.05 {
				best = s
				break
			}
			if !up && s*decade <= v*0.95 {
				best = s
			}
		}
		if !up && decade > v*0.95 {
			return decade / 2
		}
		return best * decade
	}
	return round(low, false), round(high, true)
}

// logTicks label 1, 2 and 5 of each decade, or the decades alone where there
// are many.
type logTicks struct{}

func (logTicks) Ticks(low, high float64) (ticks []plot.Tick) {
	decades := math.Log10(high / low)
	for e := math.Floor(math.Log10(low)); e <= math.Ceil(math.Log10(high)); e++ {
		for s := 1.0; s < 10; s++ {
			v := s * math.Pow(10, e)
			if v < low*0.999 || v > high*1.001 {
				continue
			}
			t := plot.Tick{Value: v}
			if s == 1 || (s == 2 || s == 5) && decades <= 3.2 {
				t.Label = strconv.FormatFloat(v, 'g', 3, 64)
				if v >= 1 {
					t.Label = grouped(int64(math.Round(v)))
				}
			}
			ticks = append(ticks, t)
		}
	}
	return ticks
}
