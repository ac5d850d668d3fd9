package rpc_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// event is a server-sent event.
type event struct{ name, data string }

// nextEvent reads the next event of a stream, without comments.
func nextEvent(r *bufio.Reader) (e event, err error) {
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return event{}, err
		}
		switch name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": "); {
		case name == "event" && e == event{}:
			e.name = value
		case name == "data" && e.name != "" && e.data == "":
			e.data = value
		case line == "\n" && e.data != "":
			return e, nil
		case strings.HasPrefix(line, ": "), line == "\n" && e == event{}: // a comment
		default:
			return event{}, fmt.Errorf("unexpected line %q after %+v", line, e)
		}
	}
}

// eventsOf returns the events of a complete response.
func eventsOf(t *testing.T, w *httptest.ResponseRecorder) (all []event) {
	t.Helper()
	if w.Code != http.StatusOK || w.Header().Get("Content-Type") != rpc.EventStream || w.Header().Get("X-Accel-Buffering") != "no" || w.Header().Get("Cache-Control") != "no-store" {
		t.Fatalf("response is %d %v %s, want a stream of events", w.Code, w.Header(), w.Body)
	}
	for r := bufio.NewReader(w.Body); ; {
		e, err := nextEvent(r)
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
}

// asEvents makes a request accept only a stream of events.
var asEvents = WithHeader("Accept", rpc.EventStream)

// live is a sandbox domain whose commands are controlled by the test.
type live struct {
	*Sandboxes
	// events has the events of the command. Its end is an error of the process.
	events chan sandbox.Event
	// taken counts the events that were read.
	taken atomic.Int32
	// ended gets why the context of the command ended, or nil if the command was closed before.
	ended chan error
}

func (l *live) RunCommand(ctx context.Context, _ sandbox.Name, _ sandbox.Command) (sandbox.Process, error) {
	return &liveProcess{l, ctx}, nil
}

func (l *live) RunCode(ctx context.Context, _ sandbox.Name, _ sandbox.Code) (sandbox.Process, error) {
	return &liveProcess{l, ctx}, nil
}

type liveProcess struct {
	*live
	ctx context.Context
}

func (p *liveProcess) Next() (sandbox.Event, error) {
	select {
	case e, ok := <-p.events:
		if !ok {
			return nil, fmt.Errorf("the connection was lost: %w", sandbox.ErrRunFailed)
		}
		p.taken.Add(1)
		return e, nil
	case <-p.ctx.Done():
		return nil, fmt.Errorf("the request was interrupted: %w", errors.Join(sandbox.ErrRunFailed, context.Cause(p.ctx)))
	}
}

func (p *liveProcess) Close() error {
	p.ended <- context.Cause(p.ctx)
	return nil
}

// newLive returns a site with a live domain.
func newLive(t *testing.T) (*Site, *live) {
	l := &live{events: make(chan sandbox.Event), ended: make(chan error, 1)}
	return New(t, func(o *Setup) {
		l.Sandboxes = o.Sandboxes.(*Sandboxes)
		o.Sandboxes = l
	}), l
}

const waitTimeout = 20 * time.Second // how long a test waits for an event

// awaitEnd returns why the context of the command ended.
func (l *live) awaitEnd(t *testing.T) error {
	t.Helper()
	select {
	case err := <-l.ended:
		return err
	case <-time.After(waitTimeout):
		t.Fatal("the run did not end")
		return nil
	}
}

var runLive = Request("sandbox.command.run", `{"sandbox":"a","command":"x"}`)

// connect sends a request over TCP and returns the response, whose body was not read.
func connect(t *testing.T, ctx context.Context, addr, key, body string) *http.Response {
	t.Helper()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+rpc.Path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header = http.Header{"Content-Type": {"application/json"}, "Authorization": {key}, "Accept": {rpc.EventStream}}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	return res
}

func output(text string) sandbox.Event {
	return sandbox.Output{Stream: sandbox.Stdout, Data: []byte(text)}
}

// The client gets the headers before the program prints anything, and each piece of output when it is printed.
func TestEventsArriveAtOnce(t *testing.T) {
	s, l := newLive(t)
	addr, stop := s.Listen(t)
	defer stop()
	res := connect(t, t.Context(), addr, s.Key, `{"jsonrpc":"2.0","method":"sandbox.command.run","params":{"sandbox":"a","command":"x"}}`)
	if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != "text/event-stream" || res.Header.Get("Cache-Control") != "no-store" ||
		res.Header.Get("X-Accel-Buffering") != "no" || res.Header.Get("X-Request-Id") == "" {
		t.Fatal(res.Status, res.Header)
	}
	body := bufio.NewReader(res.Body)
	want := func(want event) {
		t.Helper()
		if got, err := nextEvent(body); got != want || err != nil {
			t.Fatalf("got %+v, error %v, want %+v", got, err, want)
		}
	}
	l.events <- output("a")
	want(event{"output", `{"stream":"stdout","text":"a"}`})
	l.events <- sandbox.Output{Stream: sandbox.Stderr, Data: []byte("b\nc\n")}
	want(event{"output", `{"stream":"stderr","text":"b\nc\n"}`})
	l.events <- sandbox.Exit{Code: 3}
	want(event{"result", `{"command":"x","args":[],"exit_code":3,"success":false,"output":[]}`})
	if rest, err := io.ReadAll(body); err != nil || len(rest) != 0 {
		t.Errorf("after the result: %q, %v", rest, err)
	}
}

// Text is never cut in a character, however the output was cut. Base64 has the bytes as they were printed.
func TestEventsOfOutput(t *testing.T) {
	s, l := newLive(t)
	for name, c := range map[string]struct {
		pieces       []string
		text, base64 []string
	}{
		"characters": {[]string{"a\xc3", "\xa4\xe2", "\x82", "\xac", "b"}, []string{"a", "ä", "€", "b"}, []string{"YcM=", "pOI=", "gg==", "rA==", "Yg=="}},
		"not UTF-8":  {[]string{"\xff\xfea\xc3", "b\xe2\x82"}, []string{"\uFFFD\uFFFDa", "\uFFFDb", "\uFFFD\uFFFD"}, []string{"//5hww==", "YuKC"}},
		"nothing":    {nil, nil, nil},
	} {
		for encoding, want := range map[string][]string{"text": c.text, "base64": c.base64} {
			go func() {
				for _, piece := range c.pieces {
					l.events <- output(piece)
				}
				l.events <- sandbox.Exit{}
			}()
			params := `{"sandbox":"a","command":"x"}`
			if encoding == "base64" {
				params = `{"sandbox":"a","command":"x","encoding":"base64"}`
			}
			got := eventsOf(t, s.Post(Request("sandbox.command.run", params), asEvents))
			<-l.ended
			var all []event
			for _, text := range want {
				all = append(all, event{"output", fmt.Sprintf(`{"stream":"stdout",%q:"%s"}`, encoding, text)})
			}
			all = append(all, event{"result", `{"command":"x","args":[],"exit_code":0,"success":true,"output":[]}`})
			if !slices.Equal(got, all) {
				t.Errorf("%s as %s: got %q, want %q", name, encoding, got, all)
			}
		}
	}
}

// The incomplete characters of two streams do not mix.
func TestEventsOfTwoStreams(t *testing.T) {
	s, l := newLive(t)
	go func() {
		l.events <- sandbox.Output{Stream: sandbox.Stdout, Data: []byte("\xc3")}
		l.events <- sandbox.Output{Stream: sandbox.Stderr, Data: []byte("x\xc3")}
		l.events <- sandbox.Output{Stream: sandbox.Stdout, Data: []byte("\xa4")}
		l.events <- sandbox.Exit{}
	}()
	got := eventsOf(t, s.Post(runLive, asEvents))
	want := []event{{"output", `{"stream":"stderr","text":"x"}`}, {"output", `{"stream":"stdout","text":"ä"}`}, {"output", `{"stream":"stderr","text":"` + "\uFFFD" + `"}`}}
	if len(got) != 4 || !slices.Equal(got[:3], want) {
		t.Errorf("got %q, want %q and a result", got, want)
	}
}

// A silent stream sends a comment every 15 seconds after the last event.
func TestKeepAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, l := newLive(t)
		began := time.Now()
		var written []string
		w := &timedWriter{ResponseRecorder: httptest.NewRecorder(), write: func(p []byte) {
			written = append(written, fmt.Sprintf("%s %s", time.Since(began), strings.SplitN(string(p), "\n", 2)[0]))
		}}
		go func() {
			time.Sleep(40 * time.Second)
			l.events <- output("a")
			time.Sleep(15*time.Second - 1)
			l.events <- output("b")
			time.Sleep(16 * time.Second)
			l.events <- sandbox.Exit{}
		}()
		r := httptest.NewRequest(http.MethodPost, rpc.Path, strings.NewReader(runLive))
		r.Header = http.Header{"Content-Type": {"application/json"}, "Authorization": {s.Key}, "Accept": {rpc.EventStream}}
		s.ServeHTTP(w, r)
		want := []string{
			"15s : keep-alive", "30s : keep-alive", "40s event: output", "54.999999999s event: output", "1m9.999999999s : keep-alive", "1m10.999999999s event: result",
		}
		if !slices.Equal(written, want) {
			t.Errorf("got %q, want %q", written, want)
		}
		eventsOf(t, w.ResponseRecorder)
	})
}

