package sandbox_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	. "github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

// If a sandbox is stopped while a run waits in its queue, the run fails, even if another sandbox with the same name has been
// started.
func TestQueuedRunOfAStoppedSandbox(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f := newFixture(t)
			if err := f.Start(t.Context(), testName, Request{}); err != nil {
				t.Fatal(err)
			}
			first, err := f.RunCode(t.Context(), testName, Code{Language: Python, Text: "1"})
			if err != nil {
				t.Fatal(err)
			}
			queued := make(chan error, 1)
			go func() {
				_, err := sandboxtest.Read(f.RunCode(context.Background(), testName, Code{Language: Python, Text: "2"}))
				queued <- err
			}()
			synctest.Wait()
			if err := f.Stop(t.Context(), testName); err != nil {
				t.Fatal(err)
			}
			if restarted {
				if err := f.Start(t.Context(), testName, Request{}); err != nil {
					t.Fatal(err)
				}
			}
			first.Close()
			if err := <-queued; !errdefs.IsNotFound(err) {
				t.Errorf("restarted %t: got error %v, want NotFound", restarted, err)
			}
			if restarted {
				if _, err := sandboxtest.Read(f.RunCode(t.Context(), testName, Code{Language: Python, Text: "3"})); err != nil {
					t.Errorf("run in the new sandbox: %v", err)
				}
			}
			f.Manager.Close()
		})
	}
}

// Runs that wait for a connection when their sandbox is stopped say that it was stopped. They did not begin.
func TestStopWhileRunsConnect(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f := newFixture(t)
			if err := f.Start(t.Context(), testName, Request{}); err != nil {
				t.Fatal(err)
			}
			f.restart(t) // closes the connection
			id := f.List("")[0].ID
			stopped := make(chan struct{})
			f.rt.OnAttach = func(_ context.Context, attached string) error {
				if attached == "" {
					t.Error("attached to no sandbox")
				}
				if attached == id {
					<-stopped
					return errors.New("the microVM is gone")
				}
				return nil
			}
			errs := make(chan error)
			for range 3 {
				go func() {
					_, err := f.RunCommand(context.Background(), testName, Command{Program: "true"})
					errs <- err
				}()
			}
			go func() {
				_, err := f.RunCode(context.Background(), testName, Code{Language: Python, Text: "1"})
				errs <- err
			}()
			synctest.Wait()
			if err := f.Stop(t.Context(), testName); err != nil {
				t.Fatal(err)
			}
			if restarted {
				if err := f.Start(t.Context(), testName, Request{}); err != nil {
					t.Fatal(err)
				}
			}
			close(stopped)
			for range 4 {
				if err := <-errs; !errdefs.IsNotFound(err) {
					t.Errorf("restarted %t: got error %v, want NotFound", restarted, err)
				}
			}
			f.Manager.Close()
		})
	}
}

// A run that had begun when its sandbox was stopped or failed may have taken effect, and says why it ended.
func TestRunOfASandboxThatEnds(t *testing.T) {
	for want, end := range map[string]func(*fixture) error{
		"sandbox default/one was stopped":               func(f *fixture) error { return f.Stop(context.Background(), testName) },
		"sandbox default/one failed: its microVM ended": func(f *fixture) error { f.rt.Kill(f.List("")[0].ID); return nil },
		"sandbox default/one was stopped, and started again": func(f *fixture) error {
			return errors.Join(f.Stop(context.Background(), testName), f.Start(context.Background(), testName, Request{}))
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			f := newFixture(t)
			if err := f.Start(t.Context(), testName, Request{}); err != nil {
				t.Fatal(err)
			}
			f.guest.OnRun = func(ctx context.Context, _ any) error { <-ctx.Done(); return context.Cause(ctx) }
			p, err := f.RunCommand(t.Context(), testName, Command{Program: "sleep"})
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			if err := end(f); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			want, _, _ := strings.Cut(want, ", and")
			if _, err := p.Next(); !errors.Is(err, ErrRunFailed) || err.Error() != "the request was interrupted, because "+want {
				t.Errorf("got error %v, want ErrRunFailed because %s", err, want)
			}
			f.Manager.Close()
		})
	}
}

// panickingPortal is a Portal that panics at its first run if armed. It refuses to run Ruby.
type panickingPortal struct {
	Portal
	armed *bool
}

func (p *panickingPortal) RunCode(ctx context.Context, code Code) (Process, error) {
	if *p.armed {
		*p.armed = false
		panic("a fault of the portal")
	}
	if code.Language == "ruby" {
		return nil, errdefs.ErrUnavailable
	}
	return p.Portal.RunCode(ctx, code)
}

