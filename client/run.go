package client

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
)

// Code is code to run in a sandbox. Only Source and one of Language and Context are required.
type Code struct {
	// Language is python, node or bash.
	Language string
	Source   string
	// Context is the name of a context, which knows its language and its user.
	Context string
	// Dir is the working directory. By default, code starts where the run before it ended.
	Dir string
	// Env has NAME=value entries, which override those of the sandbox.
	Env []string
	// User is a name or number, optionally followed by ":" and a group.
	User  string
	Stdin []byte
	// Timeout is the time limit. 0 means the server's maximum. The time that a run waits for other runs of its context
	// counts.
	Timeout time.Duration
	// Interrupt, if it is not nil, interrupts the code for each value that it has, and when it is closed, as Ctrl-C does in a
	// terminal. The run continues until the code has handled that; see sandbox.repl.interrupt in the API. If the interrupt cannot be sent, the run is canceled, and
	// the error says why. The end of the context of Run also interrupts the code, but Run then returns at once.
	Interrupt <-chan struct{}

	// If one of these is set, output is not collected, but passed on while it is printed. Each may be nil. If one of them
	// returns an error, the run is interrupted, and Run returns that error.
	//
	// OnResult is called with each value that the code shows. If only Stdout or Stderr is set, values and tracebacks are printed
	// there as text, as in an interpreter, and the Execution has neither Results nor an Exception.
	Stdout, Stderr io.Writer
	OnResult       func(Result) error
}

// Result is a value that code has shown.
type Result struct{ rpc.Display }

// Format returns the value in a format, such as text/html or image/png. Images and documents are decoded. ok is false if the
// value does not have this format.
func (r Result) Format(mimeType string) (data []byte, ok bool) {
	value, ok := r.Data[mimeType]
	if !ok {
		return nil, false
	}
	var text string
	if json.Unmarshal(value, &text) != nil { // JSON, or an object
		return value, true
	}
	if strings.HasPrefix(mimeType, "image/") && mimeType != "image/svg+xml" || mimeType == "application/pdf" {
		if data, err := base64.StdEncoding.DecodeString(text); err == nil {
			return data, true
		}
	}
	return []byte(text), true
}

// Text returns the value as text, or "" if it has no such format.
func (r Result) Text() string {
	text, _ := r.Format("text/plain")
	return string(text)
}

// PNG returns the value as an image, or nil.
func (r Result) PNG() []byte {
	image, _ := r.Format("image/png")
	return image
}

// Execution is the result of a run of code.
type Execution struct {
	// Stdout and Stderr are empty if Code.Stdout, Code.Stderr or Code.OnResult was set.
	Stdout, Stderr string
	// Results are the values that the code has shown, in their order.
	Results []Result
	// Exception is what the code has raised, or nil.
	Exception *rpc.Exception
	ExitCode  int
	// Count is how many runs the interpreter has begun, this one included.
	Count int
	// StateLost means that the interpreter has ended, so that the context has lost its state. Stderr says why.
	StateLost bool
}

// Text returns the value of the last expression as text, or "".
func (e *Execution) Text() string {
	for _, r := range e.Results {
		if r.IsMain {
			return r.Text()
		}
	}
	return ""
}

// PNG returns the last image that the code has shown, or nil.
func (e *Execution) PNG() (image []byte) {
	for _, r := range e.Results {
		if png := r.PNG(); png != nil {
			image = png
		}
	}
	return image
}

// ExecutionError is the error of code that raised an exception, exited with a code other than 0, or ended its interpreter.
type ExecutionError struct{ *Execution }

func (e *ExecutionError) Error() string {
	switch {
	case e.Exception != nil && e.Exception.Value != "":
		return e.Exception.Name + ": " + e.Exception.Value
	case e.Exception != nil:
		return e.Exception.Name
	}
	return fmt.Sprintf("the code exited with %d", e.ExitCode)
}

// Err returns an *ExecutionError if the code failed, and nil otherwise.
func (e *Execution) Err() error {
	if e.Exception == nil && e.ExitCode == 0 {
		return nil
	}
	return &ExecutionError{e}
}

