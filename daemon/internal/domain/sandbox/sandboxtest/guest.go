package sandboxtest

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// Guest stands for what is inside a sandbox: it runs nothing, but behaves as if it did. It knows these commands: true, false, yes,
// "echo ARGS", "sleep SECONDS", and "sh -c SCRIPT" with commands of these and "exit N", separated by ";", of which each
// may end with " >&2". Of Python it knows "NAME = NUMBER", "NAME", "NUMBER + NUMBER" with names for numbers, too,
// "raise NAME", "print(...)" of one of these, "time.sleep(SECONDS)", and "while True: print('TEXT')"; one statement to a
// line. Node is like Python.
type Guest struct {
	// OnRun, when it is set, runs before each process. It gets a sandbox.Code or a sandbox.Command; its error ends the
	// process.
	OnRun func(ctx context.Context, run any) error

	mu    sync.Mutex
	repls map[sandbox.Language]map[string]int
}

// NewGuest returns a Guest whose REPLs have not been used.
func NewGuest() *Guest { return &Guest{repls: map[sandbox.Language]map[string]int{}} }

// Connect returns a connection to the guest, which owns the stream and ends with it. A nil stream never ends. It is
// what sandbox.Options.Connect wants.
func (g *Guest) Connect(_ context.Context, stream io.ReadWriteCloser) (sandbox.Portal, error) {
	p := &portal{guest: g, stream: stream, procs: map[*proc]bool{}}
	if stream != nil {
		go func() {
			io.Copy(io.Discard, stream)
			p.Close()
		}()
	}
	return p, nil
}

// portal is a connection to a Guest.
type portal struct {
	guest  *Guest
	stream io.ReadWriteCloser

	mu     sync.Mutex
	closed bool
	procs  map[*proc]bool
}

var errClosed = fmt.Errorf("connection to the sandbox is lost (closed): %w", errdefs.ErrUnavailable)

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
	for r := range p.procs {
		r.stop(errClosed)
	}
	if p.stream != nil {
		return p.stream.Close()
	}
	return nil
}

// RunCode implements sandbox.Portal.
func (p *portal) RunCode(ctx context.Context, code sandbox.Code) (sandbox.Process, error) {
	if code.Language != sandbox.Python && code.Language != sandbox.Node {
		return nil, fmt.Errorf("language %q is not one of the portal's: %w", code.Language, errdefs.ErrInvalidArgument)
	}
	return p.start(ctx, code.Timeout, code, func(r *proc) (int, error) { return p.guest.code(r, code) })
}

// RunCommand implements sandbox.Portal.
func (p *portal) RunCommand(ctx context.Context, command sandbox.Command) (sandbox.Process, error) {
	return p.start(ctx, command.Timeout, command, func(r *proc) (int, error) {
		return r.command(append([]string{command.Program}, command.Args...), sandbox.Stdout)
	})
}

// proc is a process of the fake. It runs in a goroutine that hands over one event at a time, as a process does that
// waits for its output to be read.
type proc struct {
	ctx    context.Context
	stop   context.CancelCauseFunc
	events chan sandbox.Event
	done   chan struct{} // closed when the goroutine has ended
	err    error         // why it ended, set before done is closed
	eof    bool
}

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
			limit := time.AfterFunc(timeout, func() { stop(fmt.Errorf("the limit of %s: %w", timeout, sandbox.ErrRunTimeout)) })
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
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}

func (r *proc) command(args []string, stdout sandbox.Stream) (int, error) {
	switch {
	case args[0] == "":
		return 0, fmt.Errorf("command is empty: %w", errdefs.ErrInvalidArgument)
	case args[0] == "true":
		return 0, nil
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
	return 0, fmt.Errorf("%s is not in PATH: %w", args[0], sandbox.ErrCommandNotFound)
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

// code runs the lines of a program, and prints the value of each expression of the last one.
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

// evaluate adds and multiplies two numbers, or returns one.
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
