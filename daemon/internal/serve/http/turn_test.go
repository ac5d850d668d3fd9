package http_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// largeBody is the body of a request that is so large that it takes turns.
var largeBody = `"` + strings.Repeat("x", 200<<10) + `"`

// serveLarge returns an option that adds an endpoint for large bodies and responses at testPath.
func serveLarge(serve func(c *gateway.Call, w http.ResponseWriter, r *http.Request) error) func(*Setup) {
	return withEndpoint(serve, func(e *gateway.Endpoint) { e.Body = gateway.JSON(1 << 20) })
}

// Of the large requests of a key, one works at a time, if that is the limit. Small requests and those of other keys need not
// wait, and a request that waits for something else lets the next one work. A request that panics gives back its turn.
func TestLargeRequestsTakeTurns(t *testing.T) {
	working, release := make(chan string), make(chan func(*gateway.Call))
	s := New(t, serveLarge(func(c *gateway.Call, _ http.ResponseWriter, r *http.Request) error {
		if name := r.Header.Get("X-Name"); name != "" {
			working <- name
			(<-release)(c)
		}
		return nil
	}))
	s.SetTurns(1)
	other := s.Issue(t, keys.IssueRequest{})
	done := make(chan *httptest.ResponseRecorder)
	for range 3 {
		go func() {
			done <- s.Post(largeBody, toTestPath, func(r *http.Request) { r.Header.Set("X-Name", "large") })
		}()
	}
	<-working // one of them
	for name, w := range map[string]*httptest.ResponseRecorder{
		"small request":            s.Post(`"small"`, toTestPath),
		"large one of another key": s.Post(largeBody, toTestPath, func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+other) }),
	} {
		if w.Code != http.StatusOK {
			t.Errorf("%s: status %d", name, w.Code)
		}
	}
	select {
	case <-working:
		t.Fatal("two large requests of a key work at the same time")
	default:
	}
	waited, end := make(chan struct{}), make(chan struct{})
	release <- func(c *gateway.Call) {
		c.Wait(func() { close(waited); <-end })
	}
	<-waited
	<-working // the second one, while the first one waits
	release <- func(*gateway.Call) { panic("a fault of the endpoint") }
	<-working // the third one
	release <- func(*gateway.Call) {}
	close(end)
	statuses := map[int]int{}
	for range 3 {
		statuses[(<-done).Code]++
	}
	if statuses[http.StatusOK] != 2 || statuses[http.StatusInternalServerError] != 1 {
		t.Errorf("the statuses are %v, want twice 200, and 500 for the panic", statuses)
	}
	if n := s.KeysWithTurns(); n != 0 {
		t.Errorf("after all requests, %d keys have turns", n)
	}
}

// A client that does not send its body or does not read its response does not keep the other requests of its key from
// working.
func TestSlowClientsHaveNoTurn(t *testing.T) {
	s := New(t, serveLarge(func(_ *gateway.Call, w http.ResponseWriter, r *http.Request) error {
		if r.Header.Get("X-Long") == "" {
			return nil
		}
		_, err := w.Write(make([]byte, 25<<20)) // more than the kernel accepts before the client reads
		return err
	}))
	s.SetTurns(1)
	addr, stop := s.Listen(t)
	defer stop()
	head := func(header string, length int) string {
		return fmt.Sprintf("POST /test/one HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n",
			s.Key, header, length)
	}
	send := func(text string) net.Conn {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	status := func(r *bufio.Reader) {
		t.Helper()
		if line, err := r.ReadString('\n'); err != nil || line != "HTTP/1.1 200 OK\r\n" {
			t.Errorf("the response begins with %q, error %v; want status 200", line, err)
		}
	}
	unsent := send(head("", len(largeBody)) + largeBody[:len(largeBody)/2])
	unread := bufio.NewReader(send(head("X-Long: 1\r\n", 2) + `""`))
	status(unread) // the response has begun
	status(bufio.NewReader(send(head("", len(largeBody)) + largeBody)))
	if _, err := io.WriteString(unsent, largeBody[len(largeBody)/2:]); err != nil {
		t.Fatal(err)
	}
	status(bufio.NewReader(unsent))
	for read, line := 0, ""; line != "\r\n"; read++ {
		var err error
		if line, err = unread.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := io.CopyN(io.Discard, unread, 25<<20); err != nil {
		t.Errorf("the client that reads late got %d bytes: %v", n, err)
	}
}
