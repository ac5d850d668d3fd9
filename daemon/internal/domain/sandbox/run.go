package sandbox

import (
	"context"
	"fmt"
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
	p := &process{m: m, entry: e, endRun: endRun}
	defer func() {
		if err != nil || p.Process == nil { // Process is nil after a panic in start
			p.release()
		}
	}()
	if language != "" {
		id := e.record().ID
		queue := e.replQueue(language)
		select {
		case queue <- struct{}{}:
			p.endRun = func() { <-queue; endRun() }
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		// The sandbox may have been stopped meanwhile, and another one with the same name may have been started.
		if e, err = m.runningEntry(name); err != nil {
			return nil, err
		}
		if e.record().ID != id {
			return nil, notFound(name)
		}
	}
	limit := m.timeLimit(timeout)
	ctx, p.cancel = context.WithTimeoutCause(ctx, limit+responseGrace,
		fmt.Errorf("sandbox %s is no longer responding; stop it and start it again: %w", name, errdefs.ErrUnavailable))
	p.cause = func() error { return context.Cause(ctx) }
	conn, err := e.connection(ctx, m.connect)
	if err != nil {
		m.Log.Warn("could not connect to the sandbox", "sandbox", name.Name, "namespace", name.Namespace, "err", err)
		return nil, fmt.Errorf("sandbox %s is not responding. Try again; if that persists, stop it and start it again: %w", name, errdefs.ErrUnavailable)
	}
	if p.Process, err = start(ctx, conn.Portal, e.record().Config, limit); err != nil {
		return nil, p.explain(err)
	}
	return p, nil
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
	endRun func()
	cancel context.CancelFunc
	// cause returns why the context of the process was cancelled.
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

// explain returns the reason for err. If the sandbox stopped, the guest no longer responds or the caller's key was revoked,
// it returns an error that says so, because err is then only a consequence, such as a closed connection.
func (p *process) explain(err error) error {
	name := p.entry.name
	if p.entry.record().State != Running {
		if _, notRunning := p.m.runningEntry(name); notRunning != nil {
			return notRunning
		}
	}
	// The guest no longer responds, or the caller's key was revoked.
	if cause := p.cause(); errdefs.IsUnavailable(cause) || errdefs.IsUnauthorized(cause) {
		return cause
	}
	return err
}