// timedWriter calls write with everything that is written.
type timedWriter struct {
	*httptest.ResponseRecorder
	write func([]byte)
}

func (w *timedWriter) Write(p []byte) (int, error) {
	w.write(p)
	return w.ResponseRecorder.Write(p)
}

// Every method waits with keep-alives, not only those that read events.
func TestKeepAliveOfEveryMethod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(t)
		s.Sandboxes.OnRun = func(context.Context) error {
			time.Sleep(31 * time.Second)
			return nil
		}
		s.Sandboxes.MaxRunTime = 50 * time.Second
		WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
		WantOK(t, s.Post(Request("sandbox.process.start", `{"sandbox":"a","command":"sleep","tag":"s"}`)))
		for body, want := range map[string]int{
			Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":""}`): 2,
			Request("sandbox.process.wait", `{"sandbox":"a","tag":"s"}`):                 3,
		} {
			w := s.Post(body, asEvents)
			if got := strings.Count(w.Body.String(), ": keep-alive\n\n"); got != want {
				t.Errorf("%s: got %d comments, want %d: %s", body, got, want, w.Body)
			}
			if got := eventsOf(t, w); len(got) != 1 || got[0].name != "result" {
				t.Errorf("%s: got %q", body, got)
			}
		}
	})
}

// When the key of a stream is refused, the stream ends at once without a last event.
func TestEventsEndWithTheirKey(t *testing.T) {
	s, l := newLive(t)
	addr, stop := s.Listen(t)
	defer stop()
	key, id := s.IssueNamed(t, keys.IssueRequest{})
	res := connect(t, t.Context(), addr, key, runLive)
	body := bufio.NewReader(res.Body)
	l.events <- output("a")
	if e, err := nextEvent(body); err != nil || e.name != "output" {
		t.Fatal(e, err)
	}
	if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	if err := l.awaitEnd(t); !errdefs.IsUnauthorized(err) {
		t.Errorf("the run ended because of %v", err)
	}
	if e, err := nextEvent(body); err == nil || err == io.EOF {
		t.Errorf("the stream seems complete: %+v, %v", e, err)
	}
}

