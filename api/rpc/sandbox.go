package rpc

import (
	"encoding/base64"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// Names of the sandbox methods. Their params and results follow in this file in the same order. The fields of a
// params struct are in the order of positional params. Fields without omitzero are required.
const (
	MethodSandboxStart         = "sandbox.start"
	MethodSandboxStop          = "sandbox.stop"
	MethodSandboxList          = "sandbox.list"
	MethodSandboxGet           = "sandbox.get"
	MethodSandboxMetricsGet    = "sandbox.metrics.get"
	MethodSandboxReplRun       = "sandbox.repl.run"
	MethodSandboxReplInterrupt = "sandbox.repl.interrupt"
	MethodSandboxCommandRun    = "sandbox.command.run"
)

// StartParams holds the params of sandbox.start. The result is a sentence, as a string.
type StartParams struct {
	Sandbox string `json:"sandbox"`
	// Namespace defaults to the key's namespace if the key is limited to exactly one, else to "default".
	Namespace *string        `json:"namespace,omitzero"`
	Config    *SandboxConfig `json:"config,omitzero"`
}

// SandboxConfig is the configuration of a sandbox. An absent field means the server's default.
type SandboxConfig struct {
	Image string `json:"image,omitzero"`
	// Memory is in MiB.
	Memory int `json:"memory,omitzero"`
	// CPUs is the number of virtual CPUs. 0 means 1.
	CPUs *int `json:"cpus,omitzero"`
	// Disk is the size of the writable disk in MiB.
	Disk    int      `json:"disk,omitzero"`
	Volumes []string `json:"volumes,omitzero"`
	Ports   []string `json:"ports,omitzero"`
	// Envs holds NAME=value entries.
	Envs      []string `json:"envs,omitzero"`
	DependsOn []string `json:"depends_on,omitzero"`
	// Workdir is an absolute path. If it does not exist, it is created.
	Workdir string `json:"workdir,omitzero"`
	// User is the user of requests that name none: a name or number, optionally followed by ":" and a group.
	User     string            `json:"user,omitzero"`
	Hostname string            `json:"hostname,omitzero"`
	Shell    string            `json:"shell,omitzero"`
	Scripts  map[string]string `json:"scripts,omitzero"`
	Exec     string            `json:"exec,omitzero"`
}

// UnsupportedConfig has the members of a SandboxConfig that the server refuses unless they are empty.
var UnsupportedConfig = []string{"volumes", "ports", "depends_on", "shell", "scripts", "exec"}

// StopParams holds the params of sandbox.stop. The result is a sentence, as a string.
type StopParams struct {
	Sandbox   string  `json:"sandbox"`
	Namespace *string `json:"namespace,omitzero"`
}

// MaxPage is the maximum number of sandboxes in the result of one sandbox.list.
const MaxPage = 1000

// ListParams holds the params of sandbox.list.
type ListParams struct {
	// Namespace may be [AllNamespaces].
	Namespace *string `json:"namespace,omitzero"`
	// After continues a list: it is the Next of the previous result.
	After string `json:"after,omitzero"`
	// Limit is the maximum number of sandboxes in the result, from 1 to MaxPage, which is the default.
	Limit *int `json:"limit,omitzero"`
}

// ListResult is the result of sandbox.list.
type ListResult struct {
	// Sandboxes are sorted by namespace and name.
	Sandboxes []SandboxInfo `json:"sandboxes"`
	// Next is the After of the request for the sandboxes that follow. It is empty if none follow.
	Next string `json:"next,omitzero"`
}

// GetParams holds the params of sandbox.get. The result is a SandboxInfo.
type GetParams struct {
	Sandbox   string  `json:"sandbox"`
	Namespace *string `json:"namespace,omitzero"`
}

// SandboxInfo describes a sandbox.
type SandboxInfo struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// ID differs for each start of a sandbox. The server's log and its administrators use it.
	ID    string `json:"id"`
	State State  `json:"state"`
	// Reason says why the sandbox failed. It is empty in the other states.
	Reason string `json:"reason,omitzero"`
	Image  string `json:"image"`
	// CPUs is the number of virtual CPUs.
	CPUs int `json:"cpus"`
	// Memory is in MiB.
	Memory int `json:"memory"`
	// Disk is the size of the writable disk in MiB. It is 0 if the size is not limited.
	Disk int `json:"disk,omitzero"`
	// CreatedAt is when the sandbox was started, in UTC, to the second.
	CreatedAt time.Time `json:"created_at"`
	// StartedFrom says how the sandbox was started. It is absent while the sandbox starts, and if an earlier version started it.
	StartedFrom *StartedFrom `json:"started_from,omitzero"`
}

