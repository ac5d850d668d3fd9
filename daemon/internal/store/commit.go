package store

import (
	"sync"

	"go.etcd.io/bbolt"
)

// committer lets writers that come together share one commit, and so one wait for the disk. The first
// commits at once; those who come meanwhile are committed together by one of them. (bbolt's own Batch
// waits for company on a timer, which costs a lone writer more than the commit.)
type committer struct {
	db *bbolt.DB
	// turn is filled by the writer that commits.
	turn chan struct{}

	mu      sync.Mutex
	waiting []*write
}

type write struct {
	fn   func(*bbolt.Tx) error
	err  error
	done chan struct{}
}

func newCommitter(db *bbolt.DB) *committer {
	return &committer{db: db, turn: make(chan struct{}, 1)}
}

// update runs fn in a transaction and returns when that is durable. fn may run twice, in two
// transactions of which the first is rolled back.
func (c *committer) update(fn func(*bbolt.Tx) error) error {
	w := &write{fn: fn, done: make(chan struct{})}
	c.mu.Lock()
	c.waiting = append(c.waiting, w)
	c.mu.Unlock()
	select {
	case <-w.done:
		return w.err
	case c.turn <- struct{}{}:
	}
	c.mu.Lock()
	writes := c.waiting
	c.waiting = nil
	c.mu.Unlock()
	c.commit(writes)
	<-c.turn
	<-w.done // mine is among writes, or was committed while I got the turn
	return w.err
}

func (c *committer) commit(writes []*write) {
	if len(writes) == 0 {
		return
	}
	err := c.db.Update(func(tx *bbolt.Tx) error {
		for _, w := range writes {
			if err := w.fn(tx); err != nil {
				return err
			}
		}
		return nil
	})
	for _, w := range writes {
		w.err = err
		if err != nil && len(writes) > 1 {
			w.err = c.db.Update(w.fn) // one that fails must not take the others with it
		}
		close(w.done)
	}
}
