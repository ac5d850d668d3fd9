package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
)

// mcpServer starts an MCP server that requires key, built with the SDK. Its tool echo returns its arguments, and its tool
// wait waits until the request is canceled. revision is the protocol revision in the header of the last request. began
// and canceled receive a value when a call of wait begins and when it is canceled.
func mcpServer(t *testing.T, key string) (url string, revision *atomic.Value, began, canceled chan struct{}) {
	t.Helper()
	revision = &atomic.Value{}
	began, canceled = make(chan struct{}, 1), make(chan struct{}, 1)
	server := sdk.NewServer(&sdk.Implementation{Name: "stand-in", Version: "1"}, nil)
	object := json.RawMessage(`{"type":"object"}`)
	server.AddTool(&sdk.Tool{Name: "echo", InputSchema: object}, func(ctx context.Context, req *sdk.CallToolRequest) (*sdk.CallToolResult, error) {
		if token := req.Params.GetProgressToken(); token != nil {
			for i := range 3 {
				if err := req.Session.NotifyProgress(ctx, &sdk.ProgressNotificationParams{ProgressToken: token, Progress: float64(i + 1)}); err != nil {
					return nil, err
				}
			}
		}
		return &sdk.CallToolResult{Content: []sdk.Content{&sdk.TextContent{Text: string(req.Params.Arguments)}}}, nil
	})
	type requestContext struct{}
	server.AddTool(&sdk.Tool{Name: "wait", InputSchema: object}, func(ctx context.Context, _ *sdk.CallToolRequest) (*sdk.CallToolResult, error) {
		began <- struct{}{}
		<-ctx.Value(requestContext{}).(context.Context).Done()
		canceled <- struct{}{}
		return nil, errors.New("canceled")
	})
	server.AddResource(&sdk.Resource{URI: "msb://a/b%20c", Name: "c"}, func(context.Context, *sdk.ReadResourceRequest) (*sdk.ReadResourceResult, error) {
		return &sdk.ReadResourceResult{Contents: []*sdk.ResourceContents{{Blob: []byte{0, 255}}}}, nil
	})
	handler := sdk.NewStreamableHTTPHandler(func(*http.Request) *sdk.Server { return server }, &sdk.StreamableHTTPOptions{Stateless: true})
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path != rpc.MCPPath:
			http.NotFound(w, r)
		case r.Header.Get("Authorization") != "Bearer "+key:
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprintf(w, `{"jsonrpc":"2.0","error":{"code":%d,"message":"missing or invalid API key"},"id":null}`, rpc.CodeUnauthenticated)
		default:
			negotiated := r.Header.Get("Mcp-Protocol-Version")
			revision.Store(negotiated)
			if label := r.Header.Get(labelHeader); negotiated != "" && negotiated < "2026" && label != "assistant-1" {
				t.Errorf("the server got the label %q, want the one of its answer to initialize", label)
			}
			w.Header().Set(labelHeader, "assistant-1")
			handler.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), requestContext{}, r.Context())))
		}
	}))
	t.Cleanup(web.Close)
	return web.URL, revision, began, canceled
}

