package mcp

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// Invalid arguments do not reach the domain, and the tool result says what is wrong with them.
func TestBadArguments(t *testing.T) {
	s := newSite(t)
	for arguments, message := range map[string]string{
		`{}`:                                     "params.sandbox is required",
		`[]`:                                     "params must be an object",
		`["a"]`:                                  "params must be an object",
		`"a"`:                                    "params must be an object",
		`7`:                                      "params must be an object",
		`null`:                                   "params.sandbox is required",
		`{"sandbox":7}`:                          "params.sandbox must be a string",
		`{"sandbox":"a","Sandbox":"b"}`:          "params.Sandbox is not a known member",
		`{"sandbox":"a","nameſpace":"b"}`:        "is not a known member",
		`{"sandbox":"a","namespace":"../up"}`:    "namespace",
		`{"sandbox":"a","namespace":"*"}`:        "namespace",
		`{"sandbox":"a","config":{"memory":""}}`: "params.config.memory must be an integer",
	} {
		w := s.post(toolCall(1, "sandbox_start", arguments))
		var res struct{ Result sdk.CallToolResult }
		if err := json.Unmarshal(w.Body.Bytes(), &res); err != nil || w.Code != http.StatusOK {
			t.Fatalf("%s: %d %s", arguments, w.Code, w.Body)
		}
		if !res.Result.IsError || !strings.Contains(text(t, &res.Result), message) {
			t.Errorf("%s: got %s, want an error with %q", arguments, w.Body, message)
		}
		wantCalls(t, s)
	}
}

// A body that is not strict JSON or not MCP gets a JSON-RPC error and does not reach the domain.
func TestBadRequests(t *testing.T) {
	s := newSite(t)
	stop := toolCall(1, "sandbox_stop", `{"sandbox":"a"}`)
	for _, c := range []struct {
		name, body string
		change     func(*http.Request)
		status     int
		code       rpc.Code
	}{
		{"not JSON", `{`, nil, 400, rpc.CodeParse},
		{"empty", ``, nil, 400, rpc.CodeParse},
		{"two values", stop + stop, nil, 400, rpc.CodeParse},
		{"duplicate name", toolCall(1, "sandbox_stop", `{"sandbox":"a","sandbox":"b"}`), nil, 400, rpc.CodeParse},
		{"invalid UTF-8", toolCall(1, "sandbox_stop", "{\"sandbox\":\"\xff\"}"), nil, 400, rpc.CodeParse},
		{"nested too deep", strings.Repeat("[", 65) + strings.Repeat("]", 65), nil, 400, rpc.CodeParse},
		{"empty batch", `[]`, nil, 400, rpc.CodeInvalidRequest},
		{"batch too long", "[" + strings.Repeat(stop+",", 100) + stop + "]", header("Mcp-Protocol-Version", "2025-03-26"), 400, rpc.CodeInvalidRequest},
		{"batch in a revision without batches", "[" + stop + "]", nil, 400, rpc.CodeInvalidRequest},
		{"a number", `7`, nil, 400, rpc.CodeInvalidRequest},
		{"unknown revision", stop, header("Mcp-Protocol-Version", "2024-11-05"), 400, rpc.CodeInvalidRequest},
		{"accepts no JSON", stop, header("Accept", "text/html"), 400, rpc.CodeInvalidRequest},
		{"a form", stop, header("Content-Type", "application/x-www-form-urlencoded"), 415, rpc.CodeInvalidRequest},
		{"too long", `{"x":"` + strings.Repeat("x", rpc.MaxBody) + `"}`, nil, 413, rpc.CodeInvalidRequest},
		{"header of another tool", strings.Replace(stop, `"params":{`, `"params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28",
			"io.modelcontextprotocol/clientCapabilities":{}},`, 1), func(r *http.Request) {
			r.Header.Set("Mcp-Protocol-Version", "2026-07-28")
			r.Header.Set("Mcp-Method", "tools/call")
			r.Header.Set("Mcp-Name", "sandbox_get_metrics")
		}, 400, -32020},
	} {
		change := c.change
		if change == nil {
			change = func(*http.Request) {}
		}
		w := s.post(c.body, change)
		var res rpc.Response
		if err := json.Unmarshal(w.Body.Bytes(), &res); err != nil || w.Code != c.status || res.Error == nil || res.Error.Code != c.code {
			t.Errorf("%s: got %d %s, want %d with code %d", c.name, w.Code, w.Body, c.status, c.code)
		}
		if w.Header().Get("Content-Type") != "application/json" || w.Header().Get("X-Request-Id") == "" {
			t.Errorf("%s: got headers %v, want JSON with a request id", c.name, w.Header())
		}
		wantCalls(t, s)
	}
	for _, method := range []string{http.MethodGet, http.MethodDelete, http.MethodPut, http.MethodOptions} {
		w := s.post("", func(r *http.Request) { r.Method = method })
		if w.Code != http.StatusMethodNotAllowed || w.Header().Get("Allow") != "POST" {
			t.Errorf("%s: %d %v", method, w.Code, w.Header())
		}
	}
}

