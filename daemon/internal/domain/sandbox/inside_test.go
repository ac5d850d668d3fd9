package sandbox_test

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"

	"github.com/containerd/errdefs"

	. "github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

// lasting is a Portal whose calls last until their results are closed, or the connection is. Then they fail.
type lasting struct {
	Portal
	closed context.Context
	close  context.CancelFunc
}

func (l lasting) Close() error {
	l.close()
	return l.Portal.Close()
}

// lastingResult is the result of such a call.
type lastingResult struct {
	closed context.Context
	close  context.CancelFunc
}

var errConnectionLost = errors.Join(errors.New("the connection was lost"), ErrRunFailed)

func (l lasting) result() lastingResult {
	ctx, cancel := context.WithCancel(l.closed)
	return lastingResult{ctx, cancel}
}

func (r lastingResult) Read([]byte) (int, error) {
	<-r.closed.Done()
	return 0, errConnectionLost
}

func (r lastingResult) Next() (FileChange, error) {
	_, err := r.Read(nil)
	return FileChange{}, err
}

func (r lastingResult) Write(p []byte) (int, error) { return len(p), nil }
func (r lastingResult) CloseWrite() error           { return nil }

func (r lastingResult) Close() error {
	r.close()
	return nil
}

// lastingProcess is a process that has begun.
type lastingProcess struct {
	lastingResult
	begun bool
}

func (p *lastingProcess) Next() (Event, error) {
	if !p.begun {
		p.begun = true
		return Started{PID: 1}, nil
	}
	_, err := p.Read(nil)
	return nil, err
}

func (l lasting) StatFile(context.Context, Path, bool) (FileInfo, error) { return FileInfo{}, nil }

func (l lasting) ReadFile(context.Context, Path, int64, int64) (FileInfo, io.ReadCloser, error) {
	return FileInfo{}, l.result(), nil
}

func (l lasting) ReadTree(context.Context, Path) (io.ReadCloser, error) { return l.result(), nil }

func (l lasting) WatchFiles(context.Context, Path, WatchOptions) (Watch, error) {
	return l.result(), nil
}

func (l lasting) Dial(_ context.Context, address Address) (Conn, error) {
	if address.Unix == "panic" {
		panic("a fault of the portal")
	}
	return l.result(), nil
}

func (l lasting) AttachProcess(context.Context, ProcessID, AttachOptions) (Process, error) {
	return &lastingProcess{lastingResult: l.result()}, nil
}

// newLasting returns a Manager with a running sandbox that has a lasting portal.
func newLasting(t *testing.T) *fixture {
	t.Helper()
	f := newFixture(t)
	f.Manager.Connect = func(ctx context.Context, stream io.ReadWriteCloser, attach Attach) (Portal, error) {
		p, err := f.guest.Connect(ctx, stream, attach)
		closed, cancel := context.WithCancel(context.Background())
		return lasting{p, closed, cancel}, err
	}
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Fatal(err)
	}
	return f
}

// lastingCalls begin operations that last. wait returns their error at the end.
func (f *fixture) lastingCalls() map[string]func(context.Context) (c io.Closer, wait func() error, err error) {
	read := func(r io.ReadCloser, err error) (io.Closer, func() error, error) {
		return r, func() error { _, err := r.Read(make([]byte, 1)); return err }, err
	}
	process := func(p Process, err error) (io.Closer, func() error, error) {
		return p, func() error {
			for {
				if _, err := p.Next(); err != nil {
					return err
				}
			}
		}, err
	}
	return map[string]func(context.Context) (io.Closer, func() error, error){
		"file": func(ctx context.Context) (io.Closer, func() error, error) {
			_, r, err := f.ReadFile(ctx, testName, Path{Path: "/x"}, 0, -1)
			return read(r, err)
		},
		"tree": func(ctx context.Context) (io.Closer, func() error, error) {
			return read(f.ReadTree(ctx, testName, Path{Path: "/"}))
		},
		"watch": func(ctx context.Context) (io.Closer, func() error, error) {
			w, err := f.WatchFiles(ctx, testName, Path{Path: "/"}, WatchOptions{})
			return w, func() error { _, err := w.Next(); return err }, err
		},
		"connection": func(ctx context.Context) (io.Closer, func() error, error) {
			c, err := f.Dial(ctx, testName, Address{Port: 80})
			return read(c, err)
		},
		"attached process": func(ctx context.Context) (io.Closer, func() error, error) {
			return process(f.AttachProcess(ctx, testName, ProcessID{PID: 1}, AttachOptions{}))
		},
		"run": func(ctx context.Context) (io.Closer, func() error, error) {
			return process(f.RunCommand(ctx, testName, Command{Program: "sleep", Args: []string{"60"}}))
		},
	}
}

