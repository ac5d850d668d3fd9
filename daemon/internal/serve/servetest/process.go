package servetest

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// process is a fake process. Its fields are guarded by Sandboxes.mu.
type process struct {
	info   sandbox.ProcessInfo
	output []sandbox.Output
	input  bool          // whether the input is open
	change chan struct{} // closed and replaced at each change
}

// changed wakes those that wait for the process.
func (p *process) changed() {
	close(p.change)
	p.change = make(chan struct{})
}

func (p *process) print(stream sandbox.Stream, text string) {
	if p.info.Terminal {
		stream = sandbox.Terminal
	}
	p.output = append(p.output, sandbox.Output{Stream: stream, Data: []byte(text)})
	p.info.OutputBytes += uint64(len(text))
	p.changed()
}

func (p *process) exit(e sandbox.Exit) {
	if p.info.Exit == nil {
		p.info.Exit, p.input = &e, false
		p.changed()
	}
}

// StartProcess starts a fake program: "echo" prints its arguments, "cat" prints its input until that is closed, "sleep" runs
// until it gets a signal or reaches its time limit, and "nope" does not exist. Others end at once. Tags and pids are as in a
// real sandbox, except that pids begin with 101 everywhere.
func (f *Sandboxes) StartProcess(ctx context.Context, n sandbox.Name, req sandbox.ProcessRequest) (sandbox.Process, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.find(n); err != nil {
		return nil, err
	}
	f.Options, f.Timeout = req.RunOptions, req.Timeout
	if req.Program == "nope" {
		return &attached{fake: f, ctx: ctx, err: fmt.Errorf("run %q: %w", "nope", sandbox.ErrCommandNotFound)}, nil
	}
	p := &process{
		info: sandbox.ProcessInfo{
			PID: uint32(101 + len(f.processes[n])), Argv: append([]string{req.Program}, req.Args...), Env: []string{"TOKEN=secret"}, Cwd: req.Cwd, User: req.User,
			Tag: req.Tag, Terminal: req.Terminal != nil, StartedAt: time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC),
		},
		input: req.OpenInput || req.Terminal != nil, change: make(chan struct{}),
	}
	if f.processes == nil {
		f.processes = map[sandbox.Name][]*process{}
	}
	f.processes[n] = append(f.processes[n], p)
	switch req.Program {
	case "echo":
		p.print(sandbox.Stdout, strings.Join(req.Args, " ")+"\n")
		p.exit(sandbox.Exit{})
	case "cat":
		p.print(sandbox.Stdout, string(req.Input))
		if !p.input {
			p.exit(sandbox.Exit{})
		}
	case "sleep":
		if req.Timeout > 0 {
			time.AfterFunc(req.Timeout, func() {
				f.mu.Lock()
				defer f.mu.Unlock()
				p.exit(sandbox.Exit{Code: 128 + 15, Signal: 15, TimedOut: true})
			})
		}
	default:
		p.exit(sandbox.Exit{})
	}
	return &attached{fake: f, ctx: ctx, process: p}, nil
}

// findProcess returns a process.
func (f *Sandboxes) findProcess(n sandbox.Name, id sandbox.ProcessID) (*process, error) {
	if _, err := f.find(n); err != nil {
		return nil, err
	}
	for _, p := range slices.Backward(f.processes[n]) {
		if id.PID == p.info.PID || id.PID == 0 && id.Tag == p.info.Tag {
			return p, nil
		}
	}
	return nil, fmt.Errorf("there is no such process: %w", errdefs.ErrNotFound)
}

func (f *Sandboxes) AttachProcess(ctx context.Context, n sandbox.Name, id sandbox.ProcessID, o sandbox.AttachOptions) (sandbox.Process, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, err := f.findProcess(n, id)
	if err != nil {
		return nil, err
	}
	f.Attach = o
	a := &attached{fake: f, ctx: ctx, process: p, options: o}
	if !o.Replay {
		a.read = len(p.output)
	}
	return a, nil
}

