package sandbox

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// maxWaiting limits how many starts wait at a time, and maxWaitingEach how many of one tenant namespace, so that one
	// namespace cannot take all places.
	maxWaiting     = 1024
	maxWaitingEach = maxWaiting / 4
	// retryStart is after which time a client may try a start again that the server had no room for.
	retryStart = 5 * time.Second
	// minReserve is the least memory of the host, in bytes, that sandboxes do not get.
	minReserve = 512 << 20
)

// Refusal is the error of a start for which there is no room. Its class is errdefs.ErrResourceExhausted.
type Refusal struct {
	text string
	// RetryAfter is after which time trying again can help. It is 0 if somebody must change something first.
	RetryAfter time.Duration
}

func (r *Refusal) Error() string { return r.text }
func (*Refusal) Unwrap() error   { return errdefs.ErrResourceExhausted }

// admission decides when starts begin. At most slots microVMs boot at a time. A start also needs as much memory as its
// sandbox is configured with: of what the host has available, less a reserve and the memory of the starts in progress, which
// have not used theirs yet. What running sandboxes use is not available any more, so it is not counted again.
//
// Starts wait for a slot, and for memory while a start or the removal of a microVM is in progress, because its end may free
// memory. Otherwise they are refused. The tenant namespaces take turns, and within a namespace, starts are admitted in the order
// in which they came. Thus the starts of one namespace delay a start of another one by at most one turn. A start that lacks
// memory is not overtaken.
type admission struct {
	slots  int
	memory func() (available, total uint64, err error)
	// giveUp, if it is set, is called when a start lacks memory, and the background work ends then. It begins to remove what no
	// tenant uses, and returns how many removals have begun. Each must call freed at its end. idle, if it is set, is called when no
	// start is in progress or waits any more. Both are called with mu held, and must not block.
	giveUp func() int
	idle   func()

	mu       sync.Mutex
	booting  int    // starts that were admitted and have not left
	reserved uint64 // the memory of these starts, and of the background work, in bytes
	freeing  int    // removals of microVMs in progress
	// background is the work in progress that no tenant waits for: a refill of the pool, and the build of a template.
	background []*background
	// waiting has a queue for each namespace in which starts wait. The first start of the first queue is next. If there is
	// one, a start or a removal is in progress, so leave or the end of a removal admits or refuses it.
	waiting []startQueue
}

// startQueue holds the starts of a namespace that wait, at least one.
type startQueue struct {
	namespace string
	starts    []*place
}

// background is work that no tenant waits for.
type background struct {
	giveUp  context.CancelCauseFunc
	givenUp bool
}

// place is what a start has in the admission.
type place struct {
	namespace string
	memory    uint64
	// decided is closed when the start was admitted, or refused with err.
	decided chan struct{}
	err     error
	left    bool // guarded by admission.mu
}

// enter admits or refuses a start, or appends it to the queue of its namespace. memory is in bytes. The caller must call leave
// after a nil error.
func (a *admission) enter(namespace string, memory uint64) (*place, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, most, err := a.room()
	if err != nil {
		return nil, err
	}
	if memory > most {
		return nil, &Refusal{text: fmt.Sprintf("the server has at most %d MiB of memory for sandboxes, and this sandbox needs %d MiB; ask for less memory",
			most>>20, memory>>20)}
	}
	i := a.index(namespace)
	switch {
	case i >= 0 && len(a.waiting[i].starts) >= maxWaitingEach:
		return nil, &Refusal{fmt.Sprintf("%d starts wait in namespace %s, and no more can; try again later", maxWaitingEach, namespace), retryStart}
	case a.waiters() >= maxWaiting:
		return nil, &Refusal{fmt.Sprintf("%d starts wait in all namespaces together, and no more can; try again later", maxWaiting), retryStart}
	}
	if i < 0 {
		i = len(a.waiting)
		a.waiting = append(a.waiting, startQueue{namespace: namespace})
	}
	p := &place{namespace: namespace, memory: memory, decided: make(chan struct{})}
	a.waiting[i].starts = append(a.waiting[i].starts, p)
	a.settle()
	return p, p.err
}

// wait waits until the start is admitted. The error says why it was refused, or is the cause of the end of ctx.
func (a *admission) wait(ctx context.Context, p *place) error {
	select {
	case <-p.decided:
		return p.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// leave ends the start, whether it waits or was admitted. Further calls do nothing.
func (a *admission) leave(p *place) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p.left {
		return
	}
	p.left = true
	select {
	case <-p.decided:
		if p.err == nil {
			a.booting--
			a.reserved -= p.memory
		}
	default:
		i := a.index(p.namespace)
		q := &a.waiting[i]
		q.starts = slices.DeleteFunc(q.starts, func(other *place) bool { return other == p })
		if len(q.starts) == 0 {
			a.waiting = slices.Delete(a.waiting, i, i+1)
		}
	}
	a.settle()
}

// free marks the begin of an operation that removes microVMs. The caller must call end when the operation has ended.
func (a *admission) free() (end func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.freeing++
	return a.freed
}

// freed marks the end of a removal.
func (a *admission) freed() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.freeing--
	a.settle()
}

var (
	// errBusy is the error of background work that must not begin because of the starts of tenants.
	errBusy = errors.New("starts of sandboxes go first")
	// ErrGivenUp is the cause of the end of background work whose memory a start needs.
	ErrGivenUp = errors.New("the start of a sandbox needs the memory")
)

// tryRefill begins a refill of the pool, unless a start is in progress. See begin.
func (a *admission) tryRefill(ctx context.Context, memory uint64) (_ context.Context, end func(), err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.booting > 0 {
		return nil, nil, errBusy
	}
	return a.begin(ctx, memory)
}

