package stream

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"github.com/coder/websocket"
	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

const (
	// maxControl limits a text frame of a client other than the first, in bytes.
	maxControl = 4 << 10
	// maxReason limits the text of the reason why a process was killed, in bytes.
	maxReason = 1 << 10
)

// exec is a WebSocket that is connected to a process.
type exec struct {
	*socket
	sandboxes Sandboxes
	name      sandbox.Name
	// processes gets the function that starts or attaches to the process.
	processes chan func(context.Context) (sandbox.Process, error)
	// started is closed when the process has started. From then on, id names it.
	started chan struct{}
	id      sandbox.ProcessID
	input   *input

	// These are for the receiver.
	requested  bool // whether processes has got its function
	inputEnded bool
	buffer     [32 << 10]byte
}

// exec starts a process or attaches to one, and connects it to a WebSocket.
func (s *service) exec(c *gateway.Call, w http.ResponseWriter, r *http.Request) error {
	name, params, err := target(c, r, "pid", "tag", "replay")
	if err != nil {
		return err
	}
	id, options, attach, err := params.process()
	if err != nil {
		return err
	}
	e := &exec{
		sandboxes: s.sandboxes, name: name, input: newInput(c.Hold), started: make(chan struct{}),
		processes: make(chan func(context.Context) (sandbox.Process, error), 1),
	}
	if attach {
		e.request(func(ctx context.Context) (sandbox.Process, error) {
			return s.sandboxes.AttachProcess(ctx, name, id, options)
		})
	}
	if e.socket, err = accept(c, w, r); err != nil {
		return err
	}
	return e.serve(r.Context(), e.receive, e.send, e.sendInput)
}

// process returns the process that the parameters name. attach is false if they name none.
func (p parameters) process() (id sandbox.ProcessID, o sandbox.AttachOptions, attach bool, err error) {
	pid, hasPID := p.get("pid")
	tag, hasTag := p.get("tag")
	_, hasReplay := p.get("replay")
	switch {
	case hasPID && hasTag:
		return id, o, false, fmt.Errorf("give either pid or tag: %w", errdefs.ErrInvalidArgument)
	case hasPID:
		n, err := strconv.ParseUint(pid, 10, 32)
		if err != nil || n == 0 {
			return id, o, false, fmt.Errorf("pid %q: give the number of a process: %w", bounded.Short(pid), errdefs.ErrInvalidArgument)
		}
		id.PID = uint32(n)
	case hasTag && tag == "":
		return id, o, false, fmt.Errorf("tag is empty: %w", errdefs.ErrInvalidArgument)
	case hasTag:
		id.Tag = tag
	case hasReplay:
		return id, o, false, fmt.Errorf("replay needs the parameter pid or tag: %w", errdefs.ErrInvalidArgument)
	}
	o.Replay, err = p.flag("replay")
	return id, o, hasPID || hasTag, err
}

// request makes send begin.
func (e *exec) request(open func(context.Context) (sandbox.Process, error)) {
	e.requested = true
	e.processes <- open
}

