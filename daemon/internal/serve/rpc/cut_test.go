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

// endings are the ways in which a key comes to its end while a request of it is in progress.
var endings = map[string]func(ctx context.Context, s *Site, id string) error{
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

// A request in progress ends with its key, and its answer is that of any bad key, whatever became of it.
func TestRequestsEndWithTheirKey(t *testing.T) {
	handlers := map[string]func(ctx context.Context) error{
		"stops":      func(ctx context.Context) error { <-ctx.Done(); return context.Cause(ctx) },
		"wraps":      func(ctx context.Context) error { <-ctx.Done(); return fmt.Errorf("run: %w", ctx.Err()) },
		"goes on":    func(ctx context.Context) error { <-ctx.Done(); return nil },
		"has failed": func(ctx context.Context) error { <-ctx.Done(); return fmt.Errorf("no: %w", errdefs.ErrNotFound) },
		"panics":     func(ctx context.Context) error { <-ctx.Done(); panic("a fault of the domain") },
	}
	run := Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"a secret"}`)
	start := Request("sandbox.start", `{"sandbox":"afterwards"}`)
	bodies := map[string]string{"alone": run, "first of a batch": "[" + run + "," + start + "]", "last of a batch": "[" + Request("sandbox.metrics.get", "{}") + "," + run + "]"}
	for ending, end := range endings {
		for handler, onRun := range handlers {
			for place, body := range bodies {
				t.Run(strings.Join([]string{ending, handler, place}, ", "), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						s := New(t)
						key, id := s.IssueNamed(t, keys.IssueRequest{Expire: "1h"})
						running := make(chan struct{})
						s.Sandboxes.OnRun = func(ctx context.Context) error {
							close(running)
							return onRun(ctx)
						}
						WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
						never := s.Post(run, WithKey("never"))
						answered := make(chan *httptest.ResponseRecorder)
						go func() { answered <- s.Post(body, WithKey(key)) }()
						<-running
						if err := end(t.Context(), s, id); err != nil {
							t.Fatal(err)
						}
						w := <-answered
						WantError(t, w, http.StatusUnauthorized, rpc.CodeUnauthenticated)
						w.Header().Del("X-Request-Id")
						never.Header().Del("X-Request-Id")
						if w.Body.String() != never.Body.String() || fmt.Sprint(w.Header()) != fmt.Sprint(never.Header()) {
							t.Errorf("the answer %v %s differs from that to a bad key: %v %s", w.Header(), w.Body, never.Header(), never.Body)
						}
						if strings.Contains(w.Body.String(), "secret") {
							t.Error("the result leaked")
						}
						for name := range s.Sandboxes.Running {
							if name.Name == "afterwards" {
								t.Error("the rest of the batch was run")
							}
						}
						if !strings.Contains(s.Log.String(), "status=401") {
							t.Error("the log does not tell of it:", s.Log)
						}
					})
				})
			}
		}
	}
}

// The requests of other keys go on.
func TestOthersGoOn(t *testing.T) {
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
	answered := make(chan *httptest.ResponseRecorder)
	go func() {
		answered <- s.Post(Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`))
	}()
	<-running
	if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	close(finish)
	WantOK(t, <-answered)
}

// A key that ends while its request is read is not used for it.
func TestKeyEndsWhileTheBodyIsRead(t *testing.T) {
	s := New(t)
	key, id := s.IssueNamed(t, keys.IssueRequest{})
	body := &slowBody{text: strings.NewReader(Request("sandbox.start", `{"sandbox":"a"}`)), began: make(chan struct{}), goOn: make(chan struct{})}
	answered := make(chan *httptest.ResponseRecorder)
	go func() {
		answered <- s.Post("", WithKey(key), func(r *http.Request) { r.Body, r.ContentLength = body, -1 })
	}()
	<-body.began
	if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	close(body.goOn)
	WantError(t, <-answered, http.StatusUnauthorized, rpc.CodeUnauthenticated)
	if len(s.Sandboxes.Running) != 0 {
		t.Error("it was run")
	}
}

type slowBody struct {
	text        *strings.Reader
	began, goOn chan struct{}
}

func (b *slowBody) Read(p []byte) (int, error) {
	if b.text.Len() == int(b.text.Size()) {
		close(b.began)
		<-b.goOn
	}
	return b.text.Read(p)
}

func (b *slowBody) Close() error { return nil }
