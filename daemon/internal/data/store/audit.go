package store

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
	"github.com/msbd/msbd/daemon/internal/sys/ctxio"
)

// Audit adds an event to the audit log. When it returns nil, the entry is durable.
func (s *Store) Audit(e audit.Event) error {
	return s.writes.update(func(*change) error { return nil }, e)
}

// AuditHead returns the number and the hash of the last audit entry.
func (s *Store) AuditHead() audit.Head {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return s.log.published.end.Head
}

// AuditPath returns the path of the file to which the audit log adds entries.
func (s *Store) AuditPath() string { return s.log.path }

// AuditProblem returns what was found to be wrong with the audit log, or with the store compared to it, since an
// administrator last acknowledged that, as an errdefs.ErrDataLoss. It checks nothing itself, so nil does not prove that the
// log is intact: see VerifyAudit.
func (s *Store) AuditProblem() error {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	if len(s.log.problems) == 0 {
		return nil
	}
	return fmt.Errorf("%s ('msb server audit acknowledge' removes this warning): %w", strings.Join(s.log.problems, "; "), errdefs.ErrDataLoss)
}

// AcknowledgeAudit removes the problems that AuditProblem reports, and records them in the audit log, with the local user
// by as the actor. It returns them.
func (s *Store) AcknowledgeAudit(ctx context.Context, by uint32) (problems []string, err error) {
	if err := s.writes.acquire(ctx); err != nil {
		return nil, err
	}
	defer s.writes.end()
	problems = slices.Clone(s.log.problems)
	if len(problems) == 0 {
		return nil, nil
	}
	detail := map[string]string{}
	for i, problem := range problems {
		detail[fmt.Sprint("problem_", i+1)] = bounded.Text(problem, audit.MaxLine/4/maxProblems)
	}
	// The write may find further problems, which stay.
	others := func() []string {
		return slices.DeleteFunc(slices.Clone(s.log.problems), func(p string) bool { return slices.Contains(problems, p) })
	}
	acknowledged := s.log.acknowledged
	for _, problem := range problems {
		if text := withoutFile(problem); !slices.Contains(acknowledged, text) {
			acknowledged = append(slices.Clip(acknowledged), text)
		}
	}
	acknowledged = acknowledged[max(0, len(acknowledged)-maxAcknowledged):]
	_, err = s.writes.transact([]*write{{
		fn:     func(c *change) error { return c.putProblems(others(), acknowledged) },
		events: []audit.Event{{Action: audit.LogAcknowledge, Actor: audit.ActorUID(by), Detail: detail}},
	}})
	if err != nil {
		return nil, err
	}
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	s.log.problems, s.log.acknowledged = others(), acknowledged
	return problems, nil
}

// VerifyAudit checks the audit log from its first entry to its head, with the exception of sealed segments that are absent.
// It returns the head of the intact part and, if that is not the entire log, an errdefs.ErrDataLoss that says what is wrong.
// From then on, AuditProblem reports that, except what an administrator has already acknowledged.
func (s *Store) VerifyAudit(ctx context.Context) (audit.Head, error) {
	if err := s.writes.acquire(ctx); err != nil {
		return audit.Head{}, err
	}
	_ = s.writes.logReady() // finds lines after the log's end; Health reports an error
	s.writes.end()
	head, problems, err := s.log.verify(ctx)
	if len(problems) == 0 {
		return head, err
	}
	if err := s.writes.acquire(ctx); err != nil {
		return audit.Head{}, err
	}
	defer s.writes.end()
	for _, problem := range problems {
		if !slices.Contains(s.log.acknowledged, withoutFile(problem)) {
			s.log.addProblem(errors.New(problem))
		}
	}
	_ = s.writes.logReady() // saves them
	err = fmt.Errorf("%s: %w", strings.Join(problems, "; "), errdefs.ErrDataLoss)
	return head, err
}

// logFile matches the path of a file of the log in a problem.
var logFile = regexp.MustCompile(`\S*audit[-0-9]*\.jsonl`)

