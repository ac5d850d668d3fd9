package store

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

const (
	logName = "audit.jsonl"
	// logReserve is how much disk space, in bytes, is reserved for the log beyond its end. A change is made only
	// once there is space for its entries.
	logReserve = 256 << 10
)

// auditLog is the file of the audit log. The store decides what it contains: a change first commits its lines to the
// outbox, in the same transaction, and then writes them to the file. So one wait for the disk makes the change and its
// lines durable, and the file never has an entry for a change that was not made. Entries that the store does not know
// show that the store was replaced by an earlier copy. Lines leave the outbox once the file was synced. If the file
// differs from the store, the next change, or the next Open, first makes it catch up.
type auditLog struct {
	path   string
	db     *bbolt.DB
	commit func(fn func(*change) error) (refused bool, err error)

	// The writer that holds the committer's semaphore owns these.
	file     *os.File
	dev, ino uint64
	reserved int64 // the size up to which disk space is reserved for the file
	unsynced bool  // a sync failed: lines may not be on the disk, although they can still be read from the cache
	caughtUp bool  // catchUp has succeeded at least once

	mu    sync.Mutex
	end   logEnd        // only the writer sets it
	grown chan struct{} // closed when end changes
	// generation counts how often the entries before end moved to another offset or another file.
	generation int
	problem    error // why the log is not intact
	rollback   error // why the store is known to be older than the log
	failure    error // why the log cannot be written at present
}

func (l *auditLog) close() error {
	if l.file == nil {
		return nil
	}
	return l.file.Close()
}

// begin opens the file and makes it catch up with the store. If strict is set, it returns an error if the file differs
// from what the store expects; otherwise it only records the problem.
func (l *auditLog) begin(strict bool) error {
	err := l.db.View(func(tx *bbolt.Tx) error { return getMeta(tx, logEndKey, &l.end) })
	if err == nil {
		err = l.catchUp(strict)
	}
	if strict {
		return err
	}
	l.failure = err
	return nil
}

// prepare makes sure that the file is as the store expects and can grow.
func (l *auditLog) prepare() error {
	err := l.catchUpIfNeeded()
	if err == nil {
		err = l.reserve(0)
	}
	l.setFailure(err)
	return err
}

func (l *auditLog) setFailure(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failure = err
}

func (l *auditLog) health() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failure
}

func (l *auditLog) catchUpIfNeeded() error {
	if l.caughtUp && !l.unsynced {
		var stat unix.Stat_t
		err := unix.Lstat(l.path, &stat)
		if err == nil && stat.Dev == l.dev && stat.Ino == l.ino && stat.Size == l.end.Size {
			return nil
		}
	}
	return l.catchUp(false)
}

// reserve makes sure that the disk has space for n more bytes.
func (l *auditLog) reserve(n int) error {
	if l.end.Size+int64(n) < l.reserved {
		return nil
	}
	upTo := l.end.Size + int64(n) + logReserve
	err := unix.Fallocate(int(l.file.Fd()), unix.FALLOC_FL_KEEP_SIZE, l.end.Size, upTo-l.end.Size)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
		return l.unwritable(os.NewSyscallError("fallocate", err))
	}
	l.reserved = upTo
	return nil
}

// sync makes the file durable.
func (l *auditLog) sync() error {
	if err := unix.Fdatasync(int(l.file.Fd())); err != nil {
		l.unsynced = true
		return l.unwritable(os.NewSyscallError("fdatasync", err))
	}
	return nil
}

