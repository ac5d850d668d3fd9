package sandboxtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// Guest fakes the inside of a sandbox: it interprets a few commands and statements.
//
// The commands are true, false, yes, "echo ARGS", "sleep SECONDS", and "sh -c SCRIPT", where SCRIPT consists of these
// commands and "exit N", separated by ";". Each of them may end with " >&2".
//
// The Python statements, one to a line, are imports (ignored), "NAME = EXPRESSION", "EXPRESSION", "print(EXPRESSION)",
// "raise NAME", "time.sleep(SECONDS)" and "while True: print('TEXT')". An EXPRESSION is a number, a name, a sum or product
// of two of these, or, except in an assignment, a quoted string. Node works like Python.
type Guest struct {
	// OnRun, if set, is called before each process, with its sandbox.Code or sandbox.Command. If it returns an error, the
	// process ends with that error.
	OnRun func(ctx context.Context, run any) error
	// OnWarm, if set, is called by Warm, whose error it returns.
	OnWarm func(ctx context.Context, languages []sandbox.Language) error

	mu          sync.Mutex
	repls       map[sandbox.Language]map[string]int
	directories map[string]bool
}

// AbsentUser is the only user that a Guest does not have.
const AbsentUser = "no-such-user"

// NewGuest returns a Guest with new REPLs.
func NewGuest() *Guest {
	return &Guest{repls: map[sandbox.Language]map[string]int{}, directories: map[string]bool{"/": true}}
}

// Connect returns a connection to the guest. It can be used as sandbox.Options.Connect. The connection owns the stream and
// is closed when the stream ends. If stream is nil, the connection is only closed by Close.
func (g *Guest) Connect(_ context.Context, stream io.ReadWriteCloser, _ sandbox.Attach) (sandbox.Portal, error) {
	p := &portal{guest: g, stream: stream, procs: map[*proc]bool{}}
	if stream != nil {
		go func() {
			io.Copy(io.Discard, stream)
			p.Close()
		}()
	}
	return p, nil
}

// portal is a connection to a Guest. It has no processes that outlive their calls, no contexts, and no files but the
// directories that are created, and /etc/passwd.
type portal struct {
	sandbox.Contexts
	sandbox.Processes
	sandbox.Files
	guest  *Guest
	stream io.ReadWriteCloser

	mu     sync.Mutex
	closed bool
	procs  map[*proc]bool
}

var (
	errClosed = fmt.Errorf("the connection to the sandbox does not work (closed): %w", errdefs.ErrUnavailable)
	errLost   = fmt.Errorf("the connection to the sandbox was lost, for example because a program in it ended the connection. "+
		"The request may have taken effect: check before you repeat it: %w", sandbox.ErrRunFailed)
)

// Ping implements sandbox.Portal.
func (p *portal) Ping(context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return errClosed
	}
	return nil
}

// Close implements sandbox.Portal.
func (p *portal) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	for proc := range p.procs {
		proc.stop(errLost)
	}
	if p.stream != nil {
		return p.stream.Close()
	}
	return nil
}

// Warm implements sandbox.Contexts.
func (p *portal) Warm(ctx context.Context, languages []sandbox.Language) ([]sandbox.Language, error) {
	p.mu.Lock()
	closed := p.closed
	p.mu.Unlock()
	if closed {
		return nil, errClosed
	}
	if p.guest.OnWarm != nil {
		return languages, p.guest.OnWarm(ctx, languages)
	}
	return languages, nil
}

// MakeDirectory implements sandbox.Files.
func (p *portal) MakeDirectory(_ context.Context, path sandbox.Path, _ *uint32) (sandbox.FileInfo, bool, error) {
	info := sandbox.FileInfo{Path: path.Path, Type: sandbox.Directory, Mode: 0o755, User: path.User}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return info, false, errClosed
	case path.User == AbsentUser:
		return info, false, fmt.Errorf("user %q does not exist in the sandbox: %w", path.User, errdefs.ErrInvalidArgument)
	case strings.HasPrefix(path.Path+"/", "/etc/passwd/"):
		return info, false, fmt.Errorf("%q is not a directory: %w", path.Path, errdefs.ErrFailedPrecondition)
	}
	p.guest.mu.Lock()
	defer p.guest.mu.Unlock()
	exists := p.guest.directories[path.Path]
	p.guest.directories[path.Path] = true
	return info, !exists, nil
}

// Dial implements sandbox.Portal.
func (p *portal) Dial(context.Context, sandbox.Address) (sandbox.Conn, error) {
	return nil, fmt.Errorf("nothing listens there: %w", errdefs.ErrNotFound)
}