// A client that does not read does not keep its run from ending with the key, or for longer than the deadline.
func TestEventsOfAClientThatDoesNotRead(t *testing.T) {
	for _, revoked := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			s, l := newLive(t)
			key, id := s.IssueNamed(t, keys.IssueRequest{})
			began := time.Now()
			go func() {
				l.events <- output("a")
				time.Sleep(5 * time.Second)
				if revoked {
					s.Keys.Revoke(t.Context(), id, 0)
				}
			}()
			r := httptest.NewRequest(http.MethodPost, rpc.Path, strings.NewReader(runLive))
			r.Header = http.Header{"Content-Type": {"application/json"}, "Authorization": {key}, "Accept": {rpc.EventStream}}
			w := &deafWriter{ResponseRecorder: httptest.NewRecorder(), changed: make(chan struct{}, 1)}
			func() {
				defer func() {
					if v := recover(); v != http.ErrAbortHandler {
						t.Errorf("the response was not aborted: %v", v)
					}
				}()
				s.ServeHTTP(w, r)
			}()
			took, want := time.Since(began), 5*time.Second
			cause := "revoked"
			if !revoked {
				want, cause = 61*time.Second, "did not read"
			}
			if took > want {
				t.Errorf("revoked %t: the run ended after %s, want %s", revoked, took, want)
			}
			if err := <-l.ended; err == nil || !strings.Contains(err.Error(), cause) {
				t.Errorf("revoked %t: the run ended because of %v", revoked, err)
			}
			time.Sleep(time.Minute) // until the goroutine above has ended
		})
	}
}