// send sends the events of the process. It returns errFinished after the exit.
func (e *exec) send(ctx context.Context) error {
	var open func(context.Context) (sandbox.Process, error)
	select {
	case open = <-e.processes:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	process, err := open(ctx)
	if err != nil {
		return err
	}
	defer process.Close()
	var frame []byte
	for {
		event, err := process.Next()
		if err == io.EOF {
			return fmt.Errorf("the sandbox sent no exit of the process: %w", sandbox.ErrRunFailed)
		}
		if err != nil {
			return err
		}
		if ctx.Err() != nil { // nothing is sent after the key was revoked
			return context.Cause(ctx)
		}
		switch event := event.(type) {
		case sandbox.Started:
			if e.id.PID != 0 || event.PID == 0 {
				return fmt.Errorf("the sandbox sent an invalid event: %w", sandbox.ErrRunFailed)
			}
			err = e.writeJSON(struct {
				Started rpc.ExecStarted `json:"started"`
			}{rpc.ExecStarted{PID: event.PID, SkippedBytes: event.SkippedBytes}})
			e.id.PID = event.PID
			close(e.started)
		case sandbox.Output:
			channel := byte(rpc.ChannelOutput)
			if event.Stream == sandbox.Stderr {
				channel = rpc.ChannelError
			}
			frame = append(append(frame[:0], channel), event.Data...)
			err = e.write(websocket.MessageBinary, frame)
		case sandbox.Exit:
			exit := rpc.ExecExit{Exit: event.Code, TimedOut: event.TimedOut, Reason: bounded.Text(event.Reason, maxReason)}
			if event.Signal != 0 {
				exit.Signal = sandbox.SignalName(event.Signal)
			}
			if err = e.writeJSON(exit); err == nil {
				err = errFinished
			}
		}
		if err != nil {
			return err
		}
	}
}

// receive handles a message of the client.
func (e *exec) receive(ctx context.Context, messageType websocket.MessageType, message io.Reader) error {
	switch {
	case !e.requested && messageType == websocket.MessageText:
		return e.receiveStart(message)
	case !e.requested:
		return newMistake(websocket.StatusPolicyViolation, "the first frame must be a text frame with the command")
	case messageType == websocket.MessageText:
		return e.receiveControl(ctx, message)
	default:
		return e.receiveInput(ctx, message)
	}
}

// receiveStart handles the message that asks for a process. What it has beyond freeInput bytes counts as held in memory.
func (e *exec) receiveStart(message io.Reader) error {
	var frame bytes.Buffer
	for {
		_, err := io.CopyN(&frame, message, freeInput)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if e.call.Hold(freeInput) != nil {
			return fmt.Errorf("the requests of this key take too much memory; wait until some of them finish: %w", errdefs.ErrResourceExhausted)
		}
	}
	req, err := parseStart(frame.Bytes())
	if err != nil {
		return err
	}
	e.request(func(ctx context.Context) (sandbox.Process, error) { return e.sandboxes.StartProcess(ctx, e.name, req) })
	return nil
}

// receiveControl handles a text message.
func (e *exec) receiveControl(ctx context.Context, message io.Reader) error {
	n, err := io.ReadFull(message, e.buffer[:maxControl+1])
	switch {
	case err == nil:
		return newMistake(websocket.StatusMessageTooBig, fmt.Sprintf("a text frame has at most %d bytes", maxControl))
	case err != io.EOF && err != io.ErrUnexpectedEOF:
		return err
	}
	control, err := parseControl(e.buffer[:n])
	if err != nil {
		return err
	}
	if control.closeInput {
		if e.inputEnded {
			return errInputEnded
		}
		e.inputEnded = true
		e.input.end()
		return nil
	}
	if err := e.waitForStart(ctx); err != nil {
		return err
	}
	if control.resize != nil {
		return e.warn(e.sandboxes.ResizeTerminal(ctx, e.name, e.id, *control.resize))
	}
	return e.warn(e.sandboxes.SignalProcess(ctx, e.name, e.id, control.signal, control.all))
}

var errInputEnded = newMistake(websocket.StatusPolicyViolation, "the standard input has already been closed")

// receiveInput handles a binary message. It waits until the process has read so much that the input has room.
func (e *exec) receiveInput(ctx context.Context, message io.Reader) error {
	if n, err := io.ReadFull(message, e.buffer[:1]); err != nil && err != io.EOF {
		return err
	} else if n == 0 || e.buffer[0] != rpc.ChannelInput {
		return newMistake(websocket.StatusPolicyViolation, "a binary frame begins with the byte 0, for the standard input")
	}
	if e.inputEnded {
		return errInputEnded
	}
	for {
		n, err := message.Read(e.buffer[:])
		if n > 0 {
			if err := e.input.write(ctx, e.buffer[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// sendInput copies the input to the process.
func (e *exec) sendInput(ctx context.Context) error {
	input := e.input.reader(ctx)
	if err := input.wait(); err != nil {
		return err
	}
	if err := e.waitForStart(ctx); err != nil {
		return err
	}
	if err := e.warn(e.sandboxes.WriteInput(ctx, e.name, e.id, input, true)); err != nil {
		return err
	}
	// If the process does not accept all of it, discard the rest, so that the receiver still gets signals.
	_, _ = io.Copy(io.Discard, input)
	return nil
}

func (e *exec) waitForStart(ctx context.Context) error {
	select {
	case <-e.started:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// warn reports err to the client if it means that the process does not accept what the client sent, because it has ended or
// has no input or no terminal. Otherwise warn returns err.
func (e *exec) warn(err error) error {
	if !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) {
		return err
	}
	rpcErr := rpcerr.JSONRPC(err, e.call.ID)
	return e.writeJSON(struct {
		Warning rpc.FrameError `json:"warning"`
	}{rpc.FrameError{Code: rpcErr.Code, Message: rpcErr.Message}})
}