// RunCode implements sandbox.Portal.
func (p *portal) RunCode(ctx context.Context, code sandbox.Code) (sandbox.Process, error) {
	return p.start(ctx, code.Timeout, code, func(r *proc) (int, error) {
		if code.Language != sandbox.Python && code.Language != sandbox.Node {
			return 0, fmt.Errorf("the portal does not support language %q: %w", code.Language, errdefs.ErrInvalidArgument)
		}
		r.interrupt = code.Interrupts
		exit, err := p.guest.code(r, code)
		if err == errInterrupted {
			r.interrupt = nil
			return 1, r.print(sandbox.Stderr, "KeyboardInterrupt\n")
		}
		return exit, err
	})
}

// RunCommand implements sandbox.Portal.
func (p *portal) RunCommand(ctx context.Context, command sandbox.Command) (sandbox.Process, error) {
	return p.start(ctx, command.Timeout, command, func(r *proc) (int, error) {
		return r.command(append([]string{command.Program}, command.Args...), sandbox.Stdout)
	})
}

// StartProcess implements sandbox.Processes, for processes that end with their call.
func (p *portal) StartProcess(ctx context.Context, req sandbox.ProcessRequest) (sandbox.Process, error) {
	return p.start(ctx, req.Timeout, req.Command, func(r *proc) (int, error) {
		err := find(req.Program)
		if err == nil {
			err = r.emit(sandbox.Started{PID: 41})
		}
		if err != nil {
			return 0, err
		}
		return r.command(append([]string{req.Program}, req.Args...), sandbox.Stdout)
	})
}

// proc is a fake process. It runs in a goroutine that blocks until each event is read, as a real process blocks until its
// output is read.
type proc struct {
	ctx       context.Context
	stop      context.CancelCauseFunc
	interrupt <-chan struct{} // has a value for an interrupt; nil if the process cannot be interrupted
	events    chan sandbox.Event
	done      chan struct{} // closed when the goroutine has ended
	err       error         // the error of the process, set before done is closed
	eof       bool
}

// errInterrupted ends code that is interrupted.
var errInterrupted = errors.New("interrupted")

func (p *portal) start(ctx context.Context, timeout time.Duration, run any, body func(*proc) (int, error)) (sandbox.Process, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errClosed
	}
	ctx, stop := context.WithCancelCause(ctx)
	r := &proc{ctx: ctx, stop: stop, events: make(chan sandbox.Event), done: make(chan struct{})}
	p.procs[r] = true
	go func() {
		defer close(r.done)
		defer func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			delete(p.procs, r)
		}()
		if timeout > 0 {
			limit := time.AfterFunc(timeout, func() { stop(runTimeout{timeout}) })
			defer limit.Stop()
		}
		if onRun := p.guest.OnRun; onRun != nil {
			if r.err = onRun(ctx, run); r.err != nil {
				return
			}
		}
		code, err := body(r)
		if err == nil {
			err = r.emit(sandbox.Exit{Code: code})
		}
		r.err = err
	}()
	return r, nil
}

// runTimeout is sandbox.ErrRunTimeout with the portal's message.
type runTimeout struct{ limit time.Duration }

func (e runTimeout) Error() string {
	return fmt.Sprintf("the run reached its time limit of %s and was interrupted", e.limit)
}

func (runTimeout) Unwrap() error { return sandbox.ErrRunTimeout }

// Next implements sandbox.Process.
func (r *proc) Next() (sandbox.Event, error) {
	if r.eof {
		return nil, io.EOF
	}
	select {
	case event := <-r.events:
		_, r.eof = event.(sandbox.Exit)
		return event, nil
	case <-r.done:
		return nil, r.err
	}
}

// Close implements sandbox.Process.
func (r *proc) Close() error {
	r.stop(context.Canceled)
	<-r.done
	return nil
}

