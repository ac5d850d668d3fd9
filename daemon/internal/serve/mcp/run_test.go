package mcp

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
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

const (
	runForever  = `{"sandbox":"a","language":"python","code":"forever"}`
	waitTimeout = 10 * time.Second // how long a test waits for an event
)

// blockRuns makes every run block until its context is canceled, and signals both its start and its cancellation.
func (s *site) blockRuns() (started, canceled chan struct{}) {
	started, canceled = make(chan struct{}, 16), make(chan struct{}, 16)
	s.sandboxes.onRun = func(ctx context.Context) error {
		started <- struct{}{}
		<-ctx.Done()
		canceled <- struct{}{}
		return context.Cause(ctx)
	}
	return started, canceled
}

func await(t testing.TB, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(waitTimeout):
		t.Fatalf("timed out waiting for %s", what)
	}
}

// A client of each revision can cancel a call, which interrupts the run.
func TestCancel(t *testing.T) {
	for _, revision := range Revisions {
		t.Run(revision, func(t *testing.T) {
			s := newSite(t)
			started, canceled := s.blockRuns()
			c, err := connect(t, s.listen(t), s.key, revision, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			failed := make(chan error, 1)
			go func() {
				_, err := c.CallTool(ctx, &sdk.CallToolParams{Name: "sandbox_run_code", Arguments: json.RawMessage(runForever)})
				failed <- err
			}()
			await(t, "the run to start", started)
			cancel()
			await(t, "the run to be canceled", canceled)
			if err := <-failed; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			// The client can make further calls.
			s.sandboxes.onRun = nil
			if _, err := c.CallTool(t.Context(), &sdk.CallToolParams{Name: "sandbox_run_code", Arguments: json.RawMessage(runForever)}); err != nil {
				t.Error(err)
			}
		})
	}
}

// If the client disconnects, its run is canceled, in any revision, with or without progress notifications.
func TestClientDisconnects(t *testing.T) {
	for _, revision := range []string{"2025-03-26", "2025-11-25"} {
		for _, call := range []string{toolCall(1, "sandbox_run_code", runForever), withProgress(1, runForever)} {
			s := newSite(t)
			started, canceled := s.blockRuns()
			ctx, cancel := context.WithCancel(t.Context())
			returned := make(chan struct{})
			go func() {
				defer close(returned)
				s.post(call, header("Mcp-Protocol-Version", revision), func(r *http.Request) { *r = *r.WithContext(ctx) })
			}()
			await(t, "the run to start", started)
			cancel()
			await(t, "the run to be canceled", canceled)
			await(t, "the handler to return", returned)
		}
	}
}

func withProgress(id int, arguments string) string {
	return strings.Replace(toolCall(id, "sandbox_run_code", arguments), `"params":{`, `"params":{"_meta":{"progressToken":"p"},`, 1)
}

// A cancellation is not lost if it arrives before the library calls the tool. The error of a start or stop does not say
// that a run failed.
func TestCancelBeforeTheToolIsCalled(t *testing.T) {
	for tool, arguments := range map[string]string{
		"sandbox_run_code": runForever, "sandbox_start": `{"sandbox":"a"}`, "sandbox_stop": `{"sandbox":"a"}`,
	} {
		s := newSite(t)
		s.methods = &hookedMethods{s.methods, func() {
			s.post(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7}}`, header(sessionHeader, "label"))
		}}
		w := s.post(toolCall(7, tool, arguments), header(sessionHeader, "label"))
		if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), fmt.Sprintf(`{"code":%d,"message":%q}`, rpc.CodeInvalidRequest, canceledMessage)) {
			t.Errorf("%s: got %d %s, want 200 with the code %d and %q", tool, w.Code, w.Body, rpc.CodeInvalidRequest, canceledMessage)
		}
		if strings.Contains(s.Log.String(), "ERROR") {
			t.Error(tool, "the cancellation is logged as an error:", s.Log)
		}
		wantCalls(t, s)
	}
}

// hookedMethods calls before once, before the library gets a call.
type hookedMethods struct {
	Methods
	before func()
}

func (m *hookedMethods) CountMessages(body []byte) (int, error) {
	if before := m.before; before != nil {
		m.before = nil
		before()
	}
	return m.Methods.CountMessages(body)
}

// The calls of a batch run one at a time, so that a batch cannot evade the limits of a key.
func TestCallsOfABatchRunOneAtATime(t *testing.T) {
	s := newSite(t)
	var active, maxActive, runs atomic.Int32
	s.sandboxes.onRun = func(context.Context) error {
		maxActive.Store(max(maxActive.Load(), active.Add(1)))
		runs.Add(1)
		runtime.Gosched()
		active.Add(-1)
		return nil
	}
	batch := make([]string, 20)
	for i := range batch {
		batch[i] = toolCall(i, "sandbox_run_code", runForever)
	}
	w := s.post("["+strings.Join(batch, ",")+"]", header("Mcp-Protocol-Version", "2025-03-26"))
	if w.Code != http.StatusOK || runs.Load() != 20 || maxActive.Load() != 1 {
		t.Errorf("%d of 20 calls ran, up to %d at once, want 1; got %d %s", runs.Load(), maxActive.Load(), w.Code, w.Body)
	}
}

// A client can cancel only its own calls: a label does not work with another key, and a client with another label of the
// same key cannot cancel a call that has the same id.
func TestCancelOnlyOwnCalls(t *testing.T) {
	s := newSite(t)
	started, canceled := s.blockRuns()
	label := s.post(`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"x","version":"1"}}}`).
		Header().Get(sessionHeader)
	if label == "" {
		t.Fatal("the response to initialize has no " + sessionHeader)
	}
	responses := make(chan *httptest.ResponseRecorder, 1)
	go func() {
		responses <- s.post(toolCall(7, "sandbox_run_code", runForever), header(sessionHeader, label))
	}()
	await(t, "the run to start", started)
	cancel := `{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7}}`
	other, _ := s.issue(t, keys.IssueRequest{})
	for name, change := range map[string][]func(*http.Request){
		"another key":    {header(sessionHeader, label), header("Authorization", other)},
		"another client": {header(sessionHeader, "other")},
		"no label":       {func(r *http.Request) { r.Header.Del(sessionHeader) }},
	} {
		if w := s.post(cancel, change...); w.Code != http.StatusAccepted {
			t.Errorf("%s: %d %s", name, w.Code, w.Body)
		}
	}
	for _, body := range []string{strings.Replace(cancel, "7", `"7"`, 1), strings.Replace(cancel, "7", "8", 1)} {
		s.post(body, header(sessionHeader, label))
	}
	select {
	case <-canceled:
		t.Fatal("another client canceled the run")
	default:
	}
	s.post(cancel, header(sessionHeader, label))
	await(t, "the run to be canceled", canceled)
	if w := <-responses; !strings.Contains(w.Body.String(), canceledMessage) {
		t.Error(w.Body)
	}
	if len(s.running.cancels) != 0 {
		t.Error("calls are still registered:", s.running.cancels)
	}
}

// A label is not a session and grants nothing: every request needs a key, and the server accepts any label.
func TestLabelsGrantNothing(t *testing.T) {
	s := newSite(t)
	for _, label := range []string{"", "made-up", strings.Repeat("x", 1000)} {
		if w := s.post(toolCall(1, "sandbox_stop", `{"sandbox":"a"}`), header(sessionHeader, label), header("Authorization", "msb_none")); w.Code != http.StatusUnauthorized {
			t.Errorf("label %.20q with a bad key: got %d %s, want 401", label, w.Code, w.Body)
		}
		wantCalls(t, s)
		s.post(toolCall(1, "sandbox_stop", `{"sandbox":"a"}`), header(sessionHeader, label))
		wantCalls(t, s, "stop default/a")
	}
}

// A client that sends a progress token gets notifications with increasing progress until the result.
func TestProgress(t *testing.T) {
	for _, revision := range Revisions {
		t.Run(revision, func(t *testing.T) {
			s := newSite(t)
			s.progressInterval = time.Millisecond
			notified := make(chan struct{}, 1)
			s.sandboxes.onRun = func(ctx context.Context) error {
				for range 3 {
					select {
					case <-notified:
					case <-ctx.Done():
						return ctx.Err()
					}
				}
				return nil
			}
			var mu sync.Mutex
			last := -1.0
			c, err := connect(t, s.listen(t), s.key, revision, &sdk.ClientOptions{
				ProgressNotificationHandler: func(ctx context.Context, req *sdk.ProgressNotificationClientRequest) {
					mu.Lock()
					defer mu.Unlock()
					if p := req.Params; p.ProgressToken != "p" || p.Progress <= last || !strings.HasPrefix(p.Message, "running for ") {
						t.Errorf("got notification %+v after progress %g", p, last)
					}
					last = req.Params.Progress
					select {
					case notified <- struct{}{}:
					default:
					}
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			ctx, cancel := context.WithTimeout(t.Context(), waitTimeout)
			defer cancel()
			res, err := c.CallTool(ctx, &sdk.CallToolParams{Name: "sandbox_run_code", Arguments: json.RawMessage(runForever), Meta: sdk.Meta{"progressToken": "p"}})
			if err != nil {
				t.Fatal(err)
			}
			if res.IsError || text(t, res) != "ran forever" {
				t.Errorf("got result %+v", res)
			}
		})
	}
}

// When a key is revoked, its runs are canceled immediately and their results are discarded.
func TestRunsEndWithTheirKey(t *testing.T) {
	runs := map[string]func(context.Context) error{
		"run fails":    func(ctx context.Context) error { <-ctx.Done(); return context.Cause(ctx) },
		"run succeeds": func(ctx context.Context) error { <-ctx.Done(); return nil },
	}
	for name, onRun := range runs {
		for _, body := range []string{toolCall(1, "sandbox_run_code", runForever), withProgress(1, runForever)} {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t)
				key, id := s.issue(t, keys.IssueRequest{})
				started := make(chan struct{})
				s.sandboxes.onRun = func(ctx context.Context) error {
					close(started)
					return onRun(ctx)
				}
				responses := make(chan *httptest.ResponseRecorder)
				go func() { responses <- s.post(body, header("Authorization", key)) }()
				<-started
				if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
					t.Fatal(err)
				}
				w := <-responses
				if strings.Contains(w.Body.String(), "ran forever") || !strings.Contains(w.Body.String(), fmt.Sprint(rpc.CodeUnauthenticated)) {
					t.Errorf("%s: %d %s", name, w.Code, w.Body)
				}
				// A stream has already sent its status, so the error is the tool's result.
				streamed := strings.Contains(body, "progressToken")
				if !streamed && w.Code != http.StatusUnauthorized || streamed && (w.Code != http.StatusOK || !strings.Contains(w.Body.String(), `"isError":true`)) {
					t.Errorf("%s: %d %s", name, w.Code, w.Body)
				}
				if !strings.Contains(s.Log.String(), "status=401") {
					t.Error("the log has no entry with status=401:", s.Log)
				}
			})
		}
	}
}

// escapes has the output of one run for each way in which JSON or MCP may encode a character, and how many bytes a
// character takes in a response.
var escapes = map[string]int{
	"x": 1, "<": 1, "&": 1, ">": 1, "é": 2, `"`: 2, `\`: 2, `\u003c`: 8, "\n": 2, "\t": 2, "\x01": 6, "\x7f": 1, "\xff": 3, "\u2028": 6, "😀": 4,
}

