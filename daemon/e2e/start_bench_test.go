package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/msbd/msbd/daemon/benchtest"
)

// What is measured of each way to start.
const (
	startOnly      = "start"
	startToCode    = "start and 1+1 in Python"
	startToCommand = "start and command true"
	bareBoot       = "bare QEMU: boot to its agent"
	kataStart      = "Kata with its own settings: start and command true"
)

// routes are the settings of servers on which all sandboxes of the default image and size start in one way. The shared server
// has no settings.
var routes = []struct {
	name     string
	settings map[string]string
}{
	{"pool", map[string]string{"pool-min": "1", "pool-max": "1"}},
	{"template", nil},
	{"cold", map[string]string{"max-templates": "0"}},
}

// benchServer starts a server with the Python image, and returns it with a key.
func benchServer(t testing.TB, settings map[string]string) (*server, string) {
	t.Helper()
	s, err := newServer()
	if err == nil {
		err = s.plant()
	}
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range settings {
		s.set(name, value)
	}
	t.Cleanup(func() {
		if t.Failed() {
			s.logDiagnostics(t)
		}
		if err := s.close(); err != nil {
			t.Error(err)
		}
	})
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	if err := s.importImages("python"); err != nil {
		t.Fatal(err)
	}
	return s, s.newKey(t)
}

// routeStarts returns, for each of the routes, the measurements of a start and of the first run in the sandbox. They fail
// if a sandbox was started in another way.
func routeStarts(t testing.TB) (all []measurement) {
	for _, route := range routes {
		s, key := sharedServer(t)
		if route.settings != nil {
			s, key = benchServer(t, route.settings)
		}
		if route.name == "template" {
			until(t, "a start from the template", func() bool { return s.hasTemplate(t, key, "microsandbox/python") })
		}
		ready := func() error {
			if route.name == "pool" {
				s.waitForPool(t)
			}
			return nil
		}
		if err := ready(); err != nil {
			t.Fatal(err)
		}
		box := params{"sandbox": "box"}
		var took time.Duration // of the start alone
		first := func(run func() error) func() error {
			return func() error {
				began := time.Now()
				err := s.must(key, "sandbox.start", box)()
				took = time.Since(began)
				return errors.Join(err, run())
			}
		}
		end := func() error {
			if from := s.startedFrom(t, key, "box"); from != route.name {
				return fmt.Errorf("the sandbox was started from %q, want %q", from, route.name)
			}
			return errors.Join(s.must(key, "sandbox.stop", box)(), ready()) // the pool is full while others are measured
		}
		code := s.must(key, "sandbox.repl.run", params{"sandbox": "box", "language": "python", "code": "1+1"})
		command := s.must(key, "sandbox.command.run", params{"sandbox": "box", "command": "true"})
		all = append(all,
			measurement{name: route.name + ": " + startToCode, beside: "runc: " + startToCode, run: first(code), after: end},
			measurement{name: route.name + ": " + startToCommand, beside: "runc: " + startToCommand, run: first(command), after: end},
			measurement{name: route.name + ": " + startOnly, beside: "runc: " + startOnly, run: func() error { return nil }, took: func() time.Duration { return took }},
		)
	}
	return all
}

// bareStarts is the measurement of the boot of a bareVM.
func bareStarts(accelerator string) measurement {
	var vm *bareVM
	return measurement{name: bareBoot, beside: "runc: " + startOnly, after: func() error { return vm.stop() }, run: func() (err error) {
		vm, err = bootBare(accelerator)
		return err
	}}
}

// BenchmarkStart measures the start of a sandbox and the first run in it, for each way to start. It compares that with
// containers of runc, gVisor and Kata's own settings, and with the mere boot of the same kernel and initramfs.
func BenchmarkStart(b *testing.B) {
	s, _ := sharedServer(b)
	st, err := s.status()
	if err != nil {
		b.Fatal(err)
	}
	bundle := ociBundle(b, "python", "sleep", "3600")
	all := runc.starts("runc", "runc", bundle)
	all = append(all, routeStarts(b)...)
	all = append(all, gVisor(b).starts("gVisor", "runc", bundle)...)
	all = append(all, bareStarts(st.Isolation.Accelerator))
	kata, missing := stockKata(b, s)
	compare(b, "start", rounds(30), append(all, kata...)...)
	if missing != nil {
		put(b, "start", benchtest.Record{Name: kataStart, Missing: missing.Error()})
	}
}

