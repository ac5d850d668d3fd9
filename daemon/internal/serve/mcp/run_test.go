package mcp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
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

// blockRuns makes every run block until its context is cancelled, and signals both its start and its cancellation.
func (s *site) blockRuns() (started, cancelled chan struct{}) {
	started, cancelled = make(chan struct{}, 16), make(chan struct{}, 16)
	s.sandboxes.onRun = func(ctx context.Context) error {
		started <- struct{}{}
		<-ctx.Done()
		cancelled <- struct{}{}
		return context.Cause(ctx)
	}
	return started, cancelled
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
			started, cancelled := s.blockRuns()
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
			await(t, "the run to be cancelled", cancelled)
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

// If the client disconnects, its run is cancelled, in any revision, with or without progress notifications.
func TestClientDisconnects(t *testing.T) {
	for _, revision := range []string{"2025-03-26", "2025-11-25"} {
		for _, call := range []string{toolCall(1, "sandbox_run_code", runForever), withProgress(1, runForever)} {
			s := newSite(t)
			started, cancelled := s.blockRuns()
			ctx, cancel := context.WithCancel(t.Context())
			returned := make(chan struct{})
			go func() {
				defer close(returned)
				s.post(call, header("Mcp-Protocol-Version", revision), func(r *http.Request) { *r = *r.WithContext(ctx) })
			}()
			await(t, "the run to start", started)
			cancel()
			await(t, "the run to be cancelled", cancelled)
			await(t, "the handler to return", returned)
		}
	}
}

func withProgress(id int, arguments string) string {
	return strings.Replace(toolCall(id, "sandbox_run_code", arguments), `"params":{`, `"params":{"_meta":{"progressToken":"p"},`, 1)
}

// A cancellation is not lost if it arrives before the library calls the tool.
func TestCancelBeforeTheToolIsCalled(t *testing.T) {
	s := newSite(t)
	s.methods = &hookedMethods{s.methods, func() {
		s.post(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7}}`, header(sessionHeader, "label"))
	}}
	w := s.post(toolCall(7, "sandbox_run_code", runForever), header(sessionHeader, "label"))
	if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), canceledMessage) {
		t.Errorf("got %d %s, want 200 with %q", w.Code, w.Body, canceledMessage)
	}
	if strings.Contains(s.Log.String(), "ERROR") {
		t.Error("the cancellation is logged as an error:", s.Log)
	}
	wantCalls(t, s)
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
	started, cancelled := s.blockRuns()
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
	case <-cancelled:
		t.Fatal("another client cancelled the run")
	default:
	}
	s.post(cancel, header(sessionHeader, label))
	await(t, "the run to be cancelled", cancelled)
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

// When a key is revoked, its runs are cancelled immediately and their results are discarded.
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

// MCP sends the output twice. Output that exceeds the limit when sent twice is an error that the model can read.
func TestLongOutput(t *testing.T) {
	s := newSite(t)
	for code, fits := range map[string]bool{"15 MiB of x": true, "2 MiB of <": true, "6 MiB of <": false} {
		w := s.post(toolCall(1, "sandbox_run_code", `{"sandbox":"a","language":"python","code":"`+code+`"}`))
		var res struct {
			Result struct {
				IsError bool
				Content []struct{ Text string }
			}
		}
		if err := json.Unmarshal(w.Body.Bytes(), &res); err != nil || w.Code != http.StatusOK || len(res.Result.Content) != 1 {
			t.Errorf("%s: %d, %d bytes, %v", code, w.Code, w.Body.Len(), err)
			continue
		}
		if text := res.Result.Content[0].Text; res.Result.IsError == fits || !fits && !strings.Contains(text, "print less") {
			t.Errorf("%s: error %t, want %t: %.200s", code, res.Result.IsError, !fits, text)
		}
	}
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
