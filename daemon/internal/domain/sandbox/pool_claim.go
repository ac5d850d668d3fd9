package sandbox

import (
	"context"
	"slices"
	"time"
)

// take takes an entry with this template and image out of the pool, for a start. If there is none, it returns why, or "" if there
// is no pool.
func (p *pool) take(t Template, digest string) (_ *pooled, missed string) {
	if p.off() != "" {
		return nil, ""
	}
	t = t.short()
	p.mu.Lock()
	defer p.mu.Unlock()
	shape := p.shapes[t]
	if shape == nil || shape.Max == 0 {
		return nil, "the pool has no microVMs of this image and size"
	}
	defer p.notify()
	now := time.Now()
	shape.demand, shape.demandAt = shape.demandNow(now)+1, now
	for _, e := range slices.Clone(p.entries) {
		if e.template != t || e.digest != digest || e.conn == nil {
			continue
		}
		p.remove(e)
		if e.conn.broken.Load() {
			p.doomed = append(p.doomed, e)
			continue
		}
		e.unwatch()
		shape.hits++
		if p.refillAt.Before(now) { // otherwise claims could put off a refill again and again
			p.refillAt = now.Add(refillDelay)
		}
		return new(*e), "" // a copy, because the loop may still be measuring e
	}
	shape.misses++
	return nil, "the pool had no microVM ready"
}

// late reports whether something must be done in a microVM that runs already before a tenant with this binding can use it. The
// environment comes with each run.
func (b Binding) late() bool { return b.Workdir != "" || b.User != "" || b.Hostname != DefaultHostname }

// bind makes a microVM of the pool that of rec's sandbox.
func (m *Manager) bind(ctx context.Context, e *pooled, rec Record) (_ *conn, err error) {
	defer func() {
		if err != nil {
			e.conn.Close()
		}
	}()
	b := rec.Config.Binding
	if b.Hostname != DefaultHostname {
		if err := m.Runtime.SetHostname(ctx, rec.ID, b.Hostname); err != nil {
			return nil, err
		}
	}
	if b.Workdir != "" || b.User != "" {
		// No run uses the interpreters that were started in advance: they have another directory, or another user.
		if _, err := e.conn.Warm(ctx, nil); err != nil {
			return nil, err
		}
	}
	return e.conn, prepare(ctx, e.conn, rec.Config)
}
