package http_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/mcp"
	serverpc "github.com/msbd/msbd/daemon/internal/serve/rpc"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// greedySandboxes is a domain without microVMs. The program "print" prints its argument until it has printed 15.9 MB, and
// "print-a-bit" 400 kB, in pieces that share their memory. The program "wait" runs until it is canceled.
type greedySandboxes struct{ *Sandboxes }

// greedyPieces are the pieces of output that "print" prints, by its argument.
var greedyPieces = func() map[string]sandbox.Output {
	pieces := map[string]sandbox.Output{}
	for _, what := range []string{"x", "<", "\n", "\x01", "é"} {
		pieces[what] = sandbox.Output{Stream: sandbox.Stdout, Data: []byte(strings.Repeat(what, 64<<10/len(what)))}
	}
	return pieces
}()

func (greedySandboxes) RunCommand(ctx context.Context, _ sandbox.Name, c sandbox.Command) (sandbox.Process, error) {
	return &sandboxtest.Process{Context: ctx, Body: func(ctx context.Context) (events []sandbox.Event, code int, err error) {
		switch c.Program {
		case "wait":
			<-ctx.Done()
			return nil, 0, context.Cause(ctx)
		default:
			total := 15_900_000
			if c.Program == "print-a-bit" {
				total = 400_000
			}
			piece := greedyPieces[c.Args[0]]
			events = slices.Repeat([]sandbox.Event{piece}, total/len(piece.Data))
		}
		return events, 0, nil
	}}, nil
}

// greedyJob is what a greedy client does. Tests run this test binary again as such a client, so that the memory and the
// goroutines of the client are not those of the server. It gets the job on its standard input, as JSON.
type greedyJob struct {
	Addr, Key string
	InFlight  int
	// Requests take turns.
	Requests []greedyRequest
}

type greedyRequest struct{ Path, Body string }

// greedyClient is the environment variable that makes this test binary a greedy client.
const greedyClient = "MSB_TEST_GREEDY_CLIENT"

// runGreedyClient does the job on the standard input until that ends, and prints how many responses had each status. It
// leaves the processors to the server, if that needs them.
func runGreedyClient() error {
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, 19); err != nil {
		return err
	}
	in := jsontext.NewDecoder(os.Stdin)
	var job greedyJob
	if err := json.UnmarshalDecode(in, &job); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var (
		wg       sync.WaitGroup
		mu       sync.Mutex
		statuses = map[int]int{}
	)
	for i := range job.InFlight {
		wg.Go(func() {
			for n := i / 3; ctx.Err() == nil; n++ {
				r := job.Requests[n%len(job.Requests)]
				status := postGreedily(ctx, job.Addr, r.Path, job.Key, r.Body, i%3 != 0)
				mu.Lock()
				statuses[status]++
				mu.Unlock()
			}
		})
	}
	_, _ = in.ReadToken() // fails when the test closes the pipe
	cancel()
	wg.Wait()
	return json.MarshalWrite(os.Stdout, statuses)
}

// startGreedyClient starts a greedy client. Call stop to end it; it returns how many responses had each status. 0 stands for
// those that the client did not read.
func startGreedyClient(t testing.TB, job greedyJob) (stop func() (statuses map[int]int)) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), greedyClient+"=1")
	cmd.Stderr = os.Stderr
	var out bytes.Buffer
	cmd.Stdout = &out
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceValue(func() (statuses map[int]int) {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error("greedy client:", err)
		} else if err := json.Unmarshal(out.Bytes(), &statuses); err != nil {
			t.Error("greedy client:", err)
		}
		return statuses
	})
	t.Cleanup(func() { stop() })
	if err := json.MarshalWrite(in, job); err != nil {
		t.Fatal(err)
	}
	return stop
}

// greedyKinds returns the requests of each kind with which a key does its worst to the sandbox a.
func greedyKinds(t testing.TB) map[string][]greedyRequest {
	command := func(program, argument string) string {
		args, err := json.Marshal([]string{argument})
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf(`{"sandbox":"a","command":%q,"args":%s}`, program, args)
	}
	longest := strings.Repeat("x", 1<<20-200)
	start := `{"jsonrpc":"2.0","method":"sandbox.start","params":{"sandbox":"a"}}`
	discover := `{"jsonrpc":"2.0","method":"rpc.discover","id":1}`
	kinds := map[string][]greedyRequest{
		"long bodies": {
			{rpc.Path, Request("sandbox.command.run", command("wait", longest))},
			{rpc.MCPPath, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"sandbox_run_command","arguments":` + command("wait", longest[1000:]) + "}}"},
		},
		"batches": {
			{rpc.Path, "[" + strings.Repeat(`{"jsonrpc":"2.0","method":"sandbox.list","id":1},`, 99) + `{"jsonrpc":"2.0","method":"sandbox.list","id":1}]`},
			{rpc.Path, "[" + strings.Repeat(start+",", 99) + start + "]"},
		},
		"discovery": {
			{rpc.Path, "[" + strings.Repeat(discover+",", 99) + discover + "]"},
			{rpc.MCPPath, `{"jsonrpc":"2.0","id":1,"method":"tools/list"}`},
		},
	}
	for what := range greedyPieces {
		params := command("print", what)
		run := Request("sandbox.command.run", params)
		params = command("print-a-bit", what)
		tool := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"sandbox_run_command","arguments":%s}}`,
			strings.Replace(params, "{", `{"max_output_bytes":200000,`, 1))
		stream := strings.Replace(tool, `"params":{`, `"params":{"_meta":{"progressToken":"p"},`, 1)
		kinds["outputs"] = append(kinds["outputs"], greedyRequest{rpc.Path, run}, greedyRequest{rpc.Path, "[" + strings.Repeat(run+",", 9) + run + "]"})
		kinds["excerpts"] = append(kinds["excerpts"], greedyRequest{rpc.MCPPath, tool}, greedyRequest{rpc.MCPPath, stream})
	}
	return kinds
}

