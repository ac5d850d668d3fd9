package http

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

const mountPath = "/mounted"

func (s *site) mount(serve http.HandlerFunc) { s.Mount(mountPath, serve) }

// A mounted handler has the door before it: the key, its bounds, and the body.
func TestMountedIsBehindTheDoor(t *testing.T) {
	s := newSite(t, func(o *Options) { o.RequestsPerSecond = 100 })
	reached := 0
	s.mount(func(w http.ResponseWriter, r *http.Request) {
		reached++
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "public")
		w.Write(body)
	})
	here := at(http.MethodPost, mountPath)
	for _, c := range []struct {
		name, body string
		change     func(*http.Request)
		status     int
		code       rpc.Code
	}{
		{"no key", "{}", withKey(""), 401, rpc.CodeUnauthenticated},
		{"bad key", "{}", withKey("msb_x"), 401, rpc.CodeUnauthenticated},
		{"GET", "", at(http.MethodGet, mountPath), 405, rpc.CodeInvalidRequest},
		{"DELETE", "", at(http.MethodDelete, mountPath), 405, rpc.CodeInvalidRequest},
		{"text", "{}", withHeader("Content-Type", "text/plain"), 415, rpc.CodeInvalidRequest},
		{"not JSON", "{", here, 400, rpc.CodeParse},
		{"no closing", "[1", here, 400, rpc.CodeParse},
		{"two values", "{}{}", here, 400, rpc.CodeParse},
		{"more after it", "[]]", here, 400, rpc.CodeParse},
		{"a name twice", `{"a":1,"a":2}`, here, 400, rpc.CodeParse},
		{"invalid UTF-8", "\"\xff\"", here, 400, rpc.CodeParse},
		{"deep", strings.Repeat("[", 65) + strings.Repeat("]", 65), here, 400, rpc.CodeParse},
		{"empty batch", "[]", here, 400, rpc.CodeInvalidRequest},
		{"long batch", "[" + strings.Repeat("1,", rpc.MaxBatch) + "1]", here, 400, rpc.CodeInvalidRequest},
		{"too long", `"` + strings.Repeat("x", rpc.MaxBody) + `"`, here, 413, rpc.CodeInvalidRequest},
	} {
		wantError(t, s.post(c.body, here, c.change), c.status, c.code)
		if reached != 0 {
			t.Fatalf("%s reached the handler", c.name)
		}
	}
	w := s.post(`{"a":1}`, here)
	if w.Code != http.StatusOK || w.Body.String() != `{"a":1}` || w.Header().Get("Cache-Control") != "no-store" || w.Header().Get("X-Request-Id") == "" {
		t.Errorf("%d %v %s", w.Code, w.Header(), w.Body)
	}
}

// Call is for the caller of the request at hand, and for nobody without one.
func TestCall(t *testing.T) {
	s := newSite(t)
	var caller string
	var result jsontext.Value
	var failed *rpc.Error
	call := func(method, params string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			caller = s.Caller(r.Context())
			// As a library does that has goroutines of its own.
			result, failed = s.Call(context.WithoutCancel(r.Context()), method, jsontext.Value(params))
		}
	}
	here := at(http.MethodPost, mountPath)
	key, id := s.issueNamed(t, keys.IssueRequest{Namespaces: []string{"own"}, Scopes: []keys.Scope{keys.ScopeStart}})
	for _, c := range []struct {
		method, params string
		code           rpc.Code
	}{
		{rpc.MethodSandboxStart, `{"sandbox":"a"}`, 0},
		{rpc.MethodSandboxStart, `{"sandbox":"a","namespace":"other"}`, rpc.CodePermissionDenied},
		{rpc.MethodSandboxStart, `["a"]`, rpc.CodeInvalidParams},
		{rpc.MethodSandboxStart, `7`, rpc.CodeInvalidParams},
		{rpc.MethodSandboxStart, ``, rpc.CodeInvalidParams},
		{rpc.MethodSandboxStop, `{"sandbox":"a","namespace":"own"}`, rpc.CodePermissionDenied},
		{"sandbox.none", `{}`, rpc.CodeMethodNotFound},
	} {
		s.mount(call(c.method, c.params))
		s.post("{}", here, withKey(key))
		if caller != id || (failed == nil) != (c.code == 0) || failed != nil && failed.Code != c.code || (result == nil) != (c.code != 0) {
			t.Errorf("%s %s of %s: %s, %v, want code %d", c.method, c.params, caller, result, failed, c.code)
		}
	}
	if len(s.boxes.boxes) != 1 {
		t.Error(s.boxes.boxes)
	}
	if _, failed := s.Call(t.Context(), rpc.MethodSandboxStart, jsontext.Value(`{"sandbox":"b"}`)); failed != errNoKey || s.Caller(t.Context()) != "" {
		t.Errorf("without a request: %v", failed)
	}
}

