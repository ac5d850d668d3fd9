package stream_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/coder/websocket"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

func TestExec(t *testing.T) {
	s, d := newSite(t)
	c, _ := connect(t, s)
	t.Run("output, input and exit", func(t *testing.T) {
		c := *c
		c.t = t
		e := c.open("exec")
		e.text(`{"command":"cat"}`)
		e.want(`{"started":{"pid":100,"skipped_bytes":0}}`)
		e.input("first")
		e.want("1first")
		e.input("")
		e.input("second")
		e.want("1second")
		e.text(`{"close_stdin":true}`)
		e.want(`{"exit":0}`)
		e.wantClose(websocket.StatusNormalClosure)
	})
	t.Run("every member", func(t *testing.T) {
		c := *c
		c.t = t
		e := c.open("exec?namespace=team")
		e.text(`{"command":"echo","args":["a","b"],"cwd":"/tmp","envs":["A=1"],"user":"user","terminal":{"cols":80,"rows":24},"stdin":false,` +
			`"tag":"t","timeout":1.5,"grace":2,"with_connection":false}`)
		e.want(`{"started":{"pid":101,"skipped_bytes":0}}`, "1a b\n", `{"exit":0}`)
		e.wantClose(websocket.StatusNormalClosure)
		p, err := d.process(sandbox.ProcessID{Tag: "t"})
		if err != nil {
			t.Fatal(err)
		}
		if got, want := fmt.Sprintf("%+v %+v", p.req, *p.req.Terminal), "{Command:{Program:echo Args:[a b] Timeout:1.5s "+
			"RunOptions:{Env:[A=1] Cwd:/tmp User:user Input:[] Grace:2s} Environment:{Env:[] Workdir:}} Tag:t Terminal:0x"; !strings.HasPrefix(got, want) ||
			!strings.HasSuffix(got, " OpenInput:false WithCall:false} {Columns:80 Rows:24}") {
			t.Errorf("the sandbox got %s", got)
		}
	})
	t.Run("both streams and a signal", func(t *testing.T) {
		c := *c
		c.t = t
		e := c.open("exec")
		e.text(`{"command":"wait"}`)
		e.want(`{"started":{"pid":102,"skipped_bytes":0}}`, "1out", "2err")
		e.text(`{"signal":"SIGTERM"}`)
		e.want(`{"exit":143,"signal":"TERM"}`)
		e.wantClose(websocket.StatusNormalClosure)
	})
	t.Run("time limit, reason and signal to all", func(t *testing.T) {
		c := *c
		c.t = t
		e := c.open("exec")
		e.text(`{"command":"fail"}`)
		e.want(`{"started":{"pid":103,"skipped_bytes":0}}`, `{"exit":137,"signal":"KILL","timed_out":true,"reason":"out of memory \\x1b[1m"}`)
		e.wantClose(websocket.StatusNormalClosure)
		d.takeCalls()
		e = c.open("exec")
		e.text(`{"command":"cat"}`)
		e.next()
		e.text(`{"signal":"9","all":true}`)
		e.want(`{"exit":137,"signal":"KILL"}`)
		if calls := d.takeCalls(); len(calls) != 2 || calls[1] != "signal 9 true in default" {
			t.Errorf("got calls %q, want a signal to all", calls)
		}
	})
	t.Run("terminal", func(t *testing.T) {
		c := *c
		c.t = t
		e := c.open("exec")
		e.text(`{"command":"size","terminal":{"cols":80,"rows":24}}`)
		e.next()
		e.text(`{"signal":"WINCH"}`)
		e.want("180x24")
		e.text(`{"resize":[100,30]}`)
		e.text(`{"signal":"28"}`)
		e.want("1100x30")
		e.text(`{"signal":"INT"}`)
		e.want(`{"exit":3}`)
	})
	t.Run("attach", func(t *testing.T) {
		c := *c
		c.t = t
		first := c.open("exec")
		first.text(`{"command":"cat","tag":"build"}`)
		started := first.next()
		first.input("before")
		first.want("1before")
		first.Close(websocket.StatusNormalClosure, "") // the process stays
		late := c.open("exec?tag=build")
		late.want(strings.Replace(started, `"skipped_bytes":0`, `"skipped_bytes":6`, 1))
		replay := c.open("exec?tag=build&replay=true")
		replay.want(started, "1before")
		late.input("after")
		late.want("1after")
		replay.want("1after")
		replay.text(`{"close_stdin":true}`)
		for _, e := range []socket{late, replay} {
			e.want(`{"exit":0}`)
			e.wantClose(websocket.StatusNormalClosure)
		}
		p, err := d.process(sandbox.ProcessID{Tag: "build"})
		if err != nil {
			t.Fatal(err)
		}
		ended := c.open(fmt.Sprintf("exec?pid=%d&replay=true", p.pid))
		ended.want(started, "1before", "1after", `{"exit":0}`)
		ended.wantClose(websocket.StatusNormalClosure)
	})
	t.Run("with the connection", func(t *testing.T) {
		c := *c
		c.t = t
		e := c.open("exec")
		e.text(`{"command":"cat","tag":"mine","with_connection":true}`)
		e.next()
		e.CloseNow()
		p, err := d.process(sandbox.ProcessID{Tag: "mine"})
		if err != nil {
			t.Fatal(err)
		}
		<-p.done // ends with the connection
	})
}

