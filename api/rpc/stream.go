package rpc

// Paths of files and WebSockets. NAME is the name of a sandbox.
const (
	SandboxesPath = "/api/v1/sandboxes/"
	FilesPath     = SandboxesPath + "{name}/files"        // GET, PUT and DELETE of a file
	ExecPath      = SandboxesPath + "{name}/exec"         // a WebSocket that is connected to a process
	PortPath      = SandboxesPath + "{name}/ports/{port}" // a WebSocket that is connected to a TCP port
)

const (
	// WebSocketProtocol is the subprotocol of the WebSockets.
	WebSocketProtocol = "msb"
	// KeyProtocolPrefix and an API key are a subprotocol that clients offer if they cannot set headers. The server never
	// selects it.
	KeyProtocolPrefix = "msb.key."
)

// The binary frames of the WebSocket at ExecPath begin with one of these bytes. The rest is data.
const (
	ChannelInput  = 0 // to the standard input or the terminal
	ChannelOutput = 1 // from the standard output or the terminal
	ChannelError  = 2 // from the standard error
)

// ExecStart is the first frame of a client at ExecPath that starts a process.
type ExecStart struct {
	Command string   `json:"command"`
	Args    []string `json:"args,omitempty"`
	Cwd     string   `json:"cwd,omitzero"`
	Envs    []string `json:"envs,omitempty"` // NAME=value
	User    string   `json:"user,omitzero"`
	// Terminal, if not nil, gives the process a terminal of this size.
	Terminal *ExecTerminal `json:"terminal,omitzero"`
	// Stdin keeps the standard input open. nil means true. With a terminal, it always is open.
	Stdin *bool  `json:"stdin,omitzero"`
	Tag   string `json:"tag,omitzero"`
	// Timeout and Grace are in seconds. 0 means no time limit, or the server's maximum if WithConnection is set without
	// Terminal, and the default grace.
	Timeout float64 `json:"timeout,omitzero"`
	Grace   float64 `json:"grace,omitzero"`
	// WithConnection ends the process when the connection closes.
	WithConnection bool `json:"with_connection,omitzero"`
}

// ExecTerminal is the size of a terminal, in characters.
type ExecTerminal struct {
	Cols uint16 `json:"cols"`
	Rows uint16 `json:"rows"`
}

// ExecControl is any other text frame of a client at ExecPath. It has one of Resize, CloseStdin and Signal.
type ExecControl struct {
	Resize     *[2]uint16 `json:"resize,omitzero"` // columns and rows
	CloseStdin bool       `json:"close_stdin,omitzero"`
	// Signal is a name such as TERM, or a number.
	Signal string `json:"signal,omitzero"`
	// All sends the signal to everything that the process has started.
	All bool `json:"all,omitzero"`
}

// ExecStarted is the content of the first text frame of the server at ExecPath, {"started":…}.
type ExecStarted struct {
	PID uint32 `json:"pid"`
	// SkippedBytes is how much the process had printed before the first output.
	SkippedBytes uint64 `json:"skipped_bytes"`
}

// ExecExit is the text frame of the server at ExecPath that says that the process has ended.
type ExecExit struct {
	// Exit is the exit code, or 128+N if signal N ended the process.
	Exit int `json:"exit"`
	// Signal is the name of the signal that ended the process.
	Signal string `json:"signal,omitzero"`
	// TimedOut means that the process was ended because it reached its time limit.
	TimedOut bool `json:"timed_out,omitzero"`
	// Reason says why the kernel killed the process. It comes from the sandbox.
	Reason string `json:"reason,omitzero"`
}

// FrameError is the content of a text frame of a WebSocket: {"error":…}, after which the server closes it, or {"warning":…}
// if something that the client sent had no effect.
type FrameError struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
}
