package stream

import (
	"bytes"
	"context"
	"io"
	"sync"

	"golang.org/x/sync/semaphore"
)

const (
	// maxInput limits how many bytes of input a client may send before the process reads them.
	maxInput = 1 << 20
	// freeInput is how many of them do not count as held in memory, like the first bytes of the body of a request.
	freeInput = 64 << 10
)

// input is a queue for the standard input of a process. One goroutine writes while another reads.
type input struct {
	// hold counts bytes as held in memory. It fails if there is no room for them.
	hold func(bytes int) error
	// space has as many bytes as may still be written. It begins with freeInput bytes, and grows up to maxInput if the
	// memory for them could be counted.
	space  *semaphore.Weighted
	unheld int64 // the bytes that space does not have yet
	// readable has an element if Read may succeed.
	readable chan struct{}

	mu      sync.Mutex
	pending bytes.Buffer
	closed  bool
}

func newInput(hold func(int) error) *input {
	q := &input{hold: hold, space: semaphore.NewWeighted(maxInput), unheld: maxInput - freeInput, readable: make(chan struct{}, 1)}
	q.space.TryAcquire(q.unheld)
	return q
}

// write appends p, which has at most freeInput bytes. It waits until there is room, or returns the cause of the end of ctx.
func (q *input) write(ctx context.Context, p []byte) error {
	for !q.space.TryAcquire(int64(len(p))) {
		if q.unheld == 0 || q.hold(freeInput) != nil {
			if q.space.Acquire(ctx, int64(len(p))) != nil {
				return context.Cause(ctx)
			}
			break
		}
		q.unheld -= freeInput
		q.space.Release(freeInput)
	}
	q.mu.Lock()
	q.pending.Write(p)
	q.mu.Unlock()
	q.notify()
	return nil
}

// end makes Read return io.EOF after what was written.
func (q *input) end() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.notify()
}

func (q *input) notify() {
	select {
	case q.readable <- struct{}{}:
	default:
	}
}

// reader returns a reader of the queue that fails once ctx has ended.
func (q *input) reader(ctx context.Context) inputReader { return inputReader{q, ctx} }

type inputReader struct {
	*input
	ctx context.Context
}

func (r inputReader) Read(p []byte) (int, error) {
	for {
		r.mu.Lock()
		n, _ := r.pending.Read(p)
		closed := r.closed
		r.mu.Unlock()
		if n > 0 {
			r.space.Release(int64(n))
			return n, nil
		}
		if closed {
			return 0, io.EOF
		}
		select {
		case <-r.readable:
		case <-r.ctx.Done():
			return 0, context.Cause(r.ctx)
		}
	}
}

// wait returns when something was written or the queue was ended. If ctx ends first, it returns the cause.
func (r inputReader) wait() error {
	select {
	case <-r.readable:
		r.notify() // for Read
		return nil
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}