// What the process does not accept is reported as a warning. The process and its events go on.
func TestExecWarnings(t *testing.T) {
	s, _ := newSite(t)
	c, _ := connect(t, s)
	e := c.open("exec")
	e.text(`{"command":"wait","stdin":false}`)
	e.next()
	e.want("1out", "2err")
	e.input("x")
	e.wantError("warning", -32005, "has no input")
	e.input(strings.Repeat("x", 1<<20-1)) // is discarded
	e.input(strings.Repeat("x", 1<<20-1))
	e.text(`{"close_stdin":true}`)
	e.text(`{"resize":[1,1]}`)
	e.wantError("warning", -32005, "has no terminal")
	e.text(`{"signal":"INT"}`)
	e.want(`{"exit":130,"signal":"INT"}`)
	e.wantClose(websocket.StatusNormalClosure)
}

// An error is a text frame and then a close frame.
func TestExecErrors(t *testing.T) {
	s, d := newSite(t)
	c, _ := connect(t, s)
	valid := `{"command":"cat"}`
	for name, test := range map[string]struct {
		path   string
		send   []string // a text message, or a binary one if it begins with "binary "
		code   int
		text   string
		status websocket.StatusCode
	}{
		"binary first":        {"exec", []string{"binary \x00x"}, -32600, "first frame must be", 1008},
		"not JSON":            {"exec", []string{"{"}, -32600, "text frame is not valid", 1008},
		"not UTF-8":           {"exec", []string{"{\"command\":\"\xff\"}"}, -32600, "text frame is not valid", 1008},
		"an array":            {"exec", []string{`[1]`}, -32600, "it must be an object", 1008},
		"unknown member":      {"exec", []string{`{"command":"cat","comand":1}`}, -32600, `no member \"comand\"`, 1008},
		"member twice":        {"exec", []string{`{"command":"cat","command":"cat"}`}, -32600, "duplicate", 1008},
		"wrong type":          {"exec", []string{`{"command":"cat","terminal":{"cols":"80"}}`}, -32600, `member \"terminal.cols\" has the wrong type`, 1008},
		"too many columns":    {"exec", []string{`{"command":"cat","terminal":{"cols":65536,"rows":1}}`}, -32600, `terminal.cols`, 1008},
		"no command":          {"exec", []string{`{}`}, -32602, "command is missing", 1008},
		"negative timeout":    {"exec", []string{`{"command":"cat","timeout":-1}`}, -32602, "timeout -1 is negative", 1008},
		"negative grace":      {"exec", []string{`{"command":"cat","grace":-1}`}, -32602, "grace -1 is negative", 1008},
		"no such program":     {"exec", []string{`{"command":"no"}`}, -32008, `\"no\" not found`, 1008},
		"no such process":     {"exec?pid=7", nil, -32003, "no such process", 1008},
		"channel 1":           {"exec", []string{valid, "binary \x01x"}, -32600, "begins with the byte 0", 1008},
		"empty binary":        {"exec", []string{valid, "binary "}, -32600, "begins with the byte 0", 1008},
		"two members":         {"exec", []string{valid, `{"resize":[1,1],"signal":"INT"}`}, -32600, "has one of the members", 1008},
		"no members":          {"exec", []string{valid, `{}`}, -32600, "has one of the members", 1008},
		"start again":         {"exec", []string{valid, valid}, -32600, `no member \"command\"`, 1008},
		"all without signal":  {"exec", []string{valid, `{"close_stdin":true,"all":true}`}, -32600, "only with signal", 1008},
		"close_stdin: false":  {"exec", []string{valid, `{"close_stdin":false}`}, -32600, "has one of the members", 1008},
		"size of 3 numbers":   {"exec", []string{valid, `{"resize":[1,2,3]}`}, -32600, "resize", 1008},
		"no rows":             {"exec", []string{valid, `{"resize":[1,0]}`}, -32602, "at least one column", 1008},
		"unknown signal":      {"exec", []string{valid, `{"signal":"STOPP"}`}, -32602, `signal \"STOPP\"`, 1008},
		"long control":        {"exec", []string{valid, `{"signal":"` + strings.Repeat("x", 4096) + `"}`}, -32600, "a text frame has at most 4096 bytes", 1009},
		"input after its end": {"exec", []string{valid, `{"close_stdin":true}`, "binary \x00x"}, -32600, "already been closed", 1008},
		"closed twice":        {"exec", []string{`{"command":"wait"}`, `{"close_stdin":true}`, `{"close_stdin":true}`}, -32600, "already been closed", 1008},
		"no exit":             {"exec", []string{`{"command":"scripted"}`}, -32010, "no exit", 1011},
		"two starts":          {"exec", []string{`{"command":"scripted"}`}, -32010, "invalid event", 1011},
		"no pid":              {"exec", []string{`{"command":"scripted"}`}, -32010, "invalid event", 1011},
	} {
		events := map[string][]sandbox.Event{
			"two starts": {sandbox.Started{PID: 1}, sandbox.Started{PID: 2}}, "no pid": {sandbox.Started{}},
		}[name]
		d.set(hooks{scripted: func(context.Context) (sandbox.Process, error) { return &script{events}, nil }})
		e := c.open(test.path)
		for _, message := range test.send {
			if data, binary := strings.CutPrefix(message, "binary "); binary {
				if err := e.Write(t.Context(), websocket.MessageBinary, []byte(data)); err != nil {
					t.Error(err)
				}
			} else {
				e.text(message)
			}
		}
		var got string
		for !strings.HasPrefix(got, `{"error"`) {
			if got = e.next(); strings.HasPrefix(got, `{"exit"`) { // the input has ended before the mistake
				break
			}
		}
		if name == "input after its end" && strings.HasPrefix(got, `{"exit"`) {
			continue
		}
		if !strings.HasPrefix(got, fmt.Sprintf(`{"error":{"code":%d,"message":`, test.code)) || !strings.Contains(got, test.text) {
			t.Errorf("%s: got %s, want error %d %s", name, got, test.code, test.text)
		}
		if _, _, err := e.Read(t.Context()); websocket.CloseStatus(err) != test.status {
			t.Errorf("%s: got %v, want a close frame with status %d", name, err, test.status)
		}
	}
	// Before the handshake, errors are HTTP errors.
	for path, want := range map[string]string{
		"exec?pid=0":           `pid \"0\"`,
		"exec?pid=x":           `pid \"x\"`,
		"exec?pid=1&tag=t":     "either pid or tag",
		"exec?tag=":            "tag is empty",
		"exec?replay=true":     "replay needs",
		"exec?tag=t&replay=1":  "replay must be",
		"exec?command=cat":     `\"command\" is not a parameter`,
		"exec?namespace=a%20b": "namespace",
		"ports/0":              `port \"0\"`,
		"ports/65536":          `port \"65536\"`,
		"ports/x":              `port \"x\"`,
		"ports/80?x=1":         `\"x\" is not a parameter`,
	} {
		_, res, err := websocket.Dial(t.Context(), "ws://"+c.addr+"/api/v1/sandboxes/box/"+path, &websocket.DialOptions{HTTPHeader: http.Header{"Authorization": {c.key}}})
		if err == nil || res == nil || res.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: got %v, error %v; want a 400", path, res, err)
			continue
		}
		if text, _ := io.ReadAll(res.Body); !strings.Contains(string(text), want) {
			t.Errorf("%s: got %s, want %s", path, text, want)
		}
	}
	if log := s.Log.String(); strings.Contains(log, "STOPP") || strings.Contains(log, "comand") {
		t.Error("the log contains text of the requests:", log)
	}
}