// StartedFrom says how a sandbox was started.
type StartedFrom struct {
	// Source is where its microVM came from. Later versions may add sources.
	Source StartSource `json:"source"`
	// Why says why the start was not faster. It is empty for SourcePool.
	Why string `json:"why,omitzero"`
}

// StartSource says where the microVM of a sandbox came from.
type StartSource string

const (
	// SourcePool means that the server had started it in advance.
	SourcePool StartSource = "pool"
	// SourceTemplate means that it is a copy of one that was booted before.
	SourceTemplate StartSource = "template"
	// SourceCold means that it was booted.
	SourceCold StartSource = "cold"
)

// HeaderStartedFrom is the header of the response to a single sandbox.start that is no stream of events. Its value is a StartSource.
const HeaderStartedFrom = "Msb-Started-From"

// State is the state of a sandbox. Later versions may add states.
type State string

const (
	StateStarting State = "starting"
	// StateRunning is the only state in which code and commands can run.
	StateRunning  State = "running"
	StateStopping State = "stopping"
	// StateFailed means that the sandbox does not run, and that nothing of it is left but its name and the reason.
	StateFailed State = "failed"
)

// MetricsParams holds the params of sandbox.metrics.get.
type MetricsParams struct {
	// Sandbox is the sandbox to measure. If it is absent, all sandboxes in the namespace are measured.
	Sandbox *string `json:"sandbox,omitzero"`
	// Namespace may be [AllNamespaces].
	Namespace *string `json:"namespace,omitzero"`
}

// AllNamespaces stands for every namespace that the key has access to.
const AllNamespaces = "*"

// MetricsResult is the result of sandbox.metrics.get.
type MetricsResult struct {
	Sandboxes []SandboxMetrics `json:"sandboxes"`
}

// SandboxMetrics is the resource usage of one sandbox. The usage fields are null if it is not running, or if they could
// not be measured.
type SandboxMetrics struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	State     State  `json:"state"`
	// Reason says why the sandbox failed. It is empty in the other states.
	Reason string `json:"reason,omitzero"`
	// Running reports whether State is StateRunning.
	Running bool `json:"running"`
	// CPUUsage is in percent of one CPU.
	CPUUsage *float64 `json:"cpu_usage"`
	// MemoryUsage is in MiB.
	MemoryUsage *int64 `json:"memory_usage"`
	// DiskUsage is in bytes.
	DiskUsage *int64 `json:"disk_usage"`
}

// ReplRunParams holds the params of sandbox.repl.run, which runs code in a context: the one that Context names, or that of
// Language and User, which its first run creates.
type ReplRunParams struct {
	Sandbox   string  `json:"sandbox"`
	Namespace *string `json:"namespace,omitzero"`
	// Language is "python", "node" or "bash", or another name of one of them. It is required unless Context is given.
	Language string `json:"language,omitzero"`
	Code     string `json:"code"`
	// Timeout is in seconds. 0, or more than the server's maximum, means the server's maximum. The time that the code waits for
	// its turn counts.
	Timeout float64 `json:"timeout,omitzero"`
	RunOptions
	// Grace is the time between the interrupt at the time limit and the kill, in seconds. 0 means the default.
	Grace float64 `json:"grace,omitzero"`
	// Context is the name of a context. If it is given, Language must be absent or that of the context, and User must be absent.
	Context string `json:"context,omitzero"`
	// Results asks for Results and Error in the result instead of text in Output.
	Results bool `json:"results,omitzero"`
	// RunID is an id of the client's choice for sandbox.repl.interrupt. No other run in progress in the sandbox may have it.
	RunID string `json:"run_id,omitzero"`
}

// ReplInterruptParams holds the params of sandbox.repl.interrupt, which interrupts a run of code as Ctrl-C does. The run goes on
// until its code has handled that. The result is empty.
type ReplInterruptParams struct {
	Target
	// RunID is the id that the request of the run gave.
	RunID string `json:"run_id"`
}

// RunOptions are params of the methods that run code or start a program.
type RunOptions struct {
	// Cwd is the working directory. A relative path begins at the workdir of the sandbox, and "~" is the home directory of
	// the user. By default, a program starts in the workdir, and code where the run before it ended.
	Cwd string `json:"cwd,omitzero"`
	// Envs holds NAME=value entries, which override those of the sandbox.
	Envs []string `json:"envs,omitzero"`
	// User is a name or number, optionally followed by ":" and a group. The default is the user of the sandbox.
	User string `json:"user,omitzero"`
	// Stdin is the standard input, in Encoding.
	Stdin    string   `json:"stdin,omitzero"`
	Encoding Encoding `json:"encoding,omitzero"`
}

