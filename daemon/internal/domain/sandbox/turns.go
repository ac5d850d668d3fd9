package sandbox

import (
	"context"
	"slices"
	"sync"
)

// turns limits how many microVMs boot at a time. Starts that wait get their turns round robin over the tenant namespaces,
// and in the order in which they came within a namespace. Thus the starts of one namespace delay a start of another one by
// at most one turn. golang.org/x/sync/semaphore has only one queue for all.
type turns struct {
	mu   sync.Mutex
	free int
	// waiting has a queue for each namespace in which starts wait. The first one has the next turn. It is empty if a turn
	// is free.
	waiting []turnQueue
}

// turnQueue holds a channel for each start of a namespace that waits, at least one. A channel is closed when it is the
// start's turn.
type turnQueue struct {
	namespace string
	starts    []chan struct{}
}

// take waits for a turn. The caller must call end after a nil error. The error is the cause of the end of ctx; the caller
// then has no turn.
func (t *turns) take(ctx context.Context, namespace string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	turn, free := t.enter(namespace)
	if free {
		return nil
	}
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
		t.leave(namespace, turn)
		return context.Cause(ctx)
	}
}

// end ends a turn. The next start that waits gets it.
func (t *turns) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next()
}

// enter takes a free turn, or appends a start to the queue of its namespace.
func (t *turns) enter(namespace string) (turn chan struct{}, free bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.free > 0 {
		t.free--
		return nil, true
	}
	turn = make(chan struct{})
	i := t.index(namespace)
	if i < 0 {
		i = len(t.waiting)
		t.waiting = append(t.waiting, turnQueue{namespace: namespace})
	}
	t.waiting[i].starts = append(t.waiting[i].starts, turn)
	return turn, false
}

// leave removes a start from the queue of its namespace. If its turn has just come, the next start gets the turn.
func (t *turns) leave(namespace string, turn chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-turn:
		t.next()
		return
	default:
	}
	i := t.index(namespace)
	q := &t.waiting[i]
	q.starts = slices.DeleteFunc(q.starts, func(c chan struct{}) bool { return c == turn })
	if len(q.starts) == 0 {
		t.waiting = slices.Delete(t.waiting, i, i+1)
	}
}

// next gives a turn to the first start of the first queue, and moves that queue to the end. The caller must hold t.mu.
func (t *turns) next() {
	if len(t.waiting) == 0 {
		t.free++
		return
	}
	q := t.waiting[0]
	close(q.starts[0])
	q.starts = slices.Delete(q.starts, 0, 1)
	t.waiting = slices.Delete(t.waiting, 0, 1)
	if len(q.starts) > 0 {
		t.waiting = append(t.waiting, q)
	}
}

// index returns the index of the queue of a namespace, or -1. The caller must hold t.mu.
func (t *turns) index(namespace string) int {
	return slices.IndexFunc(t.waiting, func(q turnQueue) bool { return q.namespace == namespace })
}
