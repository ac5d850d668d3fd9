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

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/sys/ctxio"
)

// Audit adds an event to the audit log. When it returns nil, the entry is durable.
func (s *Store) Audit(e audit.Event) error {
	return s.writes.update(func(*change) error { return nil }, e)
}

// AuditHead returns the number and the hash of the last audit entry.
func (s *Store) AuditHead() audit.Head {
	end, _, _ := s.log.state()
	return end.Head
}

// AuditPath returns the path of the audit log's file.
func (s *Store) AuditPath() string { return s.log.path }

// AuditProblem returns what is known to be wrong with the audit log, or with the store compared to it, as an
// errdefs.ErrDataLoss. It checks nothing itself, so nil does not prove that the log is intact: see VerifyAudit.
func (s *Store) AuditProblem() error {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return errors.Join(s.log.rollback, s.log.problem)
}

// VerifyAudit checks the audit log from its first entry to its head. It returns the head of the intact part and, if that
// is not the entire log, an errdefs.ErrDataLoss that says what is wrong. From then on, AuditProblem reports this result.
func (s *Store) VerifyAudit(ctx context.Context) (audit.Head, error) {
	select {
	case s.writes.committing <- struct{}{}:
		s.writes.begin()
		_ = s.writes.logReady() // finds lines after the log's end; Health reports an error
		s.writes.end()
	case <-ctx.Done():
		return audit.Head{}, ctx.Err()
	}
	head, err := s.log.verify(ctx)
	if err == nil || errdefs.IsDataLoss(err) {
		s.log.mu.Lock()
		s.log.problem = err
		s.log.mu.Unlock()
	}
	return head, err
}

// TailAudit calls line with each of the last entries of the audit log, without the newline. If follow is set, it then
// waits and calls line with each new entry; it returns nil when ctx ends. The slice is valid only during the call.
func (s *Store) TailAudit(ctx context.Context, last int, follow bool, line func([]byte) error) error {
	return s.log.tail(ctx, last, follow, line)
}

// OpenAudit returns the current content of the audit log, up to its head.
func (s *Store) OpenAudit() (io.ReadCloser, error) {
	end, _, _ := s.log.state()
	f, err := s.log.reader()
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.NewSectionReader(f, 0, end.Size), f}, nil
}

// state returns the end of the log, the generation, and a channel that is closed when the end changes.
func (l *auditLog) state() (end logEnd, generation int, grown <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.end, l.generation, l.grown
}

// reader opens the file a second time, so that a reader does not have to synchronize with the writer.
func (l *auditLog) reader() (*os.File, error) {
	f, err := os.OpenFile(l.path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("read audit log: %w", err)
	}
	return f, nil
}

func (l *auditLog) verify(ctx context.Context) (audit.Head, error) {
	end, _, _ := l.state()
	f, err := l.reader()
	if errors.Is(err, fs.ErrNotExist) {
		return audit.Head{}, fmt.Errorf("audit log %s is missing: %w", l.path, errdefs.ErrDataLoss)
	}
	if err != nil {
		return audit.Head{}, err
	}
	defer f.Close()
	head, err := audit.Verify(ctxio.Reader(ctx, io.NewSectionReader(f, 0, end.Size)))
	var broken *audit.ChainError
	switch {
	case errors.As(err, &broken):
		return head, fmt.Errorf("%s: %w: %w", l.path, err, errdefs.ErrDataLoss)
	case err != nil:
		return head, err
	case head != end.Head && l.health() != nil:
		return head, l.health() // the last entries could not be written yet
	case head != end.Head:
		return head, fmt.Errorf("audit log %s ends with entry %d, which does not match the last written entry, %d: its end was "+
			"cut off, or it was rewritten with new hashes: %w", l.path, head.Seq, end.Seq, errdefs.ErrDataLoss)
	}
	return head, nil
}

func (l *auditLog) tail(ctx context.Context, last int, follow bool, line func([]byte) error) error {
	f, err := l.reader()
	if err != nil {
		return err
	}
	defer f.Close()
	end, generation, grown := l.state()
	offset, err := lastLines(f, end.Size, last)
	if err != nil {
		return err
	}
	for {
		if err := readLines(ctx, f, offset, end.Size, line); err != nil || !follow {
			return err
		}
		offset = end.Size
		select {
		case <-ctx.Done():
			return nil
		case <-grown:
		}
		oldGeneration := generation
		if end, generation, grown = l.state(); generation != oldGeneration {
			return fmt.Errorf("audit log %s was replaced or changed by another program: %w", l.path, errdefs.ErrDataLoss)
		}
	}
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
