package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// RunCode runs code in the sandbox's REPL of the language. Runs in one language execute one at a time, in the order in which
// they came; RunCode waits until the code starts. The caller must close the process.
func (m *Manager) RunCode(ctx context.Context, name Name, code Code) (Process, error) {
	return m.run(ctx, name, code.Timeout, code.Language, func(ctx context.Context, p Portal, cfg Config, limit time.Duration) (Process, error) {
		code.Environment, code.Timeout = Environment{cfg.Env, cfg.Workdir}, limit
		return p.RunCode(ctx, code)
	})
}

// RunCommand runs a program in the sandbox, without a shell. The caller must close the process.
func (m *Manager) RunCommand(ctx context.Context, name Name, command Command) (Process, error) {
	if len(command.Program) > maxPath {
		return nil, fmt.Errorf("the name of a program has at most %d bytes: %w", maxPath, errdefs.ErrInvalidArgument)
	}
	return m.run(ctx, name, command.Timeout, "", func(ctx context.Context, p Portal, cfg Config, limit time.Duration) (Process, error) {
		command.Environment, command.Timeout = Environment{cfg.Env, cfg.Workdir}, limit
		return p.RunCommand(ctx, command)
	})
}

// responseGrace is how long after its time limit a run fails if the guest no longer responds. If the guest responds, its
// portal ends the run at the time limit.
const responseGrace = 30 * time.Second

// run starts a process with start. If language is not empty, it first waits in the queue of that language.
func (m *Manager) run(ctx context.Context, name Name, timeout time.Duration, language Language,
	start func(context.Context, Portal, Config, time.Duration) (Process, error),
) (_ Process, err error) {
	e, err := m.runningEntry(name)
	if err != nil {
		return nil, err
	}
	endRun, err := m.beginRun(name.Namespace)
	if err != nil {
		return nil, err
	}
	rec := e.record()
	p := &process{m: m, entry: e, id: rec.ID, endRun: endRun}
	defer func() {
		if err != nil || p.Process == nil { // Process is nil after a panic in start
			p.release()
		}
	}()
	if language != "" {
		queue := e.replQueue(language)
		select {
		case queue <- struct{}{}:
			p.endRun = func() { <-queue; endRun() }
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if err := p.notRunning(); err != nil { // the sandbox may have been stopped meanwhile
		return nil, err
	}
	limit := m.timeLimit(timeout)
	caller := ctx
	ctx, p.cancel = context.WithTimeoutCause(ctx, limit+responseGrace,
		&failure{"sandbox " + name.String() + " is no longer responding; stop it and start it again", nil})
	p.cause = func() error { return context.Cause(ctx) }
	for range 2 {
		var conn *conn
		if conn, err = e.connection(ctx, rec.ID, m.connect); err != nil {
			break
		}
		if p.Process, err = start(ctx, conn.Portal, rec.Config, limit); err == nil {
			return p, nil
		}
		if ctx.Err() != nil {
			break
		}
		conn.broken.Store(true) // nothing was sent, so try once more over a new connection
	}
	if caller.Err() != nil {
		return nil, context.Cause(caller)
	}
	if notRunning := p.notRunning(); notRunning != nil {
		return nil, notRunning
	}
	m.Log.Warn("could not connect to the sandbox", "sandbox", name.Name, "namespace", name.Namespace, "err", err)
	return nil, fmt.Errorf("sandbox %s is not responding. Try again; if that persists, stop it and start it again: %w", name, errdefs.ErrUnavailable)
}

// timeLimit returns the time limit of a run that asks for timeout.
func (m *Manager) timeLimit(timeout time.Duration) time.Duration {
	if timeout <= 0 || timeout > m.MaxRunTime {
		return m.MaxRunTime
	}
	return timeout
}

// process is a Process that counts against the run quota of its tenant namespace, and occupies its REPL, until it has ended
// or is closed.
type process struct {
	Process
	m      *Manager
	entry  *entry
	id     string // of the sandbox
	endRun func()
	cancel context.CancelFunc
	// cause returns why the context of the process was canceled.
	cause func() error
	once  sync.Once
}

func (p *process) Next() (Event, error) {
	event, err := p.Process.Next()
	if err != nil {
		err = p.explain(err)
		p.release()
	}
	if _, ended := event.(Exit); ended {
		p.release()
	}
	return event, err
}

func (p *process) Close() error {
	err := p.Process.Close()
	p.release()
	return err
}

func (p *process) release() {
	p.once.Do(func() {
		if p.cancel != nil {
			p.cancel()
		}
		p.endRun()
	})
}

// explain returns the reason for err, the error of a process that had begun. If the sandbox stopped, the guest no longer
// responds or the request was canceled, it returns an error that says so, because err is then only a consequence, such as a
// closed connection. None of its errors invites the client to try again.
func (p *process) explain(err error) error {
	if err == io.EOF { // the process has ended, and so has its context
		return err
	}
	switch rec := p.entry.record(); {
	case rec.ID != p.id || rec.State == Stopping:
		return &failure{fmt.Sprintf("the run was interrupted, because sandbox %s was stopped", p.entry.name), nil}
	case rec.State == Failed:
		return &failure{fmt.Sprintf("the run was interrupted, because sandbox %s failed: %s", p.entry.name, rec.Reason), nil}
	}
	cause := p.cause()
	switch {
	case cause == nil:
		return err
	case errdefs.IsUnauthorized(cause), errors.Is(cause, ErrRunFailed): // the key was revoked, or the guest no longer responds
		return cause
	case cause == context.Canceled:
		return &failure{"the run was interrupted, because the client ended the request", cause}
	default:
		return &failure{fmt.Sprintf("the run was interrupted: %v", cause), cause}
	}
}

// notRunning returns why the sandbox no longer runs, or nil if it does.
func (p *process) notRunning() error {
	if rec := p.entry.record(); rec.ID == p.id && rec.State == Running {
		return nil
	}
	if _, err := p.m.runningEntry(p.entry.name); err != nil {
		return err
	}
	return fmt.Errorf("sandbox %s was stopped, and has been started again since: %w", p.entry.name, errdefs.ErrNotFound)
}

// failure is an ErrRunFailed that says what happened.
type failure struct {
	text  string
	cause error // nil if text says everything
}

func (f *failure) Error() string   { return f.text }
func (f *failure) Unwrap() []error { return []error{ErrRunFailed, f.cause} }
