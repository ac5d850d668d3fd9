package main

import (
	"cmp"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/msbd/msbd/api/rpc"
)

// The commands for holders of an API key, against a stand-in for the server's HTTP side. $URL, $TLS_URL and
// $DEAD_URL are where it answers in plain, with a certificate in $CA, and not at all: nobody takes that port of
// that loopback address.
func TestSandboxScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/sandbox",
		Setup: func(env *testscript.Env) error {
			g := newGateway()
			plain, secure := httptest.NewServer(g), httptest.NewUnstartedServer(g)
			secure.Config.ErrorLog = log.New(io.Discard, "", 0)
			secure.StartTLS()
			env.Defer(plain.Close)
			env.Defer(secure.Close)
			ca := filepath.Join(env.WorkDir, "ca.pem")
			block := &pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw}
			if err := os.WriteFile(ca, pem.EncodeToMemory(block), 0o600); err != nil {
				return err
			}
			home := filepath.Join(env.WorkDir, "home")
			if err := os.MkdirAll(home, 0o700); err != nil {
				return err
			}
			for name, value := range map[string]string{
				"URL": plain.URL, "TLS_URL": secure.URL, "DEAD_URL": "http://127.0.0.3:1", "CA": ca, "HOME": home,
				"XDG_CONFIG_HOME": "", "MSB_API_KEY": "", "MSB_SERVER_URL": "",
			} {
				env.Setenv(name, value)
			}
			env.Values[gatewayValue{}] = g
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){"exits": exits, "interrupts": interrupts},
	})
}

type gatewayValue struct{}

// interrupts runs a command, interrupts it when its run has begun, sees the run end in the gateway, and
// compares its exit code: interrupts 130 msb sandbox run my-env wait.
func interrupts(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: interrupts CODE COMMAND...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	g := ts.Value(gatewayValue{}).(*gateway)
	command := exec.Command(args[1], args[2:]...)
	command.Dir = ts.MkAbs(".")
	command.Env = append(os.Environ(), "MSB_API_KEY="+ts.Getenv("MSB_API_KEY"), "MSB_SERVER_URL="+ts.Getenv("MSB_SERVER_URL"))
	ts.Check(command.Start())
	ended := make(chan error, 1)
	go func() { ended <- command.Wait() }()
	select {
	case <-g.began:
	case err := <-ended:
		ts.Fatalf("ended before its run began: %v", err)
	}
	ts.Check(command.Process.Signal(syscall.SIGINT))
	<-g.ended
	var exit *exec.ExitError
	if err := <-ended; !errors.As(err, &exit) || exit.ExitCode() != want {
		ts.Fatalf("ended with %v, want %d", err, want)
	}
}

// gateway answers as msbd does over HTTP, in its words, without sandboxes behind it. The key msb_good may do
// everything, and msb_team is limited to the namespace team-alpha.
type gateway struct {
	began, ended chan struct{} // a run that waits for the end of its request

	mu      sync.Mutex
	running map[string]string // the configuration of each sandbox, by namespace/name
}

func newGateway() *gateway {
	return &gateway{began: make(chan struct{}), ended: make(chan struct{}), running: map[string]string{}}
}

