package portal

import "context"

// queue is a lock. It is a channel because goroutines that wait for a channel are served in order, which a mutex does not
// guarantee.
type queue chan struct{}

// acquire waits for the lock. If ctx has ended or ends first, acquire returns the error of ctx.
func (q queue) acquire(ctx context.Context) error {
	select {
	case q <- struct{}{}:
		if ctx.Err() == nil {
			return nil
		}
		q.release() // both were possible
	case <-ctx.Done():
	}
	return ctx.Err()
}

func (q queue) release() { <-q }