// tryBuild begins the build of a template, also while starts are in progress: the build has little processor time then, and on a
// server where sandboxes are always being started, templates are of most use. See begin.
func (a *admission) tryBuild(ctx context.Context, memory uint64) (_ context.Context, end func(), err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.begin(ctx, memory)
}

// begin reserves memory, in bytes, for background work, which occupies no slot and does not wait. The work must end early if the
// returned context ends, which has the cause ErrGivenUp if a start needs the memory. The caller must call end when the work has
// ended, and hold a.mu now.
func (a *admission) begin(ctx context.Context, memory uint64) (_ context.Context, end func(), err error) {
	if len(a.waiting) > 0 {
		return nil, nil, errBusy
	}
	free, _, err := a.room()
	if err != nil {
		return nil, nil, err
	}
	if memory > free {
		return nil, nil, fmt.Errorf("the host has %d MiB of free memory for sandboxes, and %d MiB are needed", free>>20, memory>>20)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	b := &background{giveUp: cancel}
	a.reserved += memory
	a.background = append(a.background, b)
	return ctx, func() {
		cancel(nil)
		a.mu.Lock()
		defer a.mu.Unlock()
		a.reserved -= memory
		a.background = slices.DeleteFunc(a.background, func(other *background) bool { return other == b })
		if b.givenUp {
			a.freeing--
		}
		a.settle()
	}, nil
}

// giveUpAll ends all that uses memory but no tenant has. The caller must hold a.mu.
func (a *admission) giveUpAll() {
	for _, b := range a.background {
		if !b.givenUp {
			b.givenUp = true
			a.freeing++
			b.giveUp(ErrGivenUp)
		}
	}
	if a.giveUp != nil {
		a.freeing += a.giveUp()
	}
}

// settle admits and refuses starts in their order, until one must wait. The caller must hold a.mu.
func (a *admission) settle() {
	defer func() {
		if a.booting == 0 && len(a.waiting) == 0 && a.idle != nil {
			a.idle()
		}
	}()
	for len(a.waiting) > 0 && a.booting < a.slots {
		p := a.waiting[0].starts[0]
		free, _, err := a.room()
		if err == nil && p.memory > free {
			a.giveUpAll()
		}
		switch {
		case err != nil:
			p.err = err
		case p.memory <= free:
			a.booting++
			a.reserved += p.memory
		case a.booting > 0 || a.freeing > 0:
			return
		default:
			p.err = &Refusal{fmt.Sprintf("the server has %d MiB of free memory for sandboxes, and this sandbox needs %d MiB; "+
				"stop sandboxes, or try again later", free>>20, p.memory>>20), retryStart}
		}
		a.next()
		close(p.decided)
	}
}

// next removes the first start of the first queue, and moves that queue to the end. The caller must hold a.mu.
func (a *admission) next() {
	q := a.waiting[0]
	q.starts = slices.Delete(q.starts, 0, 1)
	a.waiting = slices.Delete(a.waiting, 0, 1)
	if len(q.starts) > 0 {
		a.waiting = append(a.waiting, q)
	}
}

// room returns the memory that the next start may have, and the most that a start could have if nothing used the host's memory.
// Both are in bytes. The caller must hold a.mu.
func (a *admission) room() (free, most uint64, err error) {
	available, total, err := a.memory()
	if err != nil {
		return 0, 0, fmt.Errorf("measure the memory of the host: %w", err)
	}
	reserve := max(total/20, minReserve)
	return less(available, reserve+a.reserved), less(total, reserve), nil
}

// less returns a - b, or 0 if b is larger.
func less(a, b uint64) uint64 { return a - min(a, b) }

// waiters returns how many starts wait. The caller must hold a.mu.
func (a *admission) waiters() (n int) {
	for _, q := range a.waiting {
		n += len(q.starts)
	}
	return n
}

// index returns the index of the queue of a namespace, or -1. The caller must hold a.mu.
func (a *admission) index(namespace string) int {
	return slices.IndexFunc(a.waiting, func(q startQueue) bool { return q.namespace == namespace })
}

// templateDisk is the most disk space that a template takes, in bytes.
const templateDisk = 256 << 20

// AdmitTemplate begins the build of a template of sandboxes with this memory. It returns an error if the build must not begin now:
// because a start waits, or because the host has not the memory, or not the disk space, for the build besides that for starts. The
// build must end early if the returned context ends, which has the cause ErrGivenUp if a start needs the memory. The caller must
// call end when the build has ended.
func (m *Manager) AdmitTemplate(ctx context.Context, memoryMiB int) (_ context.Context, end func(), err error) {
	if err := m.CheckSpace(templateDisk); err != nil {
		return nil, nil, fmt.Errorf("with a template of up to %d MiB, %w", templateDisk>>20, err)
	}
	return m.admission.tryBuild(ctx, uint64(memoryMiB)<<20)
}

// Room says what the server has left for starts.
type Room struct {
	// MemoryBytes is the largest memory that a sandbox which starts now can have. It is nil if it cannot be measured.
	MemoryBytes *uint64
	// Booting is the number of starts in progress, without those that wait. Waiting is the number of starts that wait.
	Booting, Waiting int
}

// Room returns what the server has left for starts. It does not block.
func (m *Manager) Room() Room {
	a := &m.admission
	a.mu.Lock()
	defer a.mu.Unlock()
	r := Room{Booting: a.booting, Waiting: a.waiters()}
	if free, _, err := a.room(); err == nil {
		r.MemoryBytes = &free
	}
	return r
}
