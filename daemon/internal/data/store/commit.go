package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/api/audit"
)

// committer lets concurrent writers share one commit, and so one wait for the disk. The first writer commits at once.
// Writers that arrive during that commit wait, and one of them commits all their changes together. (bbolt's own Batch
// waits on a timer for more writers, which costs a single writer more than the commit.)
type committer struct {
	db       *bbolt.DB
	dev, ino uint64 // of the file that db has open
	log      *auditLog
	// makeRoom frees disk space from a reserve, and reports whether there was any.
	makeRoom func() bool
	// committing is a semaphore. The writer that commits holds it.
	committing chan struct{}

	mu      sync.Mutex
	waiting []*write
	failure error     // the error of the last commit
	busy    time.Time // since when a writer has committed; zero if none does
	// stopped is why every write is refused: a commit failed in a way that leaves its result on the disk unknown.
	// The next Open reads what the disk has.
	stopped error
}

// write is a change to the records with the events that it adds to the audit log.
type write struct {
	fn     func(*change) error
	events []audit.Event
	err    error
	done   chan struct{}
}

// newCommitter returns a committer with an audit log whose file is at logPath. The log's begin method opens the file.
func newCommitter(db *bbolt.DB, logPath string, makeRoom func() bool) (*committer, error) {
	c := &committer{db: db, makeRoom: makeRoom, committing: make(chan struct{}, 1)}
	c.log = &auditLog{dir: filepath.Dir(logPath), path: logPath, db: db, commit: c.commitTx, grown: make(chan struct{})}
	var err error
	c.dev, c.ino, err = identify(db.Path())
	return c, err
}

// identify returns what distinguishes the file at path from every other file.
func identify(path string) (dev, ino uint64, err error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, 0, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	return st.Dev, st.Ino, nil
}

// begin marks the writer as the one that commits, which holds the semaphore. end releases it.
func (c *committer) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.busy = time.Now()
}

