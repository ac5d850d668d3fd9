package e2e

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/coder/websocket"
)

// event is a server-sent event.
type event struct{ Name, Data string }

// events is the response of a call as an event stream.
type events struct {
	body  io.ReadCloser
	lines *bufio.Scanner
}

// stream makes a call whose response is an event stream.
func (s *server) stream(t testing.TB, key, method string, p params) *events {
	t.Helper()
	body, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": 1, "method": method, "params": p})
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+s.address+"/api/v1/rpc", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "text/event-stream")
	req.Header.Set("Authorization", "Bearer "+key)
	res, err := httpClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	if res.StatusCode != 200 || res.Header.Get("Content-Type") != "text/event-stream" {
		text, _ := io.ReadAll(res.Body)
		t.Fatalf("%s: HTTP %d, %v: %s", method, res.StatusCode, res.Header, text)
	}
	lines := bufio.NewScanner(res.Body)
	lines.Buffer(nil, 1<<20)
	return &events{res.Body, lines}
}

// next returns the next event. ok is false if there is none.
func (e *events) next() (ev event, ok bool) {
	for e.lines.Scan() {
		switch name, value, _ := strings.Cut(e.lines.Text(), ": "); {
		case name == "event":
			ev.Name = value
		case name == "data":
			ev.Data += value
		case e.lines.Text() == "" && ev != (event{}):
			return ev, true
		}
	}
	return event{}, false
}

// want reads the next event and checks its name and that its data contains text.
func (e *events) want(t testing.TB, name, text string) {
	t.Helper()
	if ev, ok := e.next(); !ok || ev.Name != name || !strings.Contains(ev.Data, text) {
		t.Fatalf("got event %+v, %t, error %v; want %s with %q", ev, ok, e.lines.Err(), name, text)
	}
}

// file sends a request for a file of the sandbox "box" and returns the response.
func (s *server) file(t testing.TB, key, method, path string, body io.Reader, header ...string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method,
		"http://"+s.address+"/api/v1/sandboxes/box/files?path="+url.QueryEscape(path), body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+key)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := httpClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	return res
}

func readAll(t testing.TB, r io.Reader) string {
	t.Helper()
	text, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// socket opens a WebSocket of the sandbox "box".
func (s *server) socket(t testing.TB, key, path string) *websocket.Conn {
	t.Helper()
	c, res, err := websocket.Dial(t.Context(), "ws://"+s.address+"/api/v1/sandboxes/box"+path,
		&websocket.DialOptions{Subprotocols: []string{"msb", "msb.key." + key}})
	if err != nil {
		text := ""
		if res != nil && res.Body != nil {
			text = readAll(t, res.Body)
		}
		t.Fatalf("%s: %v %s", path, err, text)
	}
	t.Cleanup(func() { c.CloseNow() })
	return c
}

// message is a frame of a WebSocket.
type message struct {
	text bool
	data string
}

func receive(t testing.TB, c *websocket.Conn) (message, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), hung)
	defer cancel()
	kind, data, err := c.Read(ctx)
	return message{kind == websocket.MessageText, string(data)}, err
}

// receiveUntil receives frames until a text frame, or the data of all binary frames, contains want. It returns that data.
func receiveUntil(t testing.TB, c *websocket.Conn, want string) string {
	t.Helper()
	data := ""
	for {
		m, err := receive(t, c)
		if err != nil {
			t.Fatalf("%v; received %q, want %q", err, data, want)
		}
		if !m.text {
			data += m.data[1:]
		}
		if strings.Contains(data, want) || m.text && strings.Contains(m.data, want) {
			return data
		}
	}
}

func send(t testing.TB, c *websocket.Conn, text string) {
	t.Helper()
	if err := c.Write(t.Context(), websocket.MessageText, []byte(text)); err != nil {
		t.Fatal(err)
	}
}

func sendInput(t testing.TB, c *websocket.Conn, data string) {
	t.Helper()
	if err := c.Write(t.Context(), websocket.MessageBinary, append([]byte{0}, data...)); err != nil {
		t.Fatal(err)
	}
}

