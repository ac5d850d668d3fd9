// Package benchtest keeps what benchmarks measure in files, from which msb-benchreport writes docs/performance.md.
package benchtest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// Record is one measurement: a line of a file of results.
type Record struct {
	Name string  `json:"name"`           // what was measured
	At   int     `json:"at,omitempty"`   // how many things there were, in benchmarks that change their number
	Unit string  `json:"unit,omitempty"` // of P50 and P99
	N    int     `json:"n,omitempty"`    // how often it was measured
	P50  float64 `json:"p50,omitempty"`
	P99  float64 `json:"p99,omitempty"`
	// Beside is the measurement of the same benchmark with which this one is compared, and Ratio the ratio of this P50 to
	// that of Beside.
	Beside string  `json:"beside,omitempty"`
	Ratio  float64 `json:"ratio,omitempty"`
	// Missing says why there are no figures.
	Missing string `json:"missing,omitempty"`
}

// Run says where and when a benchmark ran. It is the first line of a file of results.
type Run struct {
	Date        time.Time `json:"date"`
	Commit      string    `json:"commit"`
	Load        float64   `json:"load"` // average number of running and waiting processes in the minute before
	Processor   string    `json:"processor"`
	Cores       int       `json:"cores"`
	MemoryMiB   int       `json:"memory_mib"`
	Kernel      string    `json:"kernel"`
	QEMU        string    `json:"qemu"`
	Accelerator string    `json:"accelerator"`
}

// Results are those of one benchmark.
type Results struct {
	Run     Run
	Records []Record
}

// Find returns the record of name with at things, or nil.
func (r *Results) Find(name string, at int) *Record {
	if r != nil {
		for i := range r.Records {
			if r.Records[i].Name == name && r.Records[i].At == at {
				return &r.Records[i]
			}
		}
	}
	return nil
}

// Dir is the environment variable with the directory of results. Without it, nothing is recorded.
const Dir = "MSB_BENCH_RESULTS"

// suffix is that of a file of results. The rest of its name is the benchmark.
const suffix = ".jsonl"

var recorded struct {
	sync.Mutex
	results map[string]*Results // by benchmark: what this process has recorded
}

// Put records r as a result of benchmark, in DIR/benchmark.jsonl. A process's first record of a benchmark replaces what
// earlier processes recorded of it.
func Put(b testing.TB, benchmark string, r Record) {
	b.Helper()
	dir := os.Getenv(Dir)
	if dir == "" {
		return
	}
	recorded.Lock()
	defer recorded.Unlock()
	if recorded.results == nil {
		recorded.results = map[string]*Results{}
	}
	all := recorded.results[benchmark]
	if all == nil {
		run, err := thisRun()
		if err != nil {
			b.Fatalf("describe this machine: %v", err)
		}
		all = &Results{Run: run}
		recorded.results[benchmark] = all
	}
	if old := all.Find(r.Name, r.At); old != nil { // Go runs a benchmark again with more iterations
		*old = r
	} else {
		all.Records = append(all.Records, r)
	}
	if err := write(filepath.Join(dir, benchmark+suffix), all); err != nil {
		b.Fatal(err)
	}
}

func write(path string, r *Results) error {
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false)
	if err := e.Encode(r.Run); err != nil {
		return err
	}
	for _, record := range r.Records {
		if err := e.Encode(record); err != nil {
			return err
		}
	}
	return os.WriteFile(path, text.Bytes(), 0o644)
}