// A sandbox allows 1,000 calls at a time, however long they last. Those of the daemon are always possible.
func TestCallsOfASandboxAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLasting(t)
		defer f.Manager.Close()
		other := Name{"default", "other"}
		if err := f.Start(t.Context(), other, Request{}); err != nil {
			t.Fatal(err)
		}
		calls := f.lastingCalls()
		var open []io.Closer
		for len(open) < 1000 {
			for what, call := range calls {
				c, _, err := call(t.Context())
				if err != nil {
					t.Fatalf("%s, call %d: %v", what, len(open)+1, err)
				}
				if open = append(open, c); len(open) == 1000 {
					break
				}
			}
		}
		refused := func(what string, err error) {
			t.Helper()
			if !errdefs.IsResourceExhausted(err) {
				t.Errorf("%s: got error %v, want ResourceExhausted", what, err)
			}
		}
		full := func(when string) {
			t.Helper()
			for what, call := range calls {
				_, _, err := call(t.Context())
				refused(what+" "+when, err)
			}
			_, err := f.StatFile(t.Context(), testName, Path{Path: "/"}, false)
			refused("description of a file "+when, err)
		}
		full("over the limit")
		if _, err := f.StatFile(t.Context(), other, Path{Path: "/"}, false); err != nil {
			t.Errorf("call of another sandbox: %v", err)
		}
		if m, err := f.Metrics(t.Context(), nil, "one"); err != nil || m[0].MemoryMiB == nil {
			t.Errorf("metrics at the limit: %+v, error %v", m, err)
		}
		for what, call := range calls {
			open[0].Close()
			open[0].Close() // counts only once
			open = open[1:]
			for range 3 { // a call that has ended leaves its place
				if _, err := f.StatFile(t.Context(), testName, Path{Path: "/"}, false); err != nil {
					t.Errorf("description of a file after a call was closed: %v", err)
				}
			}
			c, _, err := call(t.Context())
			if err != nil {
				t.Fatalf("%s after a call was closed: %v", what, err)
			}
			open = append(open, c)
			full("after " + what)
		}
		for _, c := range open {
			c.Close()
		}
	})
}

// However a call fails, it no longer counts.
func TestFailedCallsDoNotCount(t *testing.T) {
	f := newLasting(t)
	f.Manager.Quota = func(string) Quota { return Quota{Runs: 1} }
	run, err := f.RunCommand(t.Context(), testName, Command{Program: "sleep", Args: []string{"60"}})
	if err != nil {
		t.Fatal(err)
	}
	defer run.Close()
	for range 1100 {
		if _, err := f.RunCommand(t.Context(), testName, Command{Program: "true"}); !errdefs.IsResourceExhausted(err) {
			t.Fatalf("run over the quota: got error %v, want ResourceExhausted", err)
		}
	}
	for range 1100 {
		func() {
			defer func() { recover() }()
			f.Dial(t.Context(), testName, Address{Unix: "panic"})
		}()
	}
	if _, err := f.StatFile(t.Context(), testName, Path{Path: "/"}, false); err != nil {
		t.Errorf("call after runs over the quota and panics: %v", err)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	f.rt.OnAttach = func(context.Context, string) error { return errdefs.ErrUnavailable }
	f.restart(t) // closes the connection
	for range 1100 {
		for what, call := range f.lastingCalls() {
			if _, _, err := call(canceled); err == nil || errdefs.IsResourceExhausted(err) {
				t.Fatalf("%s that was canceled: got error %v", what, err)
			}
			if _, _, err := call(t.Context()); !errdefs.IsUnavailable(err) {
				t.Fatalf("%s without a connection: got error %v, want Unavailable", what, err)
			}
		}
	}
	f.rt.OnAttach = nil
	if r, err := sandboxtest.Read(f.RunCommand(t.Context(), testName, Command{Program: "echo", Args: []string{"x"}})); err != nil || r.Stdout != "x\n" {
		t.Errorf("the next run: got %+v, error %v", r, err)
	}
}

// A call that lasts fails when its sandbox is stopped or fails, and says so.
func TestLastingCallsOfASandboxThatEnds(t *testing.T) {
	for want, end := range map[string]func(*fixture) error{
		"the request was interrupted, because sandbox default/one was stopped":               func(f *fixture) error { return f.Stop(context.Background(), testName) },
		"the request was interrupted, because sandbox default/one failed: its microVM ended": func(f *fixture) error { f.rt.Kill(f.List("")[0].ID); return nil },
	} {
		for what := range (&fixture{}).lastingCalls() {
			synctest.Test(t, func(t *testing.T) {
				f := newLasting(t)
				defer f.Manager.Close()
				c, wait, err := f.lastingCalls()[what](t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if err := end(f); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if err := wait(); !errors.Is(err, ErrRunFailed) || err.Error() != want {
					t.Errorf("%s: got error %v, want %s", what, err, want)
				}
			})
		}
	}
}