// A model gets the beginning and the end of a long output, once. Whatever is printed, the response takes no more bytes than
// the limit and the escapes of JSON ask for.
func TestOutputIsExcerpted(t *testing.T) {
	const printed = 300 << 10
	s := newSite(t)
	for what, cost := range escapes {
		for _, c := range []struct {
			tool, argument string
			max            int
			stream         bool
		}{
			{"sandbox_run_code", `"language":"python","code"`, 50_000, false},
			{"sandbox_run_command", `"command"`, 50_000, true},
			{"sandbox_run_command", `"max_output_bytes":200000,"command"`, 200_000, false},
		} {
			code, err := json.Marshal(fmt.Sprintf("%d KiB of %+q", printed>>10, what))
			if err != nil {
				t.Fatal(err)
			}
			body := toolCall(1, c.tool, fmt.Sprintf(`{"sandbox":"a",%s:%s}`, c.argument, code))
			if c.stream {
				body = strings.Replace(body, `"params":{`, `"params":{"_meta":{"progressToken":"p"},`, 1)
			}
			w := s.post(body)
			response := w.Body.String()
			if most := c.max/len(what)*cost + 1000; w.Code != http.StatusOK || len(response) > most {
				t.Errorf("%q, %+v: %d, %d bytes, want at most %d: %.300s", what, c, w.Code, len(response), most, response)
			}
			if c.stream {
				response = response[strings.LastIndex(response, "data: ")+len("data: "):] // after the events of progress
			}
			var res struct{ Result sdk.CallToolResult }
			if err := json.Unmarshal([]byte(response), &res); err != nil {
				t.Fatal(err)
			}
			head, rest, cut := strings.Cut(res.Result.Content[0].(*sdk.TextContent).Text, "\n[… ")
			_, tail, _ := strings.Cut(rest, " …]\n")
			var omitted int
			fmt.Sscan(rest, &omitted)
			if what == "\xff" { // each run of invalid bytes becomes one character
				head, tail = head+strings.Repeat("x", c.max/2-len(head)), tail+strings.Repeat("x", c.max/2-len(tail))
			}
			total := len(head) + len(tail) + omitted
			if !cut || res.Result.IsError || total > printed+6 || total < printed-100 || len(head)+len(tail) < c.max-10 {
				t.Errorf("%q, %+v: %d and %d bytes are kept and %d left out, want together %d and about %d: %.100q … %.100q",
					what, c, len(head), len(tail), omitted, c.max, printed, head, tail)
			}
		}
	}
}

