package e2e

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
	"github.com/msbd/msbd/daemon/benchtest"
)

// measurement is an operation to time. before and after run before and after it and are not timed; they may be nil. took
// returns the time of an operation that measures itself; it is nil for all others.
type measurement struct {
	name          string
	beside        string // the name of the measurement to compare it with; the first one if empty
	bytes         int    // if not 0, the operation moves that many bytes, and its rate is recorded instead of its time
	before, after func() error
	run           func() error
	took          func() time.Duration
}

// measure runs each of all n times, and once before that, and returns the times. It alternates between them, so that a
// machine that becomes slower meanwhile slows all of them.
func measure(t testing.TB, n int, all ...measurement) [][]time.Duration {
	t.Helper()
	took := make([][]time.Duration, len(all))
	for round := range n + 1 {
		for i, m := range all {
			if m.before != nil {
				if err := m.before(); err != nil {
					t.Fatalf("%s: %v", m.name, err)
				}
			}
			began := time.Now()
			err := m.run()
			d := time.Since(began)
			if m.took != nil {
				d = m.took()
			}
			if m.after != nil {
				err = errors.Join(err, m.after())
			}
			if err != nil {
				t.Fatalf("%s: %v", m.name, err)
			}
			if round > 0 { // the first round is a warm-up
				took[i] = append(took[i], d)
			}
		}
	}
	return took
}

// compare measures all, prints a line for each, with its ratio to another one, and records it as a result of benchmark.
func compare(b *testing.B, benchmark string, n int, all ...measurement) {
	b.Helper()
	records := map[string]benchtest.Record{}
	for i, d := range measure(b, n, all...) {
		r := benchtest.Times(all[i].name, "ms", d)
		if size := all[i].bytes; size > 0 {
			rate := func(ms float64) float64 { return float64(size) / (1 << 20) / ms * 1000 }
			r.Unit, r.P50, r.P99 = "MiB/s", rate(r.P50), rate(r.P99)
		}
		records[r.Name] = r
	}
	fmt.Printf("\n%-56s %5s %10s %10s %7s\n", b.Name(), "n", "p50", "p99", "ratio")
	for _, m := range all {
		r := records[m.name]
		if beside := cmp.Or(m.beside, all[0].name); beside != m.name {
			r.Beside, r.Ratio = beside, r.P50/records[beside].P50
		}
		put(b, benchmark, r)
	}
	b.ReportMetric(0, "ns/op") // omit it: the table is more precise
}

// put prints a record and records it.
func put(b *testing.B, benchmark string, r benchtest.Record) {
	b.Helper()
	name := r.Name
	if r.At > 0 {
		name += fmt.Sprintf(", %d", r.At)
	}
	fmt.Printf("%-56s %5d %10.2f %10.2f %7.2f %s\n", name, r.N, r.P50, r.P99, r.Ratio, cmp.Or(r.Missing, r.Unit))
	benchtest.Put(b, benchmark, r)
}

// rounds returns how often to run each measurement: MSB_BENCH_ROUNDS, or def.
func rounds(def int) int {
	if n, err := strconv.Atoi(os.Getenv("MSB_BENCH_ROUNDS")); err == nil && n > 0 {
		return n
	}
	return def
}

// must returns a function that makes the call and returns an error if the call fails.
func (s *server) must(key, method string, p params) func() error {
	return func() error {
		a, err := s.call(key, method, p)
		if err == nil && a.Error != nil {
			err = fmt.Errorf("%v", a)
		}
		return err
	}
}

