package client

import (
	"context"
	"fmt"
	"io"
	"math"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
)

// Command is a program to start in a sandbox, without a shell. Only Name is required.
type Command struct {
	Name string
	Args []string
	// Dir is the working directory; empty means the workdir of the sandbox.
	Dir string
	// Env has NAME=value entries, which override those of the sandbox.
	Env []string
	// User is a name or number, optionally followed by ":" and a group.
	User string
	Attachment
	// Terminal gives the process a terminal of this size as its standard streams. What it prints goes to Stdout.
	Terminal *rpc.TerminalSize
	// Tag is a name for the process. It need not be unique.
	Tag string
	// Timeout is the time limit. 0 means none for a process that is detached or has a terminal, and the server's maximum for
	// others.
	Timeout time.Duration
	// Grace is the time between SIGTERM at the time limit and SIGKILL. 0 means the server's default.
	Grace time.Duration
	// Detached makes the process go on when the connection ends. Otherwise, it is killed.
	Detached bool
}

// Attachment has the ends of a process's standard streams. Each may be nil.
type Attachment struct {
	// Stdin is read until its end, and then the standard input of the process is closed; on a terminal, Ctrl-D is typed. An error
	// of Stdin ends the connection. It may be read beyond what the process
	// takes, and a Read that is in progress when the process ends is not interrupted.
	Stdin io.Reader
	// If a write to Stdout or Stderr blocks, the program waits. After a minute, the server closes the connection.
	Stdout, Stderr io.Writer
}

// ProcessID names a process of a sandbox: by its PID, or if that is 0 by its tag, which stands for the newest process that
// has it.
type ProcessID struct {
	PID int
	Tag string
}

func (id ProcessID) String() string {
	if id.PID != 0 {
		return strconv.Itoa(id.PID)
	}
	return strconv.Quote(id.Tag)
}

// Process is a connection to a process of a sandbox. It is safe for concurrent use.
type Process struct {
	// PID is the process's pid in the sandbox.
	PID int
	// SkippedBytes is how much the process had printed before the first output.
	SkippedBytes uint64

	client *Client
	conn   *websocket.Conn
	ctx    context.Context
	cancel context.CancelCauseFunc
	// silence cancels ctx, unless the server shows that it is alive.
	silence *time.Timer

	// inputErr is the error of reading Stdin, or nil.
	inputErr atomic.Pointer[error]

	// done is closed when exit and err are set.
	done  chan struct{}
	exit  *rpc.ProcessExit
	err   error
	close sync.Once
}

// StartProcess starts a program. The connection ends when the program has ended, when ctx is done, or with Close. If the
// sandbox does not have the program, the error is ErrCommandNotFound.
func (s *Sandbox) StartProcess(ctx context.Context, command Command) (*Process, error) {
	start := rpc.ExecStart{
		Command: command.Name, Args: command.Args, Cwd: command.Dir, Envs: command.Env, User: command.User, Tag: command.Tag,
		Timeout: command.Timeout.Seconds(), Grace: command.Grace.Seconds(), WithConnection: !command.Detached,
	}
	if command.Stdin == nil && command.Terminal == nil {
		start.Stdin = new(false)
	}
	if t := command.Terminal; t != nil {
		if !validSize(*t) {
			return nil, errInvalidSize
		}
		start.Terminal = &rpc.ExecTerminal{Cols: uint16(t.Cols), Rows: uint16(t.Rows)}
	}
	first, err := json.Marshal(start)
	if err != nil {
		return nil, errorf(errdefs.ErrInvalidArgument, "the command is not valid UTF-8: %w", err)
	}
	return s.openProcess(ctx, url.Values{}, first, command.Attachment, command.Terminal != nil)
}

// AttachProcess connects to a process. With replay, the output begins with what the server remembers. The process goes on when
// the connection ends.
func (s *Sandbox) AttachProcess(ctx context.Context, id ProcessID, replay bool, a Attachment) (*Process, error) {
	query := url.Values{"replay": {strconv.FormatBool(replay)}}
	if id.PID != 0 {
		query.Set("pid", strconv.Itoa(id.PID))
	} else {
		query.Set("tag", id.Tag)
	}
	return s.openProcess(ctx, query, nil, a, false)
}

