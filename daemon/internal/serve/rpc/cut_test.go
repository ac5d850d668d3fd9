package rpc_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// invalidations are the ways in which a key can become invalid while one of its requests is in progress.
var invalidations = map[string]func(ctx context.Context, s *Site, id string) error{
	"revoked": func(ctx context.Context, s *Site, id string) error {
		_, err := s.Keys.Revoke(ctx, id, 0)
		return err
	},
	"reset": func(ctx context.Context, s *Site, id string) error {
		_, err := s.Keys.Reset(ctx, 0)
		return err
	},
	"rotated": func(ctx context.Context, s *Site, id string) error {
		_, _, _, err := s.Keys.Rotate(ctx, keys.RotateRequest{Ref: id})
		return err
	},
	"rotated with grace": func(ctx context.Context, s *Site, id string) error {
		_, _, _, err := s.Keys.Rotate(ctx, keys.RotateRequest{Ref: id, Grace: "10m"})
		return err
	},
	"expired": func(context.Context, *Site, string) error { return nil },
}

// A request in progress is canceled when its key becomes invalid. Its response is the same as for any invalid key,
// whatever the handler returns.
func TestRequestsEndWithTheirKey(t *testing.T) {
	handlers := map[string]func(ctx context.Context) error{
		"returns the cause":    func(ctx context.Context) error { <-ctx.Done(); return context.Cause(ctx) },
		"wraps Canceled":       func(ctx context.Context) error { <-ctx.Done(); return fmt.Errorf("run: %w", ctx.Err()) },
		"succeeds":             func(ctx context.Context) error { <-ctx.Done(); return nil },
		"fails for any reason": func(ctx context.Context) error { <-ctx.Done(); return fmt.Errorf("no: %w", errdefs.ErrNotFound) },
		"panics":               func(ctx context.Context) error { <-ctx.Done(); panic("a fault of the domain") },
	}
	run := Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"a secret"}`)
	start := Request("sandbox.start", `{"sandbox":"afterwards"}`)
	bodies := map[string]string{"alone": run, "first of a batch": "[" + run + "," + start + "]", "last of a batch": "[" + Request("sandbox.metrics.get", "{}") + "," + run + "]"}
	for invalidation, invalidate := range invalidations {
		for handler, onRun := range handlers {
			for place, body := range bodies {
				t.Run(strings.Join([]string{invalidation, handler, place}, ", "), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						s := New(t)
						key, id := s.IssueNamed(t, keys.IssueRequest{Expire: "1h"})
						running := make(chan struct{})
						s.Sandboxes.OnRun = func(ctx context.Context) error {
							close(running)
							return onRun(ctx)
						}
						WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
						bad := s.Post(run, WithKey("never"))
						responses := make(chan *httptest.ResponseRecorder)
						go func() { responses <- s.Post(body, WithKey(key)) }()
						<-running
						if err := invalidate(t.Context(), s, id); err != nil {
							t.Fatal(err)
						}
						w := <-responses
						WantError(t, w, http.StatusUnauthorized, rpc.CodeUnauthenticated)
						w.Header().Del("X-Request-Id")
						bad.Header().Del("X-Request-Id")
						if w.Body.String() != bad.Body.String() || fmt.Sprint(w.Header()) != fmt.Sprint(bad.Header()) {
							t.Errorf("response %v %s differs from the response to a bad key: %v %s", w.Header(), w.Body, bad.Header(), bad.Body)
						}
						if strings.Contains(w.Body.String(), "secret") {
							t.Error("the response contains the result of the run")
						}
						for name := range s.Sandboxes.Running {
							if name.Name == "afterwards" {
								t.Error("the rest of the batch was still run")
							}
						}
						if !strings.Contains(s.Log.String(), "status=401") {
							t.Error("the log has no entry with status=401:", s.Log)
						}
					})
				})
			}
		}
	}
}

// Revoking a key does not interrupt requests of other keys.
func TestRequestsOfOtherKeysContinue(t *testing.T) {
	s := New(t)
	_, id := s.IssueNamed(t, keys.IssueRequest{})
	running, finish := make(chan struct{}), make(chan struct{})
	s.Sandboxes.OnRun = func(ctx context.Context) error {
		close(running)
		select {
		case <-finish:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	responses := make(chan *httptest.ResponseRecorder)
	go func() {
		responses <- s.Post(Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`))
	}()
	<-running
	if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	close(finish)
	WantOK(t, <-responses)
}

// A key that is revoked while the body of its request is read does not authorize that request.
func TestKeyIsRevokedWhileTheBodyIsRead(t *testing.T) {
	s := New(t)
	key, id := s.IssueNamed(t, keys.IssueRequest{})
	body := &slowBody{text: strings.NewReader(Request("sandbox.start", `{"sandbox":"a"}`)), started: make(chan struct{}), resume: make(chan struct{})}
	responses := make(chan *httptest.ResponseRecorder)
	go func() {
		responses <- s.Post("", WithKey(key), func(r *http.Request) { r.Body, r.ContentLength = body, -1 })
	}()
	<-body.started
	if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	close(body.resume)
	WantError(t, <-responses, http.StatusUnauthorized, rpc.CodeUnauthenticated)
	if len(s.Sandboxes.Running) != 0 {
		t.Error("the request was run")
	}
}

// slowBody closes started at the first Read, which then waits for resume.
type slowBody struct {
	text            *strings.Reader
	started, resume chan struct{}
}

func (b *slowBody) Read(p []byte) (int, error) {
	if b.text.Len() == int(b.text.Size()) {
		close(b.started)
		<-b.resume
	}
	return b.text.Read(p)
}

func (b *slowBody) Close() error { return nil }