// startBridge runs "msb mcp" until the test ends, and returns a transport that is connected to it.
func startBridge(t *testing.T, url, key string) (transport *sdk.IOTransport, stderr *bytes.Buffer) {
	t.Helper()
	t.Setenv("MSB_SERVER_URL", url)
	t.Setenv("MSB_API_KEY", key)
	in, toBridge := io.Pipe()
	fromBridge, out := io.Pipe()
	stderr = &bytes.Buffer{}
	app := newApp()
	app.Reader, app.Writer, app.ErrWriter = in, out, stderr
	ended := make(chan error, 1)
	go func() {
		ended <- app.RunContext(t.Context(), []string{"msb", "mcp"})
		out.Close()
	}()
	t.Cleanup(func() {
		toBridge.Close()
		go io.Copy(io.Discard, fromBridge)
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return &sdk.IOTransport{Reader: fromBridge, Writer: toBridge}, stderr
}

// Assistants of every protocol revision can use the server through the bridge.
func TestMCPBridge(t *testing.T) {
	for _, revision := range []string{"2026-07-28", "2025-11-25", "2025-06-18", "2025-03-26"} {
		t.Run(revision, func(t *testing.T) {
			url, sentRevision, began, canceled := mcpServer(t, "msb_good")
			transport, _ := startBridge(t, url, "msb_good")
			progress := make(chan struct{}, 3)
			client := sdk.NewClient(&sdk.Implementation{Name: "assistant", Version: "1"}, &sdk.ClientOptions{
				ProgressNotificationHandler: func(context.Context, *sdk.ProgressNotificationClientRequest) {
					progress <- struct{}{}
				},
			})
			c, err := client.Connect(t.Context(), transport, &sdk.ClientSessionOptions{ProtocolVersion: revision})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if got := c.InitializeResult().ProtocolVersion; got != revision {
				t.Errorf("negotiated revision %s", got)
			}
			if _, err := c.ListTools(t.Context(), nil); err != nil || sentRevision.Load() != revision {
				t.Errorf("the server got revision %v: %v", sentRevision.Load(), err)
			}
			text := "naïve\n\"ключ\" \u2028 end"
			res, err := c.CallTool(t.Context(), &sdk.CallToolParams{Name: "echo", Arguments: map[string]any{"text": text}, Meta: sdk.Meta{"progressToken": "p"}})
			if err != nil {
				t.Fatal(err)
			}
			var echoed struct{ Text string }
			if err := json.Unmarshal([]byte(res.Content[0].(*sdk.TextContent).Text), &echoed); err != nil || echoed.Text != text {
				t.Errorf("got %q, %v", echoed.Text, err)
			}
			for range 3 {
				<-progress
			}
			if res, err := c.ReadResource(t.Context(), &sdk.ReadResourceParams{URI: "msb://a/b%20c"}); err != nil || string(res.Contents[0].Blob) != "\x00\xff" {
				t.Errorf("got resource %+v, %v", res, err)
			}
			if _, err := c.CallTool(t.Context(), &sdk.CallToolParams{Name: "none"}); err == nil || !strings.Contains(err.Error(), "unknown tool") {
				t.Error(err)
			}
			// A call in progress does not block other calls, and it ends when it is canceled.
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			failed := make(chan error, 1)
			go func() {
				_, err := c.CallTool(ctx, &sdk.CallToolParams{Name: "wait"})
				failed <- err
			}()
			<-began
			if _, err := c.ListTools(t.Context(), nil); err != nil {
				t.Error(err)
			}
			cancel()
			select {
			case <-canceled:
			case <-time.After(10 * time.Second):
				t.Fatal("the run was not canceled")
			}
			if err := <-failed; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			if _, err := c.ListTools(t.Context(), nil); err != nil {
				t.Error(err)
			}
		})
	}
}

// If a message cannot be sent or is refused, the bridge answers with an error and the id of the message.
func TestMCPBridgeErrors(t *testing.T) {
	url, _, _, _ := mcpServer(t, "msb_good")
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	other := httptest.NewServer(http.NotFoundHandler())
	defer other.Close()
	for _, c := range []struct {
		name, url, key, in, want, stderr string
	}{
		{"another key", url, "msb_bad", `{"jsonrpc":"2.0","id":"x","method":"tools/list"}`, `{"jsonrpc":"2.0","error":{"code":-32002,"message":"the server does not accept the API key from the environment`, ""},
		{"no key", url, "", `{"jsonrpc":"2.0","id":18446744073709551617,"method":"tools/list"}`, `the server requires an API key, but none was found`, ""},
		{"no server", gone.URL, "msb_good", `{"jsonrpc":"2.0","id":1,"method":"tools/list"}`, `"message":"msbd is not running: nothing listens at`, ""},
		{"another server", other.URL, "msb_good", `{"jsonrpc":"2.0","id":1,"method":"tools/list"}`, `did not come from msbd`, ""},
		{"another revision", url, "msb_good", `{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2099-01-01",` +
			`"io.modelcontextprotocol/clientCapabilities":{}}}}`, `"supported":["2026-07-28"`, ""}, // the assistant then uses a supported one
		{"a notification", url, "msb_bad", `{"jsonrpc":"2.0","method":"notifications/initialized"}`, "", "msb: the server does not accept the API key"},
		{"not JSON", url, "msb_bad", `{"jsonrpc"`, `"id":null}`, ""},
		{"a response", url, "msb_good", `{"jsonrpc":"2.0","id":7,"result":{}}`, "", ""},
		{"cancels nothing", url, "msb_good", `{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":5}}`, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("MSB_SERVER_URL", c.url)
			t.Setenv("MSB_API_KEY", c.key)
			t.Setenv("XDG_CONFIG_HOME", t.TempDir())
			var out, stderr bytes.Buffer
			app := newApp()
			app.Reader, app.Writer, app.ErrWriter = strings.NewReader(c.in+"\n\n"), &out, &stderr
			if err := app.RunContext(t.Context(), []string{"msb", "mcp"}); err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(out.String(), c.want) || c.want == "" && out.Len() > 0 || !strings.Contains(stderr.String(), c.stderr) || c.stderr == "" && stderr.Len() > 0 {
				t.Errorf("printed %s and %s", &out, &stderr)
			}
			var asked, answered struct {
				ID json.RawMessage `json:"id"`
			}
			if c.want == "" || json.Unmarshal([]byte(c.in), &asked) != nil {
				return
			}
			if err := json.Unmarshal(out.Bytes(), &answered); err != nil || string(answered.ID) != string(asked.ID) {
				t.Errorf("%s has the id %s, want %s", &out, answered.ID, asked.ID)
			}
			if c.key != "" && strings.Contains(out.String(), c.key) {
				t.Error("the key was printed")
			}
		})
	}
}

// After a message that is refused or malformed, the bridge serves the next one. Every answer has the id exactly as the
// assistant wrote it.
func TestMCPBridgeContinues(t *testing.T) {
	refusals := map[string]struct {
		status  int
		code    rpc.Code
		message string
	}{
		"busy":     {http.StatusTooManyRequests, rpc.CodeExhausted, "too many requests"},
		"starting": {http.StatusServiceUnavailable, rpc.CodeUnavailable, "the server is starting"},
		"revoked":  {http.StatusUnauthorized, rpc.CodeUnauthenticated, "missing or invalid API key"},
	}
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var asked struct {
			ID     json.RawMessage
			Method string
		}
		err := json.NewDecoder(r.Body).Decode(&asked)
		w.Header().Set("Content-Type", "application/json")
		switch refused, ok := refusals[asked.Method]; {
		case err != nil:
			fmt.Fprintf(w, `{"jsonrpc":"2.0","error":{"code":%d,"message":"not JSON"},"id":null}`, rpc.CodeParse)
		case ok:
			w.Header().Set("Retry-After", "7")
			w.WriteHeader(refused.status)
			fmt.Fprintf(w, `{"jsonrpc":"2.0","error":{"code":%d,"message":%q},"id":null}`, refused.code, refused.message)
		default:
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":{}}`, asked.ID)
		}
	}))
	defer web.Close()
	t.Setenv("MSB_SERVER_URL", web.URL)
	t.Setenv("MSB_API_KEY", "msb_good")
	t.Setenv("XDG_CONFIG_HOME", t.TempDir())
	in, assistant := io.Pipe()
	answers, out := io.Pipe()
	app := newApp()
	app.Reader, app.Writer, app.ErrWriter = in, out, io.Discard
	ended := make(chan error, 1)
	go func() { ended <- app.RunContext(t.Context(), []string{"msb", "mcp"}) }()
	lines := bufio.NewScanner(answers)
	for _, c := range []struct{ line, id, want string }{
		{`{"jsonrpc":"2.0","id":1,"method":"busy"}`, `1`, fmt.Sprintf(`"code":%d,"message":"too many requests`, rpc.CodeExhausted)},
		{`{"jsonrpc":"2.0","id":2,"method":"starting"}`, `2`, fmt.Sprintf(`"code":%d,"message":"the server is starting`, rpc.CodeUnavailable)},
		{`{"jsonrpc":"2.0","id":3,"method":"revoked"}`, `3`, fmt.Sprintf(`"code":%d,"message":"the server does not accept the API key`, rpc.CodeUnauthenticated)},
		{`hello`, `null`, `"not JSON"`},
		{`{"jsonrpc":"2.0","id":9007199254740993,"method":"ping"}`, `9007199254740993`, `"result":{}`},
		{`{"jsonrpc":"2.0","id":1.5,"method":"ping"}`, `1.5`, `"result":{}`},
		{`{"jsonrpc":"2.0","id":"a","method":"ping"}`, `"a"`, `"result":{}`},
	} {
		if _, err := io.WriteString(assistant, c.line+"\n"); err != nil {
			t.Fatal(err)
		}
		if !lines.Scan() {
			t.Fatalf("%s: no answer: %v", c.line, lines.Err())
		}
		var answered struct{ ID json.RawMessage }
		if err := json.Unmarshal(lines.Bytes(), &answered); err != nil || string(answered.ID) != c.id || !strings.Contains(lines.Text(), c.want) {
			t.Errorf("%s: got %s, want id %s and %s", c.line, lines.Text(), c.id, c.want)
		}
	}
	assistant.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// A response that ends before the answer is an error, so that the assistant does not wait forever.
