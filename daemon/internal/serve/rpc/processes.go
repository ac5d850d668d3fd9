package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/wire"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// Processes is the part of Sandboxes for processes, as in sandbox.Processes.
type Processes interface {
	StartProcess(context.Context, sandbox.Name, sandbox.ProcessRequest) (sandbox.Process, error)
	AttachProcess(context.Context, sandbox.Name, sandbox.ProcessID, sandbox.AttachOptions) (sandbox.Process, error)
	ListProcesses(ctx context.Context, n sandbox.Name, each func(sandbox.ProcessInfo) error) error
	WriteInput(ctx context.Context, n sandbox.Name, id sandbox.ProcessID, data io.Reader, end bool) error
	SignalProcess(ctx context.Context, n sandbox.Name, id sandbox.ProcessID, signal int, all bool) error
	ResizeTerminal(context.Context, sandbox.Name, sandbox.ProcessID, sandbox.TerminalSize) error
	// TimeLimit returns how long a run, or the wait for a process, may take that asks for timeout, where 0 stands for the
	// server's maximum.
	TimeLimit(timeout time.Duration) time.Duration
}

func (s *Service) startProcess(ctx context.Context, c *call, namespace string, p rpc.ProcessStartParams) (rpc.ProcessStartResult, error) {
	timeout, err := wire.Seconds("timeout", p.Timeout, "for no time limit")
	if err != nil {
		return rpc.ProcessStartResult{}, err
	}
	command, err := parseCommand(p.Command, p.Args, timeout, p.RunOptions, p.Grace)
	if err != nil {
		return rpc.ProcessStartResult{}, err
	}
	req := sandbox.ProcessRequest{Command: command, Tag: p.Tag, OpenInput: p.OpenStdin}
	if p.Terminal != nil {
		size, err := parseTerminal("terminal.", *p.Terminal)
		if err != nil {
			return rpc.ProcessStartResult{}, err
		}
		req.Terminal = &size
	}
	var started sandbox.Started
	c.wait(func() { started, err = s.startAndLeave(ctx, sandbox.Name{Namespace: namespace, Name: p.Sandbox}, req) })
	return rpc.ProcessStartResult{PID: int(started.PID), Tag: p.Tag}, err
}

// startAndLeave starts a process that goes on.
func (s *Service) startAndLeave(ctx context.Context, n sandbox.Name, req sandbox.ProcessRequest) (sandbox.Started, error) {
	p, err := s.sandboxes.StartProcess(ctx, n, req)
	if err != nil {
		return sandbox.Started{}, err
	}
	defer p.Close()
	event, err := p.Next()
	started, ok := event.(sandbox.Started)
	if err == nil && !ok {
		err = errors.New("the first event of a process is not its start")
	}
	return started, err
}

// parseTerminal converts the size of a terminal. prefix precedes the names of its params.
func parseTerminal(prefix string, size rpc.TerminalSize) (sandbox.TerminalSize, error) {
	for _, p := range []struct {
		name  string
		value int
	}{{"cols", size.Cols}, {"rows", size.Rows}} {
		if p.value < 1 || p.value > math.MaxUint16 {
			return sandbox.TerminalSize{}, fmt.Errorf("%s%s %d: give a number from 1 to %d: %w", prefix, p.name, p.value, math.MaxUint16, errdefs.ErrInvalidArgument)
		}
	}
	return sandbox.TerminalSize{Columns: uint16(size.Cols), Rows: uint16(size.Rows)}, nil
}

func (s *Service) listProcesses(ctx context.Context, c *call, namespace string, p rpc.ProcessListParams) (rpc.ProcessListResult, error) {
	res := rpc.ProcessListResult{Processes: []rpc.ProcessInfo{}}
	var err error
	c.wait(func() {
		err = s.sandboxes.ListProcesses(ctx, sandbox.Name{Namespace: namespace, Name: p.Sandbox}, func(p sandbox.ProcessInfo) error {
			info, size := describeProcess(p)
			res.Processes = append(res.Processes, info)
			return c.holdResult(size)
		})
	})
	return res, err
}

