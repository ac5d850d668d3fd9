package http

import (
	"context"
	"fmt"
	"sync"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// The most output of runs, in bytes as JSON, that is held at a time: what is printed stays in memory until
// the request that asked for it is answered. In passing, there are up to three copies of it.
const (
	maxOutputs      = 64 << 20 // of all keys
	maxOutputsOfKey = 32 << 20
)

// outputs counts the output that is held.
type outputs struct {
	all, ofKey int // the most

	mu    sync.Mutex
	total int
	byKey map[string]int
}

func newOutputs(all, ofKey int) *outputs {
	return &outputs{all: all, ofKey: ofKey, byKey: map[string]int{}}
}

// keep counts n more bytes for an exchange. Its error is sandbox.ErrOutputLimit.
func (o *outputs) keep(x *exchange, n int) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case x.answered: // a handler that was mounted went on without its request
		return fmt.Errorf("the request was answered already: %w", sandbox.ErrOutputLimit)
	case o.byKey[x.caller.KeyID]+n > o.ofKey:
		return fmt.Errorf("the answers that this key waits for hold more than %d MiB and the run was interrupted: "+
			"print less, write to a file, or wait for fewer answers at a time: %w", o.ofKey>>20, sandbox.ErrOutputLimit)
	case o.total+n > o.all:
		return fmt.Errorf("the answers that all keys wait for hold more than %d MiB and the run was interrupted: "+
			"print less, or try again later: %w", o.all>>20, sandbox.ErrOutputLimit)
	}
	o.total += n
	o.byKey[x.caller.KeyID] += n
	x.kept += n
	return nil
}

// release forgets what an exchange kept. It keeps nothing from then on.
func (o *outputs) release(x *exchange) {
	o.mu.Lock()
	defer o.mu.Unlock()
	x.answered = true
	if x.kept == 0 {
		return
	}
	o.total -= x.kept
	if o.byKey[x.caller.KeyID] -= x.kept; o.byKey[x.caller.KeyID] == 0 {
		delete(o.byKey, x.caller.KeyID)
	}
}

type keeperKey struct{}

// withKeeper is ctx for the runs of an exchange.
func (g *Gateway) withKeeper(ctx context.Context, x *exchange) context.Context {
	return context.WithValue(ctx, keeperKey{}, func(n int) error { return g.outputs.keep(x, n) })
}

// keeper is what the runs of a context ask before they keep output.
func keeper(ctx context.Context) func(bytes int) error {
	keep, _ := ctx.Value(keeperKey{}).(func(int) error)
	return keep
}