func TestMaxOutputArgument(t *testing.T) {
	s := newSite(t)
	for argument, ok := range map[string]bool{"1": true, "200000": true, "null": true, "0": false, "-1": false, "200001": false, `"1"`: false, "1.5": false, "[]": false} {
		w := s.post(toolCall(1, "sandbox_run_code", `{"sandbox":"a","language":"python","code":"1","max_output_bytes":`+argument+`}`))
		if strings.Contains(w.Body.String(), `"isError":true`) == ok || !ok && !strings.Contains(w.Body.String(), "max_output_bytes must be an integer from 1 to 200000") {
			t.Errorf("%s: %d %s", argument, w.Code, w.Body)
		}
		if calls := s.sandboxes.takeCalls(); slices.Contains(calls, "code default/a") != ok {
			t.Errorf("%s: calls %q", argument, calls)
		}
	}
	// Other tools do not have it.
	if w := s.post(toolCall(1, "sandbox_stop", `{"sandbox":"a","max_output_bytes":1}`)); !strings.Contains(w.Body.String(), "not a known member") {
		t.Error(w.Body)
	}
}

func FuzzUnescapeHTML(f *testing.F) {
	f.Add("<a href=\"x\">&\\u003c\\\\<\u2028\x00")
	f.Fuzz(func(t *testing.T, s string) {
		s = strings.ToValidUTF8(s, "")
		encoded, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		before := string(encoded)
		got := unescapeHTML(encoded)
		var decoded string
		if err := json.Unmarshal(got, &decoded); err != nil || decoded != s || string(encoded) != before {
			t.Errorf("%s became %s, error %v", before, got, err)
		}
		var want bytes.Buffer
		e := json.NewEncoder(&want)
		e.SetEscapeHTML(false)
		if err := e.Encode(s); err != nil || want.String() != string(got)+"\n" {
			t.Errorf("%s became %s, want %s", before, got, want.String())
		}
	})
}

