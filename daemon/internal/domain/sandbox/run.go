package sandbox

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// RunCode runs code in the sandbox's REPL of that language. Runs of one language take turns, in the order in which
// they came; RunCode returns when the turn has come. The caller closes the process.
func (m *Manager) RunCode(ctx context.Context, name Name, code Code) (Process, error) {
	return m.run(ctx, name, code.Timeout, code.Language, func(ctx context.Context, p Portal, cfg Config, limit time.Duration) (Process, error) {
		code.Environment, code.Timeout = Environment{cfg.Env, cfg.Workdir}, limit
		return p.RunCode(ctx, code)
	})
}

// RunCommand runs a program in the sandbox, without a shell. The caller closes the process.
func (m *Manager) RunCommand(ctx context.Context, name Name, command Command) (Process, error) {
	return m.run(ctx, name, command.Timeout, "", func(ctx context.Context, p Portal, cfg Config, limit time.Duration) (Process, error) {
		command.Environment, command.Timeout = Environment{cfg.Env, cfg.Workdir}, limit
		return p.RunCommand(ctx, command)
	})
}

// answerGrace is what a process may take beyond its time limit. The portal keeps the limit itself; this is for a guest
// that no longer answers.
const answerGrace = 30 * time.Second

// run starts a process, in its turn if it has a language.
func (m *Manager) run(ctx context.Context, name Name, timeout time.Duration, language Language,
	start func(context.Context, Portal, Config, time.Duration) (Process, error),
) (_ Process, err error) {
	e, err := m.running(name)
	if err != nil {
		return nil, err
	}
	leave, err := m.enterRun(name.Namespace)
	if err != nil {
		return nil, err
	}
	p := &process{m: m, entry: e, leave: leave}
	defer func() {
		if err != nil || p.Process == nil { // the latter after a panic
			p.release()
		}
	}()
	if language != "" {
		id := e.record().ID
		queue := e.replQueue(language)
		select {
		case queue <- struct{}{}:
			p.leave = func() { <-queue; leave() }
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		// The sandbox may have been stopped meanwhile, and another one of its name started.
		if e, err = m.running(name); err != nil {
			return nil, err
		}
		if e.record().ID != id {
			return nil, notFound(name)
		}
	}
	limit := m.limit(timeout)
	ctx, p.cancel = context.WithTimeoutCause(ctx, limit+answerGrace,
		fmt.Errorf("sandbox %s no longer answers; stop it and start it: %w", name, errdefs.ErrUnavailable))
	p.cause = func() error { return context.Cause(ctx) }
	conn, err := e.connected(ctx, m.connect)
	if err != nil {
		m.Log.Warn("reach sandbox", "sandbox", name.Name, "namespace", name.Namespace, "err", err)
		return nil, fmt.Errorf("sandbox %s does not answer. Try again; if it goes on so, stop it and start it: %w", name, errdefs.ErrUnavailable)
	}
	if p.Process, err = start(ctx, conn.Portal, e.record().Config, limit); err != nil {
		return nil, p.explain(err)
	}
	return p, nil
}

func (m *Manager) limit(timeout time.Duration) time.Duration {
	if timeout <= 0 || timeout > m.MaxRunTime {
		return m.MaxRunTime
	}
	return timeout
}

// process is a Process that holds its place among the runs of its tenant namespace, and its turn in the REPL, until
// it has ended or is closed.
type process struct {
	Process
	m      *Manager
	entry  *entry
	leave  func()
	cancel context.CancelFunc
	// cause is why the process's context ended.
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
		p.leave()
	})
}

// explain tells what happened to the sandbox or to the caller, rather than what the connection noticed of it.
func (p *process) explain(err error) error {
	name := p.entry.name
	if p.entry.record().State != Running {
		if _, gone := p.m.running(name); gone != nil {
			return gone
		}
	}
	// The guest no longer answers, or the caller's key was revoked.
	if cause := p.cause(); errdefs.IsUnavailable(cause) || errdefs.IsUnauthorized(cause) {
		return cause
	}
	return err
}
