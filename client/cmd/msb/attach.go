package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

// execAttached runs a program whose standard streams are those of msb. With tty, it has a terminal. It returns an error with
// the program's exit code unless that is 0.
func execAttached(c *cli.Context, s *client.Sandbox, command client.Command, interactive, tty bool) error {
	if interactive || tty && isTerminal(c.App.Reader) { // a terminal without keys would be of no use
		command.Stdin = c.App.Reader
	}
	var exit *rpc.ProcessExit
	var err error
	if tty {
		exit, err = runInTerminal(c, s, command)
	} else {
		ctx, interrupt, stop := untilSecondInterrupt(c.Context)
		defer stop()
		output := newQueue()
		defer context.AfterFunc(ctx, func() { output.abandon(context.Canceled) })()
		command.Stdout, command.Stderr = output.to(forTerminal(c.App.Writer)), output.to(forTerminal(c.App.ErrWriter))
		exit, err = waitInterruptible(c.Context, ctx, interrupt, s, command)
		if finishErr := output.finish(ctx); err == nil {
			err = finishErr
		}
	}
	switch {
	case err != nil:
		return err
	case exit.TimedOut:
		return timedOut(command)
	case exit.Reason != "":
		fmt.Fprintln(c.App.ErrWriter, printable(exit.Reason))
	}
	return exitOf(exit.ExitCode, exit.ExitCode == 0)
}

// timedOut returns the error for a program that has reached its time limit.
func timedOut(command client.Command) error {
	limit := "its time limit, which is the server's maximum"
	if command.Timeout > 0 {
		limit = fmt.Sprintf("its time limit of %s", command.Timeout)
	}
	return fmt.Errorf("%w: the program has reached %s and was ended", client.ErrRunTimeout, limit)
}

// waitInterruptible runs a program and waits for its end. interrupt and ctx are from untilSecondInterrupt: the former interrupts the
// program and everything that it has started, and the end of the latter ends it. A start is canceled with starting.
func waitInterruptible(starting, ctx context.Context, interrupt <-chan struct{}, s *client.Sandbox, command client.Command) (*rpc.ProcessExit, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stopStart := context.AfterFunc(starting, cancel)
	p, err := s.StartProcess(ctx, command)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	stopStart()
	defer context.AfterFunc(ctx, func() { p.Close() })()
	go func() {
		select {
		case <-interrupt:
			// Not over the connection of the process, which may wait until the process reads its input.
			_ = s.SignalProcess(ctx, client.ProcessID{PID: p.PID}, "INT", true)
		case <-ctx.Done():
		}
	}()
	return p.Wait()
}

// untilSecondInterrupt returns a channel that is closed by the first Ctrl-C, and a context that ends with the second one, or with
// SIGTERM or SIGHUP. The parent is a context of main, which has ended with the first one. The caller must call stop.
func untilSecondInterrupt(parent context.Context) (ctx context.Context, interrupt <-chan struct{}, stop func()) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) {
		signal.Notify(signals, syscall.SIGHUP)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(parent))
	if parent.Err() != nil {
		cancel()
	}
	first := make(chan struct{})
	go func() {
		defer signal.Stop(signals)
		for interrupted := false; ; interrupted = true {
			select {
			case sig := <-signals:
				if interrupted || sig != os.Interrupt {
					cancel()
					return
				}
				close(first)
			case <-ctx.Done():
				return
			}
		}
	}()
	return ctx, first, cancel
}

// runInTerminal runs a program in a terminal of the sandbox that is connected to the one of msb, if it has one.
func runInTerminal(c *cli.Context, s *client.Sandbox, command client.Command) (exit *rpc.ProcessExit, err error) {
	size := terminalSize(c.App.Writer)
	command.Terminal = &size
	if !slices.ContainsFunc(command.Env, func(e string) bool { return strings.HasPrefix(e, "TERM=") }) {
		command.Env = append(command.Env, "TERM="+terminalType())
	}
	ctx, stop := endWith(c.Context, syscall.SIGHUP)
	defer stop()
	local := newLocalTerminal(c.App.Reader, c.App.Writer)
	output := newQueue()
	command.Stdout = output.to(c.App.Writer)
	p, err := s.StartProcess(ctx, command)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	if err := local.raw(); err != nil {
		return nil, err
	}
	defer func() { local.restore(exit != nil && exit.Signal == "" && !exit.TimedOut) }()
	stopResizing := onResize(func() { _ = p.Resize(terminalSize(c.App.Writer)) })
	defer stopResizing()
	if now := terminalSize(c.App.Writer); now != size { // it has changed during the start
		_ = p.Resize(now)
	}
	exit, err = p.Wait()
	if finishErr := output.finish(ctx); err == nil {
		err = finishErr
	}
	return exit, err
}

