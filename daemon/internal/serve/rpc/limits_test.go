package rpc_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

var sandboxA = sandbox.Name{Namespace: "default", Name: "a"}

// newWithSandbox returns a site with the sandbox a.
func newWithSandbox(t *testing.T) *Site {
	t.Helper()
	s := New(t)
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	return s
}

// A run that prints too much returns the beginning and the end of what it printed before.
func TestOutputOfARunThatPrintsTooMuch(t *testing.T) {
	s, l := newLive(t)
	for _, encoding := range []string{"utf-8", "base64"} {
		answered := make(chan struct{})
		go func() {
			l.events <- output("first")
			for {
				select {
				case l.events <- output(strings.Repeat("x", 1<<20)):
				case <-answered:
					return
				}
			}
		}()
		w := s.Post(Request("sandbox.command.run", fmt.Sprintf(`{"sandbox":"a","command":"x","encoding":%q}`, encoding)))
		close(answered)
		<-l.ended
		e := WantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
		if e.Data == nil || e.Data.PartialOutput == nil || e.Data.RetryAfter != 0 || !e.Data.Truncated || e.Data.TimedOut || w.Header().Get("Retry-After") != "" {
			t.Fatalf("%s: got %+v, data %+v", encoding, e.Message, e.Data)
		}
		size := 0
		for _, line := range e.Data.Output {
			size += len(line.Text) + len(line.Base64)
		}
		first := e.Data.Output[0].Text + string(e.Data.Output[0].Base64)
		if size > 2*rpc.PartialBytes || size < 2*rpc.PartialBytes-10 || !strings.HasPrefix(first, "first") {
			t.Errorf("%s: the error has %d bytes of output: %.20q", encoding, size, first)
		}
	}
}

// Also if all the output that is left is short, the error says that some is missing.
func TestOutputOfARunThatPrintsOneLongPiece(t *testing.T) {
	s, l := newLive(t)
	go func() {
		l.events <- output("first\n")
		l.events <- output(strings.Repeat("x", 17<<20))
	}()
	e := WantError(t, s.Post(runLive), http.StatusTooManyRequests, rpc.CodeExhausted)
	if e.Data == nil || e.Data.PartialOutput == nil || !e.Data.Truncated || len(e.Data.Output) != 1 || e.Data.Output[0].Text != "first" {
		t.Errorf("got data %+v", e.Data)
	}
}