// acquire waits until no other writer commits, and then begins. The caller must call end.
func (c *committer) acquire(ctx context.Context) error {
	select {
	case c.committing <- struct{}{}:
		c.begin()
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *committer) end() {
	c.mu.Lock()
	c.busy = time.Time{}
	c.mu.Unlock()
	<-c.committing
}

// update runs fn and logs the events in one transaction, and returns when the transaction is durable. fn may run twice:
// the first transaction is then rolled back.
func (c *committer) update(fn func(*change) error, events ...audit.Event) error {
	w := &write{fn: fn, events: events, done: make(chan struct{})}
	c.mu.Lock()
	c.waiting = append(c.waiting, w)
	c.mu.Unlock()
	select {
	case <-w.done:
		return w.err
	case c.committing <- struct{}{}:
		c.begin()
	}
	c.mu.Lock()
	writes := c.waiting
	c.waiting = nil
	c.mu.Unlock()
	c.commit(writes)
	c.end()
	<-w.done // w was among writes, or another writer committed it before this one took the semaphore
	return w.err
}

func (c *committer) commit(writes []*write) {
	if len(writes) == 0 {
		return
	}
	refused, err := c.transact(writes)
	for i, w := range writes {
		w.err = err
		if refused && len(writes) > 1 { // try each alone, so that a write that fails does not fail the others
			_, w.err = c.transact(writes[i : i+1])
		}
		close(w.done)
	}
}

// transact commits writes in one transaction, with disk space from the reserve if the disk is full. If refused is true,
// nothing was written.
func (c *committer) transact(writes []*write) (refused bool, err error) {
	for {
		refused, err = c.attempt(writes)
		if !errors.Is(err, unix.ENOSPC) || c.stopReason() != nil || !c.makeRoom() {
			return refused, err
		}
	}
}

func (c *committer) attempt(writes []*write) (refused bool, err error) {
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
	refused, err = c.commitTx(func(change *change) (err error) {
		for _, w := range writes {
			if err := w.fn(change); err != nil {
				return err
			}
		}
		if len(events) > 0 {
			if lines, end, err = change.addEvents(c.log, events); err != nil && !errdefs.IsInvalidArgument(err) {
				c.log.setFailure(err)
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

// commitTx runs fn in a transaction and returns nil once the transaction is on the disk. If refused is true, nothing
// was written.
func (c *committer) commitTx(fn func(*change) error) (refused bool, err error) {
	if err := c.stopReason(); err != nil {
		return true, err
	}
	if err := c.checkFile(); err != nil {
		c.setFailure(err)
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
		err = fmt.Errorf("write store: %w: check its disk; nothing was changed: %w", err, errdefs.ErrUnavailable)
	}
	c.setFailure(err)
	return false, err
}

func (c *committer) setFailure(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failure = err
}

// committed reports whether bbolt considers a transaction committed. If its commit returned an error nevertheless, only
// the final sync failed: the disk has the state after the transaction or the state before it.
func (c *committer) committed(id int) bool {
	var current int
	err := c.db.View(func(tx *bbolt.Tx) error {
		current = tx.ID()
		return nil
	})
	return err == nil && current == id
}

// stop makes the committer refuse every further write, because the final sync of one failed. The next write would
// overwrite pages of the state that the disk may still have, and the kernel does not retry a failed sync.
func (c *committer) stop(cause error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = fmt.Errorf("after a disk error (%w), it is unknown whether the last change is on the disk, so all changes are refused: "+
		"check the disk, then restart msbd: %w", cause, errdefs.ErrUnavailable)
	return fmt.Errorf("write store: %w: only a restart shows whether the change was saved, and until then all other changes are refused: "+
		"check the disk, then restart msbd: %w", cause, errdefs.ErrUnavailable)
}

// stopReason returns why every write is refused, or nil if writes are accepted.
func (c *committer) stopReason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopped
}

// logReady makes the audit log's file catch up with the store. It returns an error if the committer has stopped.
func (c *committer) logReady() error {
	if err := c.stopReason(); err != nil {
		return err
	}
	return c.log.prepare()
}

// checkFile returns an error if the store's file is no longer the one at its path. What is written to a file that was
// removed or replaced is lost when msbd ends.
func (c *committer) checkFile() error {
	dev, ino, err := identify(c.db.Path())
	if err == nil && dev == c.dev && ino == c.ino {
		return nil
	}
	if err == nil {
		err = errors.New("another file is in its place")
	}
	return fmt.Errorf("the store %s was removed or replaced while msbd is running (%w): all changes are refused, because the "+
		"next start of msbd would not find them: put the file back, or restart msbd to use what is there: %w",
		c.db.Path(), err, errdefs.ErrUnavailable)
}

// slow is how long a commit may take before the disk is called slow.
const slow = 10 * time.Second

// health returns why nothing can be written, as far as the last write and the last probe know, or nil. It does not
// access the disk.
func (c *committer) health() error {
	if err := c.stopReason(); err != nil {
		return err
	}
	c.mu.Lock()
	failure, busy := c.failure, c.busy
	c.mu.Unlock()
	if took := time.Since(busy); !busy.IsZero() && took > slow {
		failure = errors.Join(failure, fmt.Errorf("a write to %s has waited for the disk for %s: check the disk: %w",
			c.db.Path(), took.Round(time.Second), errdefs.ErrUnavailable))
	}
	return errors.Join(failure, c.log.health())
}

// probe finds out whether a failure persists: if the last write has failed, it tries another one. If another writer is
// busy, it does nothing.
func (c *committer) probe() {
	select {
	case c.committing <- struct{}{}:
		c.begin()
		defer c.end()
	default:
		return
	}
	if c.stopReason() != nil {
		return
	}
	c.mu.Lock()
	failed := c.failure != nil
	c.mu.Unlock()
	if err := c.checkFile(); err != nil {
		c.setFailure(err)
		return
	}
	if failed {
		// A transaction that changes nothing succeeds even on a full disk, so there must be space for bbolt to grow its file.
		if err := c.reserve(c.db.AllocSize); err != nil {
			c.setFailure(fmt.Errorf("write store: %w (%d MiB must be free before it is tried again): check its disk: %w",
				err, c.db.AllocSize>>20, errdefs.ErrUnavailable))
		} else {
			_, _ = c.transact([]*write{{fn: func(*change) error { return nil }}})
		}
	}
	if c.log.health() != nil {
		_ = c.logReady()
	}
	if c.stopReason() != nil {
		return
	}
	// If these fail, nothing is lost yet: the next write that needs space reports it.
	_ = c.reserve(storeReserve)
	c.log.refill()
}

// storeReserve is how much disk space, in bytes, is reserved for the store's file beyond the pages that bbolt has used. It
// is for thousands of changes on a full disk, because a change uses the pages again that an earlier one has left.
const storeReserve = 2 << 20

// reserve reserves disk space for size more bytes of pages, so that others cannot take it. It makes the file longer if
// necessary: bbolt discards what is reserved beyond the end when it makes the file longer itself, which reserves nothing.
func (c *committer) reserve(size int) error {
	f, err := os.OpenFile(c.db.Path(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var used int64
	if err := c.db.View(func(tx *bbolt.Tx) error { used = tx.Size(); return nil }); err != nil {
		return err
	}
	return allocate(f, used+int64(size), 0)
}

// allocate reserves disk space for the first size bytes of a file. mode is 0 to make a shorter file size bytes long, or
// unix.FALLOC_FL_KEEP_SIZE. On a file system that cannot reserve space, allocate does nothing and returns nil.
func allocate(f *os.File, size int64, mode uint32) error {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) == nil && st.Blocks*512 >= size && (st.Size >= size || mode != 0) {
		return nil
	}
	err := unix.Fallocate(int(f.Fd()), mode, 0, size)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	return os.NewSyscallError("fallocate", err)
}
