package sandbox

import (
	"context"
	"errors"
	"time"
)

// ErrCommandNotFound is returned for a command whose program does not exist in the sandbox.
var ErrCommandNotFound = errors.New("command not found")

// ErrCommandNotExecutable is returned for a command whose file exists in the sandbox but cannot be run.
var ErrCommandNotExecutable = errors.New("command cannot be run")

// ErrRunTimeout is returned for a process that reached its time limit and was interrupted.
var ErrRunTimeout = errors.New("time limit of the run reached")

// ErrRunFailed is returned for a process that failed or was lost after it had begun, so that it may have taken effect.
// Nothing may run it again by itself. Its text may come from the sandbox.
var ErrRunFailed = errors.New("run failed")

// Language is the language of a REPL in a sandbox.
type Language string

const (
	Python Language = "python"
	Node   Language = "nodejs"
)

// Environment is the part of a sandbox's configuration that applies to every process. The Manager sets it.
type Environment struct {
	// Env holds NAME=value entries, which override those of the image.
	Env []string
	// Workdir is an absolute path, or empty for the working directory of the image.
	Workdir string
}

// Code is code to run in the REPL of a language.
type Code struct {
	Language Language
	Text     string
	// Timeout is the time limit. 0 stands for the server's maximum.
	Timeout time.Duration
	Environment
}

// Command is a program to run, without a shell.
type Command struct {
	// Program is looked up in PATH.
	Program string
	Args    []string
	// Timeout is the time limit. 0 stands for the server's maximum.
	Timeout time.Duration
	Environment
}

// Process is a command or a run of code in a sandbox. Only one goroutine may call Next, but another may call Close.
type Process interface {
	// Next returns the next event. The last event is an Exit, after which Next returns io.EOF. Any other error means
	// that the process has ended: ErrRunTimeout, ErrCommandNotFound, ErrCommandNotExecutable, errdefs.ErrInvalidArgument or
	// errdefs.ErrFailedPrecondition if it could not be started, the cause of the end of the context that the process was
	// started with, or else ErrRunFailed, for example if the connection to the sandbox is lost.
	Next() (Event, error)
	// Close interrupts the process if it still runs, and releases its resources. It may be called more than once.
	Close() error
}

// Event is an event of a process: Output or Exit.
type Event interface{ event() }

// Stream is the stream to which output was written.
type Stream string

const (
	Stdout Stream = "stdout"
	Stderr Stream = "stderr"
)

// Output is a piece of the output of a process. It may end in the middle of a line or a character. Pieces come in the
// order in which they were read.
type Output struct {
	Stream Stream
	Data   []byte
}

// Exit reports that a process has ended. Code is the exit code of a command, or 128+N if signal N killed it. Code in a REPL
// exits with 0, or with 1 if it raised an exception, whose traceback is in the output.
type Exit struct{ Code int }

func (Output) event() {}
func (Exit) event()   {}

// Portal is a connection to the portal, the helper program inside a sandbox. An error of one of its methods means that the
// connection does not work and that nothing was started; it is errdefs.ErrUnavailable, or the cause of the end of the
// context. A process ends when the context that it was started with is canceled.
type Portal interface {
	Ping(ctx context.Context) error
	RunCode(ctx context.Context, code Code) (Process, error)
	RunCommand(ctx context.Context, command Command) (Process, error)
	// Close closes the connection and ends the processes that were started over it.
	Close() error
}