func TestReadFileIsLimited(t *testing.T) {
	s := newWithSandbox(t)
	write := func(path string, data []byte) {
		t.Helper()
		if _, _, err := s.Sandboxes.WriteFile(t.Context(), sandboxA, sandbox.Path{Path: path}, sandbox.WriteOptions{}, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
	}
	write("/fits", bytes.Repeat([]byte("x"), rpc.MaxReadFile))
	write("/long", bytes.Repeat([]byte("x"), rpc.MaxReadFile+1))
	write("/escapes", bytes.Repeat([]byte{1}, rpc.MaxReadFile))
	for _, encoding := range []string{"utf-8", "base64"} {
		read := func(params string) string {
			return Request("sandbox.fs.read", fmt.Sprintf(`{"sandbox":"a","encoding":%q,%s}`, encoding, params))
		}
		WantOK(t, s.Post(read(`"path":"/fits"`)))
		WantOK(t, s.Post(read(`"path":"/long","offset":1`)))
		WantOK(t, s.Post(read(fmt.Sprintf(`"path":"/long","length":%d`, rpc.MaxReadFile))))
		e := WantError(t, s.Post(read(`"path":"/long"`)), http.StatusConflict, rpc.CodeConflict)
		if !strings.Contains(e.Message, "8 MiB") || !strings.Contains(e.Message, rpc.FilesPath) {
			t.Errorf("the error does not say what to do: %s", e.Message)
		}
	}
	e := WantError(t, s.Post(Request("sandbox.fs.read", `{"sandbox":"a","path":"/escapes"}`)), http.StatusTooManyRequests, rpc.CodeExhausted)
	if e.Data != nil || strings.Contains(e.Message, "the run") {
		t.Errorf("a response that does not fit: %+v", e)
	}
	large := Request("sandbox.fs.read", `{"sandbox":"a","path":"/escapes","encoding":"base64"}`)
	WantOK(t, s.Post(large))
	// What a call returns counts before it is encoded, so only the call that exceeds the limit of the key fails.
	w := s.Post("[" + large + "," + large + "," + large + "]")
	if results := strings.Count(w.Body.String(), `"result"`); w.Code != http.StatusOK || results != 2 {
		t.Errorf("three large files in a batch: status %d, %d results, want 2", w.Code, results)
	}
}

func TestListFilesIsLimited(t *testing.T) {
	s := newWithSandbox(t)
	for i := range rpc.MaxListFiles + 1 {
		if _, _, err := s.Sandboxes.WriteFile(t.Context(), sandboxA, sandbox.Path{Path: fmt.Sprintf("/d/%d", i)}, sandbox.WriteOptions{}, strings.NewReader("")); err != nil {
			t.Fatal(err)
		}
	}
	e := WantError(t, s.Post(Request("sandbox.fs.list", `{"sandbox":"a","path":"/d"}`)), http.StatusConflict, rpc.CodeConflict)
	if !strings.Contains(e.Message, "10000 entries; list a smaller directory") {
		t.Error(e.Message)
	}
	WantOK(t, s.Post(Request("sandbox.fs.remove", `{"sandbox":"a","path":"/d/7"}`)))
	w := s.Post(Request("sandbox.fs.list", `{"sandbox":"a","path":"/d"}`))
	if WantOK(t, w); strings.Count(w.Body.String(), `"path"`) != rpc.MaxListFiles {
		t.Errorf("got %d entries", strings.Count(w.Body.String(), `"path"`))
	}
}

// The options of a run and of a process reach the domain, which checks them.
func TestRunOptions(t *testing.T) {
	const options = `"sandbox":"a","cwd":"~/x","envs":["A=1"],"user":"u:g","stdin":"aGk=","encoding":"base64","timeout":1.5,"grace":2.5}`
	want := fmt.Sprint(sandbox.RunOptions{Env: []string{"A=1"}, Cwd: "~/x", User: "u:g", Input: []byte("hi"), Grace: 2500 * time.Millisecond})
	s := newWithSandbox(t)
	for _, body := range []string{
		Request("sandbox.repl.run", `{"language":"python","code":"1",`+options), Request("sandbox.command.run", `{"command":"true",`+options),
		Request("sandbox.process.start", `{"command":"true",`+options),
	} {
		s.Sandboxes.Options, s.Sandboxes.Timeout = sandbox.RunOptions{}, 0
		WantOK(t, s.Post(body))
		if got := fmt.Sprint(s.Sandboxes.Options); got != want || s.Sandboxes.Timeout != 1500*time.Millisecond {
			t.Errorf("%s: options %s, timeout %s, want %s", body, got, s.Sandboxes.Timeout, want)
		}
	}

	for method, want := range map[string]sandbox.AttachOptions{
		"sandbox.process.wait": {NoOutput: true}, "sandbox.process.logs": {Replay: true, NoFollow: true}, // neither makes the process wait
	} {
		WantOK(t, s.Post(Request(method, `{"sandbox":"a","pid":101}`)))
		if s.Sandboxes.Attach != want {
			t.Errorf("%s attaches with %+v, want %+v", method, s.Sandboxes.Attach, want)
		}
	}
	for i, all := range []bool{true, false} {
		s.Sandboxes.All = !all
		WantOK(t, s.Post(Request("sandbox.process.start", `{"sandbox":"a","command":"sleep"}`)))
		WantOK(t, s.Post(Request("sandbox.process.signal", fmt.Sprintf(`{"sandbox":"a","pid":%d,"signal":"9","all":%t}`, 102+i, all))))
		if s.Sandboxes.All != all {
			t.Errorf("a signal with all %t was sent with all %t", all, s.Sandboxes.All)
		}
	}

	m := sandbox.NewManager(sandbox.Options{
		Store: sandboxtest.NewMemoryStore(), Runtime: sandboxtest.NewRuntime(), Connect: sandboxtest.NewGuest().Connect,
		Defaults: sandbox.Config{Template: sandbox.Template{Image: "default", CPUs: 1, MemoryMiB: 512}}, Quota: func(string) sandbox.Quota { return sandbox.Quota{} },
		CheckSpace: func(uint64) error { return nil }, MakeRoom: func() bool { return false }, Boots: 8,
		HostMemory: func() (available, total uint64, err error) { return 1 << 40, 1 << 40, nil },
		MaxCPUs:    4, MaxMemoryMiB: 4096, StartTimeout: time.Minute, MaxRunTime: time.Minute, Log: slog.New(slog.DiscardHandler),
	})
	if _, err := m.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	s = New(t, func(o *Setup) { o.Sandboxes = m })
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	WantOK(t, s.Post(Request("sandbox.command.run", `{"sandbox":"a","command":"true","grace":60}`)))
	for param, names := range map[string]string{`"grace":60.5`: "grace", `"grace":1e300`: "grace", `"envs":["x"]`: "environment entry"} {
		for _, method := range []string{"sandbox.command.run", "sandbox.process.start"} {
			e := WantError(t, s.Post(Request(method, `{"sandbox":"a","command":"true",`+param+`}`)), http.StatusBadRequest, rpc.CodeInvalidParams)
			if !strings.Contains(e.Message, names) {
				t.Errorf("%s with %s: the message does not name %s: %s", method, param, names, e.Message)
			}
		}
	}
}

// A start that the server has no room for says what is missing, and with Retry-After when trying again can help. Only somebody who
// stops a sandbox of the namespace can help against its quota, so that has none.
func TestRefusedStarts(t *testing.T) {
	free := uint64(1 << 40)
	m := sandbox.NewManager(sandbox.Options{
		Store: sandboxtest.NewMemoryStore(), Runtime: sandboxtest.NewRuntime(), Connect: sandboxtest.NewGuest().Connect, Disks: true,
		Defaults: sandbox.Config{Template: sandbox.Template{Image: "default", CPUs: 1, MemoryMiB: 512, DiskMiB: 1024}}, MaxDiskMiB: 4096,
		Quota:      func(string) sandbox.Quota { return sandbox.Quota{DiskMiB: 3000} },
		CheckSpace: func(uint64) error { return nil }, MakeRoom: func() bool { return false }, Boots: 8,
		HostMemory: func() (available, total uint64, err error) { return free, 20 << 30, nil },
		MaxCPUs:    4, MaxMemoryMiB: 4096, StartTimeout: time.Minute, MaxRunTime: time.Minute, Log: slog.New(slog.DiscardHandler),
	})
	if _, err := m.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	s := New(t, func(o *Setup) { o.Sandboxes = m })
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a","config":{"disk":2500}}`)))
	check := func(config, message, retryAfter string) {
		t.Helper()
		w := s.Post(Request("sandbox.start", `{"sandbox":"b","config":`+config+`}`))
		e := WantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
		if !strings.HasPrefix(e.Message, message) || w.Header().Get("Retry-After") != retryAfter || (e.Data != nil) != (retryAfter != "") {
			t.Errorf("start with %s: Retry-After %q, error %+v, data %+v; want %q and %q", config, w.Header().Get("Retry-After"), e, e.Data, retryAfter, message)
		}
	}
	check(`{"disk":501}`, "namespace default is limited to 3000 MiB of disk; this start would need 3001. Stop one of its sandboxes first", "")
	free = 1<<30 + 300<<20 // the reserve is 1 GiB
	check(`{"disk":500}`, "the server has 300 MiB of free memory for sandboxes, and this sandbox needs 512 MiB; stop sandboxes, or try again later", "5")
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a","config":{"disk":2500}}`)))
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"b","config":{"disk":500,"memory":300}}`)))
}

// The environment of a process is not shown, and its texts are short and printable, whatever the sandbox says.
func TestProcessesAreBounded(t *testing.T) {
	s := newWithSandbox(t)
	args := make([]string, 100_000)
	args[0] = strings.Repeat("\x1b", 5000)
	if _, err := s.Sandboxes.StartProcess(t.Context(), sandboxA, sandbox.ProcessRequest{
		Command: sandbox.Command{Program: "true", Args: args, RunOptions: sandbox.RunOptions{Cwd: "/\xff"}}, Tag: "t",
	}); err != nil {
		t.Fatal(err)
	}
	w := s.Post(Request("sandbox.process.list", `{"sandbox":"a"}`))
	WantOK(t, w)
	var res struct{ Result rpc.ProcessListResult }
	if err := json.Unmarshal(w.Body.Bytes(), &res, json.MatchCaseInsensitiveNames(true)); err != nil {
		t.Fatal(err)
	}
	if p := res.Result.Processes[0]; p.Cwd != "/\uFFFD" || p.Command != "true" || !strings.HasPrefix(p.Args[0], `\x1b\x1b`) {
		t.Errorf("cwd %q, command %q, first argument %.20q", p.Cwd, p.Command, p.Args[0])
	}
	if w.Body.Len() > 100_000 || strings.Contains(w.Body.String(), "secret") || strings.Contains(w.Body.String(), "\x1b") {
		t.Errorf("a response of %d bytes: %.300s", w.Body.Len(), w.Body)
	}

	// The descriptions count as what the server holds for the key.
	args = []string{strings.Repeat("x", 12<<10)}
	for range 3000 {
		if _, err := s.Sandboxes.StartProcess(t.Context(), sandboxA, sandbox.ProcessRequest{Command: sandbox.Command{Program: "true", Args: args}}); err != nil {
			t.Fatal(err)
		}
	}
	WantError(t, s.Post(Request("sandbox.process.list", `{"sandbox":"a"}`)), http.StatusTooManyRequests, rpc.CodeExhausted)
	WantOK(t, s.Post(Request("sandbox.process.get", `{"sandbox":"a","tag":"t"}`)))
}

var runLiveCode = Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"x","results":true}`)