// openProcess opens a WebSocket, sends the first frame unless it is nil, and waits until the process runs.
func (s *Sandbox) openProcess(ctx context.Context, query url.Values, first []byte, a Attachment, terminal bool) (*Process, error) {
	p := &Process{client: s.client, done: make(chan struct{})}
	p.ctx, p.cancel = context.WithCancelCause(ctx)
	p.silence = time.AfterFunc(maxSilence, func() {
		p.cancel(errorf(context.DeadlineExceeded, "the server has sent nothing for %s", maxSilence))
	})
	var err error
	if p.conn, err = s.dial(p.ctx, rpc.ExecPath, query, p.alive); err != nil {
		p.cancel(nil)
		p.silence.Stop()
		return nil, err
	}
	if err := p.begin(first); err != nil {
		p.Close()
		return nil, err
	}
	if a.Stdin != nil {
		go p.sendInput(a.Stdin, terminal)
	}
	go func() {
		defer close(p.done)
		p.exit, p.err = p.receive(a.Stdout, a.Stderr)
		p.Close()
	}()
	return p, nil
}

func (p *Process) alive() { p.silence.Reset(maxSilence) }

// begin sends the first frame and receives the answer.
func (p *Process) begin(first []byte) error {
	if first != nil {
		if err := p.conn.Write(p.ctx, websocket.MessageText, first); err != nil {
			return p.failed(err)
		}
	}
	_, frame, err := p.conn.Read(p.ctx)
	if err != nil {
		return p.failed(err)
	}
	if err := frameError(frame); err != nil {
		return err
	}
	var started struct {
		Started *rpc.ExecStarted `json:"started"`
	}
	if json.Unmarshal(frame, &started) != nil || started.Started == nil {
		return errorf(errdefs.ErrUnknown, "the server's answer to the start of a process is not valid")
	}
	p.PID, p.SkippedBytes = int(started.Started.PID), started.Started.SkippedBytes
	return nil
}

// failed returns the error for a connection that does not work.
func (p *Process) failed(err error) error {
	if inputErr := p.inputErr.Load(); inputErr != nil {
		return *inputErr
	}
	if p.ctx.Err() != nil {
		return contextError(p.ctx)
	}
	return p.client.closed("the connection to the process", err)
}

// receive passes on the output until the process has ended.
func (p *Process) receive(stdout, stderr io.Writer) (*rpc.ProcessExit, error) {
	for {
		p.alive()
		kind, frame, err := p.conn.Read(p.ctx)
		if err != nil {
			return nil, p.failed(err)
		}
		p.silence.Stop() // while the caller is busy
		if kind == websocket.MessageBinary {
			if err := passOn(frame, stdout, stderr); err != nil {
				return nil, err
			}
			continue
		}
		if err := frameError(frame); err != nil {
			return nil, err
		}
		// A warning says that something which was sent had no effect, because the process has ended.
		var end struct {
			Exit     *int   `json:"exit"`
			Signal   string `json:"signal"`
			TimedOut bool   `json:"timed_out"`
			Reason   string `json:"reason"`
		}
		if err := json.Unmarshal(frame, &end); err != nil {
			return nil, errorf(errdefs.ErrUnknown, "the server has sent a frame that is not valid: %w", err)
		}
		if end.Exit != nil {
			return &rpc.ProcessExit{ExitCode: *end.Exit, Signal: end.Signal, TimedOut: end.TimedOut, Reason: end.Reason}, nil
		}
	}
}

func passOn(frame []byte, stdout, stderr io.Writer) error {
	if len(frame) == 0 {
		return nil
	}
	w := stdout
	if frame[0] == rpc.ChannelError {
		w = stderr
	}
	if w == nil {
		return nil
	}
	_, err := w.Write(frame[1:])
	return err
}

// sendInput sends what it reads, and then closes the standard input.
func (p *Process) sendInput(from io.Reader, terminal bool) {
	buffer := make([]byte, 1+32<<10)
	buffer[0] = rpc.ChannelInput
	for {
		n, err := from.Read(buffer[1:])
		if n > 0 {
			if p.conn.Write(p.ctx, websocket.MessageBinary, buffer[:1+n]) != nil {
				return // receive reports why
			}
		}
		if err == nil {
			continue
		}
		if err != io.EOF { // the program must not take it for the end of its input
			err = fmt.Errorf("read the standard input: %w", err)
			p.inputErr.Store(&err)
			p.Close()
			return
		}
		if terminal { // whose input cannot be closed, but its programs end at Ctrl-D
			_ = p.conn.Write(p.ctx, websocket.MessageBinary, []byte{rpc.ChannelInput, 4})
		} else {
			_ = p.control(rpc.ExecControl{CloseStdin: true})
		}
		return
	}
}

