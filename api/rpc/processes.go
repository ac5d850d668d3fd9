package rpc

import "time"

// Names of the methods for processes, in the order in which their params and results follow in this file.
const (
	MethodProcessStart   = "sandbox.process.start"
	MethodProcessList    = "sandbox.process.list"
	MethodProcessGet     = "sandbox.process.get"
	MethodProcessWait    = "sandbox.process.wait"
	MethodProcessSignal  = "sandbox.process.signal"
	MethodProcessInput   = "sandbox.process.input"
	MethodProcessResize  = "sandbox.process.resize"
	MethodProcessLogs    = "sandbox.process.logs"
	MethodProcessConnect = "sandbox.process.connect"
)

// Target names a sandbox. It is the beginning of the params of most methods.
type Target struct {
	Sandbox   string  `json:"sandbox"`
	Namespace *string `json:"namespace,omitzero"`
}

// GetNamespace returns the namespace in the params, or nil if there is none.
func (t *Target) GetNamespace() *string { return t.Namespace }

// ProcessTarget names a process of a sandbox by exactly one of PID and Tag.
type ProcessTarget struct {
	Target
	PID *int `json:"pid,omitzero"`
	// Tag stands for the newest process with this tag.
	Tag *string `json:"tag,omitzero"`
}

// ProcessStartParams holds the params of sandbox.process.start, which starts a program without a shell. The program goes on
// when the request has ended.
type ProcessStartParams struct {
	Target
	Command string   `json:"command"`
	Args    []string `json:"args,omitzero"`
	RunOptions
	// OpenStdin keeps the standard input open after Stdin, for sandbox.process.input. With a terminal, it always is.
	OpenStdin bool `json:"open_stdin,omitzero"`
	// Terminal gives the process a terminal of this size as its standard streams.
	Terminal *TerminalSize `json:"terminal,omitzero"`
	// Tag is a name for the process. It need not be unique.
	Tag string `json:"tag,omitzero"`
	// Timeout is in seconds. 0 means that there is no time limit.
	Timeout float64 `json:"timeout,omitzero"`
	// Grace is the time between SIGTERM at the time limit and SIGKILL, in seconds. 0 means the default.
	Grace float64 `json:"grace,omitzero"`
}

// TerminalSize is the size of a terminal, in characters.
type TerminalSize struct {
	Cols int `json:"cols"`
	Rows int `json:"rows"`
}

// ProcessStartResult is the result of sandbox.process.start.
type ProcessStartResult struct {
	PID int `json:"pid"`
	// Tag is as given in the request.
	Tag string `json:"tag,omitzero"`
}

// ProcessListParams holds the params of sandbox.process.list.
type ProcessListParams struct{ Target }

// ProcessListResult is the result of sandbox.process.list.
type ProcessListResult struct {
	// Processes are in the order of their start.
	Processes []ProcessInfo `json:"processes"`
}

// ProcessGetParams holds the params of sandbox.process.get. The result is a ProcessInfo.
type ProcessGetParams struct{ ProcessTarget }

// ProcessInfo describes a process. Its texts are those of its start. The environment is left out, because it may contain
// secrets.
type ProcessInfo struct {
	PID     int      `json:"pid"`
	Command string   `json:"command"`
	Args    []string `json:"args"`
	Cwd     string   `json:"cwd"`
	User    string   `json:"user"`
	Tag     string   `json:"tag,omitzero"`
	// Terminal reports whether the process has a terminal.
	Terminal bool `json:"terminal"`
	// StartedAt is in UTC, to the second.
	StartedAt time.Time `json:"started_at"`
	Running   bool      `json:"running"`
	// Exit is nil while the process runs.
	Exit *ProcessExit `json:"exit,omitzero"`
	// OutputBytes is how much the process has printed.
	OutputBytes int `json:"output_bytes"`
}

// ProcessExit says how a process ended.
type ProcessExit struct {
	// ExitCode is the exit code, or 128+N if signal N ended the process.
	ExitCode int `json:"exit_code"`
	// Signal is the name of the signal that ended the process, without SIG, such as "KILL".
	Signal string `json:"signal,omitzero"`
	// TimedOut reports whether the process was ended because it reached its time limit.
	TimedOut bool `json:"timed_out"`
	// Reason says why the kernel killed the process, if memory ran out.
	Reason string `json:"reason,omitzero"`
}

// ProcessWaitParams holds the params of sandbox.process.wait. The result is a ProcessState.
type ProcessWaitParams struct {
	ProcessTarget
	// Timeout is how long to wait, in seconds. 0, or more than the server's maximum time of a run, means that maximum.
	Timeout float64 `json:"timeout,omitzero"`
}

// ProcessState reports whether a process runs.
type ProcessState struct {
	Running bool `json:"running"`
	// Exit is nil while the process runs.
	Exit *ProcessExit `json:"exit,omitzero"`
}

// ProcessSignalParams holds the params of sandbox.process.signal. The result is empty.
type ProcessSignalParams struct {
	ProcessTarget
	// Signal is a name, with or without SIG, or a number: "TERM", "SIGTERM" or "15".
	Signal string `json:"signal"`
	// All sends the signal to everything that the process has started, instead of to the process alone.
	All bool `json:"all,omitzero"`
}

// ProcessInputParams holds the params of sandbox.process.input. The result is empty.
type ProcessInputParams struct {
	ProcessTarget
	Data     string   `json:"data,omitzero"`
	Encoding Encoding `json:"encoding,omitzero"`
	// Close closes the input after Data.
	Close bool `json:"close,omitzero"`
}

// ProcessResizeParams holds the params of sandbox.process.resize. The result is empty.
type ProcessResizeParams struct {
	ProcessTarget
	TerminalSize
}

// ProcessLogsParams holds the params of sandbox.process.logs.
type ProcessLogsParams struct {
	ProcessTarget
	Encoding Encoding `json:"encoding,omitzero"`
}

// ProcessLogsResult is the result of sandbox.process.logs.
type ProcessLogsResult struct {
	Output []Line `json:"output"`
	// SkippedBytes is how much the process had printed before Output.
	SkippedBytes int `json:"skipped_bytes"`
	ProcessState
}

// ProcessConnectParams holds the params of sandbox.process.connect, which is answered only with a stream of events.
type ProcessConnectParams struct {
	ProcessTarget
	// Replay begins with the output that the server remembers.
	Replay   bool     `json:"replay,omitzero"`
	Encoding Encoding `json:"encoding,omitzero"`
}

// ProcessConnectResult is the result of sandbox.process.connect.
type ProcessConnectResult struct {
	// SkippedBytes is how much the process had printed before the first output.
	SkippedBytes int `json:"skipped_bytes"`
	ProcessState
}

// Empty is the result of a method that returns nothing.
type Empty struct{}