// With a progress token, the first event arrives at once, with the headers of every response. Without one, the response
// is one JSON document.
func TestStreaming(t *testing.T) {
	s := newSite(t)
	s.progressInterval = time.Hour
	finish := make(chan struct{})
	s.sandboxes.onRun = func(ctx context.Context) error {
		select {
		case <-finish:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), waitTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, s.listen(t), strings.NewReader(withProgress(1, runForever)))
	if err != nil {
		t.Fatal(err)
	}
	r.Header = http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}, "Authorization": {s.key}}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	res, err := transport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	h := res.Header
	if h.Get("Content-Type") != "text/event-stream" || h.Get("X-Accel-Buffering") != "no" || h.Get("X-Request-Id") == "" ||
		h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Cache-Control") != "no-store" {
		t.Error("headers of the stream:", h)
	}
	lines := bufio.NewReader(res.Body)
	for { // a progress notification arrives while the run is in progress
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(line, "notifications/progress") {
			break
		}
	}
	close(finish)
	rest, err := io.ReadAll(lines)
	if err != nil || !strings.Contains(string(rest), "ran forever") {
		t.Errorf("%s %v", rest, err)
	}

	w := s.post(toolCall(1, "sandbox_run_code", runForever))
	if w.Header().Get("Content-Type") != "application/json" || !strings.Contains(w.Body.String(), `"id":1`) {
		t.Errorf("without a progress token: %v %s", w.Header(), w.Body)
	}
}