// script is a process with these events.
type script struct{ events []sandbox.Event }

func (s *script) Next() (sandbox.Event, error) {
	if len(s.events) == 0 {
		return nil, io.EOF
	}
	event := s.events[0]
	s.events = s.events[1:]
	return event, nil
}

func (*script) Close() error { return nil }

// A panic in the domain fails only its connection. The error has the request id and the log has the cause.
func TestExecPanic(t *testing.T) {
	s, d := newSite(t)
	c, stop := connect(t, s)
	d.set(hooks{scripted: func(context.Context) (sandbox.Process, error) { panic("a fault of the domain") }})
	e := c.open("exec")
	e.text(`{"command":"scripted"}`)
	e.wantError("error", -32603, "internal error; the server's log has the cause under request id")
	e.wantClose(websocket.StatusInternalError)
	stop()
	if log := s.Log.String(); !strings.Contains(log, "a fault of the domain") || !strings.Contains(log, "level=ERROR") {
		t.Error("the log lacks the cause:", log)
	}
}

// The order of the input is kept. A process that does not read it keeps the client from sending more, but up to 1 MiB it
// still gets signals.
func TestInput(t *testing.T) {
	s, _ := newSite(t)
	c, _ := connect(t, s)
	e := c.open("exec")
	e.text(`{"command":"cat"}`)
	e.next()
	var want bytes.Buffer
	go func() {
		for i := range 20_000 {
			e.input(fmt.Sprintln(i))
		}
		e.input(strings.Repeat("long", 200_000))
		e.text(`{"close_stdin":true}`)
	}()
	for i := range 20_000 {
		fmt.Fprintln(&want, i)
	}
	want.WriteString(strings.Repeat("long", 200_000))
	var got bytes.Buffer
	for {
		message := e.next()
		if message == `{"exit":0}` {
			break
		}
		got.WriteString(message[1:])
	}
	if !bytes.Equal(got.Bytes(), want.Bytes()) {
		t.Errorf("got %d bytes, want the %d bytes of the input in order", got.Len(), want.Len())
	}

	e = c.open("exec")
	e.text(`{"command":"wait"}`)
	e.next()
	e.want("1out", "2err")
	for range 16 {
		e.input(strings.Repeat("x", 60<<10))
	}
	e.text(`{"signal":"INT"}`) // behind 960 KiB that the process does not read
	e.want(`{"exit":130,"signal":"INT"}`)

	e = c.open("exec")
	e.text(`{"command":"wait"}`)
	e.next()
	e.want("1out", "2err")
	var sent atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for e.Write(ctx, websocket.MessageBinary, make([]byte, 1<<20-1)) == nil {
			sent.Add(1)
		}
	}()
	other := c.open(fmt.Sprintf("exec?pid=%d", 102))
	other.next()
	other.text(`{"signal":"TERM"}`) // another connection is not affected
	other.want(`{"exit":143,"signal":"TERM"}`)
	e.want(`{"exit":143,"signal":"TERM"}`)
	cancel()
	<-ended
	if n := sent.Load(); n > 64 { // 1 MiB, and what the kernel holds
		t.Errorf("the server has accepted %d MiB that the process did not read", n)
	}
}