// maxProcessText limits the texts of a process in a response, in bytes. The portal cuts them off as well, but it may have been
// replaced.
const maxProcessText = 16 << 10

// describeProcess returns what clients may know about a process, and about how many bytes that takes.
func describeProcess(p sandbox.ProcessInfo) (info rpc.ProcessInfo, size int) {
	left := maxProcessText
	take := func(s string) string {
		s = bounded.Text(s, left)
		left = max(0, left-len(s))
		return s
	}
	info = rpc.ProcessInfo{
		PID: int(p.PID), Args: []string{}, Cwd: take(p.Cwd), User: take(p.User), Tag: take(p.Tag), Terminal: p.Terminal,
		StartedAt: wire.Time(p.StartedAt).Truncate(time.Second), Running: p.Exit == nil, OutputBytes: wire.Count(p.OutputBytes),
	}
	for i, arg := range p.Argv {
		switch {
		case i == 0:
			info.Command = take(arg)
		case left > 0:
			left-- // so that many empty arguments are limited as well
			info.Args = append(info.Args, take(arg))
		}
	}
	if p.Exit != nil {
		info.Exit = new(wire.Exit(*p.Exit))
	}
	return info, maxProcessText - left + processCost
}

// processCost is about how many bytes the description of a process takes beside its texts.
const processCost = 512

func (s *Service) getProcess(ctx context.Context, c *call, namespace string, p rpc.ProcessGetParams) (rpc.ProcessInfo, error) {
	n, id, err := parseProcess(namespace, p.ProcessTarget)
	if err != nil {
		return rpc.ProcessInfo{}, err
	}
	var newest *sandbox.ProcessInfo
	c.wait(func() {
		err = s.sandboxes.ListProcesses(ctx, n, func(p sandbox.ProcessInfo) error {
			if id.PID != 0 && p.PID == id.PID || id.PID == 0 && p.Tag == id.Tag {
				newest = &p
			}
			return nil
		})
	})
	switch {
	case err != nil:
		return rpc.ProcessInfo{}, err
	case newest != nil:
		info, _ := describeProcess(*newest)
		return info, nil
	case id.PID == 0:
		return rpc.ProcessInfo{}, fmt.Errorf("sandbox %s has no process with tag %q: %w", n, bounded.Short(id.Tag), errdefs.ErrNotFound)
	}
	return rpc.ProcessInfo{}, fmt.Errorf("sandbox %s has no process %d: %w", n, id.PID, errdefs.ErrNotFound)
}

// parseProcess returns the sandbox and the process that a request names.
func parseProcess(namespace string, p rpc.ProcessTarget) (n sandbox.Name, id sandbox.ProcessID, err error) {
	n = sandbox.Name{Namespace: namespace, Name: p.Sandbox}
	switch {
	case (p.PID == nil) == (p.Tag == nil):
		return n, id, fmt.Errorf("name the process by either pid or tag: %w", errdefs.ErrInvalidArgument)
	case p.Tag != nil && *p.Tag == "":
		return n, id, fmt.Errorf("tag is empty: %w", errdefs.ErrInvalidArgument)
	case p.Tag != nil:
		return n, sandbox.ProcessID{Tag: *p.Tag}, nil
	case *p.PID < 1 || *p.PID > math.MaxInt32:
		return n, id, fmt.Errorf("pid %d: give the pid of a process that sandbox.process.start started: %w", *p.PID, errdefs.ErrInvalidArgument)
	}
	return n, sandbox.ProcessID{PID: uint32(*p.PID)}, nil
}

func (s *Service) waitForProcess(ctx context.Context, c *call, namespace string, p rpc.ProcessWaitParams) (rpc.ProcessState, error) {
	n, id, err := parseProcess(namespace, p.ProcessTarget)
	if err != nil {
		return rpc.ProcessState{}, err
	}
	timeout, err := parseTimeout(p.Timeout)
	if err != nil {
		return rpc.ProcessState{}, err
	}
	waiting, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	f, err := c.follow(rpc.EncodingUTF8, func() (sandbox.Process, error) {
		p, err := s.sandboxes.AttachProcess(waiting, n, id, sandbox.AttachOptions{NoOutput: true})
		if err == nil { // the process exists
			limit := time.AfterFunc(s.sandboxes.TimeLimit(timeout), func() { cancel(errWaited) })
			context.AfterFunc(waiting, func() { limit.Stop() })
		}
		return p, err
	})
	if errors.Is(err, errWaited) {
		return rpc.ProcessState{Running: true}, nil
	}
	return f.state(), err
}

