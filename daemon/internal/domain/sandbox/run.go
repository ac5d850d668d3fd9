package sandbox

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// RunCode runs code in a context of the sandbox. Runs in one context execute one at a time, in the order in which they came;
// RunCode waits until it is the code's turn. If the time limit is over before, the error is ErrRunTimeout. The caller must close
// the process.
func (m *Manager) RunCode(ctx context.Context, name Name, code Code) (Process, error) {
	if err := code.validate(); err != nil {
		return nil, err
	}
	code.DefaultGrace = m.CodeGrace
	if code.ID == "" {
		return m.runCode(ctx, name, code)
	}
	var forget func()
	var added bool
	if code.Interrupts, forget, added = m.interrupts.Add(runID{name, code.ID}); !added {
		return nil, fmt.Errorf("a run with the id %q is in progress in the sandbox; choose another id: %w", code.ID, errdefs.ErrFailedPrecondition)
	}
	begun := false
	defer func() {
		if !begun {
			forget()
		}
	}()
	p, err := m.runCode(ctx, name, code)
	if err != nil {
		return nil, err
	}
	end := p.end
	p.end = func() { forget(); end() }
	begun = true
	return p, nil
}

func (m *Manager) runCode(ctx context.Context, name Name, code Code) (*process, error) {
	return m.run(ctx, name, code.Timeout, cmp.Or(code.Grace, m.CodeGrace), code.queue(), code.Interrupts, func(ctx context.Context, p Portal, cfg Config, limit, waited time.Duration) (Process, error) {
		code.Environment, code.User = cfg.environment(), cmp.Or(code.User, cfg.User)
		code.Timeout, code.Waited = limit, waited
		return p.RunCode(ctx, code)
	})
}

// runID is the id of a run of code in a sandbox.
type runID struct {
	Name
	id string
}

// InterruptCode interrupts a run of code and the programs that it has started, as Ctrl-C does in a terminal. The run continues until
// its code has handled that. If it waits for its turn, it ends with errdefs.ErrFailedPrecondition. If no run in progress has the id,
// the error is errdefs.ErrNotFound.
func (m *Manager) InterruptCode(name Name, id string) error {
	if !m.interrupts.Interrupt(runID{name, id}) {
		return fmt.Errorf("no run with this id is in progress in the sandbox %s: %w", name, errdefs.ErrNotFound)
	}
	return nil
}

// queue returns the queue in which the code waits for its turn. If two queues are of one context, the portal serializes their
// runs.
func (c Code) queue() queueName {
	if c.Context != "" {
		return queueName{context: c.Context}
	}
	return queueName{language: c.Language, user: c.User}
}

// RunCommand runs a program in the sandbox, without a shell. The caller must close the process.
func (m *Manager) RunCommand(ctx context.Context, name Name, command Command) (Process, error) {
	if err := command.validate(); err != nil {
		return nil, err
	}
	return m.run(ctx, name, command.Timeout, command.Grace, queueName{}, nil, func(ctx context.Context, p Portal, cfg Config, limit, _ time.Duration) (Process, error) {
		command.Environment, command.User, command.Timeout = cfg.environment(), cmp.Or(command.User, cfg.User), limit
		return p.RunCommand(ctx, command)
	})
}

// responseGrace is how long after its time limit a run fails if the guest no longer responds. If the guest responds, its
// portal ends the run at the time limit. It is also how long a guest may take for an operation that does not depend on a
// program in it.
const responseGrace = 30 * time.Second

// interpreterStart is how long a portal waits for the start of an interpreter, which does not count towards a time limit.
const interpreterStart = time.Minute

// run starts a process that ends with its context, with start. If turns is not empty, it first waits in that queue, unless
// interrupts has a value. start gets the time limit, and how much of it has passed in the queue.
func (m *Manager) run(ctx context.Context, name Name, timeout, grace time.Duration, turns queueName, interrupts <-chan struct{},
	start func(ctx context.Context, p Portal, cfg Config, limit, waited time.Duration) (Process, error),
) (_ *process, err error) {
	in, err := m.inside(name)
	if err != nil {
		return nil, err
	}
	endRun, err := m.beginRun(name.Namespace)
	if err != nil {
		in.end()
		return nil, err
	}
	p := &process{inside: in, end: endRun}
	defer func() {
		if err != nil || p.Process == nil { // Process is nil after a panic in start
			p.release()
		}
	}()
	limit := m.TimeLimit(timeout)
	var waited time.Duration
	if turns != (queueName{}) {
		var leave func()
		if leave, waited, err = in.entry.takeTurn(ctx, turns, limit, interrupts); err != nil {
			return nil, err
		}
		p.end = func() { leave(); endRun() }
	}
	patience := limit + grace + responseGrace
	if turns != (queueName{}) {
		patience += interpreterStart
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, notResponding(name))
	end := p.end
	p.end = func() { cancel(); end() }
	p.ctx = ctx
	p.Process, err = onPortal(ctx, in, func(portal Portal) (Process, error) { return start(ctx, portal, in.rec.Config, limit, waited) })
	return p, err
}