// The response to a long call without a progress token becomes a stream that is kept alive. It has log messages if the protocol
// and the client allow them, and never progress notifications.
func TestLongCallsWithoutToken(t *testing.T) {
	setLevel := func(level string) string {
		return `{"jsonrpc":"2.0","id":9,"method":"logging/setLevel","params":{"level":"` + level + `"}}`
	}
	meta := func(more string) string {
		return `"params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}` + more + `},`
	}
	call := toolCall(1, "sandbox_run_code", runForever)
	newest := []func(*http.Request){header("Mcp-Protocol-Version", "2026-07-28"), header("Mcp-Method", "tools/call"), header("Mcp-Name", "sandbox_run_code")}
	for name, c := range map[string]struct {
		before, body string
		changes      []func(*http.Request)
		takes        time.Duration
		comments     int
		messages     int
	}{
		"a short call":                 {"", call, nil, 14 * time.Second, 0, 0},
		"2025-11-25":                   {"", call, nil, 40 * time.Second, 2, 2},
		"2025-03-26":                   {"", call, []func(*http.Request){header("Mcp-Protocol-Version", "2025-03-26")}, 40 * time.Second, 2, 2},
		"level debug":                  {setLevel("debug"), call, nil, 40 * time.Second, 2, 2},
		"level warning":                {setLevel("warning"), call, nil, 40 * time.Second, 2, 0},
		"no level":                     {setLevel("nonsense"), call, nil, 40 * time.Second, 2, 2},
		"2026-07-28":                   {"", strings.Replace(call, `"params":{`, meta(""), 1), newest, 40 * time.Second, 2, 0},
		"2026-07-28 with level info":   {"", strings.Replace(call, `"params":{`, meta(`,"io.modelcontextprotocol/logLevel":"info"`), 1), newest, 40 * time.Second, 2, 2},
		"2026-07-28 with level error":  {"", strings.Replace(call, `"params":{`, meta(`,"io.modelcontextprotocol/logLevel":"error"`), 1), newest, 40 * time.Second, 2, 0},
		"a batch":                      {"", "[" + call + "]", []func(*http.Request){header("Mcp-Protocol-Version", "2025-03-26")}, 40 * time.Second, 0, 0},
		"with a token, for comparison": {"", withProgress(1, runForever), nil, 14 * time.Second, 0, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newSite(t)
			s.maxSilence /= slowMachine
			s.sandboxes.onRun = func(context.Context) error { time.Sleep(c.takes); return nil }
			label := header(sessionHeader, "label")
			if c.before != "" {
				s.post(c.before, label)
				s.post(setLevel("debug"), header(sessionHeader, "another client"))
			}
			w := s.post(c.body, append([]func(*http.Request){label}, c.changes...)...)
			body := w.Body.String()
			comments, messages, progress := strings.Count(body, ": keep-alive\n\n"), strings.Count(body, `"notifications/message"`), strings.Count(body, `"notifications/progress"`)
			kind := "application/json"
			if c.comments > 0 || progress > 0 {
				kind = "text/event-stream"
			}
			if comments != c.comments || messages != c.messages || progress > 0 != strings.HasPrefix(name, "with") || w.Code != http.StatusOK ||
				w.Header().Get("Content-Type") != kind || strings.Count(body, "ran forever") != 1 || kind == "application/json" != json.Valid([]byte(body)) {
				t.Errorf("%s: %d comments, %d messages, %d progress notifications: %d %v %s", name, comments, messages, progress, w.Code, w.Header(), body)
			}
			if c.messages > 0 && !strings.Contains(body, `"data":"running for 15s"`) {
				t.Errorf("%s: %s", name, body)
			}
		})
	}
}

// The error of a run that was interrupted begins with what the run had printed, once and at most as long as other output.
func TestErrorsHaveTheOutput(t *testing.T) {
	s := newSite(t)
	for arguments, want := range map[string]string{
		`{"sandbox":"a","language":"python","code":"overtime"}`:                      "ran overtime\ntime limit of the run reached",
		`{"sandbox":"a","language":"python","code":"overtime","max_output_bytes":8}`: "ran \n[… 5 bytes",
		`{"sandbox":"a","language":"python","code":"overtime","encoding":"base64"}`:  "ran overtime\ntime limit of the run reached",
		`{"sandbox":"a","language":"python","code":"20000 KiB of \"x\""}`:            strings.Repeat("x", 100),
		`{"sandbox":"gone","language":"python","code":"overtime"}`:                   "sandbox default/gone does not exist",
	} {
		w := s.post(toolCall(1, "sandbox_run_code", arguments))
		var res struct{ Result sdk.CallToolResult }
		if err := json.Unmarshal(w.Body.Bytes(), &res); err != nil {
			t.Fatal(err)
		}
		text := res.Result.Content[0].(*sdk.TextContent).Text
		if !res.Result.IsError || !strings.HasPrefix(text, want) || len(text) > 51_000 {
			t.Errorf("%s: text of %d bytes: %.300q, want %.100q", arguments, len(text), text, want)
		}
		if strings.Contains(arguments, "KiB") && !strings.HasSuffix(text, "print less, or write to a file") {
			t.Errorf("the text ends with %q", text[len(text)-100:])
		}
		if meta := fmt.Sprint(res.Result.Meta); strings.Contains(meta, "ran ") || strings.Contains(meta, "output:") || !strings.Contains(meta, "message:") {
			t.Errorf("%s: metadata %.300s", arguments, meta)
		}
	}
}
