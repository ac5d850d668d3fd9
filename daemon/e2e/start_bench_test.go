package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
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
// numbers of them. It compares that with idle containers of runc. MSB_BENCH_SANDBOXES=N limits their number.
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
		if err := peers.grow(n); err != nil {
			b.Fatal(err)
		}
		at = n
		each := func(name, unit string, sum float64) { record(benchtest.Value(name, unit, sum/float64(n))) }

		pids := append(s.microVMs(), processes(shim, s.dir)...)
		if len(pids) != 2*n {
			b.Fatalf("%d sandboxes have the processes %v", n, pids)
		}
		containers := peers.pids(b)
		memory, peer := memoryOf(b, pids), memoryOf(b, containers)
		each("memory of a sandbox", "MiB", memory.all)
		each("of that, machine code that the emulator has made", "MiB", memory.translated)
		record(benchtest.Value("memory of the template", "MiB", memoryFiles(b, s.cmd.Process.Pid)))
		each("runc: memory of a container", "MiB", peer.all)

		idle := min(30*time.Second, time.Duration(rounds(30))*time.Second)
		before, peerBefore := cpuTime(b, pids...), cpuTime(b, containers...)
		time.Sleep(idle) // what is measured is that nothing happens
		used, peerUsed := cpuTime(b, pids...)-before, cpuTime(b, containers...)-peerBefore
		each(fmt.Sprintf("processor time of a sandbox in %.0f seconds", idle.Seconds()), "%", 100*used.Seconds()/idle.Seconds())
		each(fmt.Sprintf("runc: processor time of a container in %.0f seconds", idle.Seconds()), "%", 100*peerUsed.Seconds()/idle.Seconds())
		record(benchtest.Value("resident memory of msbd", "MiB", float64(residentKiB(s.cmd.Process.Pid))/1024))

		operations := []measurement{
			{name: "sandbox.command.run true in one of them", run: s.must(key, "sandbox.command.run", params{"sandbox": "idle-0", "command": "true"})},
			{name: "sandbox.list", run: s.must(key, "sandbox.list", params{})},
		}
		for i, times := range measure(b, rounds(30), operations...) {
			record(benchtest.Times(operations[i].name, "ms", times))
		}
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
		record(benchtest.Value("resident memory of msbd after that start", "MiB", float64(residentKiB(s.cmd.Process.Pid))/1024))
	}
	b.ReportMetric(0, "ns/op")
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

// idleContainers are containers of runc in which Python waits.
type idleContainers struct {
	bundle string
	ids    []string
}

func newIdleContainers(b *testing.B) *idleContainers {
	c := &idleContainers{bundle: ociBundle(b, "python", "python3", "-c", "import time; time.sleep(7200)")}
	b.Cleanup(func() {
		for _, id := range c.ids {
			if err := runc.do("delete", "--force", id); err != nil {
				b.Error(err)
			}
		}
	})
	return c
}

// grow starts containers until there are n.
func (c *idleContainers) grow(n int) error {
	for len(c.ids) < n {
		id := newContainer()
		if err := runc.do("run", "--detach", "--bundle", c.bundle, id); err != nil {
			return err
		}
		c.ids = append(c.ids, id)
	}
	return nil
}

// pids returns the pids of the containers' processes, each of which is the only one in its container.
func (c *idleContainers) pids(t testing.TB) (pids []int) {
	t.Helper()
	for _, id := range c.ids {
		out, err := exec.Command("runc", "state", id).Output()
		var state struct{ Pid int }
		if err == nil {
			err = json.Unmarshal(out, &state)
		}
		if err != nil {
			t.Fatalf("runc state: %v: %s", err, out)
		}
		pids = append(pids, state.Pid)
	}
	return pids
}