// What code shows is held in memory, so it is limited, however many pieces it has. In a stream of events, only one value is held.
func TestResultsAreLimited(t *testing.T) {
	piece := sandbox.Piece{Data: []byte(strings.Repeat("x", 1<<20))}
	begin, end := sandbox.Piece{Data: []byte(`{"data":{"text/plain":"`), First: true}, sandbox.Piece{Data: []byte(`"},"is_main":false}`), Last: true}
	formats := []sandbox.Event{sandbox.Piece{Data: []byte(`{"data":{"0":0` + strings.Repeat(`,"":0`, 65) + `}}`), First: true, Last: true}}
	for i := range 65 {
		formats[0] = sandbox.Piece{Data: bytes.Replace(formats[0].(sandbox.Piece).Data, []byte(`""`), fmt.Appendf(nil, `"a%d"`, i), 1), First: true, Last: true}
	}
	for name, tt := range map[string]struct {
		events []sandbox.Event // repeated 100 times
		stream bool
		fails  bool
	}{
		"one value without an end":            {events: slices.Concat([]sandbox.Event{begin}, slices.Repeat([]sandbox.Event{piece}, 100)), fails: true},
		"many values":                         {events: []sandbox.Event{begin, piece, end}, fails: true},
		"many empty pieces":                   {events: slices.Concat([]sandbox.Event{begin}, slices.Repeat([]sandbox.Event{sandbox.Piece{}}, 1_000_000)), fails: true},
		"many formats":                        {events: formats, fails: true},
		"one value without an end, as events": {events: slices.Concat([]sandbox.Event{begin}, slices.Repeat([]sandbox.Event{piece}, 100)), stream: true, fails: true},
		"many values, as events":              {events: []sandbox.Event{begin, piece, end}, stream: true},
	} {
		s, l := newLive(t)
		answered := make(chan struct{})
		go func() {
			for range 100 {
				for _, event := range tt.events {
					select {
					case l.events <- event:
					case <-answered:
						return
					}
				}
			}
			select {
			case l.events <- sandbox.Exit{}:
			case <-answered:
			}
		}()
		var changes []func(*http.Request)
		if tt.stream {
			changes = append(changes, asEvents)
		}
		w := s.Post(runLiveCode, changes...)
		close(answered)
		<-l.ended
		if tt.stream {
			all := eventsOf(t, w)
			last := all[len(all)-1]
			if failed := last.name == rpc.EventError; failed != tt.fails || failed && !strings.Contains(last.data, fmt.Sprint(rpc.CodeExhausted)) {
				t.Errorf("%s: the last of %d events is %s %.200s", name, len(all), last.name, last.data)
			}
			if !tt.fails && (len(all) != 101 || all[0].name != rpc.EventDisplay || len(all[0].data) < 1<<20) {
				t.Errorf("%s: got %d events, the first is %s", name, len(all), all[0].name)
			}
			continue
		}
		if name == "many formats" {
			WantError(t, w, http.StatusBadGateway, rpc.CodeRunFailed)
			continue
		}
		WantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
	}
}