// write appends the lines of a committed change to the file. If that fails, the change remains committed, and its lines
// remain in the outbox. The next change then finds the file too short and makes it catch up first.
func (l *auditLog) write(lines []byte, end logEnd) {
	var writeErr error
	if _, err := l.file.Write(lines); err != nil {
		writeErr = l.unwritable(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failure = writeErr
	l.advance(end)
}

func (l *auditLog) advance(end logEnd) {
	l.end = end
	close(l.grown)
	l.grown = make(chan struct{})
}

func (l *auditLog) unwritable(err error) error {
	return fmt.Errorf("write audit log %s: %w: changes that must be logged are refused until it can be written; "+
		"check its disk and its directory: %w", l.path, err, errdefs.ErrUnavailable)
}

// catchUp makes the file agree with the store. It truncates the file only where it must write lines of the outbox;
// all other content that the store does not know is kept. The first time, entries that continue the store's chain
// become part of the log. If strict is set, it returns an error if the file differs from what the store expects.
func (l *auditLog) catchUp(strict bool) error {
	var out outbox
	err := l.db.View(func(tx *bbolt.Tx) (err error) {
		out, err = readOutbox(tx)
		return err
	})
	if err != nil {
		return err
	}
	reopened, err := l.open()
	if err != nil {
		return l.unwritable(err)
	}
	start, problem, err := l.findOutbox(out)
	if err != nil {
		return l.unwritable(err)
	}
	if err := l.rewriteLines(start, out.lines); err != nil {
		return l.unwritable(err)
	}
	end := logEnd{Head: out.end.Head, Size: start + int64(len(out.lines))}
	extended, size, err := l.readBeyond(end)
	if err != nil {
		return l.unwritable(err)
	}
	var rollback error
	if !l.caughtUp && extended.Seq > end.Seq {
		rollback = fmt.Errorf("the audit log has entry %d, but the store ends at entry %d: the store was replaced by an older "+
			"copy. All later changes to the store are lost, so keys that were revoked since then are valid again; find them "+
			"in the audit log and revoke them: %w", extended.Seq, end.Seq, errdefs.ErrDataLoss)
		end = extended
	}
	if size > end.Size {
		problem = errors.Join(problem, l.altered("another program wrote to it after entry %d", end.Seq))
		end.Size = size
	}
	if err := errors.Join(rollback, problem); strict && err != nil {
		return err
	}
	if end != out.end {
		if err := l.acceptEnd(out.end, &end, rollback != nil); err != nil {
			return err
		}
	}
	l.unsynced, l.caughtUp = false, true
	l.mu.Lock()
	defer l.mu.Unlock()
	if rollback != nil {
		l.rollback = rollback
	}
	if problem != nil {
		l.problem = problem
	}
	if reopened || start+int64(len(out.lines)) != out.end.Size {
		l.generation++
	}
	l.advance(end)
	return nil
}

// altered returns an errdefs.ErrDataLoss with what changed in the file.
func (l *auditLog) altered(format string, a ...any) error {
	return fmt.Errorf("audit log %s was altered: %s ('msb server audit verify' checks all of it): %w",
		l.path, fmt.Sprintf(format, a...), errdefs.ErrDataLoss)
}

// open opens the file, creating it if needed. It does nothing if the open file is still the one at l.path.
func (l *auditLog) open() (reopened bool, err error) {
	var stat unix.Stat_t
	if l.file != nil && unix.Lstat(l.path, &stat) == nil && stat.Dev == l.dev && stat.Ino == l.ino {
		return false, nil
	}
	// O_NONBLOCK keeps the daemon from blocking if someone put a FIFO there.
	const flags = os.O_RDWR | os.O_APPEND | os.O_CREATE | unix.O_NOFOLLOW | unix.O_NONBLOCK
	f, err := os.OpenFile(l.path, flags, 0o600)
	if err != nil {
		return false, err
	}
	err = unix.Fstat(int(f.Fd()), &stat)
	if err == nil && stat.Mode&unix.S_IFMT != unix.S_IFREG {
		err = errors.New("it is not a regular file")
	}
	if err == nil {
		err = durable.SyncDir(filepath.Dir(l.path))
	}
	if err != nil {
		return false, errors.Join(err, f.Close())
	}
	_ = l.close()
	l.file, l.dev, l.ino, l.reserved = f, stat.Dev, stat.Ino, 0
	return true, nil
}

// findOutbox returns the offset in the file at which the lines of the outbox begin, or at which they must be written if the
// file does not have them. If the store expects another offset, problem says how the file was altered.
func (l *auditLog) findOutbox(out outbox) (start int64, problem, err error) {
	start = out.end.Size - int64(len(out.lines))
	ok, err := l.endsAt(start, out.before)
	if ok || err != nil {
		return start, nil, err
	}
	start = -1
	err = l.eachLine(0, func(line []byte, end int64) bool {
		if e, err := audit.Parse(line); err == nil && e.Hash == out.before.Hash {
			start = end
		}
		return true
	})
	if err != nil {
		return 0, nil, err
	}
	if start >= 0 {
		return start, l.altered("lines were added or removed before entry %d", out.before.Seq), nil
	}
	start, err = l.endLastLine()
	return start, l.altered("entry %d is missing", out.before.Seq), err
}

// endsAt reports whether the line that ends at offset end is the entry that head names. If head.Seq is 0, there is no such
// entry, and endsAt reports whether a line ends at that offset or the offset is 0.
func (l *auditLog) endsAt(end int64, head audit.Head) (bool, error) {
	line := make([]byte, min(end, audit.MaxLine+1))
	if _, err := l.file.ReadAt(line, end-int64(len(line))); err == io.EOF {
		return false, nil // the file is shorter
	} else if err != nil {
		return false, err
	}
	line, ok := bytes.CutSuffix(line, []byte("\n"))
	if head.Seq == 0 {
		return ok || end == 0, nil
	}
	e, err := audit.Parse(line[bytes.LastIndexByte(line, '\n')+1:])
	return ok && err == nil && e.Hash == head.Hash, nil
}

// eachLine calls fn with each complete line after offset and with the offset at which the line ends, until fn returns false.
func (l *auditLog) eachLine(offset int64, fn func(line []byte, end int64) bool) error {
	r := bufio.NewReaderSize(io.NewSectionReader(l.file, offset, 1<<62), audit.MaxLine)
	for {
		line, err := r.ReadSlice('\n')
		offset += int64(len(line))
		switch {
		case err == io.EOF:
			return nil
		case err == bufio.ErrBufferFull: // too long for an entry: pass its pieces to fn, which finds that none is an entry
		case err != nil:
			return err
		}
		if !fn(bytes.TrimSuffix(line, []byte("\n")), offset) {
			return nil
		}
	}
}

// endLastLine appends a newline if the file does not end with one, and returns the file's size.
func (l *auditLog) endLastLine() (size int64, err error) {
	info, err := l.file.Stat()
	if err != nil {
		return 0, err
	}
	size = info.Size()
	if ok, err := l.endsAt(size, audit.Head{}); ok || err != nil {
		return size, err
	}
	_, err = l.file.Write([]byte("\n"))
	return size + 1, err
}

// rewriteLines makes sure that the file has lines at offset start. It writes those that a crash has lost or left incomplete.
func (l *auditLog) rewriteLines(start int64, lines []byte) error {
	found := make([]byte, len(lines))
	n, err := l.file.ReadAt(found, start)
	if err != nil && err != io.EOF {
		return err
	}
	same := 0
	for same < n && found[same] == lines[same] {
		same++
	}
	if l.unsynced {
		same = 0 // write all of it again, so that the next sync writes it to the disk
	}
	if same == len(lines) {
		return nil
	}
	if err := l.file.Truncate(start + int64(same)); err != nil {
		return err
	}
	_, err = l.file.Write(lines[same:])
	return err
}

// readBeyond reads the file after end. It returns the end of the last entry that continues the chain, and the file's
// size.
func (l *auditLog) readBeyond(end logEnd) (extended logEnd, size int64, err error) {
	err = l.eachLine(end.Size, func(line []byte, lineEnd int64) bool {
		e, err := audit.Parse(line)
		if err != nil {
			return false
		}
		head, err := end.Follow(e)
		if err != nil {
			return false
		}
		end = logEnd{Head: head, Size: lineEnd}
		return true
	})
	if err != nil {
		return end, 0, err
	}
	size, err = l.endLastLine()
	return end, size, err
}

// acceptEnd stores the end of the file as the end of the log and empties the outbox. It syncs the file first, because the
// store will no longer have a copy of the lines. If rollback is set, it also logs an audit.StoreRollback with storeEnd,
// the end that the store expected.
func (l *auditLog) acceptEnd(storeEnd logEnd, end *logEnd, rollback bool) error {
	if err := l.sync(); err != nil {
		return err
	}
	var lines []byte
	after := *end
	_, err := l.commit(func(c *change) error {
		err := emptyOutbox(c.tx)
		if err == nil {
			err = c.putMeta(logEndKey, *end)
		}
		if err == nil && rollback {
			lines, after, err = c.addEvents(l, []audit.Event{{
				Action: audit.StoreRollback,
				Actor:  audit.ActorServer,
				Detail: map[string]string{
					"store": strconv.FormatUint(storeEnd.Seq, 10),
					"log":   strconv.FormatUint(end.Seq, 10),
				},
			}})
		}
		return err
	})
	if err != nil {
		return err
	}
	*end = after
	if _, err := l.file.Write(lines); err != nil {
		return l.unwritable(err)
	}
	return nil
}
