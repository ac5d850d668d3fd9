package servetest

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// CreateContext adds a context. Its name is "chosen" if the request has none.
func (f *Sandboxes) CreateContext(_ context.Context, n sandbox.Name, req sandbox.ContextRequest) (sandbox.Context, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.find(n); err != nil {
		return sandbox.Context{}, err
	}
	name := cmp.Or(req.Name, "chosen")
	if _, err := f.findContext(n, name); err == nil {
		return sandbox.Context{}, fmt.Errorf("the sandbox has a context %q: %w", name, errdefs.ErrAlreadyExists)
	}
	created := sandbox.Context{Name: name, Language: req.Language, User: req.User, Cwd: req.Cwd, PID: 7}
	if f.contexts == nil {
		f.contexts = map[sandbox.Name][]sandbox.Context{}
	}
	f.contexts[n] = append(f.contexts[n], created)
	return created, nil
}

// findContext returns the index of a context. The caller holds mu.
func (f *Sandboxes) findContext(n sandbox.Name, name string) (int, error) {
	i := slices.IndexFunc(f.contexts[n], func(c sandbox.Context) bool { return c.Name == name })
	if i < 0 {
		return i, fmt.Errorf("there is no context %q in the sandbox: %w", name, errdefs.ErrNotFound)
	}
	return i, nil
}

// ListContexts returns the contexts of a sandbox.
func (f *Sandboxes) ListContexts(_ context.Context, n sandbox.Name) ([]sandbox.Context, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.find(n)
	return slices.Clone(f.contexts[n]), err
}

// RestartContext gives a context another pid.
func (f *Sandboxes) RestartContext(_ context.Context, n sandbox.Name, name string) (sandbox.Context, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.find(n); err != nil {
		return sandbox.Context{}, err
	}
	i, err := f.findContext(n, name)
	if err != nil {
		return sandbox.Context{}, err
	}
	f.contexts[n][i].PID++
	return f.contexts[n][i], nil
}

// RemoveContext removes a context.
func (f *Sandboxes) RemoveContext(_ context.Context, n sandbox.Name, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.find(n); err != nil {
		return err
	}
	i, err := f.findContext(n, name)
	if err == nil {
		f.contexts[n] = slices.Delete(f.contexts[n], i, i+1)
	}
	return err
}