// TestRunOptions tests what a request may choose for one run.
func TestRunOptions(t *testing.T) {
	s, key := sharedSandbox(t)
	run := func(p params) runResult {
		t.Helper()
		var r runResult
		p["sandbox"] = "box"
		s.mustCall(t, key, "sandbox.command.run", p, &r)
		return r
	}
	got := run(params{
		"command": "sh", "args": []string{"-c", "pwd; id -un; echo $A $HOME; cat"}, "cwd": "/var", "user": "nobody", "envs": []string{"A=b"}, "stdin": "from the client",
	}).text("stdout")
	if want := "/var\nnobody\nb /nonexistent\nfrom the client\n"; got != want {
		t.Errorf("command with options: got %q, want %q", got, want)
	}
	// The portal's own timer slack would delay a program.
	if got := run(params{"command": "cat", "args": []string{"/proc/self/timerslack_ns"}}).text("stdout"); got != "50000\n" {
		t.Errorf("a program has a timer slack of %q ns, want the kernel's 50000", got)
	}
	var r struct {
		Output []struct{ Stream, Base64 string }
	}
	s.mustCall(t, key, "sandbox.command.run", params{"sandbox": "box", "command": "printf", "args": []string{`\377\000a`}, "encoding": "base64"}, &r)
	if len(r.Output) != 1 || r.Output[0].Base64 != "/wBh" {
		t.Errorf("bytes: got %+v, want the base64 of ff 00 61", r)
	}
	var code runResult
	s.mustCall(t, key, "sandbox.repl.run", params{
		"sandbox": "box", "language": "python", "code": "import os\nprint(os.getcwd(), os.environ['A'], input(), os.getuid())",
		"cwd": "/var", "user": "65534", "envs": []string{"A=b"}, "stdin": "line\n",
	}, &code)
	if got := code.text("stdout"); got != "/var b line 65534\n" {
		t.Errorf("code with options: got %+v", code)
	}

	// What was printed before a limit is in the error. The limit ends everything that the command started.
	a, err := s.call(key, "sandbox.command.run", params{
		"sandbox": "box", "command": "sh", "args": []string{"-c", "setsid sleep 8765 & echo before; trap '' TERM; sleep 8765; true"}, "timeout": 1, "grace": 0.1,
	})
	var data struct {
		Output    []struct{ Text string }
		TimedOut  bool `json:"timed_out"`
		Truncated bool
	}
	if err != nil || a.Error == nil || a.Status != 504 || json.Unmarshal(a.Error.Data, &data) != nil ||
		!data.TimedOut || data.Truncated || len(data.Output) != 1 || data.Output[0].Text != "before" {
		t.Errorf("time limit: %v, %+v, error %v; want what was printed", a, data, err)
	}
	until(t, "the end of the processes", func() bool { return !s.runsIn(t, key, "sleep 8765") })
	s.wantError(t, key, "sandbox.command.run", params{"sandbox": "box", "command": "true", "user": "nobody-knows"}, 400, -32602, "nobody-knows")
	s.wantError(t, key, "sandbox.command.run", params{"sandbox": "box", "command": "true", "cwd": "/no/such"}, 400, -32602, "/no/such")
}

