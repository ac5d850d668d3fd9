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

// Recovery counts what Recover did.
type Recovery struct {
	// Adopted sandboxes run on.
	Adopted int
	// Lost sandboxes ran before, and were found dead.
	Lost int
	// Removed microVMs were half-made, half-removed or unknown.
	Removed int
}

// step is one decision of the reconcile plan.
type step struct {
	do  verb
	id  string
	rec Record // the zero Record for a microVM without one
}

type verb string

const (
	adopt  verb = "adopt"  // it runs: take it over
	lose   verb = "lose"   // it ran, and is gone: clean up, record why
	undo   verb = "undo"   // its start was cut off: clean up, record why
	finish verb = "finish" // its stop was cut off: clean up, forget it
	keep   verb = "keep"   // it had failed, and nothing is left of it
	purge  verb = "purge"  // a microVM that no record explains
)

// plan decides, from what the store remembers and what the runtime found, what becomes of each.
func plan(records []Record, found []Instance) []step {
	alive := map[string]bool{}
	for _, inst := range found {
		alive[inst.ID] = inst.Alive
	}
	var steps []step
	for _, rec := range records {
		isAlive, exists := alive[rec.ID]
		delete(alive, rec.ID)
		do := keep
		switch {
		case rec.State == Running && isAlive:
			do = adopt
		case rec.State == Running:
			do = lose
		case rec.State == Starting:
			do = undo
		case rec.State == Stopping:
			do = finish
		case exists:
			do = undo
		}
		steps = append(steps, step{do, rec.ID, rec})
	}
	for id := range alive {
		steps = append(steps, step{do: purge, id: id})
	}
	slices.SortFunc(steps, func(a, b step) int { return strings.Compare(a.id, b.id) })
	return steps
}

// Recover brings records and microVMs to agree after a restart, and opens the Manager. A step that
// fails leaves its sandbox failed with the reason; only an unreadable store or runtime is an error.
func (m *Manager) Recover(ctx context.Context) (Recovery, error) {
	records, err := m.Store.Sandboxes()
	if err != nil {
		return Recovery{}, fmt.Errorf("read the sandboxes' records: %w", err)
	}
	found, err := m.Runtime.List(ctx)
	if err != nil {
		return Recovery{}, fmt.Errorf("list microVMs: %w", err)
	}
	var (
		r  Recovery
		mu sync.Mutex
		g  errgroup.Group
	)
	g.SetLimit(parallelism)
	for _, s := range plan(records, found) {
		g.Go(func() error {
			m.carryOut(ctx, s)
			mu.Lock()
			defer mu.Unlock()
			switch s.do {
			case adopt:
				r.Adopted++
			case lose:
				r.Lost++
			case undo, finish, purge:
				r.Removed++
			}
			return nil
		})
	}
	g.Wait()
	m.mu.Lock()
	m.open = true
	m.mu.Unlock()
	return r, nil
}

func (m *Manager) carryOut(ctx context.Context, s step) {
	m.Log.Info("reconcile", "do", s.do, "id", s.id, "sandbox", s.rec.Name.Name, "namespace", s.rec.Name.Namespace)
	e := newEntry(s.rec.Name)
	if s.do != finish && s.do != purge {
		m.mu.Lock()
		m.entries[s.rec.Name] = e
		m.mu.Unlock()
	}
	switch s.do {
	case adopt:
		e.set(s.rec, nil)
		m.watch(e, s.rec)
	case keep:
		e.set(s.rec, nil)
	case lose:
		m.fail(ctx, e, s.rec, "its microVM ended while the server was not running", nil)
	case undo:
		var cause error
		if s.rec.Cause != "" {
			cause = errors.New(s.rec.Cause)
		}
		m.fail(ctx, e, s.rec, cmp.Or(s.rec.Reason, "its start was cut off when the server ended"), cause)
	case finish, purge:
		ctx, cancel := context.WithTimeout(ctx, cleanupLimit)
		defer cancel()
		err := m.Runtime.Remove(ctx, s.id)
		if err == nil && s.do == finish {
			err = m.Store.DeleteSandbox(s.id)
		}
		if err != nil {
			// The next start of the server finds the same and tries again.
			m.Log.Error("reconcile", "do", s.do, "id", s.id, "err", err)
		}
	}
}

// watch notices when a running sandbox's microVM ends by itself.
func (m *Manager) watch(e *entry, rec Record) {
	m.watchers.Go(func() {
		reason, err := m.Runtime.Wait(m.life, rec.ID)
		if m.life.Err() != nil {
			return
		}
		if err != nil {
			reason = "its microVM can no longer be watched"
		}
		e.lock <- struct{}{}
		defer m.release(e)
		if now := e.record(); now.ID != rec.ID || now.State != Running {
			return // a stop was quicker
		}
		m.fail(m.life, e, rec, reason, err)
	})
}