// Run runs code. That the code fails is not an error of Run: see Execution.Err. Variables and functions that it defines are
// available to the next run in the same context.
//
// A run that reaches its time limit is interrupted, and the error is ErrRunTimeout. A run that began and was lost, or that
// failed in the sandbox itself, is an ErrRunFailed or an errdefs.ErrUnavailable. With an error, the Execution has what was
// received before it; it is nil if nothing was run. Runs are never sent again.
func (s *Sandbox) Run(ctx context.Context, code Code) (*Execution, error) {
	params := rpc.ReplRunParams{
		Sandbox: s.Name, Namespace: namespaceParam(s.Namespace), Language: code.Language, Code: code.Source, Timeout: code.Timeout.Seconds(),
		RunOptions: rpc.RunOptions{
			Cwd: code.Dir, Envs: code.Env, User: code.User,
			// The encoding is also that of the output, which is then exact.
			Stdin: base64.StdEncoding.EncodeToString(code.Stdin), Encoding: rpc.EncodingBase64,
		},
		Context: code.Context,
	}
	streams := code.Stdout != nil || code.Stderr != nil || code.OnResult != nil
	params.Results = !streams || code.OnResult != nil
	if code.Interrupt != nil {
		params.RunID = rand.Text()
		var cancel context.CancelCauseFunc
		ctx, cancel = context.WithCancelCause(ctx)
		defer cancel(nil)
		go func() {
			if err := s.forwardInterrupts(ctx, params.RunID, code.Interrupt); err != nil {
				cancel(fmt.Errorf("interrupt the run: %w", err))
			}
		}()
	}
	r := request{method: rpc.MethodSandboxReplRun, params: params, timeout: runCallTimeout(code.Timeout)}
	if !streams {
		return s.collect(ctx, r)
	}
	return s.follow(ctx, r, code)
}

// interruptRetry is the time between two attempts to interrupt a run whose request has not reached the server yet.
const interruptRetry = 100 * time.Millisecond

// forwardInterrupts interrupts a run for each value from interrupts. It returns when an interrupt has failed, or when ctx, the context
// of the run, has ended.
func (s *Sandbox) forwardInterrupts(ctx context.Context, run string, interrupts <-chan struct{}) error {
	r := request{
		method: rpc.MethodSandboxReplInterrupt, params: rpc.ReplInterruptParams{Target: s.target(), RunID: run},
		timeout: queryTimeout, idempotent: true,
	}
	for {
		select {
		case _, open := <-interrupts:
			if !open {
				interrupts = nil
			}
		case <-ctx.Done():
			return nil
		}
		for {
			_, err := post[rpc.Empty](ctx, s.client, r)
			if err == nil {
				break
			}
			if !errdefs.IsNotFound(err) {
				return err
			}
			select {
			case <-time.After(interruptRetry):
			case <-ctx.Done():
				return nil
			}
		}
	}
}

// collect makes a run whose output is part of the response.
func (s *Sandbox) collect(ctx context.Context, r request) (*Execution, error) {
	res, err := post[rpc.ReplRunResult](ctx, s.client, r)
	if err != nil {
		if e, ok := errors.AsType[*Error](err); ok && e.Output != nil {
			out := &Execution{}
			out.Stdout, out.Stderr = joinLines(e.Output.Output)
			return out, err
		}
		return nil, err
	}
	out := newExecution(&res)
	out.Stdout, out.Stderr = joinLines(res.Output)
	for _, d := range res.Results {
		out.Results = append(out.Results, Result{d})
	}
	out.Exception = res.Error
	return out, nil
}

func newExecution(res *rpc.ReplRunResult) *Execution {
	return &Execution{ExitCode: res.ExitCode, Count: res.Count, StateLost: res.StateLost}
}

// joinLines returns the output of each stream.
func joinLines(lines []rpc.Line) (stdout, stderr string) {
	var text [2]strings.Builder
	for _, l := range lines {
		out := &text[0]
		if l.Stream == "stderr" {
			out = &text[1]
		}
		if l.Base64 != nil {
			out.Write(l.Base64)
			continue
		}
		out.WriteString(l.Text)
		out.WriteByte('\n')
	}
	return text[0].String(), text[1].String()
}

// follow makes a run whose output is passed on while it is printed.
func (s *Sandbox) follow(ctx context.Context, r request, code Code) (*Execution, error) {
	if r.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = withTimeout(ctx, r.timeout)
		defer cancel()
	}
	events, err := openStream(ctx, s.client, r)
	if err != nil {
		return nil, err
	}
	defer events.Close()
	var res rpc.ReplRunResult
	var results []Result
	var exception *rpc.Exception
	for {
		kind, data, err := events.next(&res)
		if err == nil {
			switch kind {
			case rpc.EventOutput:
				err = writeOutput(events, data, code.Stdout, code.Stderr)
			case rpc.EventDisplay:
				var d rpc.Display
				if err = events.decode(data, &d); err == nil {
					results = append(results, Result{d})
				}
				if err == nil && code.OnResult != nil {
					err = code.OnResult(Result{d})
				}
			case rpc.EventException:
				err = events.decode(data, &exception)
			}
		}
		if err == nil {
			continue
		}
		out := newExecution(&res)
		out.Results, out.Exception = results, exception
		if err == io.EOF {
			err = nil
		}
		return out, err
	}
}

// writeOutput passes on the data of an event EventOutput.
func writeOutput(events *events, data []byte, stdout, stderr io.Writer) error {
	var piece rpc.Line
	if err := events.decode(data, &piece); err != nil {
		return err
	}
	w := stdout
	if piece.Stream == "stderr" {
		w = stderr
	}
	if w == nil {
		return nil
	}
	content := piece.Base64
	if content == nil {
		content = []byte(piece.Text)
	}
	_, err := w.Write(content)
	return err
}
