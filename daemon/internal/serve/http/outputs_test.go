package http

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

func printing(n int) string {
	return request("sandbox.repl.run", fmt.Sprintf(`{"sandbox":"a","language":"python","code":"print %d"}`, n))
}

// What all runs of a request print, and all requests of a key, is bounded: no batch grows without end.
func TestOutputsAreBounded(t *testing.T) {
	s := newSite(t)
	s.outputs = newOutputs(3000, 2000)
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"a"}`)))
	w := s.post("[" + strings.Repeat(printing(900)+",", 9) + printing(900) + "]")
	wantOK(t, w)
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
	wantOK(t, s.post(printing(2000)))
	w = s.post(printing(2001))
	wantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
	if w.Header().Get("Retry-After") != "" || strings.Contains(w.Body.String(), "retry_after") {
		t.Errorf("to run it again is asked for: %v %s", w.Header(), w.Body)
	}
	// Over a quota, nothing was begun.
	w = s.post(request("sandbox.repl.run", `{"sandbox":"quota","language":"python","code":""}`))
	wantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
	if w.Header().Get("Retry-After") != "1" || !strings.Contains(w.Body.String(), `"data":{"retry_after":1}`) {
		t.Errorf("%v %s", w.Header(), w.Body)
	}
	if s.outputs.total != 0 || len(s.outputs.byKey) != 0 {
		t.Errorf("%d bytes are held for nobody: %v", s.outputs.total, s.outputs.byKey)
	}
}

// Keys have bounds of their own, and one together.
func TestOutputsOfSeveralKeys(t *testing.T) {
	s := newSite(t)
	s.outputs = newOutputs(3000, 2000)
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"a"}`)))
	other := s.issue(t, keys.IssueRequest{})
	held, release := make(chan struct{}), make(chan struct{})
	s.boxes.onRun = func(ctx context.Context) error {
		if s.boxes.onRun = nil; keeper(ctx)(1500) != nil {
			return errors.New("there was no room")
		}
		close(held)
		<-release
		return nil
	}
	first := make(chan int)
	go func() { first <- s.post(printing(1)).Code }()
	<-held
	wantError(t, s.post(printing(501)), http.StatusTooManyRequests, rpc.CodeExhausted)
	wantOK(t, s.post(printing(1500), withKey(other)))
	wantError(t, s.post(printing(1501), withKey(other)), http.StatusTooManyRequests, rpc.CodeExhausted)
	close(release)
	if code := <-first; code != http.StatusOK {
		t.Error(code)
	}
	wantOK(t, s.post(printing(2000), withKey(other)))
}

// A handler that goes on without its request holds nothing any more.
func TestNothingIsKeptForAnAnsweredRequest(t *testing.T) {
	o := newOutputs(3000, 2000)
	x := &exchange{}
	if err := o.keep(x, 7); err != nil {
		t.Fatal(err)
	}
	o.release(x)
	if err := o.keep(x, 7); !errors.Is(err, sandbox.ErrOutputLimit) || o.total != 0 {
		t.Errorf("%v, %d bytes held", err, o.total)
	}
}