// terminalSize returns the size of a terminal, or a usual one if w is not a terminal.
func terminalSize(w io.Writer) rpc.TerminalSize {
	if f, ok := w.(*os.File); ok {
		if cols, rows, err := term.GetSize(int(f.Fd())); err == nil && cols > 0 && rows > 0 {
			return rpc.TerminalSize{Cols: cols, Rows: rows}
		}
	}
	return rpc.TerminalSize{Cols: 80, Rows: 24}
}

// terminalType returns the type of msb's terminal, for the environment variable TERM.
func terminalType() string {
	if name := os.Getenv("TERM"); name != "" {
		return name
	}
	return "xterm-256color"
}

// localTerminal is the terminal of msb. All of its methods do nothing if there is none.
type localTerminal struct {
	input  *os.File // nil if standard input is not a terminal
	output io.Writer
	state  *term.State
}

func newLocalTerminal(input io.Reader, output io.Writer) *localTerminal {
	t := &localTerminal{output: output}
	if isTerminal(input) {
		t.input = input.(*os.File)
	}
	return t
}

// raw makes the terminal pass on all keys, such as Ctrl-C.
func (t *localTerminal) raw() (err error) {
	if t.input != nil {
		t.state, err = term.MakeRaw(int(t.input.Fd()))
	}
	return err
}

// resetTerminal saves the position of the cursor, because leaving the alternate screen restores it, leaves that screen, shows the cursor, and turns off colors, application keys, mouse reports, reports of
// the focus and bracketed paste. A program that did not end regularly may have left them on.
const resetTerminal = "\x1b7\x1b[?1049l\x1b[?25h\x1b[0m\x1b[?1l\x1b>\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?1004l\x1b[?2004l\r\n"

// restore undoes raw. If the program has not ended regularly, it also undoes what the program may have done.
func (t *localTerminal) restore(regularly bool) {
	if t.state == nil {
		return
	}
	_ = term.Restore(int(t.input.Fd()), t.state)
	t.state = nil
	if !regularly && isTerminal(t.output) {
		fmt.Fprint(t.output, resetTerminal)
	}
}

// maxRecorded is the most output that --json holds, in bytes.
const maxRecorded = 16 << 20

// lineRecorder records the output of a program as lines, in the order in which they begin.
type lineRecorder struct {
	lines []rpc.Line
	open  map[string]int // the index of the unfinished line of each stream
	size  int            // in bytes; each line counts as lineOverhead in addition
}

// lineOverhead is about what a line needs in memory besides its text, in bytes.
const lineOverhead = 64

// stream returns a writer for a stream. The writers of a recorder must not be used at the same time.
func (l *lineRecorder) stream(name string) io.Writer {
	return lineWriter{l, name}
}

type lineWriter struct {
	recorder *lineRecorder
	stream   string
}

// Write implements io.Writer.
func (w lineWriter) Write(p []byte) (int, error) {
	l := w.recorder
	if l.size += len(p); l.size > maxRecorded {
		return 0, fmt.Errorf("%w: the program has printed more than %s, so it was ended; leave out --json", errdefs.ErrResourceExhausted, size(maxRecorded))
	}
	if l.open == nil {
		l.open = map[string]int{}
	}
	for part := range bytes.SplitAfterSeq(p, []byte("\n")) {
		if len(part) == 0 {
			continue
		}
		i, open := l.open[w.stream]
		if !open {
			i = len(l.lines)
			l.lines = append(l.lines, rpc.Line{Stream: w.stream})
			l.open[w.stream] = i
			l.size += lineOverhead
		}
		text, complete := bytes.CutSuffix(part, []byte("\n"))
		l.lines[i].Text += string(text)
		if complete {
			delete(l.open, w.stream)
		}
	}
	return len(p), nil
}

// note adds why the kernel has killed the program.
func (l *lineRecorder) note(exit *rpc.ProcessExit) {
	if exit.Reason != "" {
		l.lines = append(l.lines, rpc.Line{Stream: "stderr", Text: exit.Reason})
	}
}

// result returns what was recorded as a result of sandbox.command.run.
func (l *lineRecorder) result(command client.Command, exitCode int) rpc.CommandRunResult {
	for i := range l.lines {
		l.lines[i].Text = strings.ToValidUTF8(l.lines[i].Text, "\uFFFD")
	}
	return rpc.CommandRunResult{
		Command: command.Name, Args: append([]string{}, command.Args...), ExitCode: exitCode, Success: exitCode == 0, Output: append([]rpc.Line{}, l.lines...),
	}
}
