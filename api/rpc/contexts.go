package rpc

// Names of the methods for contexts, in the order in which their params and results follow in this file.
const (
	MethodContextCreate  = "sandbox.context.create"
	MethodContextList    = "sandbox.context.list"
	MethodContextRestart = "sandbox.context.restart"
	MethodContextRemove  = "sandbox.context.remove"
)

// ContextCreateParams holds the params of sandbox.context.create, which creates a context and starts its interpreter. The result
// is a Context.
type ContextCreateParams struct {
	Target
	// Language is as in ReplRunParams.
	Language string `json:"language"`
	// Context is a new name, or absent for one that the sandbox chooses.
	Context string `json:"context,omitzero"`
	// Cwd and User are as in RunOptions. The interpreter starts in Cwd.
	Cwd  string `json:"cwd,omitzero"`
	User string `json:"user,omitzero"`
}

// Context is a session of an interpreter that runs code in one language as one user, and keeps its state between runs.
type Context struct {
	Context string `json:"context"`
	// Language is "python", "node" or "bash".
	Language string `json:"language"`
	// User and Cwd are as in the request that created the context.
	User string `json:"user,omitzero"`
	Cwd  string `json:"cwd,omitzero"`
	// PID is the pid of the interpreter. It is absent if the interpreter does not run.
	PID int `json:"pid,omitzero"`
	// Count is how many runs the interpreter has begun.
	Count int `json:"count"`
	// Busy means that a run is in progress.
	Busy bool `json:"busy"`
}

// ContextListParams holds the params of sandbox.context.list.
type ContextListParams struct{ Target }

// ContextListResult is the result of sandbox.context.list.
type ContextListResult struct {
	// Contexts are in the order in which they were created.
	Contexts []Context `json:"contexts"`
}

// ContextRestartParams holds the params of sandbox.context.restart, which replaces the interpreter of a context. A run in progress
// ends. The result is a Context.
type ContextRestartParams struct {
	Target
	Context string `json:"context"`
}

// ContextRemoveParams holds the params of sandbox.context.remove. The result is empty.
type ContextRemoveParams struct {
	Target
	Context string `json:"context"`
}

// ContextRemoveResult is the result of sandbox.context.remove.
type ContextRemoveResult struct{}
