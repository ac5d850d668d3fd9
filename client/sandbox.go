package client

import (
	"context"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
)

// Sandbox is a handle to a sandbox.
type Sandbox struct {
	// Namespace is the tenant namespace. Empty means the key's own, or default for a key that is not limited to
	// one.
	Namespace string
	Name      string

	client *Client
}

// Sandbox returns a handle to a sandbox. It makes no request, and the sandbox need not exist.
func (c *Client) Sandbox(namespace, name string) *Sandbox {
	return &Sandbox{Namespace: namespace, Name: name, client: c}
}

// Start starts the sandbox and returns when it is ready. The server's defaults apply to the fields that config
// does not set, and to all fields if it is nil. If the sandbox is already running, Start does nothing if config
// is equal to its configuration, and returns errdefs.ErrConflict otherwise.
func (s *Sandbox) Start(ctx context.Context, config *rpc.SandboxConfig) error {
	_, err := post[string](ctx, s.client, request{
		method: rpc.MethodSandboxStart, params: rpc.StartParams{Sandbox: s.Name, Namespace: namespaceParam(s.Namespace), Config: config},
		timeout: startTimeout, idempotent: true,
	})
	return err
}

// Stop stops the sandbox and deletes everything that was written in it. Its name can be used again.
func (s *Sandbox) Stop(ctx context.Context) error {
	_, err := post[string](ctx, s.client, request{
		method: rpc.MethodSandboxStop, params: rpc.StopParams{Sandbox: s.Name, Namespace: namespaceParam(s.Namespace)},
		timeout: stopTimeout, // not idempotent, because a second stop would not find the sandbox
	})
	return err
}

// Get returns the state and the configuration of the sandbox. If it does not exist, the error is errdefs.ErrNotFound.
func (s *Sandbox) Get(ctx context.Context) (*rpc.SandboxInfo, error) {
	res, err := post[rpc.SandboxInfo](ctx, s.client, request{
		method: rpc.MethodSandboxGet, params: rpc.GetParams{Sandbox: s.Name, Namespace: namespaceParam(s.Namespace)},
		timeout: queryTimeout, idempotent: true,
	})
	if err != nil {
		return nil, err
	}
	return &res, nil
}

// RunCode runs code in the sandbox's REPL of a language, python or node. What the code defines is available to
// the next run. Code that raises an exception is not an error: the result then has the status rpc.StatusError.
//
// A run that began and was lost, or failed in the sandbox itself, is an ErrRunFailed. It is not sent again.
//
// A run that takes longer than timeout is interrupted, and the error is ErrRunTimeout. A timeout of 0 means the
// server's maximum. Runs of the same language are queued, and timeout does not include the time in the queue.
// RunCode gives up if there is no response 2 minutes after timeout; to wait longer, use a timeout of 0 and a ctx
// with a deadline.
func (s *Sandbox) RunCode(ctx context.Context, language, code string, timeout time.Duration) (*rpc.ReplRunResult, error) {
	res, err := post[rpc.ReplRunResult](ctx, s.client, request{
		method: rpc.MethodSandboxReplRun,
		params: rpc.ReplRunParams{
			Sandbox: s.Name, Namespace: namespaceParam(s.Namespace), Language: language, Code: code, Timeout: timeout.Seconds(),
		},
		timeout: runCallTimeout(timeout),
	})
	if err != nil {
		return nil, err
	}
	return &res, nil
}

// RunCommand runs a program in the sandbox, without a shell. An exit code other than 0 is not an error. If the
// sandbox does not have the program, the error is ErrCommandNotFound. For timeout see RunCode.
func (s *Sandbox) RunCommand(ctx context.Context, command string, args []string, timeout time.Duration) (*rpc.CommandRunResult, error) {
	res, err := post[rpc.CommandRunResult](ctx, s.client, request{
		method: rpc.MethodSandboxCommandRun,
		params: rpc.CommandRunParams{
			Sandbox: s.Name, Namespace: namespaceParam(s.Namespace), Command: command, Args: args, Timeout: timeout.Seconds(),
		},
		timeout: runCallTimeout(timeout),
	})
	if err != nil {
		return nil, err
	}
	return &res, nil
}

// Metrics returns the resource usage of the sandbox.
func (s *Sandbox) Metrics(ctx context.Context) (*rpc.SandboxMetrics, error) {
	res, err := post[rpc.MetricsResult](ctx, s.client, request{
		method: rpc.MethodSandboxMetricsGet, params: rpc.MetricsParams{Sandbox: &s.Name, Namespace: namespaceParam(s.Namespace)},
		timeout: queryTimeout, idempotent: true,
	})
	if err != nil {
		return nil, err
	}
	if len(res.Sandboxes) == 0 {
		return nil, errorf(errdefs.ErrNotFound, "sandbox %s does not exist", s.Name)
	}
	return &res.Sandboxes[0], nil
}

// runCallTimeout returns the timeout of the call that makes a run with this timeout. 0 means no timeout.
func runCallTimeout(timeout time.Duration) time.Duration {
	if timeout <= 0 {
		return 0
	}
	return timeout + runSlack
}