// attached is a sandbox.Process with the events of a process.
type attached struct {
	fake    *Sandboxes
	ctx     context.Context
	process *process
	options sandbox.AttachOptions
	err     error // why the process could not be started

	started, ended bool
	read           int // how many pieces of the output were read
}

func (a *attached) Next() (sandbox.Event, error) {
	for a.err == nil {
		event, wait, err := a.next()
		if event != nil || err != nil {
			return event, err
		}
		select {
		case <-wait:
		case <-a.ctx.Done():
			a.err = fmt.Errorf("%w: %w", sandbox.ErrRunFailed, context.Cause(a.ctx))
		}
	}
	return nil, a.err
}

// next returns the next event, or what to wait for.
func (a *attached) next() (event sandbox.Event, wait <-chan struct{}, err error) {
	a.fake.mu.Lock()
	defer a.fake.mu.Unlock()
	p := a.process
	switch {
	case !a.started:
		a.started = true
		skipped := 0
		for _, out := range p.output[:a.read] {
			skipped += len(out.Data)
		}
		return sandbox.Started{PID: p.info.PID, SkippedBytes: uint64(skipped)}, nil, nil
	case !a.options.NoOutput && a.read < len(p.output):
		a.read++
		return p.output[a.read-1], nil, nil
	case p.info.Exit != nil && !a.ended:
		a.ended = true
		return *p.info.Exit, nil, nil
	case a.ended || a.options.NoFollow:
		return nil, nil, io.EOF
	}
	return nil, p.change, nil
}

func (a *attached) Close() error { return nil }

func (f *Sandboxes) ListProcesses(_ context.Context, n sandbox.Name, each func(sandbox.ProcessInfo) error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.find(n); err != nil {
		return err
	}
	for _, p := range f.processes[n] {
		if err := each(p.info); err != nil {
			return err
		}
	}
	return nil
}

// withRunning calls do with a process that runs.
func (f *Sandboxes) withRunning(n sandbox.Name, id sandbox.ProcessID, do func(*process) error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, err := f.findProcess(n, id)
	if err != nil {
		return err
	}
	if p.info.Exit != nil {
		return fmt.Errorf("process %d has ended: %w", p.info.PID, errdefs.ErrFailedPrecondition)
	}
	return do(p)
}

func (f *Sandboxes) WriteInput(_ context.Context, n sandbox.Name, id sandbox.ProcessID, data io.Reader, end bool) error {
	text, err := io.ReadAll(data)
	if err != nil {
		return err
	}
	return f.withRunning(n, id, func(p *process) error {
		if !p.input {
			return fmt.Errorf("the input of process %d is closed: %w", p.info.PID, errdefs.ErrFailedPrecondition)
		}
		if p.info.Argv[0] == "cat" {
			p.print(sandbox.Stdout, string(text))
		}
		if end {
			p.exit(sandbox.Exit{})
		}
		return nil
	})
}

func (f *Sandboxes) SignalProcess(_ context.Context, n sandbox.Name, id sandbox.ProcessID, signal int, all bool) error {
	return f.withRunning(n, id, func(p *process) error {
		f.All = all
		if f.Stubborn && signal != 9 {
			return nil
		}
		p.exit(sandbox.Exit{Code: 128 + signal, Signal: signal})
		return nil
	})
}

func (f *Sandboxes) ResizeTerminal(_ context.Context, n sandbox.Name, id sandbox.ProcessID, size sandbox.TerminalSize) error {
	return f.withRunning(n, id, func(p *process) error {
		if !p.info.Terminal {
			return fmt.Errorf("process %d has no terminal: %w", p.info.PID, errdefs.ErrFailedPrecondition)
		}
		p.print(sandbox.Terminal, fmt.Sprintf("[%dx%d]\r\n", size.Columns, size.Rows))
		return nil
	})
}

// TimeLimit returns timeout, or MaxRunTime for 0 and for more than that.
func (f *Sandboxes) TimeLimit(timeout time.Duration) time.Duration {
	if timeout <= 0 || timeout > f.MaxRunTime {
		return f.MaxRunTime
	}
	return timeout
}
