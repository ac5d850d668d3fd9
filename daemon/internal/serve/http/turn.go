package http

import (
	"sync"
	"time"

	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// turn lets a large request use a processor. Each key has few turns at a time, so that the requests of other keys find a
// free processor, however many large requests one key sends. A request is large if it holds many bytes, or if its endpoint
// says so, as for batches. The others take so little time that they need no turn.
//
// A request that waits for its client or for a sandbox has no turn.
type turn struct {
	turns *limit.Turns

	mu     sync.Mutex
	key    string
	needed bool // the request is large
	// waits is how many goroutines of the request wait for something else than a processor. The request has a turn if it
	// is large and waits is 0.
	waits int
}

// pause returns the turn of the request, if it has one, until resume is called.
func (t *turn) pause() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.waits++; t.needed && t.waits == 1 {
		t.turns.Return(t.key)
	}
}

// resume reverts pause. It waits for a turn if the request needs one.
func (t *turn) resume() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.waits--; t.needed && t.waits == 0 {
		t.turns.Take(t.key)
	}
}

// need records that the request is large. It waits for a turn.
func (t *turn) need() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.needed && t.waits == 0 {
		t.turns.Take(t.key)
	}
	t.needed = true
}

// blockedAfter is how long a write to a client takes when the client does not read. The kernel accepts what it has room for
// much sooner.
const blockedAfter = 250 * time.Microsecond

// write calls f, which writes to the client. As long as the kernel accepts the data, that is work of a processor. When the
// client does not read, the request waits.
func (t *turn) write(f func()) {
	t.mu.Lock()
	needed := t.needed
	t.mu.Unlock()
	if !needed {
		t.pause()
		defer t.resume()
		f()
		return
	}
	blocked := time.AfterFunc(blockedAfter, t.pause)
	f()
	if !blocked.Stop() {
		t.resume()
	}
}

// TakeTurns makes the request work only in its turn from now on, as if it were large. Endpoints whose work is expensive even
// for small requests call it.
func (c *Call) TakeTurns() { c.turn.need() }

// Wait calls f, which waits for something else than a processor, such as a sandbox or the client. Meanwhile another request
// of the key may work. Endpoints call it for everything that may take long without work of this process.
func (c *Call) Wait(f func()) {
	c.turn.pause()
	defer c.turn.resume()
	f()
}
