package sandbox

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/containerd/errdefs"
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

// ErrSandboxFull is returned if the disk of a sandbox has no space left. It is an errdefs.ErrResourceExhausted, but trying again
// does not help.
var ErrSandboxFull error = sandboxFull{}

type sandboxFull struct{}

func (sandboxFull) Error() string { return "the sandbox's disk is full" }
func (sandboxFull) Unwrap() error { return errdefs.ErrResourceExhausted }

// Language is a language of code in a sandbox.
type Language string

const (
	Python Language = "python"
	Node   Language = "nodejs"
	Bash   Language = "bash"
)

// Environment is the part of a sandbox's configuration that applies to every process. The Manager sets it.
type Environment struct {
	// Env holds NAME=value entries, which override those of the image.
	Env []string
	// Workdir is an absolute path, or empty for the working directory of the image.
	Workdir string
}

// RunOptions are what a request may choose for one run or process.
type RunOptions struct {
	// Env holds NAME=value entries, which override those of the sandbox.
	Env []string
	// Cwd is the working directory. A relative path begins at the workdir of the sandbox, and "~" is the home directory of
	// the user. If it is empty, a process starts in the workdir; a run of code starts where the run before it ended.
	Cwd string
	// User is a name or number, optionally followed by ":" and a group. If it is empty, the Manager sets that of the sandbox. If
	// that is empty too, it is the user of the image.
	User string
	// Input is the standard input. With ProcessRequest.OpenInput, it is only its beginning.
	Input []byte
	// Grace is the time between the interrupt at the time limit and the kill. 0 stands for the default: 2 s for a command,
	// Options.CodeGrace for code.
	Grace time.Duration
}

// Code is code to run in a context.
type Code struct {
	// ID is an id for InterruptCode, or empty. No other run in progress in the sandbox may have it.
	ID string
	// Context is the name of a context. If it is empty, the context is that of Language and User, which the first run creates.
	Context  string
	Language Language
	Text     string
	// Results makes the process report what the code shows, and its exception, as Pieces instead of output.
	Results bool
	// Rehearsal runs the code in the interpreter that Warm has started, which then waits for its first run as before. The code must
	// leave nothing behind. If there is no such interpreter, Next returns errdefs.ErrFailedPrecondition.
	Rehearsal bool
	// Timeout is the time limit. 0 stands for the server's maximum. The time that the run waits for its turn counts.
	Timeout time.Duration
	RunOptions
	// The Manager sets the fields below.

	Environment Environment
	// DefaultGrace is the Grace if that is 0, and Waited how much of Timeout has passed before the portal is called.
	DefaultGrace, Waited time.Duration
	// Interrupts, if it is not nil, has a value for each interrupt. The run continues until its code has handled that.
	Interrupts <-chan struct{} `json:"-"` // a channel has no JSON
}

// ContextRequest describes a context to create.
type ContextRequest struct {
	// Name is a new name, or empty for one that the portal chooses.
	Name     string
	Language Language
	// User and Cwd are as in RunOptions. The interpreter starts in Cwd.
	User, Cwd   string
	Environment Environment
}

// Context is a session of an interpreter. It runs code in one language as one user, one run after the other, and keeps its state
// in between. Its texts come from the sandbox.
type Context struct {
	Name      string
	Language  Language
	User, Cwd string // as in the request that created it, or empty
	// PID is the pid of the interpreter, or 0 if it does not run. AttachProcess returns what it prints while no run is in
	// progress.
	PID uint32
	// Runs is how many runs the interpreter has begun.
	Runs uint32
	// Busy reports whether a run is in progress.
	Busy bool
}

// Command is a program to run, without a shell.
type Command struct {
	// Program is looked up in PATH.
	Program string
	Args    []string
	// Timeout is the time limit. 0 stands for the server's maximum, or, for a process that outlives its client, for
	// no limit.
	Timeout time.Duration
	RunOptions
	Environment Environment
}