// withoutFile returns a problem without the path of its file. A file of the log gets another name when it is sealed, but
// its entries keep their numbers.
func withoutFile(problem string) string { return logFile.ReplaceAllString(problem, "") }

// AuditSegments returns the sealed segments of the audit log, from the first to the last.
func (s *Store) AuditSegments() []audit.Segment {
	s.log.mu.Lock()
	segments := s.log.published.segments
	s.log.mu.Unlock()
	var all []audit.Segment
	for _, seg := range segments {
		path := filepath.Join(s.log.dir, seg.name())
		_, err := os.Lstat(path)
		all = append(all, audit.Segment{Path: path, First: seg.First, Last: seg.Last, Absent: errors.Is(err, fs.ErrNotExist)})
	}
	return all
}

// TailAudit calls line with each of the last entries of the audit log, without the newline. If follow is set, it then
// waits and calls line with each new entry; it returns nil when ctx ends. The slice is valid only during the call.
func (s *Store) TailAudit(ctx context.Context, last int, follow bool, line func([]byte) error) error {
	return s.log.tail(ctx, last, follow, line)
}

// OpenAudit returns the current content of the audit log, up to its head. If sealed segments are absent, it begins after
// the last of these.
func (s *Store) OpenAudit() (io.ReadCloser, error) {
	v, err := s.log.view()
	if err != nil {
		return nil, err
	}
	var (
		readers []io.Reader
		files   = closers{v.file}
	)
	for _, seg := range v.segments {
		f, err := openFileToRead(filepath.Join(s.log.dir, seg.name()))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			readers = nil
		case err != nil:
			return nil, errors.Join(err, files.Close())
		default:
			files = append(files, f)
			readers = append(readers, io.NewSectionReader(f, 0, seg.Size))
		}
	}
	return struct {
		io.Reader
		io.Closer
	}{io.MultiReader(append(readers, io.NewSectionReader(v.file, 0, v.end.Size))...), files}, nil
}

// closers closes files.
type closers []io.Closer

func (c closers) Close() error {
	var err error
	for _, f := range c {
		err = errors.Join(err, f.Close())
	}
	return err
}

// view returns the log at this moment, with a file that the caller must close. It remains readable even if the writer
// replaces it.
func (l *auditLog) view() (logView, error) {
	v, _, err := l.viewAndGrown()
	return v, err
}

// viewAndGrown is like view, but also returns a channel that is closed when the log has changed.
func (l *auditLog) viewAndGrown() (logView, <-chan struct{}, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := l.published
	if v.file == nil {
		return v, nil, fmt.Errorf("read audit log: %w", l.failure)
	}
	fd, err := unix.FcntlInt(v.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return v, nil, fmt.Errorf("read audit log: %w", os.NewSyscallError("fcntl", err))
	}
	v.file = os.NewFile(uintptr(fd), l.path)
	return v, l.grown, nil
}

// openFileToRead opens a file that an administrator may have replaced by anything.
func openFileToRead(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("read audit log: %w", err)
	}
	return f, nil
}

// verify checks the segments and the file. It returns the head of the intact part, and what is wrong with each file.
func (l *auditLog) verify(ctx context.Context) (audit.Head, []string, error) {
	v, err := l.view()
	if err != nil {
		return audit.Head{}, nil, err
	}
	defer v.file.Close()
	var (
		base     audit.Head
		intact   audit.Head
		problems []string // one for each damaged file
		found    bool     // whether check found a problem in the last file
	)
	// check checks a file, which follows base and must end with want. It returns an error if the file cannot be checked.
	check := func(path string, f io.ReaderAt, size int64, want audit.Head, mismatch string) error {
		head, err := base.Verify(ctxio.Reader(ctx, io.NewSectionReader(f, 0, size)))
		base = want
		problem := ""
		broken, isBroken := errors.AsType[*audit.ChainError](err)
		switch {
		case isBroken:
			problem = fmt.Sprintf("%s, after entry %d, line %d: %s", path, head.Seq, broken.Line, broken.Problem)
		case err != nil:
			return err
		case head != want:
			problem = fmt.Sprintf("%s ends with entry %d, which does not match the last written entry, %d: %s", path, head.Seq, want.Seq, mismatch)
		}
		if problems == nil {
			intact = head
		}
		if found = problem != ""; found {
			problems = append(problems, problem)
		}
		return nil
	}
	for _, seg := range v.segments {
		path := filepath.Join(l.dir, seg.name())
		f, err := openFileToRead(path)
		if errors.Is(err, fs.ErrNotExist) {
			base = seg.Last
			if problems == nil {
				intact = base
			}
			continue
		}
		if err != nil {
			return intact, problems, err
		}
		info, err := f.Stat()
		if err == nil {
			err = check(path, f, info.Size(), seg.Last, "it was changed after it was sealed")
		}
		f.Close()
		if err != nil {
			return intact, problems, err
		}
	}
	before := problems
	err = check(l.path, v.file, v.end.Size, v.end.Head, "its end was cut off, or it was rewritten with new hashes")
	if failure := l.health(); err == nil && failure != nil && found {
		return intact, before, failure // the last entries could not be written yet
	}
	return intact, problems, err
}

