package rpc_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"go.uber.org/goleak"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	serverpc "github.com/msbd/msbd/daemon/internal/serve/rpc"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestInvalidUTF8(t *testing.T) {
	s := New(t)
	WantError(t, s.Post(Request("sandbox.start", "{\"sandbox\":\"a\xff\"}")), http.StatusBadRequest, rpc.CodeParse)
	WantError(t, s.Post("\xef\xbb\xbf"+Request("sandbox.metrics.get", "{}")), http.StatusBadRequest, rpc.CodeParse)
	WantError(t, s.Post(""), http.StatusBadRequest, rpc.CodeParse)
}

func TestBatchLimit(t *testing.T) {
	s := New(t)
	batch := func(n int) string {
		return "[" + strings.Join(slices.Repeat([]string{Request("sandbox.metrics.get", "{}")}, n), ",") + "]"
	}
	var res []rpc.Response
	if err := json.Unmarshal(s.Post(batch(rpc.MaxBatch)).Body.Bytes(), &res); err != nil || len(res) != rpc.MaxBatch {
		t.Errorf("full batch: got %d responses, want %d, error %v", len(res), rpc.MaxBatch, err)
	}
	WantError(t, s.Post(batch(rpc.MaxBatch+1)), http.StatusBadRequest, rpc.CodeInvalidRequest)
}

func TestTimeLimits(t *testing.T) {
	s := New(t)
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	for seconds, want := range map[string]time.Duration{
		"0": 0, "null": 0, "1": time.Second, "0.25": 250 * time.Millisecond, "1e-30": 1,
		"30000000000": 1<<63 - 1, "1e300": 1<<63 - 1, "9223372036.854775807": 1<<63 - 1, "9223372036": 9223372036 * time.Second,
	} {
		for _, call := range []string{
			Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1","timeout":`+seconds+`}`),
			Request("sandbox.command.run", `{"sandbox":"a","command":"true","timeout":`+seconds+`}`),
		} {
			s.Sandboxes.Timeout = -1
			WantOK(t, s.Post(call))
			if s.Sandboxes.Timeout != want {
				t.Errorf("timeout %s became %v, want %v", seconds, s.Sandboxes.Timeout, want)
			}
		}
	}
}

func TestRequestsReachTheDomain(t *testing.T) {
	s := New(t)
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a","namespace":"n","config":{"image":"i","memory":256,"cpus":2,"envs":["A=b"],"workdir":"/w","disk":64,"user":"u","hostname":"h"}}`)))
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"b","namespace":"n","config":{"cpus":0}}`)))
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"c","namespace":"n","config":{}}`)))
	want := "map[n/a:{i 2 256 64 [A=b] /w u h} n/b:{ 1 0 0 []   } n/c:{ 0 0 0 []   }]"
	if got := fmt.Sprint(s.Sandboxes.Running); got != want {
		t.Errorf("started %s, want %s", got, want)
	}
	WantOK(t, s.Post(Request("sandbox.command.run", `{"sandbox":"a","namespace":"n","command":"sh","args":["-c","echo \"$0\"; x &"]}`)))
	if !slices.Equal(s.Sandboxes.Args, []string{"-c", `echo "$0"; x &`}) {
		t.Errorf("args became %q", s.Sandboxes.Args)
	}
}

// The description of a sandbox says how it was started, and so does a header of the response to a single start.
func TestStartedFrom(t *testing.T) {
	start := Request(rpc.MethodSandboxStart, `{"sandbox":"a"}`)
	for _, c := range []struct {
		origin       sandbox.Origin
		header, want string
	}{
		{sandbox.Origin{From: sandbox.FromPool}, "pool", `"started_from":{"source":"pool"}`},
		{sandbox.Origin{From: sandbox.FromTemplate, Why: "the pool had no microVM ready"}, "template", `"started_from":{"source":"template","why":"the pool had no microVM ready"}`},
		{sandbox.Origin{From: sandbox.Cold, Why: "no template"}, "cold", `"started_from":{"source":"cold","why":"no template"}`},
		{sandbox.Origin{}, "", ""},
	} {
		s := New(t)
		s.Sandboxes.Origin = c.origin
		w := s.Post(start)
		WantOK(t, w)
		if got := w.Header().Get(rpc.HeaderStartedFrom); got != c.header {
			t.Errorf("%+v: the header of a start is %q, want %q", c.origin, got, c.header)
		}
		for name, w := range map[string]*httptest.ResponseRecorder{
			"a batch": s.Post("[" + start + "]"), "a stream of events": s.Post(start, asEvents), "a failed start": s.Post(Request(rpc.MethodSandboxStart, `{"sandbox":"other"}`)),
			"sandbox.get": s.Post(Request(rpc.MethodSandboxGet, `{"sandbox":"a"}`)),
		} {
			if got, set := w.Header()[rpc.HeaderStartedFrom]; set {
				t.Errorf("%+v: %s has the header %q", c.origin, name, got)
			}
		}
		for method, params := range map[string]string{rpc.MethodSandboxGet: `{"sandbox":"a"}`, rpc.MethodSandboxList: `{}`} {
			text := s.Post(Request(method, params)).Body.String()
			if want := c.want; want == "" && strings.Contains(text, "started_from") || !strings.Contains(text, want) {
				t.Errorf("%+v: %s returns %s, want %s", c.origin, method, text, want)
			}
		}
	}
}

