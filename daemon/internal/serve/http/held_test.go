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

func printing(n int) string {
	return Request("sandbox.repl.run", fmt.Sprintf(`{"sandbox":"a","language":"python","code":"print %d"}`, n))
}

// What all runs of a request print, and all requests of a key, is bounded: no batch grows without end.
func TestOutputsAreBounded(t *testing.T) {
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
			t.Errorf("%d: %+v", i, r.Error)
		}
	}
	// With the answer, room is free again; a run that is too long alone is not to be tried again.
	WantOK(t, s.Post(printing(2000)))
	w = s.Post(printing(2001))
	WantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
	if w.Header().Get("Retry-After") != "" || strings.Contains(w.Body.String(), "retry_after") {
		t.Errorf("to run it again is asked for: %v %s", w.Header(), w.Body)
	}
	// Over a quota, nothing was begun.
	w = s.Post(Request("sandbox.repl.run", `{"sandbox":"quota","language":"python","code":""}`))
	WantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
	if w.Header().Get("Retry-After") != "1" || !strings.Contains(w.Body.String(), `"data":{"retry_after":1}`) {
		t.Errorf("%v %s", w.Header(), w.Body)
	}
	if bytes, keys := s.Held(); bytes != 0 || keys != 0 {
		t.Errorf("%d bytes are held for nobody, of %d keys", bytes, keys)
	}
}

// Keys have bounds of their own, and one together.
func TestOutputsOfSeveralKeys(t *testing.T) {
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
		t.Error(code)
	}
	WantOK(t, s.Post(printing(2000), WithKey(other)))
}
