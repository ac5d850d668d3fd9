package stream

import (
	"errors"
	"fmt"
	"strings"

	"github.com/coder/websocket"
	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/wire"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// parseStart returns the process that the first frame of a client asks for. The error is a *mistake or
// errdefs.ErrInvalidArgument.
func parseStart(frame []byte) (sandbox.ProcessRequest, error) {
	var start rpc.ExecStart
	if err := parseFrame(frame, &start); err != nil {
		return sandbox.ProcessRequest{}, err
	}
	if start.Command == "" {
		return sandbox.ProcessRequest{}, fmt.Errorf("command is missing; name a program to run: %w", errdefs.ErrInvalidArgument)
	}
	timeout, err := wire.Seconds("timeout", start.Timeout, "to use the default")
	if err != nil {
		return sandbox.ProcessRequest{}, err
	}
	grace, err := wire.Seconds("grace", start.Grace, "to use the default")
	if err != nil {
		return sandbox.ProcessRequest{}, err
	}
	req := sandbox.ProcessRequest{
		Command: sandbox.Command{
			Program: start.Command, Args: start.Args, Timeout: timeout,
			RunOptions: sandbox.RunOptions{Env: start.Envs, Cwd: start.Cwd, User: start.User, Grace: grace},
		},
		Tag: start.Tag, OpenInput: start.Stdin == nil || *start.Stdin, WithCall: start.WithConnection,
	}
	if start.Terminal != nil {
		req.Terminal = &sandbox.TerminalSize{Columns: start.Terminal.Cols, Rows: start.Terminal.Rows}
	}
	return req, nil
}

// control is what a text frame of a client asks for, other than the first. One of the fields is set.
type control struct {
	resize     *sandbox.TerminalSize
	closeInput bool
	signal     int
	all        bool // with signal
}

// parseControl returns what a text frame asks for. The error is a *mistake or errdefs.ErrInvalidArgument.
func parseControl(frame []byte) (c control, err error) {
	var in rpc.ExecControl
	if err := parseFrame(frame, &in); err != nil {
		return c, err
	}
	members := 0
	if in.Resize != nil {
		members++
		c.resize = &sandbox.TerminalSize{Columns: in.Resize[0], Rows: in.Resize[1]}
		if in.Resize[0] == 0 || in.Resize[1] == 0 {
			return c, fmt.Errorf("resize: give at least one column and one row: %w", errdefs.ErrInvalidArgument)
		}
	}
	if in.CloseStdin {
		members++
		c.closeInput = true
	}
	if in.Signal != "" {
		members++
		c.all = in.All
		if c.signal, err = sandbox.ParseSignal(in.Signal); err != nil {
			return c, err
		}
	}
	if members != 1 || in.All && in.Signal == "" {
		return control{}, newMistake(websocket.StatusPolicyViolation, "a text frame has one of the members resize, close_stdin and signal, and only with signal the member all")
	}
	return c, nil
}

// parseFrame decodes strict JSON.
func parseFrame(frame []byte, value any) error {
	err := json.Unmarshal(frame, value, json.RejectUnknownMembers(true))
	if err == nil {
		return nil
	}
	reason := strings.TrimPrefix(err.Error(), "jsontext: ")
	if e, ok := errors.AsType[*json.SemanticError](err); ok {
		member := bounded.Short(strings.ReplaceAll(strings.TrimPrefix(string(e.JSONPointer), "/"), "/", "."))
		reason = fmt.Sprintf("the member %q has the wrong type", member)
		if errors.Is(e.Err, json.ErrUnknownName) {
			reason = fmt.Sprintf("there is no member %q", member)
		} else if member == "" {
			reason = "it must be an object"
		}
	}
	return newMistake(websocket.StatusPolicyViolation, "the text frame is not valid: "+bounded.Text(reason, 300))
}