func TestDiscover(t *testing.T) {
	s := New(t)
	w := s.Post(`{"jsonrpc":"2.0","method":"rpc.discover","id":1}`, WithKey(s.Issue(t, keys.IssueRequest{Namespaces: []string{"n"}})))
	WantOK(t, w)
	var res struct {
		Result serverpc.Document `json:"result"`
	}
	if err := json.Unmarshal(w.Body.Bytes(), &res); err != nil {
		t.Fatal(err)
	}
	if got := res.Result.Info.Server; got != Version {
		t.Errorf("rpc.discover reports server version %q, want %q", got, Version)
	}
	table := s.Service.Table()
	if len(res.Result.Methods) != len(table) {
		t.Fatalf("rpc.discover describes %d methods, the table has %d", len(res.Result.Methods), len(table))
	}
	for i, m := range res.Result.Methods {
		if m.Name != table[i].Name {
			t.Fatalf("rpc.discover describes %s, the table has %s", m.Name, table[i].Name)
		}
		for at, name := range table[i].Params {
			if p := m.Params[at]; p.Name != name || p.Required != slices.Contains(table[i].Required, name) || p.Schema.Type == nil {
				t.Errorf("%s: rpc.discover describes param %d as %+v, the table has %s", m.Name, at, p, name)
			}
		}
	}
	WantError(t, s.Post(`{"jsonrpc":"2.0","method":"rpc.discover","id":1}`, WithKey("")), http.StatusUnauthorized, rpc.CodeUnauthenticated)
}

func TestSchemas(t *testing.T) {
	s := New(t)
	params, result := s.Service.Schemas(rpc.MethodSandboxStop)
	if want := `{"type":"object","properties":{"namespace":{"type":["string","null"],"pattern":"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"},"sandbox":{"type":"string","pattern":"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"}},"required":["sandbox"],"additionalProperties":false}`; string(params) != want {
		t.Errorf("params are %s, want %s", params, want)
	}
	if string(result) != `{"type":"string"}` {
		t.Errorf("the schema of the result is %s", result)
	}
	if params, _ := s.Service.Schemas("sandbox.none"); params != nil {
		t.Errorf("got a schema for an unknown method: %s", params)
	}
}

const testPath = "/test"

// withEndpoint adds an endpoint that forwards requests to serve, as MCP does.
func withEndpoint(serve func(c *gateway.Call, r *http.Request)) func(*Setup) {
	return func(o *Setup) {
		o.Endpoints = append(o.Endpoints, gateway.Endpoint{
			Pattern: "POST " + testPath, Scope: gateway.PerCall, Body: gateway.JSON(rpc.MaxBody), Deadline: gateway.AnswerDeadline,
			Serve: func(c *gateway.Call, _ http.ResponseWriter, r *http.Request) error {
				serve(c, r)
				return nil
			},
		})
	}
}

// Call has the rights of the caller of the HTTP request.
func TestCall(t *testing.T) {
	var s *Site
	var method, params, caller string
	var result jsontext.Value
	var failed *rpc.Error
	s = New(t, withEndpoint(func(c *gateway.Call, r *http.Request) {
		caller = c.Principal.KeyID
		result, failed = s.Service.Call(r.Context(), c, method, jsontext.Value(params), nil)
	}))
	key, id := s.IssueNamed(t, keys.IssueRequest{Namespaces: []string{"own"}, Scopes: []keys.Scope{keys.ScopeStart}})
	for _, c := range []struct {
		method, params string
		code           rpc.Code
	}{
		{rpc.MethodSandboxStart, `{"sandbox":"a"}`, 0},
		{rpc.MethodSandboxStart, `{"sandbox":"a","namespace":"other"}`, rpc.CodePermissionDenied},
		{rpc.MethodSandboxStart, `["a"]`, rpc.CodeInvalidParams},
		{rpc.MethodSandboxStart, `7`, rpc.CodeInvalidParams},
		{rpc.MethodSandboxStart, ``, rpc.CodeInvalidParams},
		{rpc.MethodSandboxStop, `{"sandbox":"a","namespace":"own"}`, rpc.CodePermissionDenied},
		{"sandbox.none", `{}`, rpc.CodeMethodNotFound},
	} {
		method, params = c.method, c.params
		s.Post("{}", At(http.MethodPost, testPath), WithKey(key))
		if caller != id || (failed == nil) != (c.code == 0) || failed != nil && failed.Code != c.code || (result == nil) != (c.code != 0) {
			t.Errorf("%s %s of %s: %s, %v, want code %d", c.method, c.params, caller, result, failed, c.code)
		}
	}
	if len(s.Sandboxes.Running) != 1 {
		t.Error(s.Sandboxes.Running)
	}
}

// CountMessages accepts one message or a batch, as strict JSON.
func TestCountMessages(t *testing.T) {
	s := New(t)
	for body, want := range map[string]struct {
		n    int
		code rpc.Code
	}{
		`{}`: {1, 0}, `7`: {1, 0}, `[1,{}]`: {2, 0},
		`{`: {0, rpc.CodeParse}, `[1`: {0, rpc.CodeParse}, `{}{}`: {0, rpc.CodeParse}, `[]]`: {0, rpc.CodeParse}, `{"a":1,"a":2}`: {0, rpc.CodeParse},
		"\"\xff\"": {0, rpc.CodeParse}, strings.Repeat("[", 65) + strings.Repeat("]", 65): {0, rpc.CodeParse},
		`[]`: {0, rpc.CodeInvalidRequest}, "[" + strings.Repeat("1,", rpc.MaxBatch) + "1]": {0, rpc.CodeInvalidRequest},
	} {
		n, err := s.Service.CountMessages([]byte(body))
		refusal, _ := errors.AsType[*gateway.Refusal](err)
		if n != want.n || (err != nil) != (want.code != 0) || refusal != nil && refusal.ClientError.Code != want.code {
			t.Errorf("%.20s: got %d, error %v, want %d, code %d", body, n, err, want.n, want.code)
		}
	}
}
