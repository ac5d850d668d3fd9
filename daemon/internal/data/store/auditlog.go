package store

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

const (
	logName = "audit.jsonl"
	// logReserve is how much disk space, in bytes, is reserved for the log beyond its end: enough for thousands of changes
	// on a full disk. A change is made only once there is space for its entries.
	logReserve = 1 << 20
)

// auditLog is the audit log: a file to which entries are added, and the segments that were sealed before. The store
// decides what it contains: a change first commits its lines to the outbox, in the same transaction, and then writes them
// to the file. So one wait for the disk makes the change and its lines durable, and the file never has an entry for a
// change that was not made. Entries that the store does not know show that the store was replaced by an earlier copy.
// Lines leave the outbox once the file was synced. If the file differs from the store, the next change, or the next Open,
// first makes it catch up. A crash explains such a difference only at Open. Later, another program has changed the file,
// which is a problem of the log.
type auditLog struct {
	dir    string // the state directory
	path   string // of the file
	db     *bbolt.DB
	commit func(fn func(*change) error) (refused bool, err error)

	// The writer that holds the committer's semaphore owns these.
	file     *os.File
	dev, ino uint64
	segments []segment
	reserved int64 // the size up to which disk space is reserved for the file
	unsynced bool  // a sync failed: lines may not be on the disk, although they can still be read from the cache
	behind   bool  // the file does not have all lines of the store, because msbd has not written them
	caughtUp bool  // catchUp has succeeded at least once
	outboxed bool  // the outbox has lines
	unsaved  bool  // the store does not have all problems

	mu sync.Mutex
	// published is what readers use. The writer replaces it when it has changed the log.
	published logView
	grown     chan struct{} // closed when published changes
	// problems are what is wrong with the log, until an administrator acknowledges them. Only a writer that holds the
	// semaphore changes them.
	problems []string
	// acknowledged are the last problems that an administrator has acknowledged, without the names of the files. A check that
	// finds one of them again does not add it to problems. The writer owns them.
	acknowledged []string
	failure      error // why the log cannot be written at present
}

// logView is the log at one moment.
type logView struct {
	end      logEnd
	file     *os.File // nil if the file was never opened
	segments []segment
	// alterations counts how often another program has changed the log.
	alterations int
}

const (
	// maxProblems is the number of problems that the log keeps, including moreProblems.
	maxProblems = 10
	// maxAcknowledged is the number of acknowledged problems that the log remembers.
	maxAcknowledged = 100
	// moreProblems is the last of the problems if there were too many to keep.
	moreProblems = "more problems were found, which are not listed here: 'msb server audit verify' lists those that the log still has"
)

func (l *auditLog) close() error {
	var err error
	if l.file != nil {
		err = l.file.Close()
	}
	if f := l.published.file; f != nil && f != l.file {
		err = errors.Join(err, f.Close())
	}
	return err
}

// begin opens the file and makes it catch up with the store. If strict is set, it returns an error if the file differs
// from what the store expects; otherwise it only records the problem.
func (l *auditLog) begin(strict bool) error {
	err := l.db.View(func(tx *bbolt.Tx) (err error) {
		var problems []string
		if err := getMeta(tx, problemsKey, &problems); err != nil {
			return err
		}
		for _, problem := range problems {
			if text, acknowledged := strings.CutPrefix(problem, acknowledgedMark); acknowledged {
				l.acknowledged = append(l.acknowledged, text)
			} else {
				l.problems = append(l.problems, problem)
			}
		}
		if l.segments, err = loadSegments(tx); err != nil {
			return err
		}
		return getMeta(tx, logEndKey, &l.published.end)
	})
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
	if err == nil && l.unsaved {
		err = l.saveProblems()
	}
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
	if l.caughtUp && !l.unsynced && !l.behind {
		var stat unix.Stat_t
		err := unix.Lstat(l.path, &stat)
		if err == nil && stat.Dev == l.dev && stat.Ino == l.ino && stat.Size == l.published.end.Size {
			return nil
		}
	}
	return l.catchUp(false)
}

