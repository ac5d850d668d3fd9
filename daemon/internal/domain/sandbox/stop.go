package sandbox

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
)

// Stop stops a sandbox and removes its microVM, its resources and its record. A start in progress is canceled. Stop
// returns errdefs.ErrNotFound if there is no such sandbox. It does not depend on the store: even if the disk is full or
// broken, it removes the microVM, which frees what the sandbox has written.
func (m *Manager) Stop(ctx context.Context, name Name) error {
	if err := name.Validate(); err != nil {
		return err
	}
	if err := m.checkOpen(); err != nil {
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
	// Not before: this stop may wait for the end of a start, which must not wait for this stop.
	defer m.admission.free()()
	rec := e.record()
	rec.State = Stopping
	if err := m.Store.PutSandbox(rec); err != nil {
		// If the server ends before the microVM is removed, its next start finds the sandbox running, or failed.
		m.Log.Warn("could not record the stop of a sandbox; it is stopped nevertheless",
			"sandbox", name.Name, "namespace", name.Namespace, "id", rec.ID, "err", err)
	}
	e.set(rec, nil)
	// From here on, the stop is completed even if the client disconnects.
	if err := m.erase(ctx, e, rec, "its stop failed"); err != nil {
		return fmt.Errorf("sandbox %s could not be removed completely; stop it again: %w", name, errdefs.ErrUnavailable)
	}
	m.Log.Info("sandbox stopped", "sandbox", name.Name, "namespace", name.Namespace, "id", rec.ID)
	return nil
}

// StopAll stops every sandbox and returns how many it stopped, without the entries of the pool, which it stops as well. If all are
// stopped, the pool stays empty. StopAll continues after errors and returns them all.
func (m *Manager) StopAll(ctx context.Context) (int, error) {
	if err := m.checkOpen(); err != nil {
		return 0, err
	}
	var (
		mu      sync.Mutex
		stopped int
		errs    []error
		g       errgroup.Group
	)
	g.SetLimit(parallelism)
	poolErr := m.StopPool(ctx)
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
	err := errors.Join(append(errs, poolErr)...)
	if err != nil {
		m.pool.reopen()
	}
	return stopped, err
}
