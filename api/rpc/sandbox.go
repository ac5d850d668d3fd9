package rpc

// Names of the methods of sandboxes. Each is followed in this file by its params and its result. The fields of
// params are in the order of positional params, and those without omitzero are required.
const (
	MethodSandboxStart      = "sandbox.start"
	MethodSandboxStop       = "sandbox.stop"
	MethodSandboxMetricsGet = "sandbox.metrics.get"
	MethodSandboxReplRun    = "sandbox.repl.run"
	MethodSandboxCommandRun = "sandbox.command.run"
)

// StartParams asks for a sandbox. The result is a sentence, as a string.
type StartParams struct {
	Sandbox string `json:"sandbox"`
	// Namespace is by default the key's own, or "default" for a key that is not limited to one.
	Namespace *string        `json:"namespace,omitzero"`
	Config    *SandboxConfig `json:"config,omitzero"`
}

// SandboxConfig is what a sandbox is made of. Whatever is absent is the server's default.
type SandboxConfig struct {
	Image string `json:"image,omitzero"`
	// Memory in MiB.
	Memory int `json:"memory,omitzero"`
	// CPUs is the number of virtual processors. 0 means 1.
	CPUs    *int     `json:"cpus,omitzero"`
	Volumes []string `json:"volumes,omitzero"`
	Ports   []string `json:"ports,omitzero"`
	// Envs holds NAME=value entries.
	Envs      []string          `json:"envs,omitzero"`
	DependsOn []string          `json:"depends_on,omitzero"`
	Workdir   string            `json:"workdir,omitzero"`
	Shell     string            `json:"shell,omitzero"`
	Scripts   map[string]string `json:"scripts,omitzero"`
	Exec      string            `json:"exec,omitzero"`
}

// StopParams names a sandbox to be stopped. The result is a sentence, as a string.
type StopParams struct {
	Sandbox   string  `json:"sandbox"`
	Namespace *string `json:"namespace,omitzero"`
}

// MetricsParams asks what sandboxes use.
type MetricsParams struct {
	// Sandbox names one; absent, all of the namespace are measured.
	Sandbox *string `json:"sandbox,omitzero"`
	// Namespace may be [AllNamespaces].
	Namespace *string `json:"namespace,omitzero"`
}

// AllNamespaces stands for every namespace that the key may see.
const AllNamespaces = "*"

// MetricsResult is the result of sandbox.metrics.get.
type MetricsResult struct {
	Sandboxes []SandboxMetrics `json:"sandboxes"`
}

// SandboxMetrics is what one sandbox uses. The usages are null when it does not run.
type SandboxMetrics struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Running   bool   `json:"running"`
	// CPUUsage is in percent of one processor.
	CPUUsage *float64 `json:"cpu_usage"`
	// MemoryUsage is in MiB.
	MemoryUsage *int64 `json:"memory_usage"`
	// DiskUsage is in bytes.
	DiskUsage *int64 `json:"disk_usage"`
}

// ReplRunParams asks for code to be run in one of the sandbox's REPLs.
type ReplRunParams struct {
	Sandbox   string  `json:"sandbox"`
	Namespace *string `json:"namespace,omitzero"`
	// Language is "python", or one of "node", "nodejs" and "javascript".
	Language string `json:"language"`
	Code     string `json:"code"`
	// Timeout is in seconds. 0, and more than the server allows, mean the server's maximum.
	Timeout float64 `json:"timeout,omitzero"`
}

// ReplRunResult is the result of sandbox.repl.run.
type ReplRunResult struct {
	Status Status `json:"status"`
	// Language as the request had it.
	Language string `json:"language"`
	Output   []Line `json:"output"`
}

// Status says whether code ran to its end.
type Status string

const (
	StatusSuccess Status = "success"
	// StatusError: the code raised; the traceback is on stderr.
	StatusError Status = "error"
)

// CommandRunParams asks for a program to be run, without a shell.
type CommandRunParams struct {
	Sandbox   string   `json:"sandbox"`
	Namespace *string  `json:"namespace,omitzero"`
	Command   string   `json:"command"`
	Args      []string `json:"args,omitzero"`
	// Timeout is in seconds. 0, and more than the server allows, mean the server's maximum.
	Timeout float64 `json:"timeout,omitzero"`
}

// CommandRunResult is the result of sandbox.command.run.
type CommandRunResult struct {
	// Command and Args as the request had them.
	Command  string   `json:"command"`
	Args     []string `json:"args"`
	ExitCode int      `json:"exit_code"`
	// Success is true when ExitCode is 0.
	Success bool   `json:"success"`
	Output  []Line `json:"output"`
}

// Line is a line of output, without its newline.
type Line struct {
	// Stream is "stdout" or "stderr".
	Stream string `json:"stream"`
	Text   string `json:"text"`
}

// GetNamespace is the namespace that the params name, or nil.
func (p *StartParams) GetNamespace() *string      { return p.Namespace }
func (p *StopParams) GetNamespace() *string       { return p.Namespace }
func (p *MetricsParams) GetNamespace() *string    { return p.Namespace }
func (p *ReplRunParams) GetNamespace() *string    { return p.Namespace }
func (p *CommandRunParams) GetNamespace() *string { return p.Namespace }
