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
	runForever = `{"sandbox":"a","language":"python","code":"forever"}`
	leave      = 10 * time.Second // for what must happen
)

// untilCut makes runs last until their context ends, and tells of both.
func (s *site) untilCut() (began, cut chan struct{}) {
	began, cut = make(chan struct{}, 16), make(chan struct{}, 16)
	s.boxes.onRun = func(ctx context.Context) error {
		began <- struct{}{}
		<-ctx.Done()
		cut <- struct{}{}
		return context.Cause(ctx)
	}
	return began, cut
}

func await(t testing.TB, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(leave):
		t.Fatal("it did not happen: " + what)
	}
}

// A client that cancels a call, in the way of its revision, ends the run.
func TestCancel(t *testing.T) {
	for _, revision := range Revisions {
		t.Run(revision, func(t *testing.T) {
			s := newSite(t)
			began, cut := s.untilCut()
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
			await(t, "the run", began)
			cancel()
			await(t, "the run's end", cut)
			if err := <-failed; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			// The session goes on.
			s.boxes.onRun = nil
			if _, err := c.CallTool(t.Context(), &sdk.CallToolParams{Name: "sandbox_run_code", Arguments: json.RawMessage(runForever)}); err != nil {
				t.Error(err)
			}
		})
	}
}

// A client that leaves ends its run, whatever its revision, and with or without progress.
func TestClientLeaves(t *testing.T) {
	for _, revision := range []string{"2025-03-26", "2025-11-25"} {
		for _, call := range []string{toolCall(1, "sandbox_run_code", runForever), withProgress(1, runForever)} {
			s := newSite(t)
			began, cut := s.untilCut()
			ctx, cancel := context.WithCancel(t.Context())
			answered := make(chan struct{})
			go func() {
				defer close(answered)
				s.post(call, header("Mcp-Protocol-Version", revision), func(r *http.Request) { *r = *r.WithContext(ctx) })
			}()
			await(t, "the run", began)
			cancel()
			await(t, "the run's end", cut)
			await(t, "the answer's end", answered)
		}
	}
}

func withProgress(id int, arguments string) string {
	return strings.Replace(toolCall(id, "sandbox_run_code", arguments), `"params":{`, `"params":{"_meta":{"progressToken":"p"},`, 1)
}