// notResponding is why the context of an operation ends if the guest no longer responds.
func notResponding(name Name) error {
	return &failure{"sandbox " + name.String() + " is no longer responding; stop it and start it again", nil}
}

// queueTimeout is ErrRunTimeout for a run that did not get its turn.
type queueTimeout struct{ limit time.Duration }

func (e queueTimeout) Error() string {
	return fmt.Sprintf("the run reached its time limit of %s before it began, for example because another run was in progress in the context", e.limit)
}
func (queueTimeout) Unwrap() error { return ErrRunTimeout }

// errInterrupted is the error of a run that was interrupted before it got its turn.
var errInterrupted = fmt.Errorf("the run was interrupted before it began: %w", errdefs.ErrFailedPrecondition)

// maxGrace is the longest grace of a run.
const maxGrace = time.Minute

func (o RunOptions) validate() error {
	if o.Grace < 0 || o.Grace > maxGrace {
		return fmt.Errorf("grace %s: give at most %s: %w", o.Grace, maxGrace, errdefs.ErrInvalidArgument)
	}
	if len(o.Cwd) > maxPath {
		return fmt.Errorf("cwd has at most %d bytes: %w", maxPath, errdefs.ErrInvalidArgument)
	}
	if len(o.User) > maxName {
		return fmt.Errorf("user has at most %d bytes: %w", maxName, errdefs.ErrInvalidArgument)
	}
	return validateEnv(o.Env)
}

func (c Code) validate() error {
	if len(c.ID) > maxName {
		return fmt.Errorf("run_id has at most %d bytes: %w", maxName, errdefs.ErrInvalidArgument)
	}
	if len(c.Context) > maxName {
		return fmt.Errorf("context has at most %d bytes: %w", maxName, errdefs.ErrInvalidArgument)
	}
	return c.RunOptions.validate()
}

func (c Command) validate() error {
	if len(c.Program) > maxPath {
		return fmt.Errorf("the name of a program has at most %d bytes: %w", maxPath, errdefs.ErrInvalidArgument)
	}
	return c.RunOptions.validate()
}

func (r ProcessRequest) validate() error {
	if len(r.Tag) > maxName {
		return fmt.Errorf("tag has at most %d bytes: %w", maxName, errdefs.ErrInvalidArgument)
	}
	if r.Terminal != nil && (r.Terminal.Columns == 0 || r.Terminal.Rows == 0) {
		return fmt.Errorf("terminal: give at least one column and one row: %w", errdefs.ErrInvalidArgument)
	}
	return r.Command.validate()
}

// TimeLimit returns the time limit of a run that asks for timeout. 0 stands for the server's maximum, which no run exceeds.
func (m *Manager) TimeLimit(timeout time.Duration) time.Duration {
	if timeout <= 0 || timeout > m.MaxRunTime {
		return m.MaxRunTime
	}
	return timeout
}

// process is a Process of a sandbox. Its operation lasts until it has ended or is closed. If it is a run, it also counts against
// the run quota of its tenant namespace, and occupies its REPL, until then.
type process struct {
	Process
	inside inside
	ctx    context.Context // which the process was started with, or attached to
	end    func()          // called once, when the process has ended or is closed
	once   sync.Once
	first  Event // the next event, if it was read already
}

func (p *process) Next() (Event, error) {
	if event := p.first; event != nil {
		p.first = nil
		return event, nil
	}
	event, err := p.Process.Next()
	if err != nil {
		if err != io.EOF {
			err = p.inside.explain(p.ctx, err)
		}
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
	p.once.Do(p.end)
	p.inside.end()
}

// failure is an ErrRunFailed that says what happened.
type failure struct {
	text  string
	cause error // nil if text says everything
}

func (f *failure) Error() string   { return f.text }
func (f *failure) Unwrap() []error { return []error{ErrRunFailed, f.cause} }
