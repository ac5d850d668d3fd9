package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// answer is a JSON-RPC answer and its HTTP status.
type answer struct {
	Status int
	Result json.RawMessage `json:"result"`
	Error  *struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	} `json:"error"`
}

func (a answer) String() string {
	if a.Error != nil {
		return fmt.Sprintf("HTTP %d, error %d: %s", a.Status, a.Error.Code, a.Error.Message)
	}
	return fmt.Sprintf("HTTP %d, result %s", a.Status, a.Result)
}

// call sends one JSON-RPC request. It is safe outside of the test's goroutine.
func (s *server) call(key, method string, params any) (answer, error) {
	body, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
	if err != nil {
		return answer{}, err
	}
	return s.post(key, "/api/v1/rpc", body)
}

// caller gives up on a server that does not answer. A start takes the server's own two minutes at most.
var caller = &http.Client{Timeout: patience * 3 * time.Minute}

func (s *server) post(key, path string, body []byte) (answer, error) {
	var a answer
	req, err := http.NewRequest("POST", "http://"+s.address+path, bytes.NewReader(body))
	if err != nil {
		return a, err
	}
	req.Header.Set("Content-Type", "application/json")
	if key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	}
	res, err := caller.Do(req)
	if err != nil {
		return a, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return a, err
	}
	a.Status = res.StatusCode
	if err := json.Unmarshal(text, &a); err != nil {
		return a, fmt.Errorf("%w: %s", err, text)
	}
	return a, nil
}

// mustCall is call for requests that must succeed; the result is decoded into out unless it is nil.
func (s *server) mustCall(t testing.TB, key, method string, params, out any) {
	t.Helper()
	a, err := s.call(key, method, params)
	if err != nil || a.Error != nil || a.Status != 200 {
		t.Fatalf("%s: %v, %v", method, a, err)
	}
	if out != nil {
		if err := json.Unmarshal(a.Result, out); err != nil {
			t.Fatalf("%s: %v: %s", method, err, a.Result)
		}
	}
}

// wantError is call for requests that must be refused.
func (s *server) wantError(t *testing.T, key, method string, params any, status, code int, text string) {
	t.Helper()
	a, err := s.call(key, method, params)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	if a.Error == nil || a.Status != status || a.Error.Code != code || !strings.Contains(a.Error.Message, text) {
		t.Errorf("%s: %v; want HTTP %d, error %d, %q", method, a, status, code, text)
	}
}

type params map[string]any

// runResult is the result of sandbox.repl.run and, with its exit code, of sandbox.command.run.
type runResult struct {
	Status   string
	ExitCode int `json:"exit_code"`
	Success  bool
	Output   []struct{ Stream, Text string }
}

// text is what a run printed to one stream.
func (r runResult) text(stream string) string {
	var b strings.Builder
	for _, o := range r.Output {
		if o.Stream == stream {
			b.WriteString(o.Text + "\n")
		}
	}
	return b.String()
}

func (s *server) python(t testing.TB, key, name, code string) runResult {
	t.Helper()
	var r runResult
	s.mustCall(t, key, "sandbox.repl.run", params{"sandbox": name, "language": "python", "code": code}, &r)
	return r
}

func (s *server) command(t testing.TB, key, name, command string, args ...string) runResult {
	t.Helper()
	var r runResult
	s.mustCall(t, key, "sandbox.command.run", params{"sandbox": name, "command": command, "args": args}, &r)
	return r
}