// BenchmarkRoundTrip measures a run in a sandbox that has started before. It compares that with containerd's own way to
// run a command in the same sandbox.
func BenchmarkRoundTrip(b *testing.B) {
	s, key := startSandbox(b, "warm", "microsandbox/python")
	id := s.sandboxIDs()[0]
	ctr := func() error {
		cmd := exec.Command(filepath.Join(bin, "ctr"), "--address", filepath.Join(s.runDir, "containerd.sock"), "--namespace", "msb",
			"tasks", "exec", "--exec-id", fmt.Sprintf("bench-%d", time.Now().UnixNano()), id, "true")
		// Keep standard input open until ctr ends: at its end, ctr would close it in a way that locks up Kata's shim.
		stdin, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		defer stdin.Close()
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	// The floor of a command is what the emulated or virtual processor needs to start the program, as measured inside.
	var inside time.Duration
	floor := func() error {
		code := "import subprocess, time\nbegan = time.monotonic()\nsubprocess.run(['true'])\nprint(time.monotonic() - began)"
		seconds, err := strconv.ParseFloat(strings.TrimSpace(s.python(b, key, "warm", code).text("stdout")), 64)
		inside = time.Duration(seconds * float64(time.Second))
		return err
	}
	compare(b, "run", rounds(50),
		measurement{name: "ctr task exec true", run: ctr},
		measurement{name: "start and end of true in the guest, by Python", run: floor, took: func() time.Duration { return inside }},
		measurement{name: "sandbox.command.run true", run: s.must(key, "sandbox.command.run", params{"sandbox": "warm", "command": "true"})},
		measurement{name: "sandbox.repl.run 1+1", run: s.must(key, "sandbox.repl.run", params{"sandbox": "warm", "language": "python", "code": "1+1"})},
		measurement{name: "a request that runs nothing (metrics of no sandbox)", run: s.must(key, "sandbox.metrics.get", params{"namespace": "empty"})},
	)
}

// BenchmarkStream measures a run of code in a running interpreter, and the time from a request until the first byte that code
// prints is at the client, while the code still runs. It compares them with a message to the portal that runs nothing, and with
// the complete result of the same code.
func BenchmarkStream(b *testing.B) {
	s, key := startSandbox(b, "stream", "microsandbox/python")
	run := func(code string) params { return params{"sandbox": "stream", "language": "python", "code": code} }
	var open *events
	compare(b, "stream", rounds(50),
		measurement{name: "sandbox.process.list, which runs nothing", run: s.must(key, "sandbox.process.list", params{"sandbox": "stream"})},
		measurement{name: "sandbox.repl.run 1+1", run: s.must(key, "sandbox.repl.run", run("1+1"))},
		measurement{name: "sandbox.repl.run print('x')", run: s.must(key, "sandbox.repl.run", run("print('x')"))},
		measurement{name: "the same as event stream, until the first output", beside: "sandbox.repl.run print('x')", run: func() error {
			open = s.stream(b, key, "sandbox.repl.run", run("print('x')"))
			open.want(b, "output", "x")
			return nil
		}, after: func() error {
			open.want(b, "result", "success")
			return open.body.Close()
		}},
	)
}

// BenchmarkFiles measures the transfer of a file of 64 MiB between the client and the disk of a sandbox. It compares that
// with the same bytes over the standard streams of containerd's exec.
func BenchmarkFiles(b *testing.B) {
	s, key := startSandbox(b, "box", "microsandbox/python")
	id := s.sandboxIDs()[0]
	const size = 64 << 20
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(data)
	ctr := func(input []byte, command string) error {
		cmd := exec.Command(filepath.Join(bin, "ctr"), "--address", filepath.Join(s.runDir, "containerd.sock"), "--namespace", "msb",
			"tasks", "exec", "--exec-id", fmt.Sprintf("bench-%d", time.Now().UnixNano()), id, "sh", "-c", command)
		// As in BenchmarkRoundTrip, standard input stays open until ctr ends.
		stdin, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		defer stdin.Close()
		if err := cmd.Start(); err != nil {
			return err
		}
		if _, err := stdin.Write(input); err != nil {
			return err
		}
		return cmd.Wait()
	}
	status := func(res *http.Response, want int) error {
		n, err := io.Copy(io.Discard, res.Body)
		if err == nil && (res.StatusCode != want || want == 200 && n != size) {
			err = fmt.Errorf("HTTP %d with %d bytes", res.StatusCode, n)
		}
		return err
	}
	if err := status(s.file(b, key, "PUT", "/root/file", bytes.NewReader(data)), 201); err != nil {
		b.Fatal(err)
	}
	remove := func() error {
		s.command(b, key, "box", "rm", "-f", "/root/copy")
		return nil
	}
	// ctr moves less, because it is slow. The rates are compared.
	const part = size / 8
	compare(b, "files", rounds(30),
		measurement{name: "download of 8 MiB: ctr task exec head", bytes: part, run: func() error {
			return ctr(nil, fmt.Sprintf("head -c %d /root/file", part))
		}},
		measurement{name: "download of 64 MiB: GET file", bytes: size, run: func() error {
			return status(s.file(b, key, "GET", "/root/file", nil), 200)
		}},
		measurement{name: "upload of 8 MiB: ctr task exec head", beside: "upload of 8 MiB: ctr task exec head", bytes: part, run: func() error {
			return ctr(data[:part], fmt.Sprintf("head -c %d > /root/copy", part))
		}},
		measurement{name: "upload of 64 MiB: PUT file", beside: "upload of 8 MiB: ctr task exec head", bytes: size, before: remove, run: func() error {
			return status(s.file(b, key, "PUT", "/root/copy", bytes.NewReader(data)), 201)
		}},
	)
}

// BenchmarkRequest measures a request that is authenticated, decoded and answered without a sandbox. It compares that
// with a server in dev mode, which needs no key, and with a bare net/http handler whose response has as many bytes.
func BenchmarkRequest(b *testing.B) {
	s, key := sharedServer(b)
	dev, err := newServer("--dev")
	if err == nil {
		err = dev.start()
	}
	if err != nil {
		b.Fatal(err)
	}
	defer dev.close()
	body := []byte(`{"jsonrpc":"2.0","result":{"sandboxes":[]},"id":1}`)
	bare := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/json")
		w.Write(body)
	}))
	defer bare.Close()
	plain := &server{address: bare.Listener.Addr().String()}
	empty := params{"namespace": "empty"}
	compare(b, "request", rounds(2000),
		measurement{name: "bare net/http handler", run: plain.must("", "sandbox.metrics.get", empty)},
		measurement{name: "the server in dev mode", run: dev.must("", "sandbox.metrics.get", empty)},
		measurement{name: "the server with a key", run: s.must(key, "sandbox.metrics.get", empty)},
	)
}