// ProcessRequest is a program to start. It goes on when its client disconnects, unless WithCall is set.
type ProcessRequest struct {
	Command
	// Tag is a name for ProcessID. It need not be unique.
	Tag string
	// Terminal, if not nil, gives the process a terminal of this size as its standard streams.
	Terminal *TerminalSize
	// OpenInput keeps the standard input open for WriteInput. It always is with a terminal.
	OpenInput bool
	// WithCall ends the process when its Process is closed or the context that it was started with ends.
	WithCall bool
}

// TerminalSize is the size of a terminal, in characters.
type TerminalSize struct{ Columns, Rows uint16 }

// ProcessID names a process of a sandbox: by its pid, or, if PID is 0, as the newest process with a tag.
type ProcessID struct {
	PID uint32
	Tag string
}

// AttachOptions says which events of a process AttachProcess returns. The zero value means all from now on.
type AttachOptions struct {
	// Replay begins with the output in the ring buffer of the process.
	Replay bool
	// NoOutput leaves out the output. A Process without it makes the process wait until its output is read.
	NoOutput bool
	// NoFollow ends after the output in the ring buffer. If the process still runs, Next then returns io.EOF without an
	// Exit.
	NoFollow bool
}

// ProcessInfo describes a process that was started in a sandbox. Its texts come from the sandbox.
type ProcessInfo struct {
	PID         uint32
	Argv, Env   []string
	Cwd, User   string
	Tag         string
	Terminal    bool
	WithCall    bool
	StartedAt   time.Time
	Exit        *Exit // nil while the process runs
	OutputBytes uint64
}

// Process is a command, a run of code or another process in a sandbox. Only one goroutine may call Next, but another may
// call Close.
type Process interface {
	// Next returns the next event. The last event is an Exit, after which Next returns io.EOF. Any other error means
	// that the process has ended: ErrRunTimeout, ErrCommandNotFound, ErrCommandNotExecutable, errdefs.ErrInvalidArgument or
	// errdefs.ErrFailedPrecondition if it could not be started, the cause of the end of the context that the process was
	// started with, or else ErrRunFailed, for example if the connection to the sandbox is lost.
	Next() (Event, error)
	// Close interrupts the process if it still runs, unless it outlives its client, and releases the resources of the
	// Process. It may be called more than once.
	Close() error
}

// Event is an event of a process: Started, Output, Piece or Exit.
type Event interface{ event() }

// Started is the first event of a process from StartProcess or AttachProcess.
type Started struct {
	PID uint32
	// SkippedBytes is how much the process had printed before the first Output.
	SkippedBytes uint64
}

// Stream is the stream to which output was written.
type Stream string

const (
	Stdout Stream = "stdout"
	Stderr Stream = "stderr"
	// Terminal is the stream of what a terminal shows.
	Terminal Stream = "terminal"
)

// Output is a piece of the output of a process. It may end in the middle of a line or a character. Pieces come in the
// order in which they were read.
type Output struct {
	Stream Stream
	Data   []byte
}

// Piece is a piece of a JSON text that code with Results reports. The text comes from the sandbox.
type Piece struct {
	// Error says that the text describes the exception that the code raised: {"name", "value", "traceback"}, all strings.
	// Otherwise it is a value that the code shows: {"data": {MIME type: value}, "is_main": bool}.
	Error bool
	Data  []byte
	// First says that the text begins, and Last that it is complete. If it was cut off, the piece with Last is missing.
	First, Last bool
}

// Exit reports that a process has ended.
type Exit struct {
	// Code is the exit code of a command, or 128+N if signal N killed it. Code in a context has the exit code that it asked for,
	// or 1 after an exception.
	Code int
	// Signal is the number of the signal that ended the process, or 0.
	Signal int
	// TimedOut means that the process was ended because it reached its time limit. RunCode and RunCommand return
	// ErrRunTimeout instead.
	TimedOut bool
	// Reason says why the kernel killed the process. It is empty unless memory ran out. It comes from the sandbox.
	Reason string
	// Runs is how many runs the interpreter of a context has begun, this one included.
	Runs uint32
	// StateLost means that the interpreter of the context has ended.
	StateLost bool
}