// runsIn reports whether a process with the command line runs in the sandbox "box".
func (s *server) runsIn(t testing.TB, key, commandLine string) bool {
	t.Helper()
	got := s.command(t, key, "box", "sh", "-c", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '").text("stdout")
	return strings.Contains(got, commandLine+" ")
}

// TestEventStream tests that output arrives before the run ends.
func TestEventStream(t *testing.T) {
	s, key := sharedSandbox(t)
	for _, c := range []struct {
		method string
		params params
		pipe   string // the run prints what is written to it, and then ends
		result string
	}{
		{"sandbox.command.run", params{
			"sandbox": "box", "command": "sh", "args": []string{"-c", "mkfifo /tmp/stream-command; echo first; read x </tmp/stream-command; echo $x >&2; exit 3"},
		}, "/tmp/stream-command", `"exit_code":3`},
		{"sandbox.repl.run", params{
			"sandbox": "box", "language": "python",
			"code": "import os, sys\nos.mkfifo('/tmp/stream-code')\nprint('first')\nprint(open('/tmp/stream-code').read(), file=sys.stderr)\n1/0",
		}, "/tmp/stream-code", `"status":"error"`},
	} {
		e := s.stream(t, key, c.method, c.params)
		e.want(t, "output", `"first\n"`)
		s.command(t, key, "box", "sh", "-c", "echo second >"+c.pipe)
		e.want(t, "output", "second")
		var last event
		for ev, ok := e.next(); ok; ev, ok = e.next() {
			last = ev
		}
		if last.Name != "result" || !strings.Contains(last.Data, c.result) {
			t.Errorf("%s: the last event is %+v, want a result with %s", c.method, last, c.result)
		}
	}
	e := s.stream(t, key, "sandbox.command.run", params{"sandbox": "box", "command": "no-such-program"})
	e.want(t, "error", "-32008")
}

// TestProcesses tests processes that outlive their client.
func TestProcesses(t *testing.T) {
	s, key := sharedSandbox(t)
	type process struct {
		PID     int
		Running bool
		Exit    *struct {
			ExitCode int `json:"exit_code"`
			Signal   string
			TimedOut bool `json:"timed_out"`
			Reason   string
		}
	}
	start := func(p params) process {
		t.Helper()
		var r process
		p["sandbox"] = "box"
		s.mustCall(t, key, "sandbox.process.start", p, &r)
		return r
	}
	wait := func(p process) process {
		t.Helper()
		var r process
		s.mustCall(t, key, "sandbox.process.wait", params{"sandbox": "box", "pid": p.PID}, &r)
		if r.Running || r.Exit == nil {
			t.Fatalf("process %d: %+v, want it ended", p.PID, r)
		}
		return r
	}

	cat := start(params{"command": "cat", "tag": "echo", "open_stdin": true})
	attached := s.stream(t, key, "sandbox.process.connect", params{"sandbox": "box", "tag": "echo"})
	s.mustCall(t, key, "sandbox.process.input", params{"sandbox": "box", "tag": "echo", "data": "one\n"}, nil)
	attached.want(t, "output", `"one\n"`)
	again := s.stream(t, key, "sandbox.process.connect", params{"sandbox": "box", "pid": cat.PID, "replay": true})
	again.want(t, "output", `"one\n"`)
	s.mustCall(t, key, "sandbox.process.input", params{"sandbox": "box", "pid": cat.PID, "data": "two\n", "close": true}, nil)
	for _, e := range []*events{attached, again} {
		e.want(t, "output", `"two\n"`)
		e.want(t, "result", `"exit_code":0`)
	}
	if r := wait(cat); r.Exit.ExitCode != 0 {
		t.Errorf("cat: %+v", r.Exit)
	}
	var logs runResult
	s.mustCall(t, key, "sandbox.process.logs", params{"sandbox": "box", "tag": "echo"}, &logs)
	if got := logs.text("stdout"); got != "one\ntwo\n" {
		t.Errorf("logs: %q", got)
	}

	// The kernel names the program that used too much memory.
	hog := wait(start(params{"command": "python3", "args": []string{"-c", "x = []\nwhile True: x.append(bytearray(1 << 20))"}}))
	if hog.Exit.Signal != "KILL" || !strings.Contains(hog.Exit.Reason, "out of memory") {
		t.Errorf("memory hog: %+v, want the reason", hog.Exit)
	}
	// So it does if the memory does not quite run out, but the program only reads the same pages again and again.
	thrash := wait(start(params{"command": "python3", "args": []string{"-c", `
import mmap, os, random
with open("/root/pages", "wb") as f:
    f.write(bytes(64 << 20))
    f.flush()
    os.fsync(f.fileno())
pages = mmap.mmap(os.open("/root/pages", os.O_RDONLY), 64 << 20, prot=mmap.PROT_READ)
os.unlink("/root/pages")
memory = [bytearray(b"1") * (1 << 20) for i in range(470)]
while True:
    pages[random.randrange(64 << 20)]`}}))
	if thrash.Exit.Signal != "KILL" || !strings.Contains(thrash.Exit.Reason, "out of memory") {
		t.Errorf("thrashing program: %+v, want the reason", thrash.Exit)
	}
	// A time limit ends everything that the process started, also what left its session.
	late := wait(start(params{"command": "sh", "args": []string{"-c", "setsid sh -c 'trap \"\" TERM; while :; do sleep 7654; done' & sleep 7654"}, "timeout": 0.5, "grace": 0.1}))
	if !late.Exit.TimedOut || late.Exit.Signal != "TERM" {
		t.Errorf("process with a time limit: %+v", late.Exit)
	}
	until(t, "the end of the children", func() bool { return !s.runsIn(t, key, "sleep 7654") })

	family := start(params{"command": "sh", "args": []string{"-c", "setsid sleep 6543 & wait"}, "tag": "family"})
	s.mustCall(t, key, "sandbox.process.signal", params{"sandbox": "box", "tag": "family", "signal": "KILL", "all": true}, nil)
	if r := wait(family); r.Exit.Signal != "KILL" || r.Exit.ExitCode != 137 {
		t.Errorf("killed process: %+v", r.Exit)
	}
	until(t, "the end of the child", func() bool { return !s.runsIn(t, key, "sleep 6543") })
	s.wantError(t, key, "sandbox.process.signal", params{"sandbox": "box", "pid": family.PID, "signal": "TERM"}, 409, -32005, "ended")
	s.wantError(t, key, "sandbox.process.get", params{"sandbox": "box", "tag": "no-such-tag"}, 404, -32003, "no-such-tag")

	// A revoked key ends its streams and runs. The processes that it started go on.
	revoked := s.newKey(t, "--name", "streams")
	var server process
	s.mustCall(t, revoked, "sandbox.process.start", params{"sandbox": "box", "command": "sleep", "args": []string{"5432"}, "tag": "server"}, &server)
	watching := s.stream(t, revoked, "sandbox.process.connect", params{"sandbox": "box", "pid": server.PID})
	running := s.stream(t, revoked, "sandbox.command.run", params{"sandbox": "box", "command": "sh", "args": []string{"-c", "echo begun; sleep 5431"}})
	running.want(t, "output", "begun")
	shell := s.socket(t, revoked, "/exec")
	send(t, shell, `{"command": "cat"}`)
	receiveUntil(t, shell, "started")
	s.mustMSB(t, "server", "key", "revoke", "--yes", "streams")
	for _, e := range []*events{watching, running} {
		if ev, ok := e.next(); ok && ev.Name != "error" {
			t.Errorf("event after the key was revoked: %+v", ev)
		}
	}
	if m, err := receive(t, shell); err == nil {
		t.Errorf("frame after the key was revoked: %+v", m)
	}
	until(t, "the end of the run", func() bool { return !s.runsIn(t, key, "sleep 5431") })
	if !s.runsIn(t, key, "sleep 5432") {
		t.Error("the process of the revoked key does not run any more")
	}
	s.mustCall(t, key, "sandbox.process.signal", params{"sandbox": "box", "pid": server.PID, "signal": "TERM"}, nil)
}

// TestProcessesOutliveTheServer tests that a process goes on while the server is killed and started again, that clients can
// then attach to it and write to it, and that runs end with the server.
func TestProcessesOutliveTheServer(t *testing.T) {
	s, key := sharedSandbox(t)
	survivor := params{"sandbox": "box", "tag": "survivor"}
	with := func(more params) params {
		p := maps.Clone(survivor)
		maps.Copy(p, more)
		return p
	}
	s.mustCall(t, key, "sandbox.process.start", with(params{"command": "cat", "open_stdin": true}), nil)
	s.mustCall(t, key, "sandbox.process.input", with(params{"data": "before\n"}), nil)
	attached := s.stream(t, key, "sandbox.process.connect", with(params{"replay": true}))
	attached.want(t, "output", "before")
	run := s.stream(t, key, "sandbox.command.run", params{"sandbox": "box", "command": "sh", "args": []string{"-c", "echo begun; sleep 4321"}})
	run.want(t, "output", "begun")
	s.kill()
	for _, e := range []*events{attached, run} {
		if ev, ok := e.next(); ok {
			t.Errorf("event of a killed server: %+v", ev)
		}
	}
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	until(t, "the end of the run", func() bool { return !s.runsIn(t, key, "sleep 4321") })
	s.mustCall(t, key, "sandbox.process.input", with(params{"data": "after\n"}), nil)
	s.mustCall(t, key, "sandbox.process.input", with(params{"close": true}), nil)
	s.mustCall(t, key, "sandbox.process.wait", survivor, nil)
	var logs runResult
	s.mustCall(t, key, "sandbox.process.logs", survivor, &logs)
	if got := logs.text("stdout"); got != "before\nafter\n" {
		t.Errorf("logs after a restart: %q", got)
	}
}

// TestExecSocket tests a terminal over a WebSocket, and connections to ports.
func TestExecSocket(t *testing.T) {
	s, key := sharedSandbox(t)
	c := s.socket(t, key, "/exec")
	send(t, c, `{"command": "sh", "terminal": {"cols": 80, "rows": 24}, "envs": ["PS1=ready> "], "tag": "shell"}`)
	receiveUntil(t, c, "started")
	sendInput(t, c, "tty; stty size\n")
	if got := receiveUntil(t, c, "24 80"); !strings.Contains(got, "/dev/pts/") {
		t.Errorf("the terminal shows %q, want its name", got)
	}
	send(t, c, `{"resize": [100, 30]}`)
	sendInput(t, c, "sleep 1000\n")
	until(t, "sleep in the terminal", func() bool { return s.runsIn(t, key, "sleep 1000") })
	sendInput(t, c, "\x03")
	sendInput(t, c, "stty size; exit 7\n")
	if got := receiveUntil(t, c, `"exit":7`); !strings.Contains(got, "30 100") {
		t.Errorf("the terminal shows %q, want its new size", got)
	}
	var closed websocket.CloseError
	if _, err := receive(t, c); !errors.As(err, &closed) || closed.Code != websocket.StatusNormalClosure {
		t.Errorf("after the exit: error %v, want a normal close", err)
	}

	s.mustCall(t, key, "sandbox.process.start", params{
		"sandbox": "box", "tag": "web", "command": "python3", "args": []string{"-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", "/etc", "8099"},
	}, nil)
	log := s.stream(t, key, "sandbox.process.connect", params{"sandbox": "box", "tag": "web", "replay": true})
	log.want(t, "output", "Serving HTTP")
	port := s.socket(t, key, "/ports/8099")
	if err := port.Write(t.Context(), websocket.MessageBinary, []byte("GET /hostname HTTP/1.0\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	var response strings.Builder
	for {
		m, err := receive(t, port)
		if err != nil {
			if websocket.CloseStatus(err) != websocket.StatusNormalClosure {
				t.Error(err)
			}
			break
		}
		response.WriteString(m.data)
	}
	if got := response.String(); !strings.Contains(got, "200 OK") || !strings.HasSuffix(got, "\r\n\r\nsandbox\n") {
		t.Errorf("response of the port: %q", got)
	}
	s.mustCall(t, key, "sandbox.process.signal", params{"sandbox": "box", "tag": "web", "signal": "KILL"}, nil)
	if _, res, err := websocket.Dial(t.Context(), "ws://"+s.address+"/api/v1/sandboxes/box/ports/8098",
		&websocket.DialOptions{HTTPHeader: http.Header{"Authorization": {"Bearer " + key}}}); err == nil || res == nil || res.StatusCode != 404 {
		t.Errorf("closed port: %v, error %v, want HTTP 404", res, err)
	}
}

// abandonDownload ends a download of a large file early. This also ends the process in the sandbox that transfers the bytes.
func abandonDownload(t *testing.T, s *server, key, path string) {
	t.Helper()
	// Besides its connection for calls, msbd has one for each transfer. With Kata's own driver, each transfer has a process. With
	// the brackets, grep does not find its own command line.
	find := `grep '0F02000A:11F8 0202000A:[0-9A-F]* 01' /proc/net/tcp | tail -n +2 | grep .`
	if hypervisorSettings["hypervisor"] == "kata" {
		find = `grep -la '[t]ransfer' /proc/[0-9]*/cmdline`
	}
	transfers := func(script string) string {
		return s.command(t, key, "box", "sh", "-c", fmt.Sprintf(script, find)).text("stdout")
	}
	res := s.file(t, key, "GET", path, nil)
	if _, err := io.CopyN(io.Discard, res.Body, 1<<20); err != nil {
		t.Fatal(err)
	}
	if transfers("%s") == "" {
		t.Error("nothing transfers the bytes of a large file")
	}
	res.Body.Close()
	transfers("while %s; do sleep 0.05; done")
}

// TestFiles transfers files and trees.
func TestFiles(t *testing.T) {
	s, key := sharedSandbox(t)
	const size = 64 << 20
	random := func() io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{1}), size) }
	digest := sha256.New()
	io.Copy(digest, random())
	want := fmt.Sprintf("%x", digest.Sum(nil))

	st, err := s.status()
	if err != nil {
		t.Fatal(err)
	}
	before := memoryKiB(st.PID, "VmRSS")
	if res := s.file(t, key, "PUT", "/root/up/large", random()); res.StatusCode != 201 {
		t.Fatalf("upload: HTTP %d %s", res.StatusCode, readAll(t, res.Body))
	}
	if got := s.command(t, key, "box", "sha256sum", "/root/up/large").text("stdout"); !strings.HasPrefix(got, want) {
		t.Errorf("the sandbox has a file with the digest %s, want %s", got, want)
	}
	res := s.file(t, key, "GET", "/root/up/large", nil)
	digest.Reset()
	if n, err := io.Copy(digest, res.Body); err != nil || n != size || fmt.Sprintf("%x", digest.Sum(nil)) != want {
		t.Errorf("download: HTTP %d, %d bytes, digest %x, error %v; want the file that was uploaded", res.StatusCode, n, digest.Sum(nil), err)
	}
	if grown := memoryKiB(st.PID, "VmRSS") - before; grown > 24<<10 {
		t.Errorf("the server's memory grew by %d MiB during transfers of %d MiB", grown>>10, size>>20)
	} else {
		t.Logf("the server's memory grew by %d KiB", grown)
	}

	abandonDownload(t, s, key, "/root/up/large")
	if res := s.file(t, key, "GET", "/root/up/large", nil, "Range", "bytes=100-102"); res.StatusCode != 206 || len(readAll(t, res.Body)) != 3 {
		t.Errorf("range: HTTP %d", res.StatusCode)
	}
	if res := s.file(t, key, "HEAD", "/root/up/large", nil); res.StatusCode != 200 || res.ContentLength != size {
		t.Errorf("HEAD: HTTP %d, %d bytes", res.StatusCode, res.ContentLength)
	}
	if res := s.file(t, key, "DELETE", "/root/up/large", nil); res.StatusCode != 204 {
		t.Errorf("DELETE: HTTP %d", res.StatusCode)
	}
	if res := s.file(t, key, "GET", "/root/up/large", nil); res.StatusCode != 404 {
		t.Errorf("GET of a file that was deleted: HTTP %d", res.StatusCode)
	}

	// Trees, with links, modes and odd names, in both directions.
	s.command(t, key, "box", "sh", "-c", `mkdir -p /root/tree/a; cd /root/tree; printf '\377' >a/bytes; ln -s a/bytes link; touch "$(printf 'new\nline')"; chmod 750 a`)
	archive := readAll(t, s.file(t, key, "GET", "/root/tree", nil, "Accept", "application/x-tar").Body)
	names := map[string]byte{}
	for r := tar.NewReader(strings.NewReader(archive)); ; {
		h, err := r.Next()
		if err != nil {
			break
		}
		names[strings.TrimSuffix(h.Name, "/")] = h.Typeflag
	}
	if names["./a/bytes"] != tar.TypeReg || names["./link"] != tar.TypeSymlink || names["./new\nline"] != tar.TypeReg {
		t.Errorf("the tree has %q", names)
	}
	if res := s.file(t, key, "PUT", "/root/copy", strings.NewReader(archive), "Content-Type", "application/x-tar"); res.StatusCode != 200 {
		t.Errorf("upload of a tree: HTTP %d %s", res.StatusCode, readAll(t, res.Body))
	}
	if r := s.command(t, key, "box", "sh", "-c", "diff -r /root/tree /root/copy && stat -c %a /root/copy/a"); !r.Success || r.text("stdout") != "750\n" {
		t.Errorf("the copy of the tree differs: %+v", r)
	}

	// Methods for files, with the working directory and the user of the request.
	call := func(method string, p params) string {
		t.Helper()
		p["sandbox"] = "box"
		var result json.RawMessage
		s.mustCall(t, key, method, p, &result)
		return string(result)
	}
	watch := s.stream(t, key, "sandbox.fs.watch", params{"sandbox": "box", "path": "/root/copy", "recursive": true})
	watch.want(t, "started", "{}")
	call("sandbox.fs.write", params{"path": "/root/copy/new/file", "content": "text", "user": "nobody", "mode": "0640"})
	for {
		ev, ok := watch.next()
		if !ok {
			t.Fatal("the watch ended without the new file")
		}
		if strings.Contains(ev.Data, `"create"`) && strings.Contains(ev.Data, `"new/file"`) {
			break
		}
	}
	if got := s.command(t, key, "box", "stat", "-c", "%a %U %s", "/root/copy/new/file").text("stdout"); got != "640 nobody 4\n" {
		t.Errorf("the file that was written: %s", got)
	}
	if got := call("sandbox.fs.read", params{"path": "/root/copy/new/file"}); !strings.Contains(got, `"content":"text"`) {
		t.Errorf("read: %s", got)
	}
	call("sandbox.fs.move", params{"from": "/root/copy/new/file", "to": "/dev/shm/elsewhere/file"}) // another file system
	if got := call("sandbox.fs.list", params{"path": "/dev/shm", "depth": 2}); !strings.Contains(got, `"/dev/shm/elsewhere/file"`) {
		t.Errorf("list: %s", got)
	}
	call("sandbox.fs.mkdir", params{"path": "/root/made/here"})
	if got := call("sandbox.fs.stat", params{"path": "/root/made"}); !strings.Contains(got, `"directory"`) {
		t.Errorf("stat: %s", got)
	}
	call("sandbox.fs.remove", params{"path": "/root/made", "recursive": true})
	if got := call("sandbox.fs.exists", params{"path": "/root/made"}); !strings.Contains(got, "false") {
		t.Errorf("exists: %s", got)
	}
	s.wantError(t, key, "sandbox.fs.write", params{"sandbox": "box", "path": "/dev/shm/large/..", "content": "x"}, 409, -32005, "directory")

	// A full disk in the sandbox is an error of the upload, which leaves nothing.
	s.command(t, key, "box", "sh", "-c", "head -c 1G /dev/zero >/dev/shm/filler")
	if res := s.file(t, key, "PUT", "/dev/shm/upload", strings.NewReader(strings.Repeat("x", 1<<20))); res.StatusCode != 429 {
		t.Errorf("upload to a full disk: HTTP %d %s", res.StatusCode, readAll(t, res.Body))
	}
	s.wantError(t, key, "sandbox.fs.write", params{"sandbox": "box", "path": "/dev/shm/upload", "content": strings.Repeat("x", 8<<10)}, 429, -32006, "no space left in the sandbox")
	if got := s.command(t, key, "box", "ls", "-A", "/dev/shm").text("stdout"); got != "elsewhere\nfiller\n" {
		t.Errorf("after the uploads, the full disk has %q", got)
	}
	call("sandbox.fs.remove", params{"path": "/dev/shm/filler"})
}
