package main

import (
	"image/color"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"github.com/msbd/msbd/daemon/benchtest"
)

// chart is a plot of a benchmark.
type chart struct {
	name, benchmark, title string
	x, y                   string // the axes, with units
	// lines are the names of the records to show as lines over the number of things. Without them, the plot has a bar for
	// each record.
	lines []string
	log   bool // both axes are logarithmic
}

var plots = []chart{
	{name: "start", benchmark: "start", title: "From the request to the result of the first run", x: "time in ms", y: "route and first run"},
	{
		name: "density", benchmark: "density", title: "Memory of an idle sandbox in which Python runs", x: "sandboxes", y: "MiB for each (Pss)",
		lines: []string{"memory of a sandbox", "of that, machine code that the emulator has made", "runc: memory of a container", "gVisor: memory of a container"},
	},
	{
		name: "sandboxes", benchmark: "density", title: "Time of operations while sandboxes run", x: "sandboxes", y: "time in ms (p50)", log: true,
		lines: []string{"sandbox.command.run true in one of them", "sandbox.list", "kill -9 of msbd, then its start until it is ready"},
	},
	{
		name: "keys", benchmark: "keys", title: "Time of operations on keys", x: "keys", y: "time in µs (p50)", log: true,
		lines: []string{"verify", "find by id", "find by name", "find by prefix", "page of 20"},
	},
	{
		name: "store", benchmark: "store", title: "Time to open the store, with all checks", x: "keys and lines of the audit log", y: "time in ms (p50)", log: true,
		lines: []string{"open"},
	},
}

// The size of plots, at 96 dots per inch: 800 by 400 dots.
const width, height = 800 * vg.Inch / 96, 400 * vg.Inch / 96

var colors = []color.Color{
	color.RGBA{0x1f, 0x5f, 0xa8, 255}, color.RGBA{0xd5, 0x5e, 0x00, 255}, color.RGBA{0x00, 0x8f, 0x68, 255},
	color.RGBA{0x8a, 0x4f, 0x9e, 255}, color.RGBA{0x70, 0x70, 0x70, 255},
}

var shapes = []draw.GlyphDrawer{draw.CircleGlyph{}, draw.SquareGlyph{}, draw.TriangleGlyph{}, draw.PyramidGlyph{}, draw.RingGlyph{}}

// save writes the plot as SVG and PNG, or removes the files if there are no results.
func (c chart) save(all map[string]*benchtest.Results, dir string) error {
	results := all[c.benchmark]
	if results == nil {
		for _, ext := range []string{".svg", ".png"} {
			if err := os.Remove(filepath.Join(dir, c.name+ext)); err != nil && !os.IsNotExist(err) {
				return err
			}
		}
		return nil
	}
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = c.title, c.x, c.y
	p.Title.Padding = vg.Points(6)
	p.BackgroundColor = color.White
	p.Legend.Padding = vg.Points(3)
	if c.lines == nil {
		c.bars(p, results)
	} else if err := c.drawLines(p, results); err != nil {
		return err
	}
	for _, ext := range []string{".svg", ".png"} {
		if err := p.Save(width, height, filepath.Join(dir, c.name+ext)); err != nil {
			return err
		}
	}
	return nil
}

// bars adds a horizontal bar for each record, up to its p50, with a mark at its p99.
func (c chart) bars(p *plot.Plot, results *benchtest.Results) {
	b := bars{}
	var names []string
	for _, m := range slices.Backward(results.Records) { // the first record is at the top
		if m.Missing == "" {
			b = append(b, m)
			names = append(names, m.Name)
		}
	}
	p.Add(plotter.NewGrid(), b)
	p.NominalY(names...)
	p.Y.Tick.Label.Font.Size = vg.Points(8)
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.TickerFunc(powers)
	p.Legend.XOffs, p.Legend.YOffs = -vg.Points(6), vg.Points(6)
	p.Legend.Add("p50", thumbnail(func(canvas *draw.Canvas) { fill(canvas, canvas.Rectangle, colors[0]) }))
	p.Legend.Add("p99", thumbnail(func(canvas *draw.Canvas) {
		x := canvas.Center().X
		canvas.StrokeLine2(markStyle, x, canvas.Min.Y, x, canvas.Max.Y)
	}))
}

var markStyle = draw.LineStyle{Color: colors[1], Width: vg.Points(2)}

// bars is a plot.Plotter. plotter.BarChart cannot be used, because it begins bars at 0, which a logarithmic axis does not
// have.
type bars []benchtest.Record