func (g *gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Request-Id", "OC5JVGYRCJOXYK5Y")
	var req struct {
		Method string
		Params struct {
			Sandbox   string
			Namespace *string
			Config    json.RawMessage
			Language  string
			Code      string
			Command   string
			Args      []string
			Timeout   float64
		}
	}
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil || r.URL.Path != rpc.Path {
		http.Error(w, "{}", http.StatusBadRequest)
		return
	}
	p := req.Params
	refuse := func(status int, code rpc.Code, format string, a ...any) {
		message, _ := json.Marshal(fmt.Sprintf(format, a...))
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"jsonrpc":"2.0","error":{"code":%d,"message":%s},"id":1}`, code, message)
	}
	answer := func(result any) {
		text, _ := json.Marshal(result)
		fmt.Fprintf(w, `{"jsonrpc":"2.0","result":%s,"id":1}`, text)
	}

	own := "default"
	switch r.Header.Get("Authorization") {
	case "Bearer msb_good":
	case "Bearer msb_team":
		own = "team-alpha"
		if p.Namespace != nil && *p.Namespace != own {
			refuse(403, rpc.CodePermissionDenied, "this key is limited to namespace %q; the request names namespace %q", own, *p.Namespace)
			return
		}
	default:
		w.Header().Set("WWW-Authenticate", "Bearer")
		refuse(401, rpc.CodeUnauthenticated, "missing or invalid API key; send one in the header Authorization: Bearer KEY (the server's administrator makes them with: msb server keygen)")
		return
	}
	namespace := *cmp.Or(p.Namespace, &own)
	name := namespace + "/" + p.Sandbox
	switch p.Sandbox {
	case "quota":
		refuse(429, rpc.CodeExhausted, "namespace %s has all its sandboxes", namespace)
		return
	case "away":
		refuse(503, rpc.CodeUnavailable, "sandbox %s no longer answers", name)
		return
	case "broken":
		refuse(500, rpc.CodeInternal, "internal error; the server's log has the cause under request id OC5JVGYRCJOXYK5Y")
		return
	case "huge":
		refuse(400, rpc.CodeInvalidParams, "cpus 99: this server allows 1 to 2")
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	config, running := g.running[name]
	if !running && req.Method != rpc.MethodSandboxStart && p.Sandbox != "" {
		refuse(404, rpc.CodeNotFound, "sandbox %s does not exist", name)
		return
	}
	lines := func(stream string, texts ...string) (out []rpc.Line) {
		for _, text := range texts {
			out = append(out, rpc.Line{Stream: stream, Text: text})
		}
		return out
	}
	switch req.Method {
	case rpc.MethodSandboxStart:
		if running && config != string(p.Config) {
			refuse(409, rpc.CodeConflict, "sandbox %s is already running with another configuration: %s, not %s", name, config, p.Config)
			return
		}
		g.running[name] = string(p.Config)
		answer("Sandbox " + p.Sandbox + " started successfully")
	case rpc.MethodSandboxStop:
		delete(g.running, name)
		answer("Sandbox " + p.Sandbox + " stopped successfully")
	case rpc.MethodSandboxMetricsGet:
		res := rpc.MetricsResult{Sandboxes: []rpc.SandboxMetrics{}}
		cpu, memory, disk := 12.5, int64(256), int64(1<<20)
		for full := range g.running {
			ns, box, _ := strings.Cut(full, "/")
			if (namespace == rpc.AllNamespaces || ns == namespace) && (p.Sandbox == "" || box == p.Sandbox) {
				res.Sandboxes = append(res.Sandboxes, rpc.SandboxMetrics{Namespace: ns, Name: box, Running: true, CPUUsage: &cpu, MemoryUsage: &memory, DiskUsage: &disk})
			}
		}
		if namespace == rpc.AllNamespaces {
			res.Sandboxes = append(res.Sandboxes, rpc.SandboxMetrics{Namespace: "team-beta", Name: "failed"})
		}
		slices.SortFunc(res.Sandboxes, func(a, b rpc.SandboxMetrics) int { return cmp.Compare(a.Namespace+a.Name, b.Namespace+b.Name) })
		answer(res)
	case rpc.MethodSandboxReplRun:
		res := rpc.ReplRunResult{Status: rpc.StatusSuccess, Language: p.Language, Output: lines("stdout", strings.Split(strings.TrimSpace(p.Code), "\n")...)}
		switch {
		case p.Language != "python" && p.Language != "node":
			refuse(400, rpc.CodeInvalidParams, "language %q: use python, node, nodejs or javascript", p.Language)
			return
		case p.Code == "wait":
			g.began <- struct{}{}
			<-r.Context().Done()
			g.ended <- struct{}{}
			return
		case p.Code == "loop":
			refuse(504, rpc.CodeRunTimeout, "time limit of the run reached")
			return
		case p.Code == "raise":
			res.Status, res.Output = rpc.StatusError, append(lines("stdout", "before"), lines("stderr", "Traceback", "ZeroDivisionError")...)
		case p.Code == "settings":
			res.Output = lines("stdout", p.Language, fmt.Sprint(p.Timeout), config)
		}
		answer(res)
	case rpc.MethodSandboxCommandRun:
		res := rpc.CommandRunResult{Command: p.Command, Args: p.Args, Output: lines("stdout", p.Args...)}
		switch p.Command {
		case "nope":
			refuse(422, rpc.CodeCommandNotFound, `run "nope": command not found`)
			return
		case "exit":
			res.ExitCode, _ = strconv.Atoi(p.Args[0])
			res.Output = append(lines("stdout", "out"), append(lines("stderr", "err"), lines("stdout", "out again")...)...)
		}
		res.Success = res.ExitCode == 0
		answer(res)
	}
}