// However a run ends, it frees its REPL and its share of the run quota.
func TestEndedRunsFreeTheirPlace(t *testing.T) {
	f := newFixture(t)
	f.Manager.Quota = func(string) Quota { return Quota{Runs: 1} }
	armed := true
	f.Manager.Connect = func(ctx context.Context, stream io.ReadWriteCloser, attach Attach) (Portal, error) {
		p, err := f.guest.Connect(ctx, stream, attach)
		return &panickingPortal{p, &armed}, err
	}
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Fatal(err)
	}
	code := func(text string) Code { return Code{Language: Python, Text: text} }
	for _, c := range []struct {
		what string
		end  func()
	}{
		{"a panic", func() {
			defer func() { recover() }()
			f.RunCode(t.Context(), testName, code("1"))
		}},
		{"an error from RunCode", func() {
			if _, err := f.RunCode(t.Context(), testName, Code{Language: "ruby"}); !errdefs.IsUnavailable(err) {
				t.Errorf("RunCode of a portal that refuses: %v, want Unavailable", err)
			}
		}},
		{"Close", func() {
			if p, err := f.RunCode(t.Context(), testName, code("1")); err == nil {
				p.Close()
				p.Close()
			}
		}},
		{"an exit", func() { sandboxtest.Read(f.RunCode(t.Context(), testName, code("1"))) }},
		{"an exit without Close", func() {
			p, err := f.RunCode(t.Context(), testName, code("1"))
			for err == nil {
				_, err = p.Next()
			}
		}},
		{"a canceled context", func() {
			ctx, cancel := context.WithCancel(t.Context())
			if p, err := f.RunCode(ctx, testName, code("1")); err == nil {
				cancel()
				for err == nil {
					_, err = p.Next()
				}
			}
			cancel()
		}},
	} {
		c.end()
		if r, err := sandboxtest.Read(f.RunCode(t.Context(), testName, code("1 + 1"))); err != nil || r.Stdout != "2\n" {
			t.Errorf("run after %s: got %+v, error %v, want 2", c.what, r, err)
		}
	}
}

// deadPortal is a Portal that starts nothing, although its connection seems to be open.
type deadPortal struct{ Portal }

func (deadPortal) RunCommand(context.Context, Command) (Process, error) {
	return nil, errdefs.ErrUnavailable
}

// If a run cannot be started over a connection, it is started over a new one.
func TestUnusableConnectionIsReplaced(t *testing.T) {
	f := newFixture(t)
	connections := 0
	f.Manager.Connect = func(ctx context.Context, stream io.ReadWriteCloser, attach Attach) (Portal, error) {
		p, err := f.guest.Connect(ctx, stream, attach)
		if connections++; connections == 1 {
			return deadPortal{p}, err
		}
		return p, err
	}
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if r, err := sandboxtest.Read(f.RunCommand(t.Context(), testName, Command{Program: "echo", Args: []string{"x"}})); err != nil || r.Stdout != "x\n" {
			t.Errorf("got %+v, error %v", r, err)
		}
	}
	if connections != 2 {
		t.Errorf("%d connections were opened, want 2", connections)
	}
}

// failingPortal is a Portal that calls fail instead of starting a command.
type failingPortal struct {
	Portal
	fail func()
}

func (p failingPortal) RunCommand(context.Context, Command) (Process, error) {
	p.fail()
	return nil, errdefs.ErrUnavailable
}

// A run never begins in another sandbox than the one that had the name when the run was requested, even if that one fails
// and is started again just before the run begins.
func TestRunDoesNotMoveToNewSandbox(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		defer f.Manager.Close()
		connections := 0
		f.Manager.Connect = func(ctx context.Context, stream io.ReadWriteCloser, attach Attach) (Portal, error) {
			p, err := f.guest.Connect(ctx, stream, attach)
			if connections++; connections > 1 {
				return p, err
			}
			return failingPortal{p, func() {
				f.rt.Kill(f.List("")[0].ID)
				synctest.Wait() // until the sandbox has failed
				if err := f.Start(t.Context(), testName, Request{}); err != nil {
					t.Error(err)
				}
			}}, err
		}
		if err := f.Start(t.Context(), testName, Request{}); err != nil {
			t.Fatal(err)
		}
		r, err := sandboxtest.Read(f.RunCommand(t.Context(), testName, Command{Program: "echo", Args: []string{"x"}}))
		if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "has been started again since") {
			t.Errorf("got %+v, error %v, want that the sandbox has been started again", r, err)
		}
	})
}

// A run that had begun fails with ErrRunFailed if its request is canceled, so that no client sends it again.
func TestCanceledRun(t *testing.T) {
	f := newFixture(t)
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Fatal(err)
	}
	for cause, want := range map[error]string{
		nil:                         "the request was interrupted, because the client ended it",
		errors.New("the tests end"): "the request was interrupted: the tests end",
		errdefs.ErrUnavailable:      "the request was interrupted: unavailable",
	} {
		ctx, cancel := context.WithCancelCause(t.Context())
		p, err := f.RunCommand(ctx, testName, Command{Program: "sleep", Args: []string{"60"}})
		if err != nil {
			t.Fatal(err)
		}
		cancel(cause)
		if _, err := p.Next(); !errors.Is(err, ErrRunFailed) || err.Error() != want {
			t.Errorf("canceled with %v: got error %v, want %q", cause, err, want)
		}
		p.Close()
	}
}