func (l *auditLog) tail(ctx context.Context, last int, follow bool, line func([]byte) error) error {
	v, grown, err := l.viewAndGrown()
	if err != nil {
		return err
	}
	seen := v.end.Seq - min(uint64(max(0, last)), v.end.Seq)
	for alterations := v.alterations; ; {
		err := l.readAfter(ctx, v, seen, line)
		if err := errors.Join(err, v.file.Close()); err != nil || !follow {
			return err
		}
		seen = v.end.Seq
		select {
		case <-ctx.Done():
			return nil
		case <-grown:
		}
		if v, grown, err = l.viewAndGrown(); err != nil {
			return err
		}
		if v.alterations != alterations {
			return errors.Join(fmt.Errorf("audit log %s was replaced or changed by another program: %w", l.path, errdefs.ErrDataLoss), v.file.Close())
		}
	}
}

// readAfter calls line with each entry after entry seen, except those in segments that are absent. It returns nil if ctx
// ends.
func (l *auditLog) readAfter(ctx context.Context, v logView, seen uint64, line func([]byte) error) error {
	read := func(f io.ReaderAt, size int64, last uint64) error {
		offset, err := lastLines(f, size, int(last-seen))
		if err != nil {
			return err
		}
		return readLines(ctx, f, offset, size, line)
	}
	for _, seg := range v.segments {
		if seg.Last.Seq <= seen {
			continue
		}
		f, err := openFileToRead(filepath.Join(l.dir, seg.name()))
		if err == nil {
			err = errors.Join(read(f, seg.Size, seg.Last.Seq), f.Close())
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		seen = seg.Last.Seq
	}
	return read(v.file, v.end.Size, v.end.Seq)
}

// lastLines returns the offset of the last n lines of f before offset end.
func lastLines(f io.ReaderAt, end int64, n int) (int64, error) {
	if n <= 0 || end == 0 {
		return end, nil
	}
	piece := make([]byte, 32<<10)
	for limit := end - 1; limit > 0; { // skip the newline that ends the last line
		b := piece[:min(limit, int64(len(piece)))]
		limit -= int64(len(b))
		if _, err := f.ReadAt(b, limit); err != nil {
			return 0, fmt.Errorf("read audit log: %w", err)
		}
		for i := len(b); ; {
			if i = bytes.LastIndexByte(b[:i], '\n'); i < 0 {
				break
			}
			if n--; n == 0 {
				return limit + int64(i) + 1, nil
			}
		}
	}
	return 0, nil
}

// readLines calls fn with each line between the offsets offset and end. It returns nil if ctx ends.
func readLines(ctx context.Context, f io.ReaderAt, offset, end int64, fn func([]byte) error) error {
	r := bufio.NewReaderSize(io.NewSectionReader(f, offset, end-offset), audit.MaxLine)
	for offset < end && ctx.Err() == nil {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return fmt.Errorf("read audit log: %w", err)
		}
		offset += int64(len(line))
		if err := fn(bytes.TrimSuffix(line, []byte("\n"))); err != nil {
			return err
		}
	}
	return nil
}
