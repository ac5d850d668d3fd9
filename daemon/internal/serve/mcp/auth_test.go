package mcp

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
)

// The access log has the method of a tool call, but nothing of its content.
func TestAccessLog(t *testing.T) {
	s := newSite(t)
	s.post(toolCall(1, "sandbox_run_code", `{"sandbox":"a","namespace":"own","language":"python","code":"a secret"}`))
	log := s.Log.String()
	for _, want := range []string{"method=sandbox.repl.run", "namespace=own", "status=200"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %s: %s", want, log)
		}
	}
	if strings.Contains(log, "secret") || strings.Contains(log, s.key) {
		t.Error("the log contains the code or the key")
	}
}

// Every MCP request needs a valid key, whose scopes and namespaces decide which tools it may call.
func TestAuthorization(t *testing.T) {
	s := newSite(t)
	reset := s.key
	if _, err := s.Keys.Reset(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	s.key, _ = s.issue(t, keys.IssueRequest{})
	rotated, id := s.issue(t, keys.IssueRequest{})
	if _, _, _, err := s.Keys.Rotate(t.Context(), keys.RotateRequest{Ref: id}); err != nil {
		t.Fatal(err)
	}
	revoked, id := s.issue(t, keys.IssueRequest{})
	if w := s.post(`{"jsonrpc":"2.0","id":1,"method":"tools/list"}`, header("Authorization", revoked)); w.Code != http.StatusOK {
		t.Fatalf("a valid key: %d %s", w.Code, w.Body)
	}
	if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	unknown := newSite(t).key
	requests := map[string]string{
		"initialize":  `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"x","version":"1"}}}`,
		"initialized": `{"jsonrpc":"2.0","method":"notifications/initialized"}`,
		"tools/list":  `{"jsonrpc":"2.0","id":1,"method":"tools/list"}`, "prompts/list": `{"jsonrpc":"2.0","id":1,"method":"prompts/list"}`,
		"ping": `{"jsonrpc":"2.0","id":1,"method":"ping"}`, "not JSON": "{",
	}
	calls := map[string]string{} // by tool; NS stands for the namespace
	for _, tool := range tools {
		arguments := `{"sandbox":"a","namespace":"NS"}`
		switch tool.method {
		case rpc.MethodSandboxReplRun:
			arguments = `{"sandbox":"a","namespace":"NS","language":"python","code":"1"}`
		case rpc.MethodSandboxCommandRun:
			arguments = `{"sandbox":"a","namespace":"NS","command":"true"}`
		case rpc.MethodSandboxList:
			arguments = `{"namespace":"NS"}`
		case rpc.MethodFSRead, rpc.MethodFSList, rpc.MethodFSRemove:
			arguments = `{"sandbox":"a","namespace":"NS","path":"/tmp"}`
		case rpc.MethodFSWrite:
			arguments = `{"sandbox":"a","namespace":"NS","path":"/tmp","content":"x"}`
		case rpc.MethodProcessStart:
			arguments = `{"sandbox":"a","namespace":"NS","command":"cat","open_stdin":true}`
		case rpc.MethodProcessLogs, rpc.MethodProcessInput, rpc.MethodProcessSignal:
			arguments = `{"sandbox":"a","namespace":"NS","pid":101}`
		}
		calls[tool.name] = toolCall(1, tool.name, arguments)
		requests[tool.name] = strings.ReplaceAll(calls[tool.name], "NS", "own")
	}
	var refusal string
	for i, key := range []string{"", "Bearer", "msb_nonsense", revoked, "Bearer " + revoked, rotated, reset, unknown, s.key[:len(s.key)-1]} {
		// Each key comes from another address, because the gateway limits how many bad keys one address may send.
		from := func(r *http.Request) { r.RemoteAddr = fmt.Sprintf("192.0.2.%d:1234", i+1) }
		for name, body := range requests {
			w := s.post(body, header("Authorization", key), from)
			if refusal == "" {
				refusal = w.Body.String()
			}
			if w.Code != http.StatusUnauthorized || w.Body.String() != refusal || w.Header().Get("WWW-Authenticate") != "Bearer" {
				t.Errorf("%s with key %q: got %d %v %s, want 401 %s", name, key, w.Code, w.Header(), w.Body, refusal)
			}
		}
	}
	wantCalls(t, s)

	own, _ := s.issue(t, keys.IssueRequest{Namespaces: []string{"own"}})
	scopeOf := map[string]keys.Scope{
		"sandbox_start": keys.ScopeStart, "sandbox_stop": keys.ScopeStop, "sandbox_run_code": keys.ScopeExec,
		"sandbox_run_command": keys.ScopeExec, "sandbox_get_metrics": keys.ScopeRead,
		"sandbox_list": keys.ScopeRead, "sandbox_get": keys.ScopeRead,
		"sandbox_read_file": keys.ScopeFiles, "sandbox_write_file": keys.ScopeFiles, "sandbox_list_files": keys.ScopeFiles, "sandbox_remove_file": keys.ScopeFiles,
		"sandbox_start_process": keys.ScopeExec, "sandbox_list_processes": keys.ScopeRead, "sandbox_get_process_output": keys.ScopeRead,
		"sandbox_send_process_input": keys.ScopeExec, "sandbox_stop_process": keys.ScopeExec,
	}
	for _, tool := range tools {
		call := func(key, namespace string) (res sdk.CallToolResult) {
			t.Helper()
			w := s.post(strings.ReplaceAll(calls[tool.name], "NS", namespace), header("Authorization", key))
			var response struct{ Result sdk.CallToolResult }
			if err := json.Unmarshal(w.Body.Bytes(), &response); err != nil || w.Code != http.StatusOK {
				t.Fatalf("%s: %d %s", tool.name, w.Code, w.Body)
			}
			return response.Result
		}
		denied := func(key, namespace string, mentions ...string) {
			t.Helper()
			res := call(key, namespace)
			e, _ := res.Meta[errorKey].(map[string]any)
			if !res.IsError || e["code"] != float64(rpc.CodePermissionDenied) {
				t.Errorf("%s in %s: got %+v, want permission denied", tool.name, namespace, res)
			}
			for _, what := range mentions {
				if !strings.Contains(text(t, &res), what) {
					t.Errorf("%s: message %q does not mention %s", tool.name, text(t, &res), what)
				}
			}
			wantCalls(t, s)
		}
		allowed := func(key, namespace string) {
			t.Helper()
			n := sandbox.Name{Namespace: namespace, Name: "a"}
			if _, _, err := s.sandboxes.Sandboxes.WriteFile(t.Context(), n, sandbox.Path{Path: "/tmp"}, sandbox.WriteOptions{}, strings.NewReader("x")); err != nil {
				t.Fatal(err)
			}
			if res := call(key, namespace); res.IsError {
				t.Errorf("%s in %s: %s", tool.name, namespace, text(t, &res))
			}
			got := s.sandboxes.takeCalls()
			if len(got) == 0 || slices.ContainsFunc(got, func(call string) bool {
				return !strings.HasSuffix(call, " "+namespace+"/a") && !strings.HasSuffix(call, " "+namespace+"/")
			}) {
				t.Errorf("%s in %s: calls that reached the domain: %q", tool.name, namespace, got)
			}
		}
		scope := scopeOf[tool.name]
		weak := keys.IssueRequest{}
		for _, other := range keys.Scopes {
			if other != scope {
				weak.Scopes = append(weak.Scopes, other)
			}
		}
		weakKey, _ := s.issue(t, weak)
		strongKey, _ := s.issue(t, keys.IssueRequest{Scopes: []keys.Scope{scope}})
		denied(weakKey, "own", string(scope))
		denied(own, "other", `"own"`, `"other"`)
		allowed(strongKey, "own")
		allowed(own, "own")
		allowed(s.key, "other")
	}
}

// In dev mode, requests need no key, but requests from web pages are refused.
func TestDevMode(t *testing.T) {
	s := newSite(t, func(o *gateway.Options) { o.Dev = true })
	list := `{"jsonrpc":"2.0","id":1,"method":"tools/list"}`
	local := func(r *http.Request) { r.Host = "127.0.0.1:5555"; r.Header.Del("Authorization") }
	if w := s.post(list, local); w.Code != http.StatusOK {
		t.Errorf("request without a key: got %d %s, want 200", w.Code, w.Body)
	}
	for name, value := range map[string]string{"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"} {
		if w := s.post(toolCall(1, "sandbox_stop", `{"sandbox":"a"}`), local, header(name, value)); w.Code < 400 {
			t.Errorf("with %s: %s: got %d %s, want a refusal", name, value, w.Code, w.Body)
		}
	}
	if w := s.post(list, local, func(r *http.Request) { r.Host = "evil.example" }); w.Code != http.StatusForbidden {
		t.Errorf("with another Host: got %d %s, want 403", w.Code, w.Body)
	}
	wantCalls(t, s)
}

// A proxy on the same machine forwards the public host name, which must be accepted on a loopback connection.
func TestBehindAProxy(t *testing.T) {
	s := newSite(t)
	server := httptest.NewServer(s)
	defer server.Close()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL+rpc.MCPPath, strings.NewReader(`{"jsonrpc":"2.0","id":1,"method":"tools/list"}`))
	if err != nil {
		t.Fatal(err)
	}
	r.Host = "sandboxes.example.org"
	r.Header = http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}, "Authorization": {s.key}}
	res, err := server.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Error("got", res.Status)
	}
}

// The request rate of a key counts every call of a batch.
func TestRate(t *testing.T) {
	s := newSite(t, func(o *gateway.Options) { o.RequestsPerSecond = 2 })
	call := toolCall(1, "sandbox_stop", `{"sandbox":"a"}`)
	if w := s.post("["+call+","+toolCall(2, "sandbox_stop", `{"sandbox":"a"}`)+"]", header("Mcp-Protocol-Version", "2025-03-26")); w.Code != http.StatusOK {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	if w := s.post(call); w.Code != http.StatusTooManyRequests || w.Header().Get("Retry-After") == "" {
		t.Errorf("%d %v %s", w.Code, w.Header(), w.Body)
	}
	wantCalls(t, s, "stop default/a", "stop default/a")
}
