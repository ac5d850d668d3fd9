package store

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/api/audit"
)

// committer lets writers that come together share one commit, and so one wait for the disk. The first
// commits at once; those who come meanwhile are committed together by one of them. (bbolt's own Batch
// waits for company on a timer, which costs a lone writer more than the commit.)
type committer struct {
	db  *bbolt.DB
	log *auditLog
	// turn is filled by the writer that commits.
	turn chan struct{}

	mu      sync.Mutex
	waiting []*write
	failure error // of the last commit
	// stopped is why nothing is written any more: a commit failed so that nobody knows what the disk has.
	// The next Open finds out.
	stopped error
}

// write is a change to the records and what the audit log has to say of it.
type write struct {
	fn     func(*change) error
	events []audit.Event
	err    error
	done   chan struct{}
}

// newCommitter makes the audit log with the file at logPath, too, which its begin opens.
func newCommitter(db *bbolt.DB, logPath string) *committer {
	c := &committer{db: db, turn: make(chan struct{}, 1)}
	c.log = &auditLog{path: logPath, db: db, commit: c.durably, grown: make(chan struct{})}
	return c
}

// update runs fn in a transaction, logs the events in the same one, and returns when that is durable. fn
// may run twice, in two transactions of which the first is rolled back.
func (c *committer) update(fn func(*change) error, events ...audit.Event) error {
	w := &write{fn: fn, events: events, done: make(chan struct{})}
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
	refused, err := c.transact(writes)
	for i, w := range writes {
		w.err = err
		if refused && len(writes) > 1 { // one that fails must not take the others with it
			_, w.err = c.transact(writes[i : i+1])
		}
		close(w.done)
	}
}

// transact commits writes together. When they were refused, nothing was written.
func (c *committer) transact(writes []*write) (refused bool, err error) {
	var (
		lines []byte
		end   logEnd
	)
	events := eventsOf(writes)
	if len(events) > 0 {
		if err := c.logReady(); err != nil {
			return true, err
		}
	}
	refused, err = c.durably(func(change *change) (err error) {
		for _, w := range writes {
			if err := w.fn(change); err != nil {
				return err
			}
		}
		if len(events) > 0 {
			if lines, end, err = change.log(c.log, events); err != nil {
				c.log.failed(err)
			}
		}
		return err
	})
	if err == nil && len(lines) > 0 {
		c.log.write(lines, end)
	}
	return refused, err
}

func eventsOf(writes []*write) (events []audit.Event) {
	for _, w := range writes {
		events = append(events, w.events...)
	}
	return events
}

// durably runs fn in a transaction, and returns nil once that is on the disk. If it was refused, nothing
// was written.
func (c *committer) durably(fn func(*change) error) (refused bool, err error) {
	if err := c.stopReason(); err != nil {
		return true, err
	}
	id := 0
	refused = true
	err = c.db.Update(func(tx *bbolt.Tx) error {
		id = tx.ID()
		change := newChange(tx)
		if err := fn(change); err != nil {
			return err
		}
		err := change.finish()
		refused = err != nil
		return err
	})
	switch {
	case refused:
		return true, err
	case err != nil && c.committed(id):
		return false, c.stop(err)
	case err != nil:
		err = fmt.Errorf("write store: %w: see to its disk; nothing was changed: %w", err, errdefs.ErrUnavailable)
	}
	c.failed(err)
	return false, err
}

func (c *committer) failed(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failure = err
}

// committed reports whether bbolt takes a transaction for committed. If its commit failed all the same,
// the last sync did: the disk has the state after the transaction, or the one before it.
func (c *committer) committed(id int) (is bool) {
	err := c.db.View(func(tx *bbolt.Tx) error {
		is = tx.ID() == id
		return nil
	})
	return is && err == nil
}

// stop refuses every write from now on, because one failed at its very end. The next one would go over
// pages of the state that the disk may still have, and the kernel does not try a failed sync twice.
func (c *committer) stop(cause error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = fmt.Errorf("the store changes nothing since its disk failed (%w), because the last change may be on the disk or not: "+
		"check the disk, then restart msbd: %w", cause, errdefs.ErrUnavailable)
	return fmt.Errorf("write store: %w: the change may be found made after a restart, and until then nothing else is changed: "+
		"check the disk, then restart msbd: %w", cause, errdefs.ErrUnavailable)
}

// stopReason is why nothing is written any more, or nil.
func (c *committer) stopReason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopped
}

// logReady has the log's file catch up with the store. It fails while it is unknown what the disk has.
func (c *committer) logReady() error {
	if err := c.stopReason(); err != nil {
		return err
	}
	return c.log.ready()
}

// health returns why nothing can be written at present: the last attempt failed, as did one made just now.
// It never waits for another writer, who will find out as well.
func (c *committer) health() error {
	if err := c.stopReason(); err != nil {
		return err
	}
	c.mu.Lock()
	commit := c.failure
	c.mu.Unlock()
	err := errors.Join(commit, c.log.health())
	if err == nil {
		return nil
	}
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	default:
		return err
	}
	if commit != nil {
		if commit = c.room(); commit == nil {
			_, commit = c.transact([]*write{{fn: func(*change) error { return nil }}})
		}
	}
	return errors.Join(commit, c.logReady())
}

// room has the disk keep room for the store to grow by a step of bbolt's: a transaction that changes
// nothing would succeed on a full one.
func (c *committer) room() error {
	err := reserve(c.db.Path(), int64(c.db.AllocSize))
	if err == nil || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	return fmt.Errorf("write store: %w (%d MiB are wanted before it is tried again): see to its disk: %w",
		err, c.db.AllocSize>>20, errdefs.ErrUnavailable)
}

// reserve has a file's disk keep room for size bytes behind its end, which stays where it is.
func reserve(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return os.NewSyscallError("fallocate", unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, info.Size(), size))
}
