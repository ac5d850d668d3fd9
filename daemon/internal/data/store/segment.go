package store

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

// segment is a sealed segment of the audit log. The store keeps this record even if an administrator moves the file away.
type segment struct {
	// First is the number of the first entry.
	First uint64     `json:"first"`
	Last  audit.Head `json:"last"`
	// Size is the size of the file in bytes.
	Size     int64     `json:"size"`
	SealedAt time.Time `json:"sealed_at"`
}

// segmentPattern matches the names of the files of segments, which contain the numbers of the first and the last entry.
const segmentPattern = "audit-%012d-%012d.jsonl"

// name returns the name of the file, which is in the state directory.
func (s segment) name() string { return fmt.Sprintf(segmentPattern, s.First, s.Last.Seq) }

// id returns the key of the segment in its bucket.
func (s segment) id() string { return fmt.Sprintf("%020d", s.First) }

func (c *change) putSegment(s segment) error {
	r, err := encode(segmentBucket, s.id(), s)
	if err != nil {
		return err
	}
	return c.put(r)
}

// loadSegments returns the segments, from the first to the last. It returns errdefs.ErrDataLoss if one is missing.
func loadSegments(tx *bbolt.Tx) (segments []segment, err error) {
	err = each(tx, segmentBucket, func(id string, value []byte) error {
		var s segment
		if err := decode(segmentBucket, id, value, &s); err != nil {
			return err
		}
		first := uint64(1)
		if n := len(segments); n > 0 {
			first = segments[n-1].Last.Seq + 1
		}
		if s.id() != id || s.First != first {
			return fmt.Errorf("record %s %q is the segment of entry %d, not %d: %w", segmentBucket, id, s.First, first, errdefs.ErrDataLoss)
		}
		segments = append(segments, s)
		return nil
	})
	return segments, err
}

// base returns the head of the log before the first entry of the current file.
func (l *auditLog) base() audit.Head {
	if n := len(l.segments); n > 0 {
		return l.segments[n-1].Last
	}
	return audit.Head{}
}

// SealAudit seals the current file of the audit log: it becomes a segment with a name of its own, and further entries are
// added to a new file, of which the first records the segment. actor is who asked for it. SealAudit returns
// errdefs.ErrFailedPrecondition if there is no entry since the last segment was sealed.
func (s *Store) SealAudit(ctx context.Context, actor string) (audit.Segment, error) {
	if err := s.writes.acquire(ctx); err != nil {
		return audit.Segment{}, err
	}
	defer s.writes.end()
	if err := s.writes.logReady(); err != nil {
		return audit.Segment{}, err
	}
	seg, err := s.log.seal(actor)
	if err != nil {
		return audit.Segment{}, fmt.Errorf("seal the audit log: %w", err)
	}
	return audit.Segment{Path: filepath.Join(s.log.dir, seg.name()), First: seg.First, Last: seg.Last}, nil
}

// seal first stores the segment, and then renames the file. If a crash comes between the two, placeSegment renames it
// later.
func (l *auditLog) seal(actor string) (segment, error) {
	end, base := l.published.end, l.base()
	if end.Seq == base.Seq+1 && base.Seq > 0 || end.Seq == base.Seq {
		return segment{}, fmt.Errorf("it has no entries since it was last sealed: %w", errdefs.ErrFailedPrecondition)
	}
	if err := l.sync(); err != nil { // the store will no longer have a copy of the lines
		return segment{}, err
	}
	seg := segment{First: base.Seq + 1, Last: end.Head, Size: end.Size, SealedAt: time.Now().UTC().Truncate(time.Second)}
	_, err := l.commit(func(c *change) error {
		err := cmp.Or(emptyOutbox(c.tx), c.putSegment(seg), c.putMeta(logEndKey, logEnd{Head: end.Head}))
		if err == nil {
			_, _, err = c.addEvents(l, []audit.Event{{
				Action: audit.LogSeal, Actor: actor, Target: seg.name(), Detail: map[string]string{
					"first": strconv.FormatUint(seg.First, 10), "last": strconv.FormatUint(seg.Last.Seq, 10), "hash": seg.Last.Hash,
				},
			}})
		}
		return err
	})
	if err != nil {
		return segment{}, err
	}
	l.segments = append(slices.Clip(l.segments), seg)
	l.behind = true
	// The segment is sealed even if its file cannot be renamed now. No entry is added before that.
	l.setFailure(l.catchUp(false))
	l.refill()
	return seg, nil
}

