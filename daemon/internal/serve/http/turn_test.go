package http_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// largeBody is the body of a request that is so large that it takes turns.
var largeBody = `"` + strings.Repeat("x", 200<<10) + `"`

// turnSite is a server on which a key has one turn at a time. The endpoint at testPath does what the header X-Do says.
type turnSite struct {
	*greedySite
	// working gets a value when a request to testPath has its turn and works. It works until it gets a function to call.
	working chan struct{}
	proceed chan func(c *gateway.Call, w http.ResponseWriter, r *http.Request)
	results chan result
}

// result is the response to a request that was sent in the background.
type result struct {
	name     string
	response *httptest.ResponseRecorder
}

func newTurnSite(t *testing.T) *turnSite {
	s := &turnSite{
		working: make(chan struct{}), results: make(chan result),
		proceed: make(chan func(*gateway.Call, http.ResponseWriter, *http.Request)),
	}
	serve := func(c *gateway.Call, w http.ResponseWriter, r *http.Request) error {
		switch r.Header.Get("X-Do") {
		case "nothing":
			return nil
		case "hold output":
			if err := c.Hold(200 << 10); err != nil {
				return err
			}
		case "write a response":
			if _, err := w.Write(make([]byte, 200<<10)); err != nil {
				return err
			}
		}
		s.working <- struct{}{}
		(<-s.proceed)(c, w, r)
		return nil
	}
	s.greedySite = newGreedySite(t, withEndpoint(serve, func(e *gateway.Endpoint) { e.Body = gateway.JSON(1 << 20) }), withEndpoint(
		func(c *gateway.Call, w http.ResponseWriter, r *http.Request) error {
			c.TakeTurns()
			s.working <- struct{}{}
			(<-s.proceed)(c, w, r)
			return nil
		}, func(e *gateway.Endpoint) { e.Pattern, e.Body = "POST /test/stream", gateway.Stream(1<<20) },
	))
	s.SetTurns(1)
	return s
}

// send sends a request in the background.
func (s *turnSite) send(name, body string, edits ...func(*http.Request)) {
	go func() { s.results <- result{name, s.Post(body, edits...)} }()
}

// end does not do anything, so that the request ends.
func end(*gateway.Call, http.ResponseWriter, *http.Request) {}

func do(what string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set("X-Do", what) }
}

// waitForUsers returns when n requests have a turn or wait for one.
func (s *turnSite) waitForUsers(t *testing.T, n int) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); s.UsersOfTurns() != n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d requests have a turn or wait for one, want %d", s.UsersOfTurns(), n)
		}
	}
}

// Requests that may be much work wait for the turn of another one. Small ones and those of other keys do not.
func TestLargeRequestsTakeTurns(t *testing.T) {
	s := newTurnSite(t)
	other := s.Issue(t, keys.IssueRequest{})
	s.send("first", largeBody, toTestPath)
	<-s.working
	for name, w := range map[string]*httptest.ResponseRecorder{
		"small request":               s.Post(`"small"`, toTestPath, do("nothing")),
		"small call":                  s.Post(Request("sandbox.list", "{}")),
		"large one of another key":    s.Post(largeBody, toTestPath, do("nothing"), func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+other) }),
		"small one of unknown length": s.Post(`"small"`, toTestPath, do("nothing"), func(r *http.Request) { r.ContentLength = -1 }),
	} {
		if w.Code != http.StatusOK {
			t.Errorf("%s: status %d", name, w.Code)
		}
	}
	waiting := map[string]func(){
		"large body": func() { s.send("large body", largeBody, toTestPath, do("nothing")) },
		"output":     func() { s.send("output", `""`, toTestPath, do("hold output")) },
		"response":   func() { s.send("response", `""`, toTestPath, do("write a response")) },
		"batch":      func() { s.send("batch", "["+Request("sandbox.list", "{}")+"]") },
		"events": func() {
			s.send("events", Request("sandbox.list", "{}"), func(r *http.Request) { r.Header.Set("Accept", "text/event-stream") })
		},
		"large output": func() {
			s.send("large output", Request("sandbox.command.run", `{"sandbox":"a","command":"print","args":["x"]}`))
		},
		"MCP": func() {
			s.send("MCP", `{"jsonrpc":"2.0","id":1,"method":"tools/list"}`, At(http.MethodPost, rpc.MCPPath), func(r *http.Request) {
				r.Header.Set("Accept", "application/json, text/event-stream")
			})
		},
	}
	sent := 1
	for _, send := range waiting {
		send()
		sent++
		s.waitForUsers(t, sent)
	}
	s.proceed <- end
	for range sent {
		for received := false; !received; {
			select {
			case <-s.working:
				s.proceed <- end
			case r := <-s.results:
				if received = true; r.response.Code != http.StatusOK {
					t.Errorf("%s: got %d %.100s", r.name, r.response.Code, r.response.Body)
				}
			}
		}
	}
	s.waitForUsers(t, 0)
}