func (Started) event() {}
func (Output) event()  {}
func (Piece) event()   {}
func (Exit) event()    {}

// Portal is a connection to the portal, the helper program inside a sandbox. A process that RunCode or RunCommand has started
// ends when the context that it was started with is canceled.
//
// An error of RunCode, RunCommand, StartProcess and AttachProcess means that the connection does not work and that nothing was
// started; it is errdefs.ErrUnavailable, or the cause of the end of the context. The errors of the other methods are these, and
// those that the interfaces list; ErrRunFailed means that the call may have taken effect. A portal of an earlier version does
// not support every method: the error is errdefs.ErrFailedPrecondition and says so.
type Portal interface {
	Ping(ctx context.Context) error
	RunCode(ctx context.Context, code Code) (Process, error)
	RunCommand(ctx context.Context, command Command) (Process, error)
	Contexts
	Processes
	Files
	// Dial connects to an address in the sandbox. If nothing listens there, the error is errdefs.ErrNotFound.
	Dial(ctx context.Context, address Address) (Conn, error)
	// Close closes the connection and ends the processes that were started over it.
	Close() error
}

// Contexts are the contexts of a sandbox.
type Contexts interface {
	// CreateContext creates a context. If its name is taken, the error is errdefs.ErrAlreadyExists; if the image does not have
	// the interpreter, errdefs.ErrFailedPrecondition.
	CreateContext(ctx context.Context, req ContextRequest) (Context, error)
	// ListContexts returns the contexts in the order in which they were created.
	ListContexts(ctx context.Context) ([]Context, error)
	// RestartContext replaces the interpreter of a context, whose state is lost.
	RestartContext(ctx context.Context, name string, e Environment) (Context, error)
	// Warm starts an interpreter of each given language that the image has, for the first run of code in it, and ends those that
	// an earlier call started for other languages. It returns the languages that have one. It leaves no trace: no context, no process
	// and no output. A run with an Environment or a user does not use the interpreter.
	Warm(ctx context.Context, languages []Language) ([]Language, error)
	// RemoveContext removes a context. If there is none with this name, the error of this and of RestartContext is
	// errdefs.ErrNotFound.
	RemoveContext(ctx context.Context, name string) error
}

// Processes are the processes of a sandbox. If there is no such process, the error is errdefs.ErrNotFound; if it has ended, or
// has no input or no terminal, errdefs.ErrFailedPrecondition.
type Processes interface {
	// StartProcess starts a program. If too many processes run, the error of Next is errdefs.ErrFailedPrecondition.
	StartProcess(ctx context.Context, req ProcessRequest) (Process, error)
	// AttachProcess returns the events of a process.
	AttachProcess(ctx context.Context, id ProcessID, o AttachOptions) (Process, error)
	// ListProcesses calls each for the processes that run and those that ended last, in the order of their start. A sandbox may
	// send any number of them. An error of each ends the call and is returned.
	ListProcesses(ctx context.Context, each func(ProcessInfo) error) error
	// WriteInput copies data to the input of a process until data ends. With end, it then closes the input.
	WriteInput(ctx context.Context, id ProcessID, data io.Reader, end bool) error
	// SignalProcess sends a signal to a process, or to everything that it started.
	SignalProcess(ctx context.Context, id ProcessID, signal int, all bool) error
	ResizeTerminal(ctx context.Context, id ProcessID, size TerminalSize) error
}

// Address is a place in a sandbox that listens for connections: a TCP port on its loopback interface or, if Port is 0, the
// path of a Unix socket, which begins with "@" for an abstract one.
type Address struct {
	Port uint16
	Unix string
}

// Conn is a connection to a program in a sandbox. One goroutine may read while another writes.
type Conn interface {
	io.ReadWriteCloser
	// CloseWrite ends the direction to the program.
	CloseWrite() error
}