// A run with an id can be interrupted until it has ended, and continues until its code has handled that.
func TestInterruptCode(t *testing.T) {
	f := newFixture(t)
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Fatal(err)
	}
	if err := f.InterruptCode(testName, "run"); !errdefs.IsNotFound(err) {
		t.Errorf("interrupt before the run: %v, want ErrNotFound", err)
	}
	run := Code{ID: "run", Language: Python, Text: "print('begun')\nimport time\ntime.sleep(60)"}
	p, err := f.RunCode(t.Context(), testName, run)
	if err != nil {
		t.Fatal(err)
	}
	if event, err := p.Next(); err != nil {
		t.Fatalf("the first event: %v, error %v", event, err)
	}
	if _, err := f.RunCode(t.Context(), testName, Code{ID: "run", Language: Node}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another run with the id: %v, want ErrFailedPrecondition", err)
	}
	for _, other := range []struct {
		name Name
		id   string
	}{{testName, "other"}, {testName, ""}, {Name{Namespace: "other", Name: testName.Name}, "run"}, {Name{Namespace: testName.Namespace, Name: "other"}, "run"}} {
		if err := f.InterruptCode(other.name, other.id); !errdefs.IsNotFound(err) {
			t.Errorf("interrupt %+v: %v, want ErrNotFound", other, err)
		}
	}
	if err := f.InterruptCode(testName, "run"); err != nil {
		t.Fatal(err)
	}
	if got, err := sandboxtest.Read(p, nil); err != nil || got.ExitCode != 1 || !strings.Contains(got.Stderr, "KeyboardInterrupt") {
		t.Errorf("after the interrupt: got %+v, error %v", got, err)
	}
	if err := f.InterruptCode(testName, "run"); !errdefs.IsNotFound(err) {
		t.Errorf("interrupt after the end: %v, want ErrNotFound", err)
	}
	// A run that could not begin does not keep its id.
	for range 2 {
		if _, err := f.RunCode(t.Context(), Name{Namespace: "none", Name: "none"}, run); !errdefs.IsNotFound(err) {
			t.Errorf("run in a sandbox that does not exist: %v, want ErrNotFound", err)
		}
	}
	if _, err := f.RunCode(t.Context(), testName, Code{ID: strings.Repeat("x", 513), Language: Python}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an id of 513 bytes: %v, want ErrInvalidArgument", err)
	}
}

// The time that code waits for its turn counts towards its time limit. Contexts and users do not wait for each other.
func TestQueueOfAContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		if err := f.Start(t.Context(), testName, Request{}); err != nil {
			t.Fatal(err)
		}
		first, err := f.RunCode(t.Context(), testName, Code{Language: Python, Text: "1"})
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		_, err = f.RunCode(t.Context(), testName, Code{Language: Python, Text: "2", Timeout: 10 * time.Second})
		if waited := time.Since(begin); !errors.Is(err, ErrRunTimeout) || !strings.Contains(err.Error(), "limit of 10s before it began") || waited != 10*time.Second {
			t.Errorf("run that waits for its turn: error %v after %v, want ErrRunTimeout after 10 s", err, waited)
		}
		time.AfterFunc(time.Second, func() {
			if err := f.InterruptCode(testName, "waits"); err != nil {
				t.Errorf("interrupt of a run that waits: %v", err)
			}
		})
		if _, err = f.RunCode(t.Context(), testName, Code{ID: "waits", Language: Python, Text: "2"}); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("run that is interrupted while it waits for its turn: error %v, want ErrFailedPrecondition", err)
		}
		for _, code := range []Code{
			{Language: Node}, {Context: "python"}, {Context: "other"}, {Language: Python, RunOptions: RunOptions{User: "1000"}},
		} {
			p, err := f.RunCode(t.Context(), testName, code)
			if err != nil {
				t.Errorf("%+v waits for another context: %v", code, err)
				continue
			}
			p.Close()
		}
		var waited time.Duration
		f.guest.OnRun = func(_ context.Context, run any) error {
			waited = run.(Code).Waited
			return nil
		}
		result := make(chan error, 1)
		go func() {
			_, err := sandboxtest.Read(f.RunCode(context.Background(), testName, Code{Language: Python, Text: "3", Timeout: 10 * time.Second}))
			result <- err
		}()
		time.Sleep(3 * time.Second)
		first.Close()
		if err := <-result; err != nil || waited != 3*time.Second {
			t.Errorf("run that had its turn after 3 s: error %v, waited %v", err, waited)
		}
		f.Manager.Close()
	})
}
