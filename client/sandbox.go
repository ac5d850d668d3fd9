package client

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
)

// Sandbox is the name of a sandbox, and what a Client can do with it.
type Sandbox struct {
	// Namespace may be empty: then it is the key's own, or default for a key that is not limited to one.
	Namespace string
	Name      string

	client *Client
}

// Sandbox names a sandbox. It makes no request: the sandbox need not be there yet.
func (c *Client) Sandbox(namespace, name string) *Sandbox {
	return &Sandbox{Namespace: namespace, Name: name, client: c}
}

// Start starts the sandbox and returns when it is ready. Whatever config leaves out, or all if it is nil, is
// the server's default. Starting a running sandbox with an equal config does nothing; with another one it is
// errdefs.ErrConflict.
func (s *Sandbox) Start(ctx context.Context, config *rpc.SandboxConfig) error {
	_, err := post[string](ctx, s.client, request{
		method: rpc.MethodSandboxStart, params: rpc.StartParams{Sandbox: s.Name, Namespace: optional(s.Namespace), Config: config},
		limit: startLimit, repeatable: true,
	})
	return err
}

// Stop stops the sandbox: what was written in it is gone, and its name is free again.
func (s *Sandbox) Stop(ctx context.Context) error {
	_, err := post[string](ctx, s.client, request{
		method: rpc.MethodSandboxStop, params: rpc.StopParams{Sandbox: s.Name, Namespace: optional(s.Namespace)},
		limit: stopLimit, // a second one would not find it
	})
	return err
}

// RunCode runs code in the sandbox's REPL of a language: python or node. What it defines is there for the
// next one. Code that raises is no error here, but has the result's status rpc.StatusError.
//
// Beyond timeout the run is interrupted, and the error is ErrRunTimeout; 0 is the server's maximum. Runs of
// one language take turns. A run without an answer 2 minutes after its timeout, its turn not come perhaps, is
// given up; to wait longer, use 0 and end ctx.
func (s *Sandbox) RunCode(ctx context.Context, language, code string, timeout time.Duration) (*rpc.ReplRunResult, error) {
	res, err := post[rpc.ReplRunResult](ctx, s.client, request{
		method: rpc.MethodSandboxReplRun,
		params: rpc.ReplRunParams{
			Sandbox: s.Name, Namespace: optional(s.Namespace), Language: language, Code: code, Timeout: timeout.Seconds(),
		},
		limit: runLimit(timeout),
	})
	if err != nil {
		return nil, err
	}
	return &res, nil
}

// RunCommand runs a program, without a shell. One that ends with another code than 0 is no error here; one
// that the sandbox does not have is ErrCommandNotFound. For timeout see RunCode.
func (s *Sandbox) RunCommand(ctx context.Context, command string, args []string, timeout time.Duration) (*rpc.CommandRunResult, error) {
	res, err := post[rpc.CommandRunResult](ctx, s.client, request{
		method: rpc.MethodSandboxCommandRun,
		params: rpc.CommandRunParams{
			Sandbox: s.Name, Namespace: optional(s.Namespace), Command: command, Args: args, Timeout: timeout.Seconds(),
		},
		limit: runLimit(timeout),
	})
	if err != nil {
		return nil, err
	}
	return &res, nil
}

// Metrics says what the sandbox uses.
func (s *Sandbox) Metrics(ctx context.Context) (*rpc.SandboxMetrics, error) {
	res, err := post[rpc.MetricsResult](ctx, s.client, request{
		method: rpc.MethodSandboxMetricsGet, params: rpc.MetricsParams{Sandbox: &s.Name, Namespace: optional(s.Namespace)},
		limit: queryLimit, repeatable: true,
	})
	if err != nil {
		return nil, err
	}
	if len(res.Sandboxes) == 0 {
		return nil, fmt.Errorf("sandbox %s does not exist: %w", s.Name, errdefs.ErrNotFound)
	}
	return &res.Sandboxes[0], nil
}

// runLimit is how long a run may keep its caller waiting; 0 is as long as its context.
func runLimit(timeout time.Duration) time.Duration {
	if timeout <= 0 {
		return 0
	}
	return timeout + runSlack
}