// Signal sends a signal to the process, or with all to everything that it has started. The signal is a name, with or without SIG,
// or a number. It has no effect on a process that has ended.
func (p *Process) Signal(signal string, all bool) error {
	return p.control(rpc.ExecControl{Signal: signal, All: all})
}

// Resize changes the size of the process's terminal.
func (p *Process) Resize(size rpc.TerminalSize) error {
	if !validSize(size) {
		return errInvalidSize
	}
	return p.control(rpc.ExecControl{Resize: &[2]uint16{uint16(size.Cols), uint16(size.Rows)}})
}

var errInvalidSize = errorf(errdefs.ErrInvalidArgument, "a terminal has 1 to 65535 columns and rows")

func validSize(s rpc.TerminalSize) bool {
	return s.Cols > 0 && s.Cols <= math.MaxUint16 && s.Rows > 0 && s.Rows <= math.MaxUint16
}

func (p *Process) control(c rpc.ExecControl) error {
	frame, err := json.Marshal(c)
	if err != nil {
		return errorf(errdefs.ErrInvalidArgument, "%w", err)
	}
	err = p.conn.Write(p.ctx, websocket.MessageText, frame)
	select {
	case <-p.done: // what was sent has no effect
		return nil
	default:
	}
	if err != nil {
		return p.failed(err)
	}
	return nil
}

// Wait waits until the process has ended and all of its output was passed on, or until the connection has ended, and then
// returns an error. An exit code other than 0 is not an error. While a write to Stdout or Stderr blocks, Wait does not return, even
// after Close.
func (p *Process) Wait() (*rpc.ProcessExit, error) {
	<-p.done
	return p.exit, p.err
}

// Close closes the connection. Unless the process is detached, it is killed.
func (p *Process) Close() error {
	p.close.Do(func() {
		p.cancel(nil)
		p.silence.Stop()
		_ = p.conn.CloseNow()
	})
	return nil
}

// Processes returns the processes that run and those that the server remembers, in the order of their start.
func (s *Sandbox) Processes(ctx context.Context) ([]rpc.ProcessInfo, error) {
	res, err := post[rpc.ProcessListResult](ctx, s.client, request{
		method: rpc.MethodProcessList, params: rpc.ProcessListParams{Target: s.target()}, timeout: queryTimeout, idempotent: true,
	})
	return res.Processes, err
}

// ProcessLogs returns the last output of a process that the server remembers, in pieces that are exactly what was printed.
func (s *Sandbox) ProcessLogs(ctx context.Context, id ProcessID) (*rpc.ProcessLogsResult, error) {
	res, err := post[rpc.ProcessLogsResult](ctx, s.client, request{
		method:  rpc.MethodProcessLogs,
		params:  rpc.ProcessLogsParams{ProcessTarget: s.processTarget(id), Encoding: rpc.EncodingBase64},
		timeout: queryTimeout, idempotent: true,
	})
	if err != nil {
		return nil, err
	}
	return &res, nil
}

// SignalProcess sends a signal to a process, or with all to everything that it has started. The signal is a name, with or
// without SIG, or a number.
func (s *Sandbox) SignalProcess(ctx context.Context, id ProcessID, signal string, all bool) error {
	_, err := post[rpc.Empty](ctx, s.client, request{
		method:  rpc.MethodProcessSignal,
		params:  rpc.ProcessSignalParams{ProcessTarget: s.processTarget(id), Signal: signal, All: all},
		timeout: queryTimeout,
	})
	return err
}

// WaitProcess waits until a process has ended, at most for timeout. 0 means the server's maximum. A process that still runs
// is not an error.
func (s *Sandbox) WaitProcess(ctx context.Context, id ProcessID, timeout time.Duration) (*rpc.ProcessState, error) {
	res, err := post[rpc.ProcessState](ctx, s.client, request{
		method:  rpc.MethodProcessWait,
		params:  rpc.ProcessWaitParams{ProcessTarget: s.processTarget(id), Timeout: timeout.Seconds()},
		timeout: runCallTimeout(timeout), idempotent: true,
	})
	if err != nil {
		return nil, err
	}
	return &res, nil
}

func (s *Sandbox) target() rpc.Target {
	return rpc.Target{Sandbox: s.Name, Namespace: namespaceParam(s.Namespace)}
}

func (s *Sandbox) processTarget(id ProcessID) rpc.ProcessTarget {
	t := rpc.ProcessTarget{Target: s.target()}
	if id.PID != 0 {
		t.PID = &id.PID
	} else {
		t.Tag = &id.Tag
	}
	return t
}
