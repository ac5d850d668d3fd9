package sandboxtest

import (
	"context"
	"io"
	"sync"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// Process is a sandbox.Process that does what Body does.
type Process struct {
	// Body returns the events before the exit, and the exit code or an error. It is called by the first Next, in a
	// context that ends when the process is closed.
	Body func(ctx context.Context) ([]sandbox.Event, int, error)
	// Context is what the process was started with.
	Context context.Context

	mu     sync.Mutex
	cancel context.CancelFunc
	closed bool
	events []sandbox.Event
	begun  bool
}

// Next implements sandbox.Process.
func (p *Process) Next() (sandbox.Event, error) {
	if !p.begun {
		p.begun = true
		p.mu.Lock()
		ctx, cancel := context.WithCancel(p.Context)
		p.cancel = cancel
		if p.closed {
			cancel()
		}
		p.mu.Unlock()
		events, code, err := p.Body(ctx)
		if err != nil {
			return nil, err
		}
		p.events = append(events, sandbox.Exit{Code: code})
	}
	if len(p.events) == 0 {
		return nil, io.EOF
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