// deafWriter is the response of a client that reads nothing but the headers.
type deafWriter struct {
	*httptest.ResponseRecorder
	mu       sync.Mutex
	deadline time.Time
	changed  chan struct{} // has an element when the deadline was changed
}

func (w *deafWriter) SetWriteDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deadline = t
	select {
	case w.changed <- struct{}{}:
	default:
	}
	return nil
}

func (w *deafWriter) Write([]byte) (int, error) {
	for {
		w.mu.Lock()
		left := time.Until(w.deadline)
		w.mu.Unlock()
		if left <= 0 {
			return 0, os.ErrDeadlineExceeded
		}
		select {
		case <-w.changed:
		case <-time.After(left):
		}
	}
}

// When the context of a stream has ended, a client that does not read delays its end by at most a second.
func TestLastEventOfAClientThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, l := newLive(t)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		r := httptest.NewRequestWithContext(ctx, http.MethodPost, rpc.Path, strings.NewReader(runLive))
		r.Header = http.Header{"Content-Type": {"application/json"}, "Authorization": {s.Key}, "Accept": {rpc.EventStream}}
		began := time.Now()
		func() {
			defer func() {
				if v := recover(); v != http.ErrAbortHandler {
					t.Errorf("the response was not aborted: %v", v)
				}
			}()
			s.ServeHTTP(&deafWriter{ResponseRecorder: httptest.NewRecorder(), changed: make(chan struct{}, 1)}, r)
		}()
		if took := time.Since(began); took != 6*time.Second {
			t.Errorf("the stream ended after %s, want 6s", took)
		}
		<-l.ended
	})
}

// A client that leaves ends the run.
func TestEventsEndWithTheirClient(t *testing.T) {
	s, l := newLive(t)
	addr, stop := s.Listen(t)
	defer stop()
	ctx, leave := context.WithCancel(t.Context())
	connect(t, ctx, addr, s.Key, runLive)
	leave()
	if err := l.awaitEnd(t); !errors.Is(err, context.Canceled) {
		t.Errorf("the run ended because of %v", err)
	}
}

// A program waits if the client does not read what it prints. There is no limit to how much it prints.
func TestEventsAreNotBuffered(t *testing.T) {
	const pieces, pieceSize, inTheNetwork = 640, 64 << 10, 256
	s, l := newLive(t)
	addr, stop := s.Listen(t)
	defer stop()
	go func() {
		piece := output(strings.Repeat("x", pieceSize))
		for range pieces {
			l.events <- piece
		}
		l.events <- sandbox.Exit{}
	}()
	body := bufio.NewReader(connect(t, t.Context(), addr, s.Key, runLive).Body)
	for received := 1; ; received++ {
		e, err := nextEvent(body)
		if err != nil {
			t.Fatal(err)
		}
		if e.name == "result" {
			if received != pieces+1 {
				t.Errorf("got %d pieces, want %d", received-1, pieces)
			}
			return
		}
		if ahead := int(l.taken.Load()) - received; ahead > inTheNetwork {
			t.Fatalf("the server has read %d pieces that the client has not received", ahead)
		}
	}
}