// placeSegment renames the file of the segment that was sealed last, if a crash came before its rename: the outbox, out,
// then begins with the entry of the seal, no file has the segment's name, and the current file is not the new one. If
// another program has changed the file since it was sealed, placeSegment renames it nevertheless, so that its content is
// kept, and returns a problem that is already among the problems of the log. If strict is set, it only returns the problem.
func (l *auditLog) placeSegment(out outbox, strict bool) (problem, err error) {
	if len(l.segments) == 0 || len(out.lines) == 0 || out.before != l.base() {
		return nil, nil
	}
	seg := l.segments[len(l.segments)-1]
	path := filepath.Join(l.dir, seg.name())
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f, err := openFileToRead(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if isNew, err := beginsLike(f, out.lines); isNew || err != nil {
		return nil, err // an administrator has moved the segment away
	}
	intact, err := endsAt(f, seg.Size, seg.Last)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !intact || info.Size() != seg.Size {
		problem = l.altered("it no longer ended with entry %d, with which it was sealed; msbd has renamed it to %s", seg.Last.Seq, seg.name())
		if strict {
			return problem, nil
		}
		// Save the problem first, because after the rename nothing shows it to the next Open.
		l.addProblem(problem)
		if l.unsaved {
			if err := l.saveProblems(); err != nil {
				return problem, err
			}
		}
	}
	if err := os.Rename(l.path, path); err != nil {
		return problem, err
	}
	if problem == nil { // free its reserve, which it no longer needs; if that fails, nothing is lost but space
		_ = os.Truncate(path, seg.Size)
	}
	return problem, durable.SyncDir(l.dir)
}

// beginsLike reports whether f begins with the first of lines, or, if f is shorter than that, with a part of it.
func beginsLike(f io.ReaderAt, lines []byte) (bool, error) {
	first, _, _ := bytes.Cut(lines, []byte("\n"))
	found := make([]byte, len(first))
	n, err := f.ReadAt(found, 0)
	if err != nil && err != io.EOF {
		return false, err
	}
	return bytes.HasPrefix(first, found[:n]), nil
}

// adoptSegments returns the segments that were sealed after the state of the store, which is then an older copy. head is
// the last entry that the store knows. A segment is adopted only if the chain leads from the log before the current file,
// over head, to the last entry of the segment.
func (l *auditLog) adoptSegments(head audit.Head) (adopted []segment, err error) {
	files, err := os.ReadDir(l.dir)
	if err != nil {
		return nil, err
	}
	base, known := l.base(), false
	for _, file := range files { // sorted by name, and so by number
		var first, last uint64
		name := file.Name()
		if _, err := fmt.Sscanf(name, segmentPattern, &first, &last); err != nil || first != base.Seq+1 {
			continue
		}
		known = known || head == base
		seg := segment{First: first, Last: base, SealedAt: time.Now().UTC().Truncate(time.Second)}
		f, err := openFileToRead(filepath.Join(l.dir, name))
		if err != nil {
			return nil, err
		}
		err = eachLine(f, 0, func(line []byte, end int64) bool {
			e, err := audit.Parse(line)
			if err != nil {
				return false
			}
			next, err := seg.Last.Follow(e)
			if err != nil {
				return false
			}
			seg.Last, seg.Size = next, end
			known = known || next == head
			return true
		})
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
		if seg.name() != name || !known {
			return nil, nil
		}
		adopted, base = append(adopted, seg), seg.Last
	}
	return adopted, nil
}

// eachLine calls fn with each complete line after offset and with the offset at which the line ends, until fn returns false.
func eachLine(f io.ReaderAt, offset int64, fn func(line []byte, end int64) bool) error {
	r := bufio.NewReaderSize(io.NewSectionReader(f, offset, 1<<62), audit.MaxLine)
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