// BenchmarkRestart measures how long a server with 10,000 keys takes from its start until it is ready, and how much
// memory it uses then. It compares that with a server without keys. containerd keeps running, as in a crash or an
// upgrade.
func BenchmarkRestart(b *testing.B) {
	memory := map[int][]float64{}
	restart := func(keys int) measurement {
		s, err := newServer()
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := s.close(); err != nil {
				b.Error(err)
			}
		})
		if err := s.start(); err != nil {
			b.Fatal(err)
		}
		a := s.admin(b)
		var g errgroup.Group
		g.SetLimit(64)
		for range keys {
			g.Go(func() error {
				_, err := a.CreateKey(b.Context(), &adminv1.CreateKeyRequest{Expire: "1y"})
				return err
			})
		}
		if err := g.Wait(); err != nil {
			b.Fatal(err)
		}
		return measurement{
			name:   fmt.Sprintf("kill -9, start to ready with %d keys", keys),
			before: func() error { s.kill(); return nil },
			run:    func() error { return s.start() },
			after: func() error {
				memory[keys] = append(memory[keys], float64(memoryKiB(s.cmd.Process.Pid, "VmRSS"))/1024)
				return nil
			},
		}
	}
	compare(b, "restart", rounds(30), restart(0), restart(10_000))
	for _, keys := range []int{0, 10_000} {
		counted := memory[keys][1:] // without the warm-up
		put(b, "restart", benchtest.Record{
			Name: fmt.Sprintf("resident memory of msbd with %d keys", keys), Unit: "MiB", N: len(counted),
			P50: benchtest.Percentile(counted, 50), P99: benchtest.Percentile(counted, 99),
		})
	}
}

// memoryKiB returns a field of a process's status in KiB, such as VmRSS, the resident memory, and VmHWM, its peak. It is 0 if
// the process does not exist.
func memoryKiB(pid int, field string) (n int) {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(status)) {
		fmt.Sscanf(line, field+": %d kB", &n)
	}
	return n
}

// BenchmarkSDKs prints the time of a run through each SDK, compared with the same request sent without the SDK.
func BenchmarkSDKs(b *testing.B) {
	s, key := sharedServer(b)
	for _, language := range []string{"python", "typescript"} {
		cmd := exec.Command(filepath.Join(root, "client", language, "check.sh"), "bench")
		cmd.Env = append(os.Environ(), "MSB_SERVER_URL=http://"+s.address, "MSB_API_KEY="+key)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		fmt.Printf("\n%s/%s\n", b.Name(), language)
		if err := cmd.Run(); err != nil {
			b.Fatalf("%s: %v", language, err)
		}
	}
	b.ReportMetric(0, "ns/op") // omit it: the tables are more precise
}

// BenchmarkGoClient measures a run through the Go client whose output is passed on while it is printed, and compares it with
// the same request sent without the client.
func BenchmarkGoClient(b *testing.B) {
	s, key := startSandbox(b, "go", "microsandbox/python")
	box := (&client.Client{ServerURL: "http://" + s.address, Key: client.NewKey(key)}).Sandbox("", "go")
	raw := params{"sandbox": "go", "language": "python", "code": "print('x')", "encoding": "base64"}
	compare(b, "goclient", rounds(50),
		measurement{name: "sandbox.repl.run as event stream", run: func() error {
			open := s.stream(b, key, "sandbox.repl.run", raw)
			open.want(b, "output", "eAo=")
			open.want(b, "result", "success")
			return open.body.Close()
		}},
		measurement{name: "client.Sandbox.Run with Stdout", run: func() error {
			_, err := box.Run(b.Context(), client.Code{Language: "python", Source: "print('x')", Stdout: io.Discard})
			return err
		}},
	)
}