// A cancellation that overtakes its call, before the library has come to the tool, is not lost.
func TestCancelBeforeTheToolIsCalled(t *testing.T) {
	s := newSite(t)
	s.methods = &overtaken{s.methods, func() {
		s.post(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7}}`, header(sessionHeader, "label"))
	}}
	w := s.post(toolCall(7, "sandbox_run_code", runForever), header(sessionHeader, "label"))
	if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), cancelled) {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if strings.Contains(s.Log.String(), "ERROR") {
		t.Error("it is logged as a fault:", s.Log)
	}
	wantPassed(t, s)
}

// overtaken does something once, before the library sees a call.
type overtaken struct {
	Methods
	before func()
}

func (o *overtaken) CountMessages(body []byte) (int, error) {
	if before := o.before; before != nil {
		o.before = nil
		before()
	}
	return o.Methods.CountMessages(body)
}

// The calls of one request run one at a time, so that a batch is no way around the bounds of a key.
func TestCallsOfABatchTakeTurns(t *testing.T) {
	s := newSite(t)
	var inside, most, runs atomic.Int32
	s.boxes.onRun = func(context.Context) error {
		most.Store(max(most.Load(), inside.Add(1)))
		runs.Add(1)
		runtime.Gosched()
		inside.Add(-1)
		return nil
	}
	batch := make([]string, 20)
	for i := range batch {
		batch[i] = toolCall(i, "sandbox_run_code", runForever)
	}
	w := s.post("["+strings.Join(batch, ",")+"]", header("Mcp-Protocol-Version", "2025-03-26"))
	if w.Code != http.StatusOK || runs.Load() != 20 || most.Load() != 1 {
		t.Errorf("%d of 20 ran, %d at once: %d %s", runs.Load(), most.Load(), w.Code, w.Body)
	}
}

// A cancellation reaches the runs of its own client alone: not those of another key that got hold of the
// label, nor those of another client of the same key that uses the same id.
func TestCancelReachesNoOther(t *testing.T) {
	s := newSite(t)
	began, cut := s.untilCut()
	label := s.post(`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"x","version":"1"}}}`).
		Header().Get(sessionHeader)
	if label == "" {
		t.Fatal("there is no label")
	}
	answered := make(chan *httptest.ResponseRecorder, 1)
	go func() {
		answered <- s.post(toolCall(7, "sandbox_run_code", runForever), header(sessionHeader, label))
	}()
	await(t, "the run", began)
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
	case <-cut:
		t.Fatal("the run was cancelled by another")
	default:
	}
	s.post(cancel, header(sessionHeader, label))
	await(t, "the run's end", cut)
	if w := <-answered; !strings.Contains(w.Body.String(), "cancelled") {
		t.Error(w.Body)
	}
	if len(s.running.runs) != 0 {
		t.Error("a run is still kept:", s.running.runs)
	}
}

// A label is no session: nothing is kept for it, and any will do.
func TestLabelsOpenNothing(t *testing.T) {
	s := newSite(t)
	for _, label := range []string{"", "made-up", strings.Repeat("x", 1000)} {
		if w := s.post(toolCall(1, "sandbox_stop", `{"sandbox":"a"}`), header(sessionHeader, label), header("Authorization", "msb_none")); w.Code != http.StatusUnauthorized {
			t.Errorf("%d %s", w.Code, w.Body)
		}
		wantPassed(t, s)
		s.post(toolCall(1, "sandbox_stop", `{"sandbox":"a"}`), header(sessionHeader, label))
		wantPassed(t, s, "stop default/a")
	}
}

// A client that gives a token is told that its run goes on, more and more, until it has the result.
func TestProgress(t *testing.T) {
	for _, revision := range Revisions {
		t.Run(revision, func(t *testing.T) {
			s := newSite(t)
			s.beat = time.Millisecond
			told := make(chan struct{}, 1)
			s.boxes.onRun = func(ctx context.Context) error {
				for range 3 {
					select {
					case <-told:
					case <-ctx.Done():
						return ctx.Err()
					}
				}
				return nil
			}
			var mu sync.Mutex
			var last float64
			c, err := connect(t, s.listen(t), s.key, revision, &sdk.ClientOptions{
				ProgressNotificationHandler: func(ctx context.Context, req *sdk.ProgressNotificationClientRequest) {
					mu.Lock()
					defer mu.Unlock()
					if p := req.Params; p.ProgressToken != "p" || p.Progress <= last || !strings.HasPrefix(p.Message, "running for ") {
						t.Errorf("told of %+v after %g", p, last)
					}
					last = req.Params.Progress
					select {
					case told <- struct{}{}:
					default:
					}
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			ctx, cancel := context.WithTimeout(t.Context(), leave)
			defer cancel()
			res, err := c.CallTool(ctx, &sdk.CallToolParams{Name: "sandbox_run_code", Arguments: json.RawMessage(runForever), Meta: sdk.Meta{"progressToken": "p"}})
			if err != nil {
				t.Fatal(err)
			}
			if res.IsError || text(t, res) != "ran forever" {
				t.Errorf("%+v", res)
			}
		})
	}
}

// The end of a key ends its runs at once, and tells nothing of what they came to.
func TestRunsEndWithTheirKey(t *testing.T) {
	runs := map[string]func(context.Context) error{
		"stops":   func(ctx context.Context) error { <-ctx.Done(); return context.Cause(ctx) },
		"goes on": func(ctx context.Context) error { <-ctx.Done(); return nil },
	}
	for name, onRun := range runs {
		for _, body := range []string{toolCall(1, "sandbox_run_code", runForever), withProgress(1, runForever)} {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t)
				key, id := s.issue(t, keys.IssueRequest{})
				began := make(chan struct{})
				s.boxes.onRun = func(ctx context.Context) error {
					close(began)
					return onRun(ctx)
				}
				answered := make(chan *httptest.ResponseRecorder)
				go func() { answered <- s.post(body, header("Authorization", key)) }()
				<-began
				if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
					t.Fatal(err)
				}
				w := <-answered
				if strings.Contains(w.Body.String(), "ran forever") || !strings.Contains(w.Body.String(), fmt.Sprint(rpc.CodeUnauthenticated)) {
					t.Errorf("%s: %d %s", name, w.Code, w.Body)
				}
				// A stream ends with the error as the tool's result.
				streamed := strings.Contains(body, "progressToken")
				if !streamed && w.Code != http.StatusUnauthorized || streamed && (w.Code != http.StatusOK || !strings.Contains(w.Body.String(), `"isError":true`)) {
					t.Errorf("%s: %d %s", name, w.Code, w.Body)
				}
				if !strings.Contains(s.Log.String(), "status=401") {
					t.Error("the log does not tell of it:", s.Log)
				}
			})
		}
	}
}

// MCP sends an output twice. What is too long for that is an error that the model can read.
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
			t.Errorf("%s: error %t: %.200s", code, res.Result.IsError, text)
		}
	}
}

// What is streamed arrives as it is written, with the headers of every answer; what is not, is one document.
func TestStreaming(t *testing.T) {
	s := newSite(t)
	s.beat = time.Millisecond
	finish := make(chan struct{})
	s.boxes.onRun = func(ctx context.Context) error {
		select {
		case <-finish:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.listen(t), strings.NewReader(withProgress(1, runForever)))
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
	if h.Get("Content-Type") != "text/event-stream" || h.Get("X-Request-Id") == "" || h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Cache-Control") != "no-store" {
		t.Error(h)
	}
	lines := bufio.NewReader(res.Body)
	for { // it arrives while the run goes on
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

	whole := s.post(toolCall(1, "sandbox_run_code", runForever))
	if whole.Header().Get("Content-Type") != "application/json" || !strings.Contains(whole.Body.String(), `"id":1`) {
		t.Errorf("%v %s", whole.Header(), whole.Body)
	}
}
