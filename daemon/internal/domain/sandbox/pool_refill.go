package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"time"
)

const (
	// demandHalf is the time in which the demand for a template falls to a half.
	demandHalf = 5 * time.Minute
	// The delay after a refill has failed doubles with each failure in a row.
	minPoolDelay = time.Second
	maxPoolDelay = 5 * time.Minute
)

// target returns how many entries with the template there should be at a time.
func (s *poolShape) target(now time.Time) int {
	if s.digest == "" {
		return 0
	}
	return min(max(int(math.Round(s.demandNow(now))), s.Min), s.Max)
}

// demandNow returns the demand: the number of starts with the template, each of which counts less the longer ago it was.
func (s *poolShape) demandNow(now time.Time) float64 {
	return s.demand * math.Exp2(-now.Sub(s.demandAt).Seconds()/demandHalf.Seconds())
}

// next returns the template of which an entry is to be started now, and the context of its start, which admission ends if a tenant
// needs the memory. If none is to be started, end is nil. The caller must call end when the entry has its memory, or will never
// have it.
func (p *pool) next(ctx context.Context, now time.Time) (_ Template, fillCtx context.Context, end func()) {
	all := p.sorted()
	p.mu.Lock()
	have, used := map[Template]int{}, 0
	for _, e := range p.entries {
		have[e.template]++
		used += e.template.MemoryMiB
	}
	budget, rests, hold := p.budget(), p.stopped || now.Before(p.refillAt), p.holdUntil
	p.mu.Unlock()
	// The template that lacks most comes first.
	slices.SortStableFunc(all, func(a, b poolShape) int {
		return (b.target(now) - have[b.Template]) - (a.target(now) - have[a.Template])
	})
	for _, shape := range all {
		waits := ""
		switch {
		case have[shape.Template] >= shape.target(now) || rests:
		case now.Before(shape.retryAt):
			waits = "the last refill has failed"
		case now.Before(hold):
			waits = "sandboxes needed the memory of the pool"
		case used+shape.MemoryMiB > budget:
			waits = fmt.Sprintf("the entries may have %d MiB of memory together", budget)
		default:
			var err error
			if fillCtx, end, err = p.m.admission.tryRefill(ctx, uint64(shape.MemoryMiB)<<20); err == nil {
				p.setWaits(shape.Template, "")
				return shape.Template, fillCtx, end
			}
			waits = err.Error()
		}
		p.setWaits(shape.Template, waits)
	}
	return Template{}, nil, nil
}

func (p *pool) setWaits(t Template, why string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if shape := p.shapes[t]; shape != nil {
		shape.waits = why
	}
}

// patience returns after which time there may be something to do, if nothing wakes the loop.
func (p *pool) patience(now time.Time) time.Duration {
	wait := poolTick
	p.mu.Lock()
	if p.refillAt.After(now) {
		wait = p.refillAt.Sub(now)
	}
	p.mu.Unlock()
	for _, shape := range p.sorted() {
		if shape.retryAt.After(now) {
			wait = min(wait, shape.retryAt.Sub(now))
		}
	}
	return wait
}