func TestMCPBridgeCutOff(t *testing.T) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		io.WriteString(w, "event: message\ndata: {\"jsonrpc\":\"2.0\",\ndata: \"method\":\"notifications/progress\"}\n\n")
	}))
	defer web.Close()
	t.Setenv("MSB_SERVER_URL", web.URL)
	var out bytes.Buffer
	app := newApp()
	app.Reader, app.Writer = strings.NewReader(`{"jsonrpc":"2.0","id":7,"method":"tools/call"}`), &out
	if err := app.RunContext(t.Context(), []string{"msb", "mcp"}); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(out.String(), "\n")
	if len(lines) != 3 || lines[0] != `{"jsonrpc":"2.0","method":"notifications/progress"}` || !strings.Contains(lines[1], "before it answered") || !strings.Contains(lines[1], `"id":7`) {
		t.Errorf("printed %q", lines)
	}
}

// If the assistant exits without canceling its run, the bridge cancels it. If the assistant only closes its output, it
// still gets the answer.
func TestMCPBridgeAssistantExits(t *testing.T) {
	began, canceled := make(chan struct{}), make(chan struct{})
	web := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		close(began)
		<-r.Context().Done()
		close(canceled)
	}))
	defer web.Close()
	t.Setenv("MSB_SERVER_URL", web.URL)
	reader, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	app := newApp()
	app.Reader, app.Writer = strings.NewReader(`{"jsonrpc":"2.0","id":7,"method":"tools/call"}`), out
	ended := make(chan error, 1)
	go func() { ended <- app.RunContext(t.Context(), []string{"msb", "mcp"}) }()
	<-began
	select {
	case <-canceled:
		t.Fatal("the end of the input canceled the run")
	case <-time.After(time.Second):
	}
	reader.Close()
	<-canceled
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// The settings contain the absolute path of msb, the server's URL and a placeholder for the key, never the key itself.
func TestMCPConfig(t *testing.T) {
	t.Setenv("MSB_SERVER_URL", "https://msb.example.org")
	t.Setenv("MSB_API_KEY", "msb_secret")
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := json.Marshal(executable)
	if err != nil {
		t.Fatal(err)
	}
	for assistant, want := range map[string]string{
		"claude": `{"mcpServers":{"msbd":{"args":["mcp"],"command":PROGRAM,"env":{"MSB_API_KEY":"your-api-key-here","MSB_SERVER_URL":"https://msb.example.org"}}}}`,
		"cursor": `{"mcpServers":{"msbd":{"args":["mcp"],"command":PROGRAM,"env":{"MSB_API_KEY":"your-api-key-here","MSB_SERVER_URL":"https://msb.example.org"}}}}`,
		"vscode": `{"inputs":[{"description":"API key of https://msb.example.org","id":"msb-api-key","password":true,"type":"promptString"}],` +
			`"servers":{"msbd":{"args":["mcp"],"command":PROGRAM,"env":{"MSB_API_KEY":"${input:msb-api-key}","MSB_SERVER_URL":"https://msb.example.org"},"type":"stdio"}}}`,
	} {
		want = strings.ReplaceAll(want, "PROGRAM", string(program))
		var out, got bytes.Buffer
		app := newApp()
		app.Writer = &out
		if err := app.RunContext(t.Context(), []string{"msb", "mcp", "config", assistant}); err != nil {
			t.Fatal(err)
		}
		if err := json.Compact(&got, out.Bytes()); err != nil || got.String() != want {
			t.Errorf("%s: %s", assistant, &out)
		}
	}
	for _, bad := range [][]string{{"config"}, {"config", "emacs"}, {"config", "claude", "x"}, {"serve"}} {
		app := newApp()
		app.Writer, app.Reader = io.Discard, strings.NewReader("")
		if err := app.RunContext(t.Context(), append([]string{"msb", "mcp"}, bad...)); err == nil {
			t.Errorf("%v was accepted", bad)
		}
	}
}