// greedySite is a server with a sandbox a, a key that does its worst, and a client with another key.
type greedySite struct {
	*Site
	addr, greedy string
	good         *traffic
	sent         int // by good
	stop         func()
}

func newGreedySite(t testing.TB, options ...func(*Setup)) *greedySite {
	t.Helper()
	s := New(t, append(options, func(o *Setup) {
		o.Sandboxes, o.Log = greedySandboxes{o.Sandboxes.(*Sandboxes)}, slog.New(slog.DiscardHandler)
	}, WithEndpoint(func(methods *serverpc.Service) (gateway.Endpoint, error) {
		h, err := mcp.New(methods, "1")
		if err != nil {
			return gateway.Endpoint{}, err
		}
		return h.Endpoint(), nil
	}))...)
	s.SetDrain(time.Millisecond)
	if w := s.Post(Request("sandbox.start", `{"sandbox":"a"}`)); w.Code != http.StatusOK {
		t.Fatalf("start: %d %s", w.Code, w.Body)
	}
	greedy := s.Issue(t, keys.IssueRequest{Name: "greedy"})
	addr, stop := s.Listen(t)
	t.Cleanup(stop)
	good := newTraffic(s, addr, 1)
	t.Cleanup(good.transport.CloseIdleConnections)
	return &greedySite{Site: s, addr: addr, greedy: greedy, good: good, stop: stop}
}

// calls makes n calls of the other key, one after the other with pauses, and returns their latencies in order of length.
func (g *greedySite) calls(t testing.TB, n int) (latencies []time.Duration) {
	for range n {
		time.Sleep(time.Millisecond)
		began := time.Now()
		if err := g.good.sendGood(g.sent); err != nil {
			t.Error(err)
		}
		g.sent++
		latencies = append(latencies, time.Since(began))
	}
	slices.Sort(latencies)
	return latencies
}

// waitForTurns returns when requests of the greedy key wait for their turn, so that the client does its worst.
func (g *greedySite) waitForTurns(t testing.TB) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); g.UsersOfTurns() < 10; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the greedy client does not send its requests")
		}
	}
}

// p99 returns the 99th percentile of sorted latencies.
func p99(latencies []time.Duration) time.Duration { return latencies[len(latencies)*99/100] }

// A single key does its worst: it makes many requests at a time, in a soak 256, through every door, with the longest
// bodies and outputs, and does not read many of the responses. The memory stays within a limit, and other keys are
// served. BenchmarkGreedyKey measures how fast.
func TestGreedyKey(t *testing.T) {
	calls, inFlight := 200, 128
	if soak() {
		calls, inFlight = 6000, 256
	}
	g := newGreedySite(t)
	for name, requests := range greedyKinds(t) {
		t.Run(name, func(t *testing.T) {
			debug.FreeOSMemory()
			before, peak := memoryBytes(), 0
			end := startGreedyClient(t, greedyJob{g.addr, g.greedy, inFlight, requests})
			g.waitForTurns(t)
			for range calls / 10 {
				g.calls(t, 10)
				peak = max(peak, memoryBytes()-before)
			}
			statuses := end()
			t.Logf("memory grew by %d MiB; statuses %v", peak>>20, statuses)
			if peak > 256<<20 {
				t.Errorf("memory grew by %d MiB, want at most 256", peak>>20)
			}
		})
	}
	g.stop()
	g.WaitForConnections()
	if bytes, keys := g.Held(); bytes != 0 || keys != 0 {
		t.Errorf("after all requests, %d keys hold %d bytes", keys, bytes)
	}
}

// BenchmarkGreedyKey measures the latency of a key's calls, first alone and then while another key does its worst with 256
// requests at a time.
func BenchmarkGreedyKey(b *testing.B) {
	g := newGreedySite(b)
	alone := g.calls(b, 1000)
	for name, requests := range greedyKinds(b) {
		b.Run(strings.ReplaceAll(name, " ", "_"), func(b *testing.B) {
			for range b.N {
				end := startGreedyClient(b, greedyJob{g.addr, g.greedy, 256, requests})
				g.waitForTurns(b)
				beside := g.calls(b, 1000)
				end()
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(alone[len(alone)/2].Seconds()*1000, "alone-p50-ms")
				b.ReportMetric(p99(alone).Seconds()*1000, "alone-p99-ms")
				b.ReportMetric(beside[len(beside)/2].Seconds()*1000, "beside-p50-ms")
				b.ReportMetric(p99(beside).Seconds()*1000, "beside-p99-ms")
				b.ReportMetric(float64(p99(beside))/float64(p99(alone)), "p99-ratio")
			}
		})
	}
}

// postGreedily sends a request over a connection of its own. If read is set, it reads the response and returns its status.
// Otherwise it reads nothing. In any case it ends with ctx, and then returns 0.
func postGreedily(ctx context.Context, addr, path, key, body string, read bool) int {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return 0
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nContent-Type: application/json\r\n"+
		"Accept: application/json, text/event-stream\r\nMcp-Protocol-Version: 2025-11-25\r\nContent-Length: %d\r\n\r\n", path, key, len(body))
	if _, err := io.WriteString(conn, body); err != nil {
		return 0
	}
	if !read {
		<-ctx.Done()
		return 0
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return 0
	}
	return res.StatusCode
}