// Read reads the results of all benchmarks in a directory, by benchmark.
func Read(dir string) (map[string]*Results, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*"+suffix))
	if err != nil {
		return nil, err
	}
	all := map[string]*Results{}
	for _, path := range paths {
		r, err := readFile(path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		all[strings.TrimSuffix(filepath.Base(path), suffix)] = r
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s has no results", dir)
	}
	return all, nil
}

func readFile(path string) (*Results, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := &Results{}
	line := 0
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
		d := json.NewDecoder(bytes.NewReader(s.Bytes()))
		d.DisallowUnknownFields()
		if line++; line == 1 {
			if err := d.Decode(&r.Run); err != nil {
				return nil, fmt.Errorf("line 1, the run: %w", err)
			}
			continue
		}
		var record Record
		if err = d.Decode(&record); err == nil {
			err = record.check(r)
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", line, err)
		}
		r.Records = append(r.Records, record)
	}
	if len(r.Records) == 0 {
		return nil, errors.New("no records")
	}
	for _, record := range r.Records {
		if record.Beside != "" && r.Find(record.Beside, record.At) == nil {
			return nil, fmt.Errorf("%q is compared with %q, which is missing", record.Name, record.Beside)
		}
	}
	return r, nil
}

// check returns an error if the record cannot be the next one of earlier.
func (r Record) check(earlier *Results) error {
	switch {
	case r.Name == "":
		return errors.New("a record without a name")
	case earlier.Find(r.Name, r.At) != nil:
		return fmt.Errorf("%q is there twice", r.Name)
	case r.Missing != "" && (r.N != 0 || r.P50 != 0):
		return fmt.Errorf("%q is missing and has figures", r.Name)
	case r.Missing == "" && (r.N < 1 || r.Unit == "" || r.P50 < 0 || r.P99 < 0):
		return fmt.Errorf("%q has no figures", r.Name)
	}
	return nil
}

// Percentile returns the smallest of the values that is larger than p percent of them, or the largest. It sorts the values.
func Percentile[T int | float64 | time.Duration](values []T, p int) T {
	slices.Sort(values)
	return values[min(len(values)-1, len(values)*p/100)]
}

// Times returns the record of durations, in the unit. It sorts them.
func Times(name, unit string, d []time.Duration) Record {
	in := map[string]time.Duration{"ns": time.Nanosecond, "µs": time.Microsecond, "ms": time.Millisecond, "s": time.Second}[unit]
	return Record{
		Name: name, Unit: unit, N: len(d),
		P50: float64(Percentile(d, 50)) / float64(in), P99: float64(Percentile(d, 99)) / float64(in),
	}
}

// Value returns the record of a value that was measured once.
func Value(name, unit string, v float64) Record {
	return Record{Name: name, Unit: unit, N: 1, P50: v, P99: v}
}

// field returns what the group in a pattern matches in a file of /proc, or "".
func field(path, pattern string) string {
	text, _ := os.ReadFile(path)
	if m := regexp.MustCompile(pattern).FindSubmatch(text); m != nil {
		return string(m[1])
	}
	return ""
}

// The time and the load when this process started, before it ran a benchmark.
var (
	started = time.Now().UTC().Truncate(time.Second)
	load, _ = strconv.ParseFloat(field("/proc/loadavg", `^(\S+)`), 64)
)

// thisRun describes this machine and the commit that is measured.
func thisRun() (Run, error) {
	r := Run{Date: started, Load: load, Cores: runtime.NumCPU()}
	r.Processor = field("/proc/cpuinfo", `(?m)^model name\s*: (.*)$`)
	r.Kernel = field("/proc/sys/kernel/osrelease", `^(\S+)`)
	kib, _ := strconv.Atoi(field("/proc/meminfo", `(?m)^MemTotal:\s*(\d+) kB$`))
	r.MemoryMiB = kib / 1024
	for out, command := range map[*string]string{
		&r.Accelerator: `if "$(git rev-parse --show-toplevel)/daemon/setup/lab/kvm.sh"; then echo KVM; else echo "none, QEMU emulates the processor (TCG)"; fi`,
		&r.QEMU:        `qemu-system-x86_64 --version | sed -n '1s/.*version //p'`,
		&r.Commit:      `git rev-parse --short=12 HEAD; git diff --quiet HEAD -- ':/*.go' || echo with changes`,
	} {
		text, err := exec.Command("sh", "-c", command).Output()
		if err != nil {
			return r, fmt.Errorf("%s: %w", command, err)
		}
		*out = strings.Join(strings.Fields(string(text)), " ")
	}
	return r, nil
}