// reserve makes sure that the disk has space for n more bytes.
func (l *auditLog) reserve(n int) error {
	end := l.published.end.Size
	if end+int64(n) < l.reserved {
		return nil
	}
	upTo := end + int64(n) + logReserve
	if err := allocate(l.file, upTo, unix.FALLOC_FL_KEEP_SIZE); err != nil {
		return l.unwritable(err)
	}
	l.reserved = upTo
	return nil
}

// refill completes the reserve if half of it is used up and the disk has space.
func (l *auditLog) refill() {
	if end := l.published.end.Size; l.file != nil && l.reserved-end < logReserve/2 && allocate(l.file, end+logReserve, unix.FALLOC_FL_KEEP_SIZE) == nil {
		l.reserved = end + logReserve
	}
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
// remain in the outbox. The next change then makes the file catch up first.
func (l *auditLog) write(lines []byte, end logEnd) {
	var writeErr error
	if _, err := l.file.Write(lines); err != nil {
		l.behind = true
		writeErr = l.unwritable(err)
	}
	l.outboxed = true
	l.setFailure(writeErr)
	l.publish(end, false)
}

// settle syncs the file and empties the outbox. From then on, a crash does not explain a change of the file, so that the
// next Open reports it.
func (l *auditLog) settle() error {
	if !l.outboxed {
		return nil
	}
	err := l.catchUpIfNeeded()
	if err == nil {
		err = l.sync()
	}
	if err == nil {
		_, err = l.commit(func(c *change) error { return emptyOutbox(c.tx) })
	}
	if err == nil {
		l.outboxed = false
	}
	return err
}

// publish shows readers the current state of the log, with this end.
func (l *auditLog) publish(end logEnd, altered bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f := l.published.file; f != nil && f != l.file {
		f.Close()
	}
	l.published.end, l.published.file, l.published.segments = end, l.file, l.segments
	if altered {
		l.published.alterations++
	}
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
	var (
		adopted   []segment
		misplaced error
	)
	expected, base := out, l.base()
	if !l.caughtUp {
		if adopted, err = l.adoptSegments(out.end.Head); err != nil {
			return l.unwritable(err)
		}
	}
	if n := len(adopted); n > 0 {
		base = adopted[n-1].Last
		expected = outbox{before: base, end: logEnd{Head: base}}
	} else if misplaced, err = l.placeSegment(out, strict); err != nil {
		return l.unwritable(err)
	} else if strict && misplaced != nil {
		return misplaced
	}
	if err := l.open(); err != nil {
		return l.unwritable(err)
	}
	start, problem, err := l.findOutbox(base, expected)
	if err != nil {
		return l.unwritable(err)
	}
	if !strict { // add each problem at once, because the next attempt would not find it after a repair
		l.addProblem(problem)
	}
	problem = errors.Join(misplaced, problem)
	changed, err := l.rewriteLines(start, expected.lines)
	if err != nil {
		return l.unwritable(err)
	}
	if changed && problem == nil && l.caughtUp && !l.unsynced && !l.behind {
		problem = l.altered("the entries after %d were removed or changed; msbd has written them again", expected.before.Seq)
		l.addProblem(problem)
	}
	l.outboxed = len(out.lines) > 0
	end := logEnd{Head: expected.end.Head, Size: start + int64(len(expected.lines))}
	extended, size, err := l.readBeyond(end)
	if err != nil {
		return l.unwritable(err)
	}
	var rollback error
	if !l.caughtUp && extended.Seq > out.end.Seq {
		rollback = fmt.Errorf("the audit log has entry %d, but the store ends at entry %d: the store was replaced by an older "+
			"copy. All later changes to the store are lost, so keys that were revoked since then are valid again; find them "+
			"in the audit log and revoke them: %w", extended.Seq, out.end.Seq, errdefs.ErrDataLoss)
		end = extended
	}
	if size > end.Size {
		foreign := l.altered("another program wrote to it after entry %d", end.Seq)
		problem = errors.Join(problem, foreign)
		if !strict {
			l.addProblem(foreign)
		}
		end.Size = size
	}
	if err := errors.Join(rollback, problem); strict && err != nil {
		return err
	}
	l.addRollback(rollback)
	if end != out.end {
		if err := l.acceptEnd(out.end, &end, adopted, rollback != nil); err != nil {
			return err
		}
	}
	l.unsynced, l.behind, l.caughtUp = false, false, true
	l.publish(end, rollback != nil || problem != nil)
	if l.unsaved {
		return l.saveProblems()
	}
	return nil
}

// addProblem adds what is wrong with the log to its problems, which are kept until an administrator acknowledges them. It
// does nothing if err is nil.
func (l *auditLog) addProblem(err error) { l.insertProblem(maxProblems, err) }

// addRollback is like addProblem, but puts the problem before the others, so that it is kept however many there are: a
// rollback makes revoked keys valid again, and no later check finds it.
func (l *auditLog) addRollback(err error) { l.insertProblem(0, err) }

// insertProblem inserts a new problem at index, or at the end if index is beyond it. If there are too many problems, it
// drops the last ones and adds moreProblems instead.
func (l *auditLog) insertProblem(index int, err error) {
	if err == nil {
		return
	}
	text := strings.TrimSuffix(strings.ReplaceAll(err.Error(), "\n", "; "), ": "+errdefs.ErrDataLoss.Error())
	l.mu.Lock()
	defer l.mu.Unlock()
	if slices.Contains(l.problems, text) {
		return
	}
	kept := slices.DeleteFunc(slices.Clone(l.problems), func(p string) bool { return p == moreProblems })
	dropped := len(kept) < len(l.problems)
	kept = slices.Insert(kept, min(index, len(kept)), text)
	if dropped || len(kept) >= maxProblems {
		kept = append(kept[:min(len(kept), maxProblems-1)], moreProblems)
	}
	l.unsaved = l.unsaved || !slices.Equal(kept, l.problems)
	l.problems = kept
}

// saveProblems stores the problems.
func (l *auditLog) saveProblems() error {
	_, err := l.commit(func(c *change) error { return c.putProblems(l.problems, l.acknowledged) })
	if err == nil {
		l.unsaved = false
	}
	return err
}

// putProblems stores the problems, and those that an administrator has acknowledged.
func (c *change) putProblems(problems, acknowledged []string) error {
	all := slices.Clone(problems)
	for _, text := range acknowledged {
		all = append(all, acknowledgedMark+text)
	}
	return c.putMeta(problemsKey, all)
}

// altered returns an errdefs.ErrDataLoss with what changed in the file.
func (l *auditLog) altered(format string, a ...any) error {
	return fmt.Errorf("audit log %s was altered: %s ('msb server audit verify' checks all of it): %w",
		l.path, fmt.Sprintf(format, a...), errdefs.ErrDataLoss)
}

// open opens the file, creating it if needed. It does nothing if the open file is still the one at l.path.
func (l *auditLog) open() error {
	var stat unix.Stat_t
	if l.file != nil && unix.Lstat(l.path, &stat) == nil && stat.Dev == l.dev && stat.Ino == l.ino {
		return nil
	}
	// O_NONBLOCK keeps the daemon from blocking if someone put a FIFO there.
	const flags = os.O_RDWR | os.O_APPEND | os.O_CREATE | unix.O_NOFOLLOW | unix.O_NONBLOCK
	f, err := os.OpenFile(l.path, flags, 0o600)
	if err != nil {
		return err
	}
	err = unix.Fstat(int(f.Fd()), &stat)
	if err == nil && stat.Mode&unix.S_IFMT != unix.S_IFREG {
		err = errors.New("it is not a regular file")
	}
	if err == nil {
		err = durable.SyncDir(filepath.Dir(l.path))
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	if l.file != nil && l.file != l.published.file { // readers use the published file
		_ = l.file.Close()
	}
	// What an earlier run of msbd reserved is still there. Some of the blocks may hold what the file system needs itself.
	l.file, l.dev, l.ino, l.reserved = f, stat.Dev, stat.Ino, stat.Blocks*512-logReserve/16
	return nil
}

// findOutbox returns the offset in the file at which the lines of the outbox begin, or at which they must be written if the
// file does not have them. base is the head of the log before the file. If the store expects another offset, problem says
// how the file was altered.
func (l *auditLog) findOutbox(base audit.Head, out outbox) (start int64, problem, err error) {
	start = out.end.Size - int64(len(out.lines))
	ok, err := endsAt(l.file, start, out.before)
	if out.before == base {
		ok, err = l.endsLine(start)
	}
	if ok || err != nil {
		return start, nil, err
	}
	start = -1
	err = eachLine(l.file, 0, func(line []byte, end int64) bool {
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

// endsAt reports whether the line that ends at offset end is the entry that head names.
func endsAt(f io.ReaderAt, end int64, head audit.Head) (bool, error) {
	line := make([]byte, max(0, min(end, audit.MaxLine+1)))
	if _, err := f.ReadAt(line, end-int64(len(line))); err == io.EOF {
		return false, nil // the file is shorter
	} else if err != nil {
		return false, err
	}
	line, ok := bytes.CutSuffix(line, []byte("\n"))
	e, err := audit.Parse(line[bytes.LastIndexByte(line, '\n')+1:])
	return ok && err == nil && e.Hash == head.Hash, nil
}

// endsLine reports whether the file begins or a line ends at offset end.
func (l *auditLog) endsLine(end int64) (bool, error) {
	if end == 0 {
		return true, nil
	}
	var last [1]byte
	_, err := l.file.ReadAt(last[:], end-1)
	if err == io.EOF {
		return false, nil // the file is shorter
	}
	return last[0] == '\n', err
}

// endLastLine appends a newline if the file does not end with one, and returns the file's size.
func (l *auditLog) endLastLine() (size int64, err error) {
	info, err := l.file.Stat()
	if err != nil {
		return 0, err
	}
	size = info.Size()
	if ok, err := l.endsLine(size); ok || err != nil {
		return size, err
	}
	_, err = l.file.Write([]byte("\n"))
	return size + 1, err
}

// rewriteLines makes sure that the file has lines at offset start. It writes those that are missing, incomplete or
// changed, and reports whether there were any.
func (l *auditLog) rewriteLines(start int64, lines []byte) (changed bool, err error) {
	found := make([]byte, len(lines))
	n, err := l.file.ReadAt(found, start)
	if err != nil && err != io.EOF {
		return false, err
	}
	same := 0
	for same < n && found[same] == lines[same] {
		same++
	}
	if l.unsynced {
		same = 0 // write all of it again, so that the next sync writes it to the disk
	}
	if same == len(lines) {
		return false, nil
	}
	if same < n { // a Truncate that removes nothing would free the reserve
		if err := l.file.Truncate(start + int64(same)); err != nil {
			return false, err
		}
		l.reserved = 0
	}
	_, err = l.file.Write(lines[same:])
	return true, err
}

// readBeyond reads the file after end. It returns the end of the last entry that continues the chain, and the file's
// size.
func (l *auditLog) readBeyond(end logEnd) (extended logEnd, size int64, err error) {
	err = eachLine(l.file, end.Size, func(line []byte, lineEnd int64) bool {
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
// store will no longer have a copy of the lines. It stores the segments that were adopted and the problems of the log as
// well. If rollback is set, it also logs an audit.StoreRollback with storeEnd, the end that the store expected.
func (l *auditLog) acceptEnd(storeEnd logEnd, end *logEnd, adopted []segment, rollback bool) error {
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
		if err == nil {
			err = c.putProblems(l.problems, l.acknowledged)
		}
		for _, s := range adopted {
			if err == nil {
				err = c.putSegment(s)
			}
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
	l.segments = slices.Concat(l.segments, adopted)
	l.unsaved, l.outboxed = false, len(lines) > 0
	*end = after
	if _, err := l.file.Write(lines); err != nil {
		l.behind = true
		return l.unwritable(err)
	}
	return nil
}
