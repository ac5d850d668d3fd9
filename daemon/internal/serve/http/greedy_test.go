package http_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

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

func (greedySandboxes) RunCommand(ctx context.Context, _ sandbox.Name, c sandbox.Command) (sandbox.Process, error) {
	return &sandboxtest.Process{Context: ctx, Body: func(ctx context.Context) (events []sandbox.Event, code int, err error) {
		switch c.Program {
		case "wait":
			<-ctx.Done()
			return nil, 0, context.Cause(ctx)
		default:
			const size = 64 << 10
			total := 15_900_000
			if c.Program == "print-a-bit" {
				total = 400_000
			}
			piece := sandbox.Output{Stream: sandbox.Stdout, Data: []byte(strings.Repeat(c.Args[0], size/len(c.Args[0])))}
			for range total / size {
				events = append(events, piece)
			}
		}
		return events, 0, nil
	}}, nil
}

// A single key does its worst: it makes many requests at a time, in a soak 256, through every door, with the longest
// bodies and outputs, and does not read many of the responses. The memory stays within a limit, and other keys are
// served.
func TestGreedyKey(t *testing.T) {
	rounds, inFlight := 1, 128
	if soak() {
		rounds, inFlight = 30, 256
	}
	s := New(t, func(o *Setup) { o.Sandboxes = greedySandboxes{o.Sandboxes.(*Sandboxes)} },
		WithEndpoint(func(methods *serverpc.Service) (gateway.Endpoint, error) {
			h, err := mcp.New(methods, "1")
			if err != nil {
				return gateway.Endpoint{}, err
			}
			return h.Endpoint(), nil
		}))
	s.SetDrain(time.Millisecond)
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	greedy := s.Issue(t, keys.IssueRequest{Name: "greedy"})
	addr, stop := s.Listen(t)
	defer stop()
	good := newTraffic(s, addr, 1)
	defer good.transport.CloseIdleConnections()

	// goodCall sends a call of another key and adds its latency. The latencies are logged only: the clients of the greedy key
	// run in this process and take most of the time of its processors.
	goodCall := func(latencies *[]time.Duration) {
		began := time.Now()
		if err := good.sendGood(len(*latencies)); err != nil {
			t.Error(err)
		}
		*latencies = append(*latencies, time.Since(began))
	}
	p99 := func(latencies []time.Duration) time.Duration {
		slices.Sort(latencies)
		return latencies[len(latencies)*99/100]
	}
	var alone []time.Duration
	for range 200 {
		goodCall(&alone)
	}

	command := func(program, argument string) string {
		args, err := json.Marshal([]string{argument})
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf(`{"sandbox":"a","command":%q,"args":%s}`, program, args)
	}
	type request struct{ path, body string }
	longest := strings.Repeat("x", 1<<20-200)
	discover := `{"jsonrpc":"2.0","method":"rpc.discover","id":1}`
	kinds := map[string][]request{
		"long bodies": {
			{rpc.Path, Request("sandbox.command.run", command("wait", longest))},
			{rpc.MCPPath, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"sandbox_run_command","arguments":` + command("wait", longest[1000:]) + "}}"},
		},
		"discovery": {
			{rpc.Path, "[" + strings.Repeat(discover+",", 99) + discover + "]"},
			{rpc.MCPPath, `{"jsonrpc":"2.0","id":1,"method":"tools/list"}`},
		},
	}
	for _, what := range []string{"x", "<", "\n", "\x01", "é"} {
		params := command("print", what)
		run := Request("sandbox.command.run", params)
		params = command("print-a-bit", what)
		tool := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"sandbox_run_command","arguments":%s}}`,
			strings.Replace(params, "{", `{"max_output_bytes":200000,`, 1))
		stream := strings.Replace(tool, `"params":{`, `"params":{"_meta":{"progressToken":"p"},`, 1)
		kinds["outputs"] = append(kinds["outputs"], request{rpc.Path, run}, request{rpc.Path, "[" + strings.Repeat(run+",", 9) + run + "]"})
		kinds["excerpts"] = append(kinds["excerpts"], request{rpc.MCPPath, tool}, request{rpc.MCPPath, stream})
	}
	for name, requests := range kinds {
		for range rounds {
			t.Run(name, func(t *testing.T) {
				debug.FreeOSMemory()
				before := memoryBytes()
				statuses := map[int]int{}
				responses := make(chan int)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				for i := range inFlight {
					r := requests[i/3%len(requests)]
					go func() { responses <- postGreedily(ctx, t, addr, r.path, greedy, r.body, i%3 != 0) }()
				}
				// Once all requests have been sent and the fast responses are there, other keys are still served.
				left, peak := inFlight, 0
				var latencies []time.Duration
				for left > 0 {
					select {
					case status := <-responses:
						statuses[status]++
						left--
					case <-time.After(time.Millisecond):
						if goodCall(&latencies); len(latencies) == 200 {
							cancel()
						}
					}
					peak = max(peak, memoryBytes()-before)
				}
				t.Logf("memory grew by %d MiB; statuses %v; p99 of another key's %d calls: %s, alone %s",
					peak>>20, statuses, len(latencies), p99(latencies), p99(alone))
				if peak > 256<<20 {
					t.Errorf("memory grew by %d MiB, want at most 256", peak>>20)
				}
			})
		}
	}
	stop()
	if bytes, keys := s.Held(); bytes != 0 || keys != 0 {
		t.Errorf("after all requests, %d keys hold %d bytes", keys, bytes)
	}
}

// postGreedily sends a request over a connection of its own. If read is set, it reads the response and returns its status.
// Otherwise it reads nothing. In any case it ends with ctx, and then returns 0.
func postGreedily(ctx context.Context, t *testing.T, addr, path, key, body string, read bool) int {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Error(err)
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