// However far a library has taken a call from its request: it ends when the client leaves.
func TestCallEndsWithItsClient(t *testing.T) {
	s := newSite(t)
	began := make(chan struct{})
	s.boxes.onRun = func(ctx context.Context) error {
		close(began)
		<-ctx.Done()
		return context.Cause(ctx)
	}
	var failed *rpc.Error
	s.mount(func(w http.ResponseWriter, r *http.Request) {
		_, failed = s.Call(context.WithoutCancel(r.Context()), rpc.MethodSandboxReplRun, jsontext.Value(`{"sandbox":"a","language":"python","code":""}`))
	})
	ctx, cancel := context.WithCancel(t.Context())
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		s.post("{}", at(http.MethodPost, mountPath), func(r *http.Request) { *r = *r.WithContext(ctx) })
	}()
	<-began
	cancel()
	<-answered
	if failed == nil {
		t.Error("the run went on")
	}
}

// A request has one turn at a time, so that a batch in a handler's hands is no way around the bounds of a key.
func TestCallsTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		running, goOn := make(chan struct{}, 10), make(chan struct{})
		s.boxes.onRun = func(context.Context) error {
			running <- struct{}{}
			<-goOn
			return nil
		}
		s.mount(func(w http.ResponseWriter, r *http.Request) {
			var calls sync.WaitGroup
			for range 5 {
				calls.Go(func() {
					s.Call(r.Context(), rpc.MethodSandboxReplRun, jsontext.Value(`{"sandbox":"a","language":"python","code":""}`))
				})
			}
			calls.Wait()
		})
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			s.post("[1,2,3,4,5]", at(http.MethodPost, mountPath))
		}()
		for range 5 {
			synctest.Wait()
			if len(running) != 1 {
				t.Fatalf("%d run at once", len(running))
			}
			<-running
			goOn <- struct{}{}
		}
		<-answered
	})
}

// What a handler says is whole or not at all, unless it flushes.
func TestMountedAnswers(t *testing.T) {
	s := newSite(t)
	here := at(http.MethodPost, mountPath)
	for name, c := range map[string]struct {
		serve  http.HandlerFunc
		status int
		code   rpc.Code // 0: the body is "whole"
	}{
		"whole":      {func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "wh"); io.WriteString(w, "ole") }, 200, 0},
		"panic":      {func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "half"); panic("a fault") }, 500, rpc.CodeInternal},
		"plain text": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "not so", 400) }, 400, rpc.CodeInvalidRequest},
		"flushed": {func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "wh")
			if err := http.NewResponseController(w).Flush(); err != nil {
				t.Error(err)
			}
			w.WriteHeader(http.StatusTeapot)
			io.WriteString(w, "ole")
		}, 200, 0},
		"panic after a flush": {func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "whole")
			http.NewResponseController(w).Flush()
			panic("a fault")
		}, 200, 0},
	} {
		s.mount(c.serve)
		s.log.Reset()
		w := s.post("{}", here)
		if c.code != 0 {
			wantError(t, w, c.status, c.code)
		} else if w.Code != c.status || w.Body.String() != "whole" || w.Header().Get("X-Request-Id") == "" {
			t.Errorf("%s: %d %v %s", name, w.Code, w.Header(), w.Body)
		}
		if strings.HasPrefix(name, "panic") && !strings.Contains(s.log.String(), "a fault") {
			t.Errorf("%s is not in the log: %s", name, s.log)
		}
	}
}

// Of what a handler came to when the key had ended, nothing is told.
func TestMountedEndsWithTheKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		key, id := s.issueNamed(t, keys.IssueRequest{})
		began := make(chan struct{})
		s.boxes.onRun = func(ctx context.Context) error {
			close(began)
			<-ctx.Done()
			return nil // in spite of it
		}
		var result jsontext.Value
		var failed *rpc.Error
		s.mount(func(w http.ResponseWriter, r *http.Request) {
			result, failed = s.Call(context.WithoutCancel(r.Context()), rpc.MethodSandboxReplRun, jsontext.Value(`{"sandbox":"a","language":"python","code":""}`))
			io.WriteString(w, "something")
		})
		answered := make(chan *httptest.ResponseRecorder)
		go func() { answered <- s.post("{}", at(http.MethodPost, mountPath), withKey(key)) }()
		<-began
		if _, err := s.keys.Revoke(t.Context(), id, 0); err != nil {
			t.Fatal(err)
		}
		wantError(t, <-answered, http.StatusUnauthorized, rpc.CodeUnauthenticated)
		if result != nil || failed != errNoKey {
			t.Errorf("%s %v", result, failed)
		}
	})
}

// The schemas are those of rpc.discover.
func TestSchemas(t *testing.T) {
	s := newSite(t)
	params, result := s.Schemas(rpc.MethodSandboxStop)
	if want := `{"type":"object","properties":{"namespace":{"type":["string","null"],"pattern":"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"},"sandbox":{"type":"string","pattern":"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"}},"required":["sandbox"],"additionalProperties":false}`; string(params) != want {
		t.Errorf("params are %s, want %s", params, want)
	}
	if string(result) != `{"type":"string"}` {
		t.Errorf("the result is %s", result)
	}
	if params, _ := s.Schemas("sandbox.none"); params != nil {
		t.Errorf("%s", params)
	}
}