// fill starts an entry.
func (p *pool) fill(ctx context.Context, t Template) {
	fillCtx, cancel := context.WithTimeout(ctx, p.m.StartTimeout)
	defer cancel()
	p.mu.Lock()
	p.filling, p.cancelFill = &t, cancel
	if p.stopped {
		cancel()
	}
	p.mu.Unlock()
	began := time.Now()
	e, err := p.start(fillCtx, t)
	p.mu.Lock()
	given := p.stopped
	if context.Cause(ctx) == ErrGivenUp {
		given, p.holdUntil = true, time.Now().Add(poolHold)
	}
	p.filling, p.cancelFill = nil, nil
	p.mu.Unlock()
	if err == nil && given {
		err = errBusy // it was given up at the last moment
	}
	if err == nil {
		p.add(e)
		p.m.Log.Info("added an entry to the pool", "id", e.id, "image", t.Image, "took", time.Since(began).Round(time.Millisecond))
	} else {
		_ = p.discard(context.WithoutCancel(ctx), e) // also when the server stops
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	shape := p.shapes[t]
	switch {
	case shape == nil || given || ctx.Err() != nil:
	case err == nil:
		shape.failed, shape.lastError, shape.retryAt = 0, "", time.Time{}
	default:
		delay := min(minPoolDelay<<min(shape.failed, 16), maxPoolDelay)
		shape.failed, shape.failures, shape.lastError, shape.retryAt = shape.failed+1, shape.failures+1, err.Error(), time.Now().Add(delay)
		p.m.Log.Warn("could not add an entry to the pool", "image", t.Image, "retry_in", delay, "err", err)
	}
}

// start starts a microVM, warms it and records it as an entry. If it fails, the caller must discard the entry.
func (p *pool) start(ctx context.Context, t Template) (*pooled, error) {
	m := p.m
	rec := Record{ID: newID(), Config: Config{t, Binding{Hostname: DefaultHostname}}, State: Starting, CreatedAt: time.Now().UTC()}
	e := &pooled{id: rec.ID, template: t, createdAt: rec.CreatedAt, unwatch: func() {}}
	digest, err := p.findImage(ctx, t)
	if err != nil {
		return e, err
	}
	e.digest, rec.Digest = digest, digest
	if err := m.CheckSpace(0); err != nil {
		return e, err
	}
	if err := m.Store.PutSandbox(rec); err != nil {
		return e, err
	}
	_, err = m.Runtime.Start(ctx, e.id, t, DefaultHostname)
	if err == nil {
		e.conn, err = m.connect(ctx, e.id)
	}
	if err == nil {
		err = warm(ctx, e.conn)
	}
	if err != nil {
		return e, errors.Join(err, context.Cause(ctx))
	}
	if found, err := m.Runtime.ResolveImage(ctx, t.Image); err != nil || found != digest {
		return e, errors.Join(errors.New("the image was replaced meanwhile"), err)
	}
	usage, err := m.Runtime.Usage(ctx, e.id)
	if err != nil {
		return e, err
	}
	e.cpu, e.memory = usage.CPUTime, usage.MemoryBytes
	rec.State, rec.CPUNanos = Pooled, usage.CPUTime.Nanoseconds()
	return e, m.Store.PutSandbox(rec)
}

// warm runs what the first run of a tenant is likely to need: a command, which need not exist, and code of each language that the
// image has. It leaves the interpreters started.
func warm(ctx context.Context, c Portal) error {
	if err := rehearseCommand(ctx, c, "true"); err != nil {
		return err
	}
	languages, err := c.Warm(ctx, []Language{Python, Node})
	if err != nil {
		return fmt.Errorf("start interpreters in the microVM: %w", err)
	}
	for _, language := range languages {
		if err := runToEnd(c.RunCode(ctx, Code{Language: language, Text: "1 + 1", Rehearsal: true})); err != nil {
			return fmt.Errorf("run code of %s in the microVM: %w", language, err)
		}
	}
	return nil
}

// RehearseTemplate connects to the portal at the other end of stream, which it takes over, and runs "program version", as the first
// call in a sandbox runs a command. program must not be one of the image, whose programs may run only in sandboxes.
func (m *Manager) RehearseTemplate(ctx context.Context, stream io.ReadWriteCloser, program string) error {
	c, err := m.Connect(ctx, stream, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	return rehearseCommand(ctx, c, program, "version")
}

// rehearseCommand runs a command, which need not exist.
func rehearseCommand(ctx context.Context, c Portal, program string, args ...string) error {
	command := Command{Program: program, Args: args, Timeout: responseGrace, Environment: Config{}.environment()}
	if err := runToEnd(c.RunCommand(ctx, command)); err != nil {
		return fmt.Errorf("run a command in the microVM: %w", err)
	}
	return nil
}

// runToEnd waits for the end of a process, which RunCode or RunCommand has returned. That its program does not exist is no error.
func runToEnd(process Process, err error) error {
	if err != nil {
		return err
	}
	defer process.Close()
	for {
		switch event, err := process.Next(); {
		case errors.Is(err, ErrCommandNotFound), errors.Is(err, ErrCommandNotExecutable):
			return nil
		case err != nil:
			return err
		default:
			if _, ended := event.(Exit); ended {
				return nil
			}
		}
	}
}
