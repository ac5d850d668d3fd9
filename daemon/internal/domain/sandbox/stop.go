package sandbox

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
)

// Stop ends the sandbox and removes all that it held, its record too. A start in progress is
// cancelled. errdefs.ErrNotFound when there is none.
func (m *Manager) Stop(ctx context.Context, name Name) error {
	if err := name.Validate(); err != nil {
		return err
	}
	if err := m.accepting(); err != nil {
		return err
	}
	m.mu.Lock()
	e := m.entries[name]
	m.mu.Unlock()
	if e == nil {
		return notFound(name)
	}
	e.cancelStart(fmt.Errorf("sandbox %s was stopped while it was starting: %w", name, errdefs.ErrFailedPrecondition))
	e, err := m.acquire(ctx, name, false)
	if err != nil {
		return err
	}
	defer m.release(e)
	rec := e.record()
	rec.State = Stopping
	if err := m.Store.PutSandbox(rec); err != nil {
		return fmt.Errorf("record the stop of sandbox %s: %w", name, err)
	}
	e.set(rec, nil)
	// A stop once begun is finished, also when the client goes away.
	if err := m.erase(ctx, e, rec, "its stop failed"); err != nil {
		return fmt.Errorf("sandbox %s was not wholly removed; stop it again: %w", name, errdefs.ErrUnavailable)
	}
	m.Log.Info("sandbox stopped", "sandbox", name.Name, "namespace", name.Namespace, "id", rec.ID)
	return nil
}

// StopAll stops every sandbox and says how many were stopped. It goes on after an error.
func (m *Manager) StopAll(ctx context.Context) (int, error) {
	if err := m.accepting(); err != nil {
		return 0, err
	}
	var (
		mu      sync.Mutex
		stopped int
		errs    []error
		g       errgroup.Group
	)
	g.SetLimit(parallelism)
	for _, rec := range m.List("") {
		g.Go(func() error {
			err := m.Stop(ctx, rec.Name)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				stopped++
			case !errdefs.IsNotFound(err):
				errs = append(errs, err)
			}
			return nil
		})
	}
	g.Wait()
	return stopped, errors.Join(errs...)
}
