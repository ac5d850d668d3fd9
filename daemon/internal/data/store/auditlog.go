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
	// logRoom is how much space the disk holds ready for the log, in bytes: a change is not made before
	// there is room for what it logs.
	logRoom = 256 << 10
)

// auditLog is the file of the audit log. What it should hold is decided in the store: a change commits
// its lines to the outbox, and then they are written to the file. So one wait for the disk makes both
// durable, and the file never holds what did not happen: entries that the store does not know of are a
// sign that an earlier copy of the store was put in its place. Lines leave the outbox when the file was
// synced. If the file is not as the store says, the next change, or the next start, catches up first.
type auditLog struct {
	path   string
	db     *bbolt.DB
	commit func(fn func(*change) error) (refused bool, err error)

	// These belong to the writer that has the committer's turn.
	file     *os.File
	dev, ino uint64
	reserved int64 // the disk has room for the file up to there
	unsynced bool  // a sync failed: what it was for may be gone, although it can be read
	caughtUp bool  // at least once

	mu    sync.Mutex
	end   logEnd        // written by the writer only
	grown chan struct{} // closed when end has moved
	moved int           // how often what is before end came to lie elsewhere
	// problem is what is wrong with the log or, if it is behind the log, with the store; failure is why
	// the log cannot be written.
	problem, rollback, failure error
}

func (l *auditLog) close() error {
	if l.file == nil {
		return nil
	}
	return l.file.Close()
}

// begin brings the file in step for the first time. With strict, a log that is not the store's is an
// error; otherwise whatever is wrong is remembered.
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

// ready sees to it that the file is as the store says, and can grow.
func (l *auditLog) ready() error {
	err := l.inStep()
	if err == nil {
		err = l.reserve(0)
	}
	l.failed(err)
	return err
}

func (l *auditLog) failed(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failure = err
}

func (l *auditLog) health() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failure
}

func (l *auditLog) inStep() error {
	if l.caughtUp && !l.unsynced {
		var at unix.Stat_t
		err := unix.Lstat(l.path, &at)
		if err == nil && at.Dev == l.dev && at.Ino == l.ino && at.Size == l.end.Size {
			return nil
		}
	}
	return l.catchUp(false)
}