// BenchmarkStartRate measures how many sandboxes a server can start and stop in a minute, two at a time, and the
// processor time that everything but QEMU needs for that.
func BenchmarkStartRate(b *testing.B) {
	s, key := sharedServer(b)
	until(b, "a start from the template", func() bool { return s.hasTemplate(b, key, "microsandbox/python") })
	pids := []int{s.cmd.Process.Pid}
	pids = append(pids, processes("containerd", s.dir)...)
	if len(pids) != 2 {
		b.Fatalf("msbd and containerd are %v", pids)
	}
	before := cpuTime(b, pids...)
	var shims, starts atomic.Int64
	began := time.Now()
	duration := min(time.Minute, time.Duration(rounds(30))*2*time.Second)
	var g errgroup.Group
	for worker := range 2 {
		g.Go(func() error {
			box := params{"sandbox": "rate-" + strconv.Itoa(worker)}
			for time.Since(began) < duration {
				if err := s.must(key, "sandbox.start", box)(); err != nil {
					return err
				}
				id := s.sandboxID(box["sandbox"].(string))
				shims.Add(int64(cpuTime(b, processes(shim, id)...)))
				if err := s.must(key, "sandbox.stop", box)(); err != nil {
					return err
				}
				starts.Add(1)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
	took, n := time.Since(began), float64(starts.Load())
	used := cpuTime(b, pids...) - before + time.Duration(shims.Load())
	record := func(name, unit string, v float64) {
		r := benchtest.Value(name, unit, v)
		r.N = int(n)
		put(b, "rate", r)
	}
	record(fmt.Sprintf("starts from the template and stops, two at a time, for %.0f seconds", duration.Seconds()), "per second", n/took.Seconds())
	record("processor time of msbd, containerd and the shim for each start", "s", used.Seconds()/n)
	b.ReportMetric(0, "ns/op")
}

// cpuTime returns the processor time that processes have used. Of a process that has ended it is 0.
func cpuTime(t testing.TB, pids ...int) (sum time.Duration) {
	t.Helper()
	for _, pid := range pids {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		// The name of the program, in parentheses, may contain spaces. utime and stime are fields 14 and 15.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		for _, field := range fields[11:13] {
			ticks, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			sum += time.Duration(ticks) * 10 * time.Millisecond // Linux has 100 ticks a second for all programs
		}
	}
	return sum
}

// BenchmarkDensity measures what idle sandboxes need, in each of which Python runs, and how fast the server is, for growing
// numbers of them. It compares that with idle containers of runc and gVisor. MSB_BENCH_SANDBOXES=N limits their number.
func BenchmarkDensity(b *testing.B) {
	s, key := benchServer(b, map[string]string{"default-memory-mib": "128"})
	until(b, "a start from the template", func() bool { return s.hasTemplate(b, key, "microsandbox/python") })
	peers := newIdleContainers(b)
	most, err := strconv.Atoi(os.Getenv("MSB_BENCH_SANDBOXES"))
	if err != nil {
		most = 100
	}
	numbers := slices.DeleteFunc([]int{1, 10, 25, 50, 100}, func(n int) bool { return n > most })
	at := 0 // so many sandboxes run
	record := func(r benchtest.Record) {
		r.At = at
		put(b, "density", r)
	}
	for _, n := range numbers {
		var g errgroup.Group
		g.SetLimit(2)
		for i := at; i < n; i++ {
			g.Go(func() error {
				box := "idle-" + strconv.Itoa(i)
				return errors.Join(s.must(key, "sandbox.start", params{"sandbox": box})(),
					s.must(key, "sandbox.repl.run", params{"sandbox": box, "language": "python", "code": "1+1"})())
			})
		}
		if err := g.Wait(); err != nil {
			b.Fatal(err)
		}
		for _, p := range peers {
			if err := p.grow(n); err != nil {
				b.Fatal(err)
			}
		}
		at = n
		each := func(name, unit string, sum float64) { record(benchtest.Value(name, unit, sum/float64(n))) }

		pids := append(s.microVMs(), processes(shim, s.dir)...)
		if len(pids) != 2*n {
			b.Fatalf("%d sandboxes have the processes %v", n, pids)
		}
		memory := memoryOf(b, pids)
		each("memory of a sandbox", "MiB", memory.all)
		each("of that, machine code that the emulator has made", "MiB", memory.translated)
		record(benchtest.Value("memory of all templates", "MiB", memoryFiles(b, s.cmd.Process.Pid)))
		idle := min(30*time.Second, time.Duration(rounds(30))*time.Second)
		type group struct {
			name string
			pids []int
		}
		groups := []group{{"processor time of a sandbox", pids}}
		for _, p := range peers {
			containers := p.pids(b)
			each(p.name+": memory of a container", "MiB", memoryOf(b, containers).all)
			groups = append(groups, group{p.name + ": processor time of a container", containers})
		}
		before := make([]time.Duration, len(groups))
		for i, g := range groups {
			before[i] = cpuTime(b, g.pids...)
		}
		time.Sleep(idle) // what is measured is that nothing happens
		for i, g := range groups {
			used := cpuTime(b, g.pids...) - before[i]
			each(fmt.Sprintf("%s in %.0f seconds", g.name, idle.Seconds()), "%", 100*used.Seconds()/idle.Seconds())
		}
		record(benchtest.Value("resident memory of msbd", "MiB", float64(memoryKiB(s.cmd.Process.Pid, "VmRSS"))/1024))

		operations := []measurement{
			{name: "sandbox.command.run true in one of them", run: s.must(key, "sandbox.command.run", params{"sandbox": "idle-0", "command": "true"})},
			{name: "sandbox.list", run: s.must(key, "sandbox.list", params{})},
		}
		for i, times := range measure(b, rounds(30), operations...) {
			record(benchtest.Times(operations[i].name, "ms", times))
		}
	}
	pid, streams := s.cmd.Process.Pid, min(16, at)
	for _, method := range []string{"PUT", "GET"} {
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil { // from now on
			b.Fatal(err)
		}
		if err := s.transfer(b, key, method, streams); err != nil {
			b.Fatal(err)
		}
		peak := float64(memoryKiB(pid, "VmHWM")) / 1024
		what := map[string]string{"PUT": "uploads", "GET": "downloads"}[method]
		record(benchtest.Value(fmt.Sprintf("peak resident memory of msbd in %d parallel %s of 64 MiB each", streams, what), "MiB", peak))
	}
	// The server restarts last: sandboxes that start after that do not share the memory of the template with the earlier ones.
	for _, n := range slices.Backward(numbers) {
		for ; at > n; at-- {
			if err := s.must(key, "sandbox.stop", params{"sandbox": "idle-" + strconv.Itoa(at-1)})(); err != nil {
				b.Fatal(err)
			}
		}
		restart := measurement{
			name:   "kill -9 of msbd, then its start until it is ready",
			before: func() error { s.kill(); return nil },
			run:    func() error { return s.start() },
		}
		record(benchtest.Times(restart.name, "ms", measure(b, rounds(30), restart)[0]))
		if st, err := s.status(); err != nil || st.Recovery.Adopted != n {
			b.Fatalf("the server adopted %d of %d sandboxes (%v)", st.Recovery.Adopted, n, err)
		}
		record(benchtest.Value("resident memory of msbd after that start", "MiB", float64(memoryKiB(s.cmd.Process.Pid, "VmRSS"))/1024))
	}
	b.ReportMetric(0, "ns/op")
}

// transfer uploads or downloads a file of 64 MiB in each of n sandboxes of BenchmarkDensity, all at once.
func (s *server) transfer(b *testing.B, key, method string, n int) error {
	const size = 64 << 20
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(data)
	var g errgroup.Group
	for i := range n {
		g.Go(func() error {
			var body io.Reader
			if method == "PUT" {
				body = bytes.NewReader(data)
			}
			url := fmt.Sprintf("http://%s/api/v1/sandboxes/idle-%d/files?path=/root/file", s.address, i)
			req, err := http.NewRequestWithContext(b.Context(), method, url, body)
			if err != nil {
				return err
			}
			req.Header.Set("Authorization", "Bearer "+key)
			res, err := httpClient.Do(req)
			if err != nil {
				return err
			}
			defer res.Body.Close()
			got, err := io.Copy(io.Discard, res.Body)
			if err == nil && (method == "PUT" && res.StatusCode != http.StatusCreated || method == "GET" && got != size) {
				err = fmt.Errorf("%s in sandbox idle-%d: %s with %d bytes", method, i, res.Status, got)
			}
			return err
		})
	}
	return g.Wait()
}

// memory is what processes use, in MiB. A page that several processes use counts in part for each of them (Pss).
type memory struct {
	all, translated float64
}

// memoryOf returns what processes use.
func memoryOf(t testing.TB, pids []int) (m memory) {
	t.Helper()
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
		if err != nil {
			t.Fatal(err)
		}
		translated := false
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			switch {
			case strings.Contains(fields[0], "-"): // the first line of a mapping
				translated = strings.HasPrefix(fields[1], "rwx") // QEMU writes machine code there, and runs it
			case fields[0] == "Pss:":
				kib, err := strconv.Atoi(fields[1])
				if err != nil {
					t.Fatal(err)
				}
				m.all += float64(kib) / 1024
				if translated {
					m.translated += float64(kib) / 1024
				}
			}
		}
	}
	return m
}

// memoryFiles returns the size of the files in memory that a process has open, in MiB.
func memoryFiles(t testing.TB, pid int) (mib float64) {
	t.Helper()
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[uint64]bool{} // the inodes
	for _, path := range paths {
		var st syscall.Stat_t
		if target, err := os.Readlink(path); err == nil && strings.HasPrefix(target, "/memfd:") && syscall.Stat(path, &st) == nil && !seen[st.Ino] {
			seen[st.Ino] = true
			mib += float64(st.Blocks) * 512 / (1 << 20)
		}
	}
	return mib
}

// idleContainers are containers of a program in which Python waits.
type idleContainers struct {
	name    string
	program containers
	bundle  string
	ids     []string
}

// newIdleContainers returns no containers yet, of runc and of gVisor.
func newIdleContainers(b *testing.B) []*idleContainers {
	bundle := ociBundle(b, "python", "python3", "-c", "import time; time.sleep(7200)")
	all := []*idleContainers{{name: "runc", program: runc, bundle: bundle}, {name: "gVisor", program: gVisor(b), bundle: bundle}}
	b.Cleanup(func() {
		for _, c := range all {
			for _, id := range c.ids {
				if err := c.program.do("delete", "--force", id); err != nil {
					b.Error(err)
				}
			}
		}
	})
	return all
}

// grow starts containers until there are n.
func (c *idleContainers) grow(n int) error {
	for len(c.ids) < n {
		id := newContainer()
		if err := c.program.do("run", "--detach", "--bundle", c.bundle, id); err != nil {
			return err
		}
		c.ids = append(c.ids, id)
	}
	return nil
}

// pids returns the pids of all processes in the cgroups of the containers. Each container has a cgroup with its name.
func (c *idleContainers) pids(t testing.TB) (pids []int) {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{} // the containers
	for _, path := range paths {
		text, _ := os.ReadFile(path) // other processes may end meanwhile
		for line := range strings.Lines(string(text)) {
			id := filepath.Base(strings.TrimSpace(line))
			if !slices.Contains(c.ids, id) {
				continue
			}
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err != nil {
				t.Fatal(err)
			}
			seen[id] = true
			pids = append(pids, pid)
			break
		}
	}
	if len(seen) != len(c.ids) {
		t.Fatalf("%d of %d containers of %s have processes", len(seen), len(c.ids), c.name)
	}
	return pids
}
