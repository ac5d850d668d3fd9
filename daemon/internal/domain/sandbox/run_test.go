package sandbox_test

import (
	"context"
	"io"
	"testing"
	"testing/synctest"

	"github.com/containerd/errdefs"

	. "github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

// A run that waits for its turn while its sandbox is stopped says so, also if another sandbox has its name by then.
func TestQueuedRunOfAStoppedSandbox(t *testing.T) {
	for _, again := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			if err := w.Start(t.Context(), box1, Request{}); err != nil {
				t.Fatal(err)
			}
			first, err := w.RunCode(t.Context(), box1, Code{Language: Python, Text: "1"})
			if err != nil {
				t.Fatal(err)
			}
			queued := make(chan error, 1)
			go func() {
				_, err := sandboxtest.Read(w.RunCode(context.Background(), box1, Code{Language: Python, Text: "2"}))
				queued <- err
			}()
			synctest.Wait()
			if err := w.Stop(t.Context(), box1); err != nil {
				t.Fatal(err)
			}
			if again {
				if err := w.Start(t.Context(), box1, Request{}); err != nil {
					t.Fatal(err)
				}
			}
			first.Close()
			if err := <-queued; !errdefs.IsNotFound(err) {
				t.Errorf("started again %t: %v", again, err)
			}
			if again {
				if _, err := sandboxtest.Read(w.RunCode(t.Context(), box1, Code{Language: Python, Text: "3"})); err != nil {
					t.Errorf("the new sandbox: %v", err)
				}
			}
			w.Manager.Close()
		})
	}
}

// panicking is a portal whose first run panics.
type panicking struct {
	Portal
	panicked bool
}

func (p *panicking) RunCode(ctx context.Context, code Code) (Process, error) {
	if !p.panicked {
		p.panicked = true
		panic("a fault of the portal")
	}
	return p.Portal.RunCode(ctx, code)
}

// However a run ends, it leaves its turn and its place among the runs of its namespace to others.
func TestRunsLeaveTheirPlace(t *testing.T) {
	w := newWorld(t)
	w.Manager.Quota = func(string) Quota { return Quota{Runs: 1} }
	w.Manager.Connect = func(ctx context.Context, stream io.ReadWriteCloser) (Portal, error) {
		p, err := w.guest.Connect(ctx, stream)
		return &panicking{Portal: p}, err
	}
	if err := w.Start(t.Context(), box1, Request{}); err != nil {
		t.Fatal(err)
	}
	code := func(text string) Code { return Code{Language: Python, Text: text} }
	for _, c := range []struct {
		what string
		end  func()
	}{
		{"a panic", func() {
			defer func() { recover() }()
			w.RunCode(t.Context(), box1, code("1"))
		}},
		{"an error at the start", func() { w.RunCode(t.Context(), box1, Code{Language: "ruby"}) }},
		{"a close", func() {
			if p, err := w.RunCode(t.Context(), box1, code("1")); err == nil {
				p.Close()
				p.Close()
			}
		}},
		{"an exit", func() { sandboxtest.Read(w.RunCode(t.Context(), box1, code("1"))) }},
		{"an exit that is not closed", func() {
			p, err := w.RunCode(t.Context(), box1, code("1"))
			for err == nil {
				_, err = p.Next()
			}
		}},
		{"a context", func() {
			ctx, cancel := context.WithCancel(t.Context())
			if p, err := w.RunCode(ctx, box1, code("1")); err == nil {
				cancel()
				for err == nil {
					_, err = p.Next()
				}
			}
			cancel()
		}},
	} {
		c.end()
		if r, err := sandboxtest.Read(w.RunCode(t.Context(), box1, code("1 + 1"))); err != nil || r.Stdout != "2\n" {
			t.Errorf("after %s: %+v, %v", c.what, r, err)
		}
	}
}