// Events of values, and of an exception. The formats of a value are sorted, also in the result of a call without events.
func TestEventsOfResults(t *testing.T) {
	const sorted = `{"data":{"a/1":"","a/2":"","b/1":"","b/2":"","c/1":"","c/2":"","text/plain":"1"},"is_main":true}`
	for _, stream := range []bool{true, false} {
		s, l := newLive(t)
		go func() {
			for _, event := range []sandbox.Event{
				output("a"), sandbox.Piece{Data: []byte(`{"data":{"cut off`), First: true},
				sandbox.Piece{Data: []byte(`{"data":{"c/2":"","text/plain":"1","b/2":"","a/2":"","b/1":"",`), First: true},
				sandbox.Piece{Data: []byte(`"c/1":"","a/1":""},"is_main":true}`), Last: true},
				sandbox.Piece{Error: true, Data: []byte(`{"name":"E","value":"v","traceback":"t"}`), First: true, Last: true}, sandbox.Exit{Code: 1, Runs: 7},
			} {
				l.events <- event
			}
		}()
		if stream {
			want := []event{
				{rpc.EventOutput, `{"stream":"stdout","text":"a"}`},
				{rpc.EventDisplay, sorted},
				{rpc.EventException, `{"name":"E","value":"v","traceback":"t"}`},
				{rpc.EventResult, `{"status":"error","language":"python","output":[],"exit_code":1,"count":7}`},
			}
			if got := eventsOf(t, s.Post(runLiveCode, asEvents)); !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		} else if got := s.Post(runLiveCode).Body.String(); !strings.Contains(got, `"results":[`+sorted+`]`) {
			t.Errorf("got %s, want the value %s", got, sorted)
		}
		<-l.ended
	}
}