// Encoding says how bytes from or for a sandbox are written in JSON.
type Encoding string

const (
	// EncodingUTF8 is text, and the default.
	EncodingUTF8   Encoding = "utf-8"
	EncodingBase64 Encoding = "base64"
)

// ReplRunResult is the result of sandbox.repl.run.
type ReplRunResult struct {
	Status Status `json:"status"`
	// Language is as given in the request.
	Language string `json:"language,omitzero"`
	Output   []Line `json:"output"`
	// ExitCode is the code with which the code exited, 1 after an exception, or 0.
	ExitCode int `json:"exit_code"`
	// Count is how many runs the interpreter of the context has begun, this one included. It is absent for a sandbox that an
	// earlier version of msbd started.
	Count int `json:"count,omitzero"`
	// StateLost means that the interpreter has ended, so that the context has lost its state. The output says why.
	StateLost bool `json:"state_lost,omitzero"`
	// Results are the values that the code has shown, in their order. They are absent unless the request asks for them, and in
	// a stream of events.
	Results []Display `json:"results,omitzero"`
	// Error is the exception that the code has raised. It is absent in the same cases.
	Error *Exception `json:"error,omitzero"`
}

// Display is a value that code has shown.
type Display struct {
	// Data has the value in each format in which it can be shown, by MIME type. Images and documents are base64, JSON is JSON,
	// and other formats are strings.
	Data map[string]jsontext.Value `json:"data"`
	// IsMain means that it is the value of the last expression of the code.
	IsMain bool `json:"is_main"`
}

// Exception is an exception that code has raised.
type Exception struct {
	Name      string `json:"name"`
	Value     string `json:"value"`
	Traceback string `json:"traceback"`
}

// Status is the outcome of running code in a REPL.
type Status string

const (
	StatusSuccess Status = "success"
	// StatusError means that the code raised an exception, exited with a code other than 0, or ended the interpreter.
	StatusError Status = "error"
)

// CommandRunParams holds the params of sandbox.command.run, which runs a program without a shell.
type CommandRunParams struct {
	Sandbox   string   `json:"sandbox"`
	Namespace *string  `json:"namespace,omitzero"`
	Command   string   `json:"command"`
	Args      []string `json:"args,omitzero"`
	// Timeout is in seconds. 0, or more than the server's maximum, means the server's maximum.
	Timeout float64 `json:"timeout,omitzero"`
	RunOptions
	// Grace is the time between SIGTERM at the time limit and SIGKILL, in seconds. 0 means the default.
	Grace float64 `json:"grace,omitzero"`
}

// CommandRunResult is the result of sandbox.command.run.
type CommandRunResult struct {
	// Command and Args are as given in the request.
	Command  string   `json:"command"`
	Args     []string `json:"args"`
	ExitCode int      `json:"exit_code"`
	// Success reports whether ExitCode is 0.
	Success bool   `json:"success"`
	Output  []Line `json:"output"`
}

// Line is a line of output, without its newline. With EncodingBase64, and in a stream of events, it is a piece of output that
// may begin and end anywhere.
type Line struct {
	// Stream is "stdout", "stderr" or "terminal".
	Stream string `json:"stream"`
	// Text is the output, unless Base64 is present.
	Text string `json:"text,omitzero"`
	// Base64 is the output with EncodingBase64.
	Base64 []byte `json:"base64,omitzero"`
}

// MarshalJSONTo writes the stream, and exactly one of the text and the base64, even if it is empty.
func (l Line) MarshalJSONTo(e *jsontext.Encoder) error {
	name, value := "text", l.Text
	if l.Base64 != nil {
		name, value = "base64", base64.StdEncoding.EncodeToString(l.Base64)
	}
	for _, t := range [...]jsontext.Token{
		jsontext.BeginObject, jsontext.String("stream"), jsontext.String(l.Stream), jsontext.String(name), jsontext.String(value), jsontext.EndObject,
	} {
		if err := e.WriteToken(t); err != nil {
			return err
		}
	}
	return nil
}

// GetNamespace returns the namespace in the params, or nil if there is none.
func (p *StartParams) GetNamespace() *string      { return p.Namespace }
func (p *StopParams) GetNamespace() *string       { return p.Namespace }
func (p *ListParams) GetNamespace() *string       { return p.Namespace }
func (p *GetParams) GetNamespace() *string        { return p.Namespace }
func (p *MetricsParams) GetNamespace() *string    { return p.Namespace }
func (p *ReplRunParams) GetNamespace() *string    { return p.Namespace }
func (p *CommandRunParams) GetNamespace() *string { return p.Namespace }