// errWaited is why the wait for a process ends at its time limit.
var errWaited = errors.New("the process still runs at the time limit of the wait")

// state reports whether the process runs.
func (f followed) state() rpc.ProcessState {
	if f.exit == nil {
		return rpc.ProcessState{Running: true}
	}
	return rpc.ProcessState{Exit: new(wire.Exit(*f.exit))}
}

func (s *Service) signalProcess(ctx context.Context, c *call, namespace string, p rpc.ProcessSignalParams) (none rpc.Empty, err error) {
	n, id, err := parseProcess(namespace, p.ProcessTarget)
	if err != nil {
		return none, err
	}
	signal, err := sandbox.ParseSignal(p.Signal)
	if err != nil {
		return none, err
	}
	c.wait(func() { err = s.sandboxes.SignalProcess(ctx, n, id, signal, p.All) })
	return none, err
}

func (s *Service) writeInput(ctx context.Context, c *call, namespace string, p rpc.ProcessInputParams) (none rpc.Empty, err error) {
	n, id, err := parseProcess(namespace, p.ProcessTarget)
	if err != nil {
		return none, err
	}
	data, err := decodeText("data", p.Data, p.Encoding)
	if err != nil {
		return none, err
	}
	c.wait(func() { err = s.sandboxes.WriteInput(ctx, n, id, bytes.NewReader(data), p.Close) })
	return none, err
}

func (s *Service) resizeTerminal(ctx context.Context, c *call, namespace string, p rpc.ProcessResizeParams) (none rpc.Empty, err error) {
	n, id, err := parseProcess(namespace, p.ProcessTarget)
	if err != nil {
		return none, err
	}
	size, err := parseTerminal("", p.TerminalSize)
	if err != nil {
		return none, err
	}
	c.wait(func() { err = s.sandboxes.ResizeTerminal(ctx, n, id, size) })
	return none, err
}

func (s *Service) readLogs(ctx context.Context, c *call, namespace string, p rpc.ProcessLogsParams) (rpc.ProcessLogsResult, error) {
	f, err := s.attach(ctx, c, namespace, p.ProcessTarget, p.Encoding, sandbox.AttachOptions{Replay: true, NoFollow: true})
	if e, ok := errors.AsType[*rpc.Error](err); ok && e.Code == rpc.CodeExhausted { // the ring buffer is small, but not its JSON
		err = fmt.Errorf("the log has too many lines for one response; request it with the encoding base64: %w", errdefs.ErrFailedPrecondition)
	}
	return rpc.ProcessLogsResult{Output: f.output, SkippedBytes: wire.Count(f.skipped), ProcessState: f.state()}, err
}

func (s *Service) connectProcess(ctx context.Context, c *call, namespace string, p rpc.ProcessConnectParams) (rpc.ProcessConnectResult, error) {
	f, err := s.attach(ctx, c, namespace, p.ProcessTarget, p.Encoding, sandbox.AttachOptions{Replay: p.Replay})
	return rpc.ProcessConnectResult{SkippedBytes: wire.Count(f.skipped), ProcessState: f.state()}, err
}

// attach reads the events of a process that was started before.
func (s *Service) attach(ctx context.Context, c *call, namespace string, p rpc.ProcessTarget, encoding rpc.Encoding, o sandbox.AttachOptions) (followed, error) {
	n, id, err := parseProcess(namespace, p)
	if err != nil {
		return followed{}, err
	}
	if err := checkEncoding(encoding); err != nil {
		return followed{}, err
	}
	return c.follow(encoding, func() (sandbox.Process, error) { return s.sandboxes.AttachProcess(ctx, n, id, o) })
}
