package client

import (
	"context"

	"github.com/msbd/msbd/api/rpc"
)

// ContextOptions describe a context. Only Language is required.
type ContextOptions struct {
	// Language is python, node or bash.
	Language string
	// Name is a new name; if it is empty, the sandbox chooses one.
	Name string
	// Dir is the directory in which the interpreter starts, and User its user; see Code.
	Dir, User string
}

// CreateContext creates a context, a session of an interpreter, and returns when the interpreter is ready.
func (s *Sandbox) CreateContext(ctx context.Context, o ContextOptions) (*rpc.Context, error) {
	return s.contextCall(ctx, rpc.MethodContextCreate, rpc.ContextCreateParams{
		Target: s.target(), Language: o.Language, Context: o.Name, Cwd: o.Dir, User: o.User,
	})
}

// RestartContext replaces the interpreter of a context. Its variables are lost, and a run in progress ends.
func (s *Sandbox) RestartContext(ctx context.Context, name string) (*rpc.Context, error) {
	return s.contextCall(ctx, rpc.MethodContextRestart, rpc.ContextRestartParams{Target: s.target(), Context: name})
}

func (s *Sandbox) contextCall(ctx context.Context, method string, params any) (*rpc.Context, error) {
	res, err := post[rpc.Context](ctx, s.client, request{method: method, params: params, timeout: stopTimeout})
	if err != nil {
		return nil, err
	}
	return &res, nil
}

// Contexts returns the contexts of the sandbox in the order in which they were created.
func (s *Sandbox) Contexts(ctx context.Context) ([]rpc.Context, error) {
	res, err := post[rpc.ContextListResult](ctx, s.client, request{
		method: rpc.MethodContextList, params: rpc.ContextListParams{Target: s.target()}, timeout: queryTimeout, idempotent: true,
	})
	return res.Contexts, err
}

// RemoveContext ends the interpreter of a context. Runs of the context fail.
func (s *Sandbox) RemoveContext(ctx context.Context, name string) error {
	_, err := post[rpc.ContextRemoveResult](ctx, s.client, request{
		method: rpc.MethodContextRemove, params: rpc.ContextRemoveParams{Target: s.target(), Context: name}, timeout: stopTimeout,
	})
	return err
}