// reserve makes sure that the disk has room for n bytes more.
func (l *auditLog) reserve(n int) error {
	if l.end.Size+int64(n) < l.reserved {
		return nil
	}
	upTo := l.end.Size + int64(n) + logRoom
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

// write adds the lines of a change that was committed. If the file does not take them, the change
// stands, and the outbox has logged it, but the next one finds the file too short, and waits until it has
// caught up.
func (l *auditLog) write(lines []byte, end logEnd) {
	var failed error
	if _, err := l.file.Write(lines); err != nil {
		failed = l.unwritable(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failure = failed
	l.advance(end)
}

func (l *auditLog) advance(end logEnd) {
	l.end = end
	close(l.grown)
	l.grown = make(chan struct{})
}

func (l *auditLog) unwritable(err error) error {
	return fmt.Errorf("write audit log %s: %w: nothing that belongs there is done without it; see to its disk and "+
		"its directory: %w", l.path, err, errdefs.ErrUnavailable)
}

// catchUp makes the file what the store says. It cuts off only what stands in the place of lines of the
// outbox; whatever else the store does not know of, it keeps. At the first time, entries that go on from
// the store's become part of the log. With strict, a log that is not the store's is an error.
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
	start, problem, err := l.locate(out)
	if err != nil {
		return l.unwritable(err)
	}
	if err := l.restore(start, out.lines); err != nil {
		return l.unwritable(err)
	}
	end := logEnd{Head: out.end.Head, Size: start + int64(len(out.lines))}
	further, size, err := l.readOn(end)
	if err != nil {
		return l.unwritable(err)
	}
	var rollback error
	if !l.caughtUp && further.Seq > end.Seq {
		rollback = fmt.Errorf("the store ends with audit entry %d, the audit log with entry %d: an earlier copy of the "+
			"store was put in its place, and what was changed since is undone; see which keys were revoked since, "+
			"they are good again: %w", end.Seq, further.Seq, errdefs.ErrDataLoss)
		end = further
	}
	if size > end.Size {
		problem = errors.Join(problem, l.wrong("something else wrote to it behind entry %d", end.Seq))
		end.Size = size
	}
	if err := errors.Join(rollback, problem); strict && err != nil {
		return err
	}
	if end != out.end {
		if err := l.adopt(out.end, &end, rollback != nil); err != nil {
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
		l.moved++
	}
	l.advance(end)
	return nil
}

func (l *auditLog) wrong(format string, a ...any) error {
	return fmt.Errorf("audit log %s is not as it was left: %s ('msb server audit verify' checks all of it): %w",
		l.path, fmt.Sprintf(format, a...), errdefs.ErrDataLoss)
}

// open opens the file, unless it is open already, and makes it if needed.
func (l *auditLog) open() (reopened bool, err error) {
	var at unix.Stat_t
	if l.file != nil && unix.Lstat(l.path, &at) == nil && at.Dev == l.dev && at.Ino == l.ino {
		return false, nil
	}
	// O_NONBLOCK: a FIFO put there must not hang the daemon.
	const flags = os.O_RDWR | os.O_APPEND | os.O_CREATE | unix.O_NOFOLLOW | unix.O_NONBLOCK
	f, err := os.OpenFile(l.path, flags, 0o600)
	if err != nil {
		return false, err
	}
	err = unix.Fstat(int(f.Fd()), &at)
	if err == nil && at.Mode&unix.S_IFMT != unix.S_IFREG {
		err = errors.New("it is not a plain file")
	}
	if err == nil {
		err = durable.SyncDir(filepath.Dir(l.path))
	}
	if err != nil {
		return false, errors.Join(err, f.Close())
	}
	_ = l.close()
	l.file, l.dev, l.ino, l.reserved = f, at.Dev, at.Ino, 0
	return true, nil
}

// locate finds where the lines of the outbox begin, or belong, in the file. problem is why that is not
// where they were, if so.
func (l *auditLog) locate(out outbox) (start int64, problem, err error) {
	start = out.end.Size - int64(len(out.lines))
	ok, err := l.endsAt(start, out.before)
	if ok || err != nil {
		return start, nil, err
	}
	start = -1
	err = l.lines(0, func(line []byte, end int64) bool {
		if e, err := audit.Parse(line); err == nil && e.Hash == out.before.Hash {
			start = end
		}
		return true
	})
	if err != nil {
		return 0, nil, err
	}
	if start >= 0 {
		return start, l.wrong("something was added or taken out before entry %d", out.before.Seq), nil
	}
	start, err = l.closeLine()
	return start, l.wrong("entry %d is gone", out.before.Seq), err
}

// endsAt reports whether the entry that is the head of a log ends at offset end.
func (l *auditLog) endsAt(end int64, head audit.Head) (bool, error) {
	line := make([]byte, min(end, audit.MaxLine+1))
	if _, err := l.file.ReadAt(line, end-int64(len(line))); err == io.EOF {
		return false, nil // it is shorter
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

// lines calls fn with each whole line from offset on, and the offset of its end, until fn returns false.
func (l *auditLog) lines(offset int64, fn func(line []byte, end int64) bool) error {
	r := bufio.NewReaderSize(io.NewSectionReader(l.file, offset, 1<<62), audit.MaxLine)
	for {
		line, err := r.ReadSlice('\n')
		offset += int64(len(line))
		switch {
		case err == io.EOF:
			return nil
		case err == bufio.ErrBufferFull: // no entry; the next piece is none, either
		case err != nil:
			return err
		}
		if !fn(bytes.TrimSuffix(line, []byte("\n")), offset) {
			return nil
		}
	}
}

// closeLine ends the last line of the file, if something else left it open, and returns the file's size.
func (l *auditLog) closeLine() (size int64, err error) {
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

// restore makes the file hold lines at start. A crash may have lost some of them, or left others half
// written.
func (l *auditLog) restore(start int64, lines []byte) error {
	there := make([]byte, len(lines))
	n, err := l.file.ReadAt(there, start)
	if err != nil && err != io.EOF {
		return err
	}
	good := 0
	for good < n && there[good] == lines[good] {
		good++
	}
	if l.unsynced {
		good = 0 // written again, it is synced again
	}
	if good == len(lines) {
		return nil
	}
	if err := l.file.Truncate(start + int64(good)); err != nil {
		return err
	}
	_, err = l.file.Write(lines[good:])
	return err
}

// readOn reads what lies behind end: up to where entries go on from it, and in all.
func (l *auditLog) readOn(end logEnd) (further logEnd, size int64, err error) {
	err = l.lines(end.Size, func(line []byte, at int64) bool {
		e, err := audit.Parse(line)
		if err != nil {
			return false
		}
		head, err := end.Follow(e)
		if err != nil {
			return false
		}
		end = logEnd{Head: head, Size: at}
		return true
	})
	if err != nil {
		return end, 0, err
	}
	size, err = l.closeLine()
	return end, size, err
}

// adopt makes the file's end the store's. What it is made of besides the outbox must be durable first.
func (l *auditLog) adopt(was logEnd, end *logEnd, rollback bool) error {
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
			lines, after, err = c.log(l, []audit.Event{{
				Action: audit.StoreRollback,
				Actor:  audit.ActorServer,
				Detail: map[string]string{
					"store": strconv.FormatUint(was.Seq, 10),
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
