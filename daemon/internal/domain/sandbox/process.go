package sandbox

import (
	"context"
	"errors"
	"time"
)

// ErrCommandNotFound is the error of a command whose program does not exist in the sandbox.
var ErrCommandNotFound = errors.New("command not found")

// ErrRunTimeout is the error of a process that reached its time limit and was interrupted.
var ErrRunTimeout = errors.New("time limit of the run reached")

// Language is one of the REPLs that a sandbox may hold.
type Language string

const (
	Python Language = "python"
	Node   Language = "nodejs"
)

// Environment is what the sandbox's configuration gives to every process. The Manager sets it.
type Environment struct {
	// Env holds NAME=value entries, over those of the image.
	Env []string
	// Workdir is absolute, or empty for the image's.
	Workdir string
}

// Code asks for code to be run in the REPL of a language.
type Code struct {
	Language Language
	Text     string
	// Timeout is the time limit; 0 is the server's maximum.
	Timeout time.Duration
	Environment
}

// Command asks for a program to be run, without a shell.
type Command struct {
	// Program is found through PATH.
	Program string
	Args    []string
	// Timeout is the time limit; 0 is the server's maximum.
	Timeout time.Duration
	Environment
}

// Process is a command or a run of code in a sandbox. One goroutine reads its events; another may close it.
type Process interface {
	// Next returns the next event. The last one is an Exit; after that, the error is io.EOF. Other errors end the
	// process: ErrRunTimeout, ErrCommandNotFound, errdefs.ErrUnavailable if the connection to the sandbox is lost, or
	// the error of the context that the process was started with.
	Next() (Event, error)
	// Close interrupts the process if it still runs, and releases what it holds. It may be called again.
	Close() error
}

// Event is what a process did: Output or Exit.
type Event interface{ event() }

// Stream names where output was printed.
type Stream string

const (
	Stdout Stream = "stdout"
	Stderr Stream = "stderr"
)

// Output is a piece of what a process printed, as it was read: it may end within a line or a character. Pieces come
// in the order in which they were read.
type Output struct {
	Stream Stream
	Data   []byte
}

// Exit is the end of a process. Code is the exit code of a command, or 128+N if signal N killed it. Code in a REPL exits
// with 0, or with 1 if it raised an exception, whose traceback is in the output.
type Exit struct{ Code int }

func (Output) event() {}
func (Exit) event()   {}

// Portal is a connection to the helper inside a sandbox. Its errors carry errdefs classes; a lost connection is
// errdefs.ErrUnavailable. A process ends at the latest with the context that it was started with.
type Portal interface {
	Ping(ctx context.Context) error
	RunCode(ctx context.Context, code Code) (Process, error)
	RunCommand(ctx context.Context, command Command) (Process, error)
	// Close ends the connection and the processes that were started over it.
	Close() error
}
