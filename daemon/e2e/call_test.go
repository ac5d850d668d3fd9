package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
)

// response is a JSON-RPC response and its HTTP status.
type response struct {
	Status int
	Result json.RawMessage `json:"result"`
	Error  *struct {
		Code    int             `json:"code"`
		Message string          `json:"message"`
		Data    json.RawMessage `json:"data"`
	} `json:"error"`
}

func (a response) String() string {
	if a.Error != nil {
		return fmt.Sprintf("HTTP %d, error %d: %s", a.Status, a.Error.Code, a.Error.Message)
	}
	return fmt.Sprintf("HTTP %d, result %s", a.Status, a.Result)
}

// call sends one JSON-RPC request. It may be called from any goroutine.
func (s *server) call(key, method string, params any) (response, error) {
	body, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
	if err != nil {
		return response{}, err
	}
	return s.post(key, "/api/v1/rpc", body)
}

// httpClient limits the time of a request, in case the server does not respond. The limit is above the server's own
// limit of two minutes for the start of a sandbox.
var httpClient = &http.Client{Timeout: hung}

// post sends a POST request with an API key, unless key is empty, and decodes the JSON-RPC response.
func (s *server) post(key, path string, body []byte) (response, error) {
	var a response
	req, err := http.NewRequest("POST", "http://"+s.address+path, bytes.NewReader(body))
	if err != nil {
		return a, err
	}
	req.Header.Set("Content-Type", "application/json")
	if key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	}
	res, err := httpClient.Do(req)
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

// mustCall is like call but fails the test on an error. It decodes the result into out unless out is nil.
func (s *server) mustCall(t testing.TB, key, method string, params, out any) {
	t.Helper()
	a, err := s.call(key, method, params)
	if err != nil || a.Error != nil || a.Status != 200 {
		t.Fatalf("%s: %v, error %v", method, a, err)
	}
	if out != nil {
		if err := json.Unmarshal(a.Result, out); err != nil {
			t.Fatalf("%s: %v: %s", method, err, a.Result)
		}
	}
}

// wantError makes a call and checks that its response is an error with this HTTP status, code and text in its message.
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

// runResult is the result of sandbox.repl.run and of sandbox.command.run, which also has an exit code.
type runResult struct {
	Status   string
	ExitCode int `json:"exit_code"`
	Success  bool
	Output   []struct{ Stream, Text string }
}

// text returns the output of a run on one stream.
func (r runResult) text(stream string) string {
	var b strings.Builder
	for _, o := range r.Output {
		if o.Stream == stream {
			b.WriteString(o.Text + "\n")
		}
	}
	return b.String()
}

// python runs Python code in a sandbox and fails the test if the call fails.
func (s *server) python(t testing.TB, key, name, code string) runResult {
	t.Helper()
	var r runResult
	s.mustCall(t, key, "sandbox.repl.run", params{"sandbox": name, "language": "python", "code": code}, &r)
	return r
}

// command runs a command in a sandbox and fails the test if the call fails.
func (s *server) command(t testing.TB, key, name, command string, args ...string) runResult {
	t.Helper()
	var r runResult
	s.mustCall(t, key, "sandbox.command.run", params{"sandbox": name, "command": command, "args": args}, &r)
	return r
}
