package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
)

// Recovery is the result of Recover.
type Recovery struct {
	// Adopted is the number of sandboxes that were found running and keep running.
	Adopted int
	// Lost is the number of sandboxes that ran before the restart and were found dead.
	Lost int
	// Removed is the number of microVMs that were removed because their start or stop was interrupted, or because they
	// had no record.
	Removed int
}

// step is one decision of the reconcile plan.
type step struct {
	action action
	id     string
	rec    Record // the zero Record for a microVM without one
}

type action string

const (
	actionAdopt  action = "adopt"  // the sandbox runs: watch it
	actionLose   action = "lose"   // the sandbox ran but its microVM is dead: clean up and record that it failed
	actionUndo   action = "undo"   // a start was interrupted, or a failed sandbox was not removed: clean up and record the failure
	actionFinish action = "finish" // a stop was interrupted: clean up and delete the record
	actionKeep   action = "keep"   // the sandbox had failed and has no microVM: keep the record
	actionPurge  action = "purge"  // a microVM has no record: remove it
	actionPool   action = "pool"   // the microVM waits for a tenant: it is an entry of the pool again
)

// plan returns one step for each record of the store and for each microVM of the runtime that has no record.
func plan(records []Record, found []Instance) []step {
	alive := map[string]bool{}
	for _, inst := range found {
		alive[inst.ID] = inst.Alive
	}
	var steps []step
	for _, rec := range records {
		isAlive, exists := alive[rec.ID]
		delete(alive, rec.ID)
		act := actionKeep
		switch {
		case rec.State == Pooled && isAlive:
			act = actionPool
		case rec.State == Pooled, rec.State == Starting && rec.Name == Name{}:
			act = actionFinish
		case rec.State == Running && isAlive:
			act = actionAdopt
		case rec.State == Running:
			act = actionLose
		case rec.State == Starting:
			act = actionUndo
		case rec.State == Stopping:
			act = actionFinish
		case exists:
			act = actionUndo
		}
		steps = append(steps, step{act, rec.ID, rec})
	}
	for id := range alive {
		steps = append(steps, step{action: actionPurge, id: id})
	}
	slices.SortFunc(steps, func(a, b step) int { return strings.Compare(a.id, b.id) })
	return steps
}

// Recover reconciles the records with the existing microVMs after a restart, and opens the Manager. If cleaning up fails,
// Recover logs the error and continues; it returns an error only if the records or the microVMs cannot be listed.
func (m *Manager) Recover(ctx context.Context) (Recovery, error) {
	records, err := m.Store.Sandboxes()
	if err != nil {
		return Recovery{}, fmt.Errorf("read sandbox records: %w", err)
	}
	found, err := m.Runtime.List(ctx)
	if err != nil {
		return Recovery{}, fmt.Errorf("list microVMs: %w", err)
	}
	if err := m.pool.load(); err != nil {
		return Recovery{}, fmt.Errorf("read the sizes of the pool: %w", err)
	}
	var (
		r  Recovery
		mu sync.Mutex
		g  errgroup.Group
	)
	g.SetLimit(parallelism)
	for _, s := range plan(records, found) {
		if s.action == actionPool && m.pool.off() != "" {
			s.action = actionFinish
		}
		g.Go(func() error {
			m.execute(ctx, s)
			mu.Lock()
			defer mu.Unlock()
			switch s.action {
			case actionAdopt:
				r.Adopted++
			case actionLose:
				r.Lost++
			case actionUndo, actionFinish, actionPurge:
				r.Removed++
			}
			return nil
		})
	}
	g.Wait()
	byNamespace := map[string][]Record{}
	for _, rec := range m.List("") {
		byNamespace[rec.Name.Namespace] = append(byNamespace[rec.Name.Namespace], rec)
	}
	for _, recs := range byNamespace {
		m.forgetOldest(ctx, recs, maxFailed)
	}
	m.forgetOldest(ctx, m.List(""), maxAllFailed)
	m.mu.Lock()
	m.open = true
	m.mu.Unlock()
	close(m.recovered)
	return r, nil
}

// execute carries out a step of the plan.
func (m *Manager) execute(ctx context.Context, s step) {
	m.Log.Info("reconcile", "action", s.action, "id", s.id, "sandbox", s.rec.Name.Name, "namespace", s.rec.Name.Namespace)
	if s.action == actionPool {
		m.pool.adopt(s.rec)
		return
	}
	e := newEntry(s.rec.Name)
	e.lock <- struct{}{}
	defer m.release(e)
	if s.action != actionFinish && s.action != actionPurge {
		m.mu.Lock()
		m.entries[s.rec.Name] = e
		m.mu.Unlock()
	}
	switch s.action {
	case actionAdopt:
		e.set(s.rec, nil)
		m.watch(e, s.rec)
	case actionKeep:
		if s.rec.Config.Env != nil { // from a version that kept it
			s.rec.Config.Env = nil
			if err := m.Store.PutSandbox(s.rec); err != nil {
				m.Log.Error("could not reconcile", "action", s.action, "id", s.id, "err", err)
			}
		}
		e.set(s.rec, nil)
	case actionLose:
		m.fail(ctx, e, s.rec, "its microVM ended while the server was not running", nil)
	case actionUndo:
		var cause error
		if s.rec.Cause != "" {
			cause = errors.New(s.rec.Cause)
		}
		m.fail(ctx, e, s.rec, cmp.Or(s.rec.Reason, "its start was interrupted when the server stopped"), cause)
	case actionFinish, actionPurge:
		ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
		defer cancel()
		err := m.Runtime.Remove(ctx, s.id)
		if err == nil && s.action == actionFinish {
			err = m.Store.DeleteSandbox(s.id)
		}
		if err != nil {
			// The next start of the server will find the same state and try again.
			m.Log.Error("could not reconcile", "action", s.action, "id", s.id, "err", err)
		}
	}
}

// watch starts a goroutine that records the failure when the microVM of a running sandbox ends by itself.
func (m *Manager) watch(e *entry, rec Record) {
	m.watchers.Go(func() {
		reason, err := m.Runtime.Wait(m.lifetime, rec.ID)
		if m.lifetime.Err() != nil {
			return
		}
		if err != nil {
			reason = "its microVM can no longer be watched"
		}
		e.lock <- struct{}{}
		defer m.release(e)
		if current := e.record(); current.ID != rec.ID || current.State != Running {
			return // Stop got the lock first
		}
		m.fail(m.lifetime, e, rec, reason, err)
	})
}