// A request that waits for something else than a processor has no turn, and one that panics gives its turn back.
func TestWaitingRequestsHaveNoTurn(t *testing.T) {
	for name, wait := range map[string]func(c *gateway.Call, stop <-chan struct{}){
		"Wait":                 func(c *gateway.Call, stop <-chan struct{}) { c.Wait(func() { <-stop }) },
		"panic":                func(*gateway.Call, <-chan struct{}) { panic("a fault of the endpoint") },
		"panic while it waits": func(c *gateway.Call, _ <-chan struct{}) { c.Wait(func() { panic("a fault of the endpoint") }) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newTurnSite(t)
			stop := make(chan struct{})
			s.send("waiting", largeBody, toTestPath)
			<-s.working
			s.proceed <- func(c *gateway.Call, _ http.ResponseWriter, _ *http.Request) { wait(c, stop) }
			s.send("another one", largeBody, toTestPath, do("nothing"))
			<-s.results // if the first request waits, this is the other one's
			close(stop)
			<-s.results
			s.waitForUsers(t, 0)
		})
	}
	t.Run("a run in a sandbox", func(t *testing.T) {
		s := newTurnSite(t)
		ctx, cancel := context.WithCancel(t.Context())
		s.send("run", Request("sandbox.command.run", `{"sandbox":"a","command":"wait","args":[`+largeBody+`]}`),
			func(r *http.Request) { *r = *r.WithContext(ctx) })
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			if bytes, _ := s.Held(); bytes > 0 && s.UsersOfTurns() == 0 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("the run does not wait without a turn")
			}
		}
		if w := s.Post(largeBody, toTestPath, do("nothing")); w.Code != http.StatusOK {
			t.Errorf("another request: status %d", w.Code)
		}
		cancel()
		<-s.results
	})
}

// A client that does not send its body, does not read its response, or uses a hijacked connection, does not keep the other
// requests of its key from working.
func TestSlowClientsHaveNoTurn(t *testing.T) {
	s := newTurnSite(t)
	connect := func(path, header string, length int) net.Conn {
		conn, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if _, err := fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n",
			path, s.Key, header, length); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	write := func(conn net.Conn, text string) {
		t.Helper()
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
	}
	status := func(r *bufio.Reader) {
		t.Helper()
		if line, err := r.ReadString('\n'); err != nil || line != "HTTP/1.1 200 OK\r\n" {
			t.Errorf("the response begins with %q, error %v; want status 200", line, err)
		}
	}
	unsent := connect("/test/one", "X-Do: nothing\r\n", len(largeBody))
	write(unsent, largeBody[:len(largeBody)/2])

	const long = 25 << 20 // more than the kernel accepts before the client reads
	conn := connect("/test/one", "X-Do: hold output\r\n", 2)
	write(conn, `""`)
	<-s.working
	s.proceed <- func(_ *gateway.Call, w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, long)) }
	unread := bufio.NewReader(conn)
	status(unread) // the response has begun

	streaming := connect("/test/stream", "", 1)
	<-s.working
	s.proceed <- func(_ *gateway.Call, _ http.ResponseWriter, r *http.Request) { io.ReadAll(r.Body) }

	hijacked := connect("/test/stream", "", 0)
	<-s.working
	s.proceed <- func(_ *gateway.Call, w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		io.ReadAll(conn)
	}

	last := connect("/test/one", "X-Do: nothing\r\n", len(largeBody))
	write(last, largeBody)
	status(bufio.NewReader(last))
	write(unsent, largeBody[len(largeBody)/2:])
	status(bufio.NewReader(unsent))
	write(streaming, "x")
	status(bufio.NewReader(streaming))
	hijacked.Close()
	for line := ""; line != "\r\n"; {
		var err error
		if line, err = unread.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := io.CopyN(io.Discard, unread, long); err != nil {
		t.Errorf("the client that reads late got %d bytes: %v", n, err)
	}
}