// A request that is refused before its method begins gets an ordinary response. After that, an error is an event.
func TestEventsAndErrors(t *testing.T) {
	s := New(t)
	reader := s.Issue(t, keys.IssueRequest{Scopes: []keys.Scope{keys.ScopeRead}})
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	start := Request("sandbox.start", `{"sandbox":"b"}`)
	WantError(t, s.Post(start, asEvents, WithKey("no")), http.StatusUnauthorized, rpc.CodeUnauthenticated)
	WantError(t, s.Post(start, asEvents, WithKey(reader)), http.StatusForbidden, rpc.CodePermissionDenied)
	WantError(t, s.Post("{", asEvents), http.StatusBadRequest, rpc.CodeParse)
	WantError(t, s.Post("{}", asEvents), http.StatusBadRequest, rpc.CodeInvalidRequest)
	WantError(t, s.Post("["+start+"]", asEvents), http.StatusBadRequest, rpc.CodeInvalidRequest)
	WantError(t, s.Post(Request("sandbox.none", `{}`), asEvents), http.StatusNotFound, rpc.CodeMethodNotFound)
	WantError(t, s.Post(Request("sandbox.start", `{}`), asEvents), http.StatusBadRequest, rpc.CodeInvalidParams)
	if len(s.Sandboxes.Running) != 1 {
		t.Error("a refused request was run")
	}
	for body, want := range map[string]event{
		start: {"result", `"Sandbox b started successfully"`},
		`{"jsonrpc":"2.0","method":"sandbox.stop","params":{"sandbox":"b"}}`:                  {"result", `"Sandbox b stopped successfully"`},
		Request("sandbox.stop", `{"sandbox":"gone"}`):                                         {"error", `{"code":-32003,"message":"sandbox default/gone does not exist"}`},
		Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"overtime "}`): {"error", `{"code":-32007,"message":"time limit of the run reached","data":{"output":[],"truncated":false,"timed_out":true}}`},
		Request("sandbox.command.run", `{"sandbox":"a","command":"x","encoding":"hex"}`):      {"error", `{"code":-32602,"message":"encoding \"hex\" is not supported; use utf-8 or base64"}`},
		Request("sandbox.process.connect", `{"sandbox":"a","pid":7}`):                         {"error", `{"code":-32003,"message":"there is no such process"}`},
	} {
		if body == start {
			continue // below, because the order of a map is random
		}
		if strings.Contains(body, "sandbox.stop") && want.name == "result" {
			if got := eventsOf(t, s.Post(start, asEvents)); len(got) != 1 || got[0] != (event{"result", `"Sandbox b started successfully"`}) {
				t.Errorf("%s: got %q", start, got)
			}
		}
		if got := eventsOf(t, s.Post(body, asEvents)); len(got) != 1 || got[0] != want {
			t.Errorf("%s: got %q, want %q", body, got, want)
		}
	}
	if got := eventsOf(t, s.Post(`{"jsonrpc":"2.0","method":"rpc.discover"}`, asEvents)); len(got) != 1 || got[0].name != "result" || !strings.HasPrefix(got[0].data, `{"openrpc"`) {
		t.Errorf("rpc.discover: got %d events", len(got))
	}
	// A panic in another goroutine ends only this call.
	w := s.Post(Request("sandbox.stop", `{"sandbox":"panic"}`), asEvents)
	if got := eventsOf(t, w); len(got) != 1 || got[0].name != "error" || !strings.Contains(got[0].data, `"code":-32603`) || strings.Contains(got[0].data, "fault") {
		t.Errorf("after a panic: got %q", got)
	}
	if log := s.Log.String(); !strings.Contains(log, "a fault of the domain") || !strings.Contains(log, "servetest.(*Sandboxes).find") {
		t.Error("the log does not say where the panic was:", log)
	}
}

func TestAccept(t *testing.T) {
	s := New(t)
	for _, c := range []struct {
		accept []string
		events bool
	}{
		{[]string{"text/event-stream"}, true},
		{[]string{"Text/Event-Stream; charset=utf-8"}, true},
		{[]string{"text/event-stream, */*;q=0.1"}, true},
		{[]string{"text/html", "text/event-stream"}, true},
		{[]string{"application/json;q=0, text/event-stream"}, true},
		{[]string{"application/json; q=0.000, text/event-stream;q=0.5"}, true},
		{[]string{"text/event-stream, ;;, a"}, true},
		{nil, false},
		{[]string{""}, false},
		{[]string{"*/*"}, false},
		{[]string{"text/*"}, false},
		{[]string{"application/json"}, false},
		{[]string{"application/json, text/event-stream"}, false},
		{[]string{"text/event-stream, application/json;q=0.1"}, false},
		{[]string{"text/event-stream", "Application/JSON"}, false},
		{[]string{"text/event-stream;q=0"}, false},
		{[]string{"text/event-stream;q=0.0, */*"}, false},
	} {
		w := s.Post(Request("sandbox.list", `{}`), func(r *http.Request) { r.Header["Accept"] = c.accept })
		if events := w.Header().Get("Content-Type") == rpc.EventStream; events != c.events || w.Code != http.StatusOK {
			t.Errorf("Accept %q: got %d %v, want events: %t", c.accept, w.Code, w.Header(), c.events)
		}
	}
	w := s.Post("", asEvents, At(http.MethodGet, "/"))
	if w.Code != http.StatusOK || w.Header().Get("Content-Type") == rpc.EventStream {
		t.Errorf("GET /: got %d %v", w.Code, w.Header())
	}
	WantError(t, s.Post("", asEvents, At(http.MethodGet, rpc.Path)), http.StatusMethodNotAllowed, rpc.CodeInvalidRequest)
}

// A client can follow a process that goes on, with what it has printed before or without it.
func TestConnectProcess(t *testing.T) {
	s := New(t)
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	WantOK(t, s.Post(Request("sandbox.process.start", `{"sandbox":"a","command":"cat","tag":"c","stdin":"before\n","open_stdin":true}`)))
	addr, stop := s.Listen(t)
	defer stop()
	connected := func(params string) *bufio.Reader {
		return bufio.NewReader(connect(t, t.Context(), addr, s.Key, Request("sandbox.process.connect", params)).Body)
	}
	want := func(r *bufio.Reader, want ...event) {
		t.Helper()
		for _, want := range want {
			if got, err := nextEvent(r); got != want || err != nil {
				t.Fatalf("got %+v, error %v, want %+v", got, err, want)
			}
		}
	}
	before, after := event{"output", `{"stream":"stdout","text":"before\n"}`}, event{"output", `{"stream":"stdout","base64":"YWZ0ZXI="}`}
	all := connected(`{"sandbox":"a","tag":"c","replay":true}`)
	want(all, before)
	ctx, leave := context.WithCancel(t.Context())
	left := bufio.NewReader(connect(t, ctx, addr, s.Key, Request("sandbox.process.connect", `{"sandbox":"a","tag":"c","replay":true}`)).Body)
	want(left, before)
	leave() // the process goes on
	WantOK(t, s.Post(Request("sandbox.process.input", `{"sandbox":"a","tag":"c","data":"after"}`)))
	want(all, event{"output", `{"stream":"stdout","text":"after"}`})
	WantOK(t, s.Post(Request("sandbox.process.signal", `{"sandbox":"a","tag":"c","signal":"KILL"}`)))
	exit := `"running":false,"exit":{"exit_code":137,"signal":"KILL","timed_out":false}}`
	want(all, event{"result", `{"skipped_bytes":0,` + exit})
	want(connected(`{"sandbox":"a","tag":"c"}`), event{"result", `{"skipped_bytes":12,` + exit})
	want(connected(`{"sandbox":"a","tag":"c","replay":true,"encoding":"base64"}`), event{"output", `{"stream":"stdout","base64":"YmVmb3JlCg=="}`}, after)
	logs := eventsOf(t, s.Post(Request("sandbox.process.logs", `{"sandbox":"a","tag":"c"}`), asEvents))
	if want := (event{"result", `{"output":[{"stream":"stdout","text":"before"},{"stream":"stdout","text":"after"}],"skipped_bytes":0,` + exit}); len(logs) != 1 || logs[0] != want {
		t.Errorf("the logs are %q", logs)
	}
}

func TestWatchFiles(t *testing.T) {
	s := New(t)
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	WantOK(t, s.Post(Request("sandbox.fs.mkdir", `{"sandbox":"a","path":"/d"}`)))
	s.Sandboxes.Changes = make(chan sandbox.FileChange)
	addr, stop := s.Listen(t)
	defer stop()
	body := bufio.NewReader(connect(t, t.Context(), addr, s.Key, Request("sandbox.fs.watch", `{"sandbox":"a","path":"/d","recursive":true}`)).Body)
	want := func(want event) {
		t.Helper()
		if got, err := nextEvent(body); got != want || err != nil {
			t.Fatalf("got %+v, error %v, want %+v", got, err, want)
		}
	}
	want(event{"started", `{}`})
	s.Sandboxes.Changes <- sandbox.FileChange{Type: sandbox.FileCreated, Path: "new"}
	want(event{"change", `{"type":"create","path":"new"}`})
	s.Sandboxes.Changes <- sandbox.FileChange{Type: sandbox.FileRemoved, Path: "\xff"}
	want(event{"change", `{"type":"remove","path":"` + "\uFFFD" + `","path_base64":"/w=="}`})
	s.Sandboxes.Changes <- sandbox.FileChange{Type: sandbox.ChangesLost}
	want(event{"change", `{"type":"overflow","path":""}`})
	close(s.Sandboxes.Changes)
	want(event{"result", `{}`})
	if !s.Sandboxes.Recursive {
		t.Error("the watch was not recursive")
	}
	if got := eventsOf(t, s.Post(Request("sandbox.fs.watch", `{"sandbox":"a","path":"/none"}`), asEvents)); len(got) != 1 || got[0].name != "error" || !strings.Contains(got[0].data, "-32003") {
		t.Errorf("a watch of a missing file: %q", got)
	}
}