func (r *proc) emit(event sandbox.Event) error {
	select {
	case r.events <- event:
		return nil
	case <-r.interrupt:
		return errInterrupted
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}

func (r *proc) print(stream sandbox.Stream, text string) error {
	return r.emit(sandbox.Output{Stream: stream, Data: []byte(text)})
}

func (r *proc) sleep(seconds string) error {
	n, err := strconv.ParseFloat(seconds, 64)
	if err != nil {
		return err
	}
	select {
	case <-time.After(time.Duration(n * float64(time.Second))):
		return nil
	case <-r.interrupt:
		return errInterrupted
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}

// find returns an error if there is no such program, or if it cannot be run.
func find(program string) error {
	switch program {
	case "":
		return fmt.Errorf("command is empty: %w", errdefs.ErrInvalidArgument)
	case "true", "false", "echo", "yes", "sleep", "sh":
		return nil
	case "/etc/passwd":
		return fmt.Errorf("%s is not executable: %w", program, sandbox.ErrCommandNotExecutable)
	}
	hint := ""
	if strings.Contains(program, " ") {
		hint = fmt.Sprintf(`, because this is a command line, not the name of a program; use command "sh" with args ["-c", %q]`, program)
	}
	return fmt.Errorf("program %q not found in PATH%s: %w", program, hint, sandbox.ErrCommandNotFound)
}

func (r *proc) command(args []string, stdout sandbox.Stream) (int, error) {
	if err := find(args[0]); err != nil {
		return 0, err
	}
	switch {
	case args[0] == "false":
		return 1, nil
	case args[0] == "echo":
		return 0, r.print(stdout, strings.Join(args[1:], " ")+"\n")
	case args[0] == "yes":
		for {
			if err := r.print(stdout, strings.Repeat("y\n", 1<<14)); err != nil {
				return 0, err
			}
		}
	case args[0] == "sleep" && len(args) == 2:
		return 0, r.sleep(args[1])
	case args[0] == "sh" && len(args) == 3 && args[1] == "-c":
		return r.script(args[2])
	}
	return 0, nil
}

func (r *proc) script(script string) (code int, err error) {
	for line := range strings.SplitSeq(script, ";") {
		line, toStderr := strings.CutSuffix(strings.TrimSpace(line), " >&2")
		if n, ok := strings.CutPrefix(line, "exit "); ok {
			return strconv.Atoi(n)
		}
		stdout := sandbox.Stdout
		if toStderr {
			stdout = sandbox.Stderr
		}
		if code, err = r.command(strings.Fields(line), stdout); err != nil {
			return 0, err
		}
	}
	return code, nil
}

// code runs a program line by line. It prints the value of every expression.
func (g *Guest) code(r *proc, code sandbox.Code) (int, error) {
	g.mu.Lock()
	vars := g.repls[code.Language]
	if vars == nil {
		vars = map[string]int{}
		g.repls[code.Language] = vars
	}
	g.mu.Unlock()
	for line := range strings.SplitSeq(code.Text, "\n") {
		line = strings.TrimSpace(line)
		name, value, assigns := strings.Cut(line, " = ")
		inner, isCall := strings.CutSuffix(line, ")")
		switch {
		case line == "" || strings.HasPrefix(line, "import "):
		case strings.HasPrefix(line, "raise "):
			return 1, r.print(sandbox.Stderr, "Traceback (most recent call last):\n"+strings.TrimPrefix(line, "raise ")+"\n")
		case strings.HasPrefix(line, "while True: print('"):
			text := strings.TrimSuffix(strings.TrimPrefix(line, "while True: print('"), "')") + "\n"
			for {
				if err := r.print(sandbox.Stdout, text); err != nil {
					return 0, err
				}
			}
		case isCall && strings.HasPrefix(inner, "time.sleep("):
			if err := r.sleep(strings.TrimPrefix(inner, "time.sleep(")); err != nil {
				return 0, err
			}
		case assigns:
			n, ok := evaluate(vars, value)
			if !ok {
				return 1, r.print(sandbox.Stderr, "NameError: "+value+"\n")
			}
			vars[name] = n
		default:
			if isCall {
				line = strings.TrimPrefix(inner, "print(")
			}
			text := strings.Trim(line, `'"`)
			if text == line {
				n, ok := evaluate(vars, line)
				if !ok {
					return 1, r.print(sandbox.Stderr, "NameError: "+line+"\n")
				}
				text = strconv.Itoa(n)
			}
			if err := r.print(sandbox.Stdout, text+"\n"); err != nil {
				return 0, err
			}
		}
	}
	return 0, nil
}

// evaluate returns the value of a number, a variable, or a sum or product of two of these, and whether it is defined.
func evaluate(vars map[string]int, expression string) (int, bool) {
	number := func(text string) (int, bool) {
		text = strings.TrimSpace(text)
		if n, ok := vars[text]; ok {
			return n, true
		}
		n, err := strconv.Atoi(text)
		return n, err == nil
	}
	for _, operator := range []string{"+", "*"} {
		left, right, found := strings.Cut(expression, operator)
		if !found {
			continue
		}
		a, okA := number(left)
		b, okB := number(right)
		if operator == "+" {
			return a + b, okA && okB
		}
		return a * b, okA && okB
	}
	return number(expression)
}
