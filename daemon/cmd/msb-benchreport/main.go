// Command msb-benchreport writes docs/performance.md and its plots from the results that benchmarks recorded.
//
//	msb-benchreport DIR
//
// DIR contains results/, with a file for each benchmark, and the plots. The page is DIR.md. The text of the page is
// performance.md.tmpl, and all figures come from the results, so the text must stay true for other figures. It is a build
// tool and is not used on a server.
package main

import (
	"bytes"
	_ "embed"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/template"

	"github.com/msbd/msbd/daemon/benchtest"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: msb-benchreport DIR")
		os.Exit(2)
	}
	if err := run(filepath.Clean(os.Args[1])); err != nil {
		fmt.Fprintln(os.Stderr, "msb-benchreport:", err)
		os.Exit(1)
	}
}

//go:embed performance.md.tmpl
var pageText string

// run writes the page and the plots of a directory.
func run(dir string) error {
	results, err := benchtest.Read(filepath.Join(dir, "results"))
	if err != nil {
		return err
	}
	page, err := render(pageText, report{results, filepath.Base(dir)})
	if err != nil {
		return err
	}
	for _, p := range plots {
		if err := p.save(results, dir); err != nil {
			return fmt.Errorf("plot %s: %w", p.name, err)
		}
	}
	return os.WriteFile(dir+".md", page, 0o644)
}

// render executes the template of a page. The functions of the template are the methods of r.
func render(text string, r report) ([]byte, error) {
	t, err := template.New("page").Funcs(template.FuncMap{
		"table": r.table, "values": r.values, "grid": r.grid, "plot": r.plot, "machine": r.machine, "runs": r.runs,
	}).Parse(text)
	if err != nil {
		return nil, err
	}
	var page bytes.Buffer
	err = t.Execute(&page, nil)
	return page.Bytes(), err
}

// report renders parts of the page.
type report struct {
	results map[string]*benchtest.Results
	dir     string // of the plots, relative to the page
}

// notMeasured replaces a part whose benchmark has no results.
const notMeasured = "Not measured yet.\n"

// table returns a table with a row for each record of a benchmark.
func (r report) table(benchmark string) string {
	results := r.results[benchmark]
	if results == nil {
		return notMeasured
	}
	var out, missing strings.Builder
	out.WriteString("| What | n | p50 | p99 | Ratio | of the p50 to that of |\n|---|--:|--:|--:|--:|---|\n")
	for _, m := range results.Records {
		name := m.Name
		if m.At > 0 {
			name += ", " + count(m.At)
		}
		if m.Missing != "" {
			fmt.Fprintf(&missing, "\n%s could not be measured on this machine:\n\n```\n%s\n```\n", name, m.Missing)
			continue
		}
		ratio := ""
		if m.Beside != "" {
			ratio = number(m.Ratio)
		}
		fmt.Fprintf(&out, "| %s | %d | %s %s | %s %s | %s | %s |\n", name, m.N, number(m.P50), m.Unit, number(m.P99), m.Unit, ratio, m.Beside)
	}
	return out.String() + missing.String()
}

// values returns a table of records that have one value each.
func (r report) values(benchmark string) string {
	results := r.results[benchmark]
	if results == nil {
		return notMeasured
	}
	out := "| What | n | Value |\n|---|--:|--:|\n"
	for _, m := range results.Records {
		out += fmt.Sprintf("| %s | %d | %s %s |\n", m.Name, m.N, number(m.P50), m.Unit)
	}
	return out
}

// grid returns a table with a row for each name of a benchmark and a column for each number of things. The cells are the
// p50, or the only value.
func (r report) grid(benchmark, things string) string {
	results := r.results[benchmark]
	if results == nil {
		return notMeasured
	}
	var out strings.Builder
	names, numbers := axes(results)
	fmt.Fprintf(&out, "| %s | Unit |", things)
	for _, at := range numbers {
		fmt.Fprintf(&out, " %s |", count(at))
	}
	out.WriteString("\n|---|---|" + strings.Repeat("--:|", len(numbers)) + "\n")
	for _, name := range names {
		cells, unit := "", ""
		for _, at := range numbers {
			cell := ""
			if m := results.Find(name, at); m != nil {
				cell, unit = number(m.P50), m.Unit
			}
			cells += " " + cell + " |"
		}
		fmt.Fprintf(&out, "| %s | %s |%s\n", name, unit, cells)
	}
	return out.String()
}

// axes returns the names of the records in their order, and the numbers of things, sorted.
func axes(results *benchtest.Results) (names []string, numbers []int) {
	for _, m := range results.Records {
		if !slices.Contains(names, m.Name) {
			names = append(names, m.Name)
		}
		if !slices.Contains(numbers, m.At) {
			numbers = append(numbers, m.At)
		}
	}
	slices.Sort(numbers)
	return names, numbers
}

// plot returns the image of a plot, or nothing if its benchmark has no results.
func (r report) plot(name, alt string) (string, error) {
	i := slices.IndexFunc(plots, func(p chart) bool { return p.name == name })
	if i < 0 {
		return "", fmt.Errorf("no plot %q", name)
	}
	if r.results[plots[i].benchmark] == nil {
		return "", nil
	}
	return fmt.Sprintf("![%s](%s/%s.svg)\n", alt, r.dir, name), nil
}

// machine returns a table that describes the machine. If benchmarks ran on different ones, it has all of their values.
func (r report) machine() string {
	rows := []string{"Processor", "Cores", "Memory", "Kernel", "QEMU", "Virtualization"}
	values := make([][]string, len(rows))
	for _, results := range r.byName() {
		run := results.Run
		for i, value := range []string{run.Processor, strconv.Itoa(run.Cores), fmt.Sprintf("%d MiB", run.MemoryMiB), run.Kernel, run.QEMU, run.Accelerator} {
			if !slices.Contains(values[i], value) {
				values[i] = append(values[i], value)
			}
		}
	}
	out := "| Part | Value |\n|---|---|\n"
	for i, row := range rows {
		out += fmt.Sprintf("| %s | %s |\n", row, strings.Join(values[i], "; "))
	}
	return out
}

// runs returns a table of when each benchmark ran.
func (r report) runs() string {
	out := "| Benchmark | Started (UTC) | Commit | Load before |\n|---|---|---|--:|\n"
	for _, results := range r.byName() {
		run := results.Run
		out += fmt.Sprintf("| `%s` | %s | %s | %.2f |\n", results.name, run.Date.UTC().Format("2006-01-02 15:04"), run.Commit, run.Load)
	}
	return out
}

type named struct {
	*benchtest.Results
	name string
}

func (r report) byName() (all []named) {
	for name, results := range r.results {
		all = append(all, named{results, name})
	}
	slices.SortFunc(all, func(a, b named) int { return strings.Compare(a.name, b.name) })
	return all
}

// number formats a figure with three significant digits, and with all digits before the point.
func number(v float64) string {
	if v == 0 {
		return "0"
	}
	digits := max(0, 2-int(math.Floor(math.Log10(math.Abs(v)))))
	return group(strconv.FormatFloat(v, 'f', min(digits, 4), 64))
}

// count formats a number of things.
func count(n int) string { return group(strconv.Itoa(n)) }

// group puts commas between groups of three digits before the point.
func group(s string) string {
	whole, fraction, point := strings.Cut(s, ".")
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if point {
		return whole + "." + fraction
	}
	return whole
}
