package sandbox

import (
	"context"
	"slices"
)

// maxFailed and maxAllFailed are how many failed sandboxes of a tenant namespace, and of all namespaces together, are kept.
// They do not count against the quotas, but their records occupy memory and disk space.
const (
	maxFailed    = 100
	maxAllFailed = 1000
)

// failed returns the record of rec's sandbox after it has failed, with reason and cause; cause may be nil. It has no
// environment, which may be long: another start brings its own.
func failed(rec Record, reason string, cause error) Record {
	rec.State, rec.Reason, rec.Cause = Failed, reason, ""
	if cause != nil {
		rec.Cause = cause.Error()
	}
	rec.Config.Env = nil
	return rec
}

// limitFailed removes the oldest failed sandboxes of a tenant namespace that has more than maxFailed, and then those of all
// namespaces if they have more than maxAllFailed.
func (m *Manager) limitFailed(ctx context.Context, namespace string) {
	m.forgetOldest(ctx, m.List(namespace), maxFailed)
	m.forgetOldest(ctx, m.List(""), maxAllFailed)
}

// forgetOldest removes the failed sandboxes among recs but for the newest, of which it keeps as many as kept says. It also
// keeps those that another operation is changing, and those whose microVM or record cannot be removed.
func (m *Manager) forgetOldest(ctx context.Context, recs []Record, kept int) {
	recs = slices.DeleteFunc(recs, func(r Record) bool { return r.State != Failed })
	slices.SortFunc(recs, func(a, b Record) int { return a.CreatedAt.Compare(b.CreatedAt) })
	for _, rec := range recs[:max(0, len(recs)-kept)] {
		m.mu.Lock()
		e := m.entries[rec.Name]
		m.mu.Unlock()
		if e == nil {
			continue
		}
		select {
		case e.lock <- struct{}{}:
			m.forget(ctx, e, rec)
			m.release(e)
		default:
		}
	}
}

// forget removes a failed sandbox, unless it has changed since rec was read. The caller must hold e's lock.
func (m *Manager) forget(ctx context.Context, e *entry, rec Record) {
	if current := e.record(); current.ID != rec.ID || current.State != Failed {
		return
	}
	log := m.Log.With("sandbox", rec.Name.Name, "namespace", rec.Name.Namespace, "id", rec.ID)
	if err := m.remove(ctx, rec.ID); err != nil { // an earlier attempt may have failed
		log.Error("could not remove the microVM of the failed sandbox", "err", err)
		return
	}
	if err := m.Store.DeleteSandbox(rec.ID); err != nil {
		log.Error("could not remove the record of the failed sandbox", "err", err)
		return
	}
	e.set(Record{}, nil)
	log.Warn("removed a failed sandbox, because there are many newer ones", "reason", rec.Reason)
}
