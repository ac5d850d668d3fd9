package http_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// printing returns a call that runs code which prints n bytes.
func printing(n int) string {
	return Request("sandbox.repl.run", fmt.Sprintf(`{"sandbox":"a","language":"python","code":"print %d"}`, n))
}

// The output of all runs of a request, and of all requests of a key, is limited together, so that a batch cannot grow
// without limit.
func TestRunOutputIsLimited(t *testing.T) {
	s := New(t)
	s.SetHeld(3000, 2000, 64<<10)
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	w := s.Post("[" + strings.Repeat(printing(900)+",", 9) + printing(900) + "]")
	WantOK(t, w)
	var all []rpc.Response
	if err := json.Unmarshal(w.Body.Bytes(), &all); err != nil || len(all) != 10 {
		t.Fatal(err, w.Body)
	}
	for i, r := range all {
		if (r.Error == nil) != (i < 2) || r.Error != nil && r.Error.Code != rpc.CodeExhausted {
			t.Errorf("call %d of the batch: error is %+v, want the first two to succeed and the others to be over the limit", i, r.Error)
		}
	}
	// When the response has been sent, its bytes are free again. A run that exceeds the limit by itself must not be
	// retried, so the error has no Retry-After.
	WantOK(t, s.Post(printing(2000)))
	w = s.Post(printing(2001))
	WantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
	if w.Header().Get("Retry-After") != "" || strings.Contains(w.Body.String(), "retry_after") {
		t.Errorf("the error asks for a retry: %v %s", w.Header(), w.Body)
	}
	// An error about a quota asks for a retry, because nothing was run.
	w = s.Post(Request("sandbox.repl.run", `{"sandbox":"quota","language":"python","code":""}`))
	WantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
	if w.Header().Get("Retry-After") != "1" || !strings.Contains(w.Body.String(), `"data":{"retry_after":1}`) {
		t.Errorf("the error does not ask for a retry after 1 s: %v %s", w.Header(), w.Body)
	}
	if bytes, keys := s.Held(); bytes != 0 || keys != 0 {
		t.Errorf("after all requests, %d keys hold %d bytes", keys, bytes)
	}
}

// There is a limit for each key and one for all keys together.
func TestRunOutputLimitsOfSeveralKeys(t *testing.T) {
	held, release := make(chan struct{}), make(chan struct{})
	s := New(t, withEndpoint(func(c *gateway.Call, _ http.ResponseWriter, _ *http.Request) error {
		err := c.Hold(1500)
		close(held)
		<-release
		return err
	}))
	s.SetHeld(3000, 2000, 64<<10)
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	other := s.Issue(t, keys.IssueRequest{})
	first := make(chan int)
	go func() { first <- s.Post("{}", toTestPath).Code }()
	<-held
	WantError(t, s.Post(printing(501)), http.StatusTooManyRequests, rpc.CodeExhausted)
	WantOK(t, s.Post(printing(1500), WithKey(other)))
	WantError(t, s.Post(printing(1501), WithKey(other)), http.StatusTooManyRequests, rpc.CodeExhausted)
	close(release)
	if code := <-first; code != http.StatusOK {
		t.Errorf("the first request has status %d, want 200", code)
	}
	WantOK(t, s.Post(printing(2000), WithKey(other)))
}

// Long bodies of requests in progress count like responses. A request that must wait for others may be repeated.
func TestBodiesAreLimited(t *testing.T) {
	serving, finish := make(chan struct{}), make(chan struct{})
	s := New(t, withEndpoint(func(*gateway.Call, http.ResponseWriter, *http.Request) error {
		serving <- struct{}{}
		<-finish
		return nil
	}))
	s.SetHeld(3000, 2000, 100)
	body := `"` + strings.Repeat("x", 598) + `"` // counts 2 * 500
	unknownLength := func(r *http.Request) { r.ContentLength = -1 }
	responses := make(chan int)
	for range 2 {
		go func() { responses <- s.Post(body, toTestPath).Code }()
		<-serving
	}
	if bytes, _ := s.Held(); bytes != 2000 {
		t.Errorf("two requests hold %d bytes, want 2000", bytes)
	}
	for _, change := range []func(*http.Request){func(*http.Request) {}, unknownLength} {
		w := s.Post(body, toTestPath, change)
		WantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
		if w.Header().Get("Retry-After") == "" {
			t.Error("the error does not ask for a retry")
		}
	}
	go func() { responses <- s.Post("{}", toTestPath).Code }() // short bodies do not count
	<-serving
	other := s.Issue(t, keys.IssueRequest{})
	WantError(t, s.Post(`"`+strings.Repeat("x", 698)+`"`, toTestPath, WithKey(other)), http.StatusTooManyRequests, rpc.CodeExhausted) // all keys together
	close(finish)
	for range 3 {
		if code := <-responses; code != http.StatusOK {
			t.Errorf("status %d, want 200", code)
		}
	}
	if bytes, keys := s.Held(); bytes != 0 || keys != 0 {
		t.Errorf("after all requests, %d keys hold %d bytes", keys, bytes)
	}
}