func (b bars) Plot(canvas draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&canvas)
	for i, m := range b {
		middle, half := y(float64(i)), vg.Points(4)
		fill(&canvas, vg.Rectangle{Min: vg.Point{X: x(p.X.Min), Y: middle - half}, Max: vg.Point{X: x(m.P50), Y: middle + half}}, peerColor(m.Name))
		canvas.StrokeLine2(markStyle, x(m.P99), middle-half, x(m.P99), middle+half)
	}
}

// DataRange makes the X axis begin and end at powers of ten.
func (b bars) DataRange() (xmin, xmax, ymin, ymax float64) {
	xmin, xmax = 1, 10
	for _, m := range b {
		if m.P50 > 0 {
			xmin = min(xmin, powerOf10(m.P50, math.Floor))
		}
		xmax = max(xmax, powerOf10(m.P99, math.Ceil))
	}
	return xmin, xmax, -0.5, float64(len(b)) - 0.5
}

// powers are the ticks of a logarithmic axis that begins and ends at powers of ten.
func powers(from, to float64) (ticks []plot.Tick) {
	for power := from; power <= to*1.001; power *= 10 {
		ticks = append(ticks, plot.Tick{Value: power, Label: group(strconv.FormatFloat(power, 'f', max(0, int(math.Round(-math.Log10(power)))), 64))})
		for i := 2.0; i < 10 && i*power <= to; i++ {
			ticks = append(ticks, plot.Tick{Value: i * power})
		}
	}
	return ticks
}

// integers are the ticks of a linear axis, without digits after the point.
func integers(from, to float64) []plot.Tick {
	ticks := plot.DefaultTicks{}.Ticks(from, to)
	for i := range ticks {
		if ticks[i].Label != "" {
			ticks[i].Label = count(int(ticks[i].Value))
		}
	}
	return ticks
}

// powerOf10 rounds v, which is greater than 0, to a power of ten.
func powerOf10(v float64, round func(float64) float64) float64 {
	return math.Pow(10, round(math.Log10(v)))
}

// peerColor is gray for what is not msbd.
func peerColor(name string) color.Color {
	for _, route := range []string{"pool:", "template:", "cold:"} {
		if strings.HasPrefix(name, route) {
			return colors[0]
		}
	}
	return color.Gray{0xa8}
}

func fill(canvas *draw.Canvas, r vg.Rectangle, c color.Color) {
	canvas.FillPolygon(c, []vg.Point{r.Min, {X: r.Max.X, Y: r.Min.Y}, r.Max, {X: r.Min.X, Y: r.Max.Y}})
}

// thumbnail draws the symbol of an entry in the legend.
type thumbnail func(canvas *draw.Canvas)

func (t thumbnail) Thumbnail(canvas *draw.Canvas) { t(canvas) }

// drawLines adds a line for each of the chart's names.
func (c chart) drawLines(p *plot.Plot, results *benchtest.Results) error {
	p.Add(plotter.NewGrid())
	_, numbers := axes(results)
	for i, name := range c.lines {
		var points plotter.XYs
		for _, at := range numbers {
			if m := results.Find(name, at); m != nil && m.P50 > 0 {
				points = append(points, plotter.XY{X: float64(at), Y: m.P50})
			}
		}
		if len(points) == 0 {
			continue
		}
		line, dots, err := plotter.NewLinePoints(points)
		if err != nil {
			return err
		}
		line.Color, line.Width = colors[i%len(colors)], vg.Points(1.5)
		dots.Color, dots.Shape = line.Color, shapes[i%len(shapes)]
		p.Add(line, dots)
		p.Legend.Add(name, line, dots)
	}
	p.Legend.Top, p.Legend.Left = true, true
	if c.log {
		for _, axis := range []*plot.Axis{&p.X, &p.Y} {
			axis.Scale, axis.Tick.Marker = plot.LogScale{}, plot.TickerFunc(powers)
			axis.Min, axis.Max = powerOf10(axis.Min, math.Floor), powerOf10(axis.Max, math.Ceil)
		}
		p.Y.Max *= 10 // room for the legend, and more than p.Y.Min
		p.X.Max = max(p.X.Max, 10*p.X.Min)
	} else {
		p.X.Tick.Marker, p.Y.Tick.Marker = plot.TickerFunc(integers), plot.TickerFunc(integers)
		p.X.Min, p.Y.Min = 0, 0
		p.Y.Max *= 1.4
	}
	return nil
}
