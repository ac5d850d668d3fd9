package mcp

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// FuzzMCP sends hostile bodies as a client of each revision. Every body gets a response of the right form, no body makes
// the server panic, and only valid calls of tools and reads of resources reach the domain.
func FuzzMCP(f *testing.F) {
	meta := `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}`
	stop := toolCall(1, "sandbox_stop", `{"sandbox":"a"}`)
	for _, body := range []string{
		stop, "[" + stop + "," + stop + "]", withProgress(1, runForever), strings.Replace(stop, `"params":{`, `"params":{`+meta+",", 1),
		`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"x","version":"1"}}}`,
		`{"jsonrpc":"2.0","method":"notifications/initialized"}`, `{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}`,
		`{"jsonrpc":"2.0","id":"x","method":"tools/list","params":{"cursor":"!"}}`, `{"jsonrpc":"2.0","id":1,"method":"prompts/get","params":{"name":"create_node_sandbox","arguments":{"sandbox_name":"a"}}}`,
		`{"jsonrpc":"2.0","id":1,"method":"server/discover","params":{` + meta + `}}`, `{"jsonrpc":"2.0","id":1,"method":"subscriptions/listen","params":{` + meta + `}}`,
		`{"jsonrpc":"2.0","id":1,"result":{}}`, `{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":""}}`, `{"jsonrpc":"2.0","id":1,"method":"ping"}`,
		`{"jsonrpc":"2.0","id":1,"method":"completion/complete","params":{"ref":{"type":"ref/prompt","name":"x"},"argument":{"name":"y","value":"z"}}}`,
		`{"jsonrpc":"2.0","id":1,"method":"logging/setLevel","params":{"level":"debug"}}`, `{"jsonrpc":"2.0","id":1,"method":"resources/read","params":{"uri":"file:///etc/passwd"}}`,
		`{"jsonrpc":"2.0","id":1,"method":"resources/read","params":{"uri":"msb://sandboxes/default/a/files/tmp/x?offset=1&length=2"}}`,
		toolCall(1, "sandbox_read_file", `{"sandbox":"a","path":"/tmp/x","length":3}`), toolCall(1, "sandbox_run_code", `{"sandbox":"a","language":"python","code":"show [{\"data\":{\"image/png\":\"AAAA\"}}]"}`),
		toolCall(1, "sandbox_get_process_output", `{"sandbox":"a","pid":101,"offset":1,"max_output_bytes":2}`),
		`{}`, `[]`, `null`, `[null]`, `{"jsonrpc":"2.0","id":{},"method":7,"params":[]}`, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":null}`,
	} {
		for i := range Revisions {
			f.Add([]byte(body), byte(i))
		}
	}
	s := newSite(f)
	s.progressInterval = time.Millisecond
	s.putFile(f, "/tmp/x", "é\x00\xff")
	if _, err := s.sandboxes.StartProcess(f.Context(), sandboxA, sandbox.ProcessRequest{Command: sandbox.Command{Program: "echo", Args: []string{"é\xff"}}}); err != nil {
		f.Fatal(err)
	}
	s.sandboxes.takeCalls()
	f.Fuzz(func(t *testing.T, body []byte, revision byte) {
		w := s.post(string(body), header("Mcp-Protocol-Version", Revisions[int(revision)%len(Revisions)]), header(sessionHeader, "label"),
			func(r *http.Request) {
				// Clients of the newest revision repeat parts of the body in headers.
				var m struct {
					Method string
					Params struct{ Name, URI string }
				}
				if json.Unmarshal(body, &m) == nil && m.Method != "" {
					r.Header.Set("Mcp-Method", m.Method)
					r.Header.Set("Mcp-Name", m.Params.Name+m.Params.URI)
				}
			})
		calls := s.sandboxes.takeCalls()
		valid := jsontext.Value(body).IsValid()
		calling := strings.Contains(unescaped(body), "tools/call") || strings.Contains(unescaped(body), "resources/read")
		if calls != nil && (!valid || !calling || w.Code >= 500) {
			t.Fatalf("%q made the calls %q and got %d %s", body, calls, w.Code, w.Body)
		}
		switch kind := w.Header().Get("Content-Type"); {
		case w.Code == http.StatusAccepted && w.Body.Len() == 0 && valid:
		case kind == "text/event-stream" && w.Code == http.StatusOK && valid:
		case kind == "application/json" && jsontext.Value(w.Body.Bytes()).IsValid():
			var res rpc.Response
			if w.Code >= 400 && (json.Unmarshal(w.Body.Bytes(), &res) != nil || res.Error == nil) {
				t.Fatalf("%q got %d %s, which is not a JSON-RPC error", body, w.Code, w.Body)
			}
		default:
			t.Fatalf("%q got an unexpected response: %d %s %q", body, w.Code, kind, w.Body)
		}
		if len(s.running.cancels) != 0 {
			t.Fatalf("%q: calls still registered: %v", body, s.running.cancels)
		}
	})
}

// unescaped returns body with its JSON strings re-encoded, so that ASCII letters are not escaped.
func unescaped(body []byte) string {
	var v any
	if json.Unmarshal(body, &v) != nil {
		return ""
	}
	b, _ := json.Marshal(v)
	return string(b)
}
