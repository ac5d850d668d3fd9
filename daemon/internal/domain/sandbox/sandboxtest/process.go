package sandboxtest

import (
	"context"
	"io"
	"sync"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// Process is a sandbox.Process with the events that Body returns.
type Process struct {
	// Body returns the events before the end, and the exit code or an error. The first Next calls it, with a context
	// that is canceled when the process is closed.
	Body func(ctx context.Context) ([]sandbox.Event, int, error)
	// Context is the context that the process was started with.
	Context context.Context

	mu      sync.Mutex
	cancel  context.CancelFunc
	closed  bool
	events  []sandbox.Event
	err     error // at the end of the events
	started bool
}

// Next implements sandbox.Process.
func (p *Process) Next() (sandbox.Event, error) {
	if !p.started {
		p.started = true
		p.mu.Lock()
		ctx, cancel := context.WithCancel(p.Context)
		p.cancel = cancel
		if p.closed {
			cancel()
		}
		p.mu.Unlock()
		events, code, err := p.Body(ctx)
		if p.events, p.err = events, err; err == nil {
			p.events, p.err = append(events, sandbox.Exit{Code: code}), io.EOF
		}
	}
	if len(p.events) == 0 {
		return nil, p.err
	}
	event := p.events[0]
	p.events = p.events[1:]
	return event, nil
}

// Close implements sandbox.Process.
func (p *Process) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed = true; p.cancel != nil {
		p.cancel()
	}
	return nil
}
