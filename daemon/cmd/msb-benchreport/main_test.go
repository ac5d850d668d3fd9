package main

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/msbd/msbd/daemon/benchtest"
)

var update = flag.Bool("update", false, "write the golden file")

// small has a few results of each kind.
const small = `{"date":"2026-12-02T08:36:24Z","commit":"0123456789ab","load":0.25,"processor":"P","cores":2,"memory_mib":1024,"kernel":"6.1","qemu":"7.2","accelerator":"KVM"}
`

var files = map[string]string{
	"start": small + `{"name":"runc: start","unit":"ms","n":30,"p50":47.04,"p99":60}
{"name":"pool: start","unit":"ms","n":30,"p50":9.117,"p99":10.5,"beside":"runc: start","ratio":0.19382}
{"name":"cold: start","unit":"ms","n":30,"p50":3012.3,"p99":12764.12,"beside":"runc: start","ratio":64.04}
{"name":"Kata","missing":"no vsock"}
`,
	"density": small + `{"name":"memory of a sandbox","at":1,"unit":"MiB","n":1,"p50":187.67,"p99":187.67}
{"name":"sandbox.list","at":1,"unit":"ms","n":30,"p50":0.91,"p99":3}
{"name":"memory of a sandbox","at":100,"unit":"MiB","n":1,"p50":101,"p99":101}
`,
	"rate": small + `{"name":"starts","unit":"per second","n":90,"p50":1.5,"p99":1.5}
`,
	"keys": small + `{"name":"verify","at":100,"unit":"µs","n":5,"p50":0.123,"p99":0.2}
{"name":"verify","at":1000000,"unit":"µs","n":5,"p50":0.14,"p99":0.2}
`,
}

func writeFiles(t *testing.T, files map[string]string) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "performance")
	if err := os.MkdirAll(filepath.Join(dir, "results"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, "results", name+".jsonl"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// The parts of a page have the expected Markdown, and the page and the plots are written.
func TestReport(t *testing.T) {
	dir := writeFiles(t, files)
	results, err := benchtest.Read(filepath.Join(dir, "results"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := render(`{{plot "start" "Bars."}}{{plot "store" "None."}}
{{table "start"}}
{{grid "density" "Sandboxes"}}
{{grid "keys" "Keys"}}
{{table "files"}}
{{values "rate"}}
{{machine}}
{{runs}}`, report{results, "performance"})
	if err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "report.md")
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}

	if err := os.WriteFile(filepath.Join(dir, "store.svg"), nil, 0o644); err != nil { // of earlier results
		t.Fatal(err)
	}
	if err := run(dir); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(dir + ".md")
	if err != nil || !strings.Contains(string(page), "| pool: start | 30 | 9.12 ms |") {
		t.Errorf("the page is %v:\n%s", err, page)
	}
	for _, name := range []string{"start", "density", "keys"} {
		for ext, begins := range map[string]string{".svg": "<?xml", ".png": "\x89PNG"} {
			image, err := os.ReadFile(filepath.Join(dir, name+ext))
			if err != nil || !strings.HasPrefix(string(image), begins) {
				t.Errorf("%s%s is %v, %.20q", name, ext, err, image)
			}
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "store.svg")); !os.IsNotExist(err) {
		t.Errorf("a plot without results: %v", err)
	}
}

// Broken results are an error that names the file and the line, and nothing is written.
func TestBrokenResults(t *testing.T) {
	first := `{"name":"a","unit":"ms","n":1,"p50":1,"p99":1}` + "\n"
	for name, c := range map[string]struct{ text, want string }{
		"no line":        {"", "no records"},
		"no records":     {small, "no records"},
		"no run":         {first, "line 1, the run"},
		"not JSON":       {small + "{\n", "line 2"},
		"unknown field":  {small + `{"name":"a","p95":1}`, "line 2"},
		"no name":        {small + `{"unit":"ms","n":1,"p50":1,"p99":1}`, "without a name"},
		"no figures":     {small + `{"name":"a"}`, "has no figures"},
		"negative":       {small + `{"name":"a","unit":"ms","n":1,"p50":-1,"p99":1}`, "has no figures"},
		"twice":          {small + first + first, "line 3: \"a\" is there twice"},
		"two claims":     {small + `{"name":"a","unit":"ms","n":1,"p50":1,"p99":1,"missing":"x"}`, "is missing and has figures"},
		"unknown beside": {small + `{"name":"a","unit":"ms","n":1,"p50":1,"p99":1,"beside":"b","ratio":1}`, `compared with "b"`},
	} {
		t.Run(name, func(t *testing.T) {
			dir := writeFiles(t, map[string]string{"start": c.text})
			err := run(dir)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "start.jsonl") {
				t.Errorf("the error is %v, want %q", err, c.want)
			}
			if _, err := os.Stat(dir + ".md"); !os.IsNotExist(err) {
				t.Errorf("the page is there: %v", err)
			}
		})
	}
	if err := run(writeFiles(t, nil)); err == nil || !strings.Contains(err.Error(), "no results") {
		t.Errorf("the error without results is %v", err)
	}
}

// docs/performance.md is what the template and the results in the checkout give.
func TestPageIsCurrent(t *testing.T) {
	docs := filepath.Join("..", "..", "..", "docs")
	results, err := benchtest.Read(filepath.Join(docs, "performance", "results"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := render(pageText, report{results, "performance"})
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(docs, "performance.md"))
	if err != nil || string(got) != string(want) {
		t.Errorf("docs/performance.md is not current (%v): run go run ./daemon/cmd/msb-benchreport docs/performance", err)
	}
}