// A message whose form is wrong gets an error in the terms of JSON, with the id of the message.
func TestMessageErrors(t *testing.T) {
	s := newSite(t)
	const notMessage = "not a JSON-RPC 2.0 message: "
	for _, c := range []struct {
		body, revision string
		status         int
		code           rpc.Code
		message, id    string
	}{
		{`{"jsonrpc":"2.0","id":7,"method":"nope"}`, "", 200, rpc.CodeMethodNotFound, `there is no method "nope"`, "7"},
		{`{"jsonrpc":"2.0","id":7,"method":"nope"}`, "2026-07-28", 404, rpc.CodeMethodNotFound, `there is no method "nope"`, "7"},
		{`{"jsonrpc":"2.0","id":"x","method":"logging/setLevel","params":{"level":1}}`, "", 200, rpc.CodeInvalidParams, "params.level must be a string", `"x"`},
		{`{"jsonrpc":"2.0","method":"notifications/nope"}`, "", 404, rpc.CodeMethodNotFound, `there is no method "notifications/nope"`, "null"},
		{`{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":5}}`, "", 200, rpc.CodeInvalidParams, "params.name must be a string", "7"},
		{`{"jsonrpc":"2.0","id":7,"method":"tools/call","params":[]}`, "", 200, rpc.CodeInvalidParams, "params must be an object", "7"},
		{`{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"sandbox_list","_meta":5}}`, "", 200, rpc.CodeInvalidParams, "params._meta must be an object", "7"},
		{`{"jsonrpc":"2.0","id":7,"method":"tools/call"}`, "", 200, rpc.CodeInvalidParams, "params.name is required", "7"},
		{`{"jsonrpc":"2.0","id":7,"method":"initialize"}`, "", 200, rpc.CodeInvalidParams, "params.protocolVersion is required", "7"},
		{`{"jsonrpc":"2.0","id":7,"method":"tools/list","params":{"cursor":1}}`, "", 200, rpc.CodeInvalidParams, "params.cursor must be a string", "7"},
		{`{"jsonrpc":"2.0","id":7,"method":"prompts/get","params":{"name":"create_node_sandbox","arguments":{"sandbox_name":5}}}`, "", 200,
			rpc.CodeInvalidParams, "params.arguments must be an object of strings", "7"},
		{`{"jsonrpc":"2.0","id":7,"method":"prompts/get","params":{"name":"create_node_sandbox"}}`, "", 200,
			rpc.CodeInvalidParams, "the argument sandbox_name is required", "7"},
		{`{}`, "", 400, rpc.CodeInvalidRequest, notMessage + `jsonrpc must be the string "2.0"`, "null"},
		{`{"jsonrpc":"2.0","id":7}`, "", 400, rpc.CodeInvalidRequest, notMessage + "method must be a string", "7"},
		{`{"jsonrpc":"2.0","id":null,"method":"ping"}`, "", 400, rpc.CodeInvalidRequest, notMessage + "id must be a string or a number", "null"},
		{`{"jsonrpc":"2.0","method":"tools/call","params":{"name":"x"}}`, "", 400, rpc.CodeInvalidRequest, notMessage + "tools/call needs an id", "null"},
		{`{"jsonrpc":"2.0","id":7,"method":"notifications/initialized"}`, "", 400, rpc.CodeInvalidRequest,
			notMessage + "notifications/initialized is a notification, which must not have an id", "7"},
		{`7`, "", 400, rpc.CodeInvalidRequest, notMessage + "a message must be a JSON object", "null"},
		{`[7]`, "2025-03-26", 400, rpc.CodeInvalidRequest, notMessage + "a message must be a JSON object", "null"},
		{`{"jsonrpc":"2.0","id":7,"method":"ping"}`, "1999-01-01", 400, rpc.CodeInvalidRequest,
			`MCP-Protocol-Version "1999-01-01" is not supported; use one of 2026-07-28, 2025-11-25, 2025-06-18, 2025-03-26`, "null"},
	} {
		w := s.post(c.body, func(r *http.Request) {
			if c.revision != "" {
				r.Header.Set("Mcp-Protocol-Version", c.revision)
			}
		})
		var res struct {
			ID    json.RawMessage
			Error rpc.Error
		}
		if err := json.Unmarshal(w.Body.Bytes(), &res); err != nil {
			t.Errorf("%s: %d %s: %v", c.body, w.Code, w.Body, err)
		}
		if w.Code != c.status || res.Error.Code != c.code || res.Error.Message != c.message || string(res.ID) != c.id {
			t.Errorf("%s: got %d %s,\nwant %d with code %d, message %q and id %s", c.body, w.Code, w.Body, c.status, c.code, c.message, c.id)
		}
		wantCalls(t, s)
	}
}

// A batch, which only revision 2025-03-26 has, gets a response to every call, and each call is authorized separately.
func TestBatch(t *testing.T) {
	s := newSite(t)
	limited, _ := s.issue(t, keys.IssueRequest{Namespaces: []string{"own"}})
	w := s.post("["+toolCall(1, "sandbox_stop", `{"sandbox":"a"}`)+","+toolCall(2, "sandbox_stop", `{"sandbox":"a","namespace":"other"}`)+"]",
		header("Mcp-Protocol-Version", "2025-03-26"), header("Authorization", limited))
	var all []struct {
		ID     int
		Result sdk.CallToolResult
	}
	if err := json.Unmarshal(w.Body.Bytes(), &all); err != nil || len(all) != 2 {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	for _, res := range all {
		if res.Result.IsError != (res.ID == 2) {
			t.Errorf("call %d: got %+v, want an error only for call 2", res.ID, res.Result)
		}
	}
	wantCalls(t, s, "stop own/a")
}
