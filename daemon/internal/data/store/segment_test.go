package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/audit"
)

func sealLog(t testing.TB, s *Store) audit.Segment {
	t.Helper()
	seg, err := s.SealAudit(t.Context(), "uid:0")
	if err != nil {
		t.Fatal(err)
	}
	return seg
}

func wholeLog(t testing.TB, s *Store) []byte {
	t.Helper()
	log, err := s.OpenAudit()
	if err != nil {
		t.Fatal(err)
	}
	content, err := io.ReadAll(log)
	if err := errors.Join(err, log.Close()); err != nil {
		t.Fatal(err)
	}
	return content
}

func lastEntries(t testing.TB, s *Store, n int) []string {
	t.Helper()
	var log []byte
	err := s.TailAudit(t.Context(), n, false, func(line []byte) error {
		log = append(append(log, line...), '\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return targets(t, log)
}

// sealed returns a store with two sealed segments and three further entries.
func sealed(t testing.TB, dir string) (s *Store, segments []audit.Segment) {
	t.Helper()
	s = open(t, dir)
	logEvents(t, s, "a", "b")
	segments = append(segments, sealLog(t, s))
	logMany(t, s)
	segments = append(segments, sealLog(t, s))
	logEvents(t, s, "c", "d")
	return s, segments
}

func checkIntact(t testing.TB, s *Store) {
	t.Helper()
	if head, err := s.VerifyAudit(context.Background()); err != nil || head != s.AuditHead() {
		t.Errorf("VerifyAudit: %v, %v, want the head %v", head, err, s.AuditHead())
	}
	if err := errors.Join(s.AuditProblem(), s.Health()); err != nil {
		t.Error(err)
	}
}

func TestSeal(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, segments := sealed(t, dir)
	want := []string{"sandbox.stop a", "sandbox.stop b", "audit.seal audit-000000000001-000000000002.jsonl"}
	for i := range outboxLimit + 10 {
		want = append(want, fmt.Sprint("sandbox.stop many-", i))
	}
	want = append(want, "sandbox.stop after-many", "audit.seal audit-000000000003-000000000526.jsonl", "sandbox.stop c", "sandbox.stop d")
	for range 2 {
		checkIntact(t, s)
		if diff := cmp.Diff(segments, s.AuditSegments()); diff != "" {
			t.Errorf("segments differ: %s", diff)
		}
		if diff := cmp.Diff(want, targets(t, wholeLog(t, s))); diff != "" {
			t.Errorf("the whole log differs: %s", diff)
		}
		if got := len(targets(t, readLog(t, s))); got != 3 {
			t.Errorf("the current file has %d entries, want 3", got)
		}
		for _, n := range []int{0, 1, 3, 4, 5, 500, len(want) - 2, len(want) - 1, len(want), 1000} {
			if got := lastEntries(t, s, n); !cmp.Equal(want[max(0, len(want)-n):], got) && n > 0 || len(got) != min(n, len(want)) {
				t.Errorf("the last %d entries are %d: %.200q", n, len(got), got)
			}
		}
		s = reopen(t, s, dir)
	}
	// Each segment can be checked on its own.
	head := audit.Head{}
	for _, seg := range segments {
		content, err := os.ReadFile(seg.Path)
		if err != nil {
			t.Fatal(err)
		}
		if head, err = head.Verify(bytes.NewReader(content)); err != nil || head != seg.Last {
			t.Errorf("%s ends with %v, %v, want %v", seg.Path, head, err, seg.Last)
		}
	}
}

func TestSealWithoutNewEntries(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	for range 2 {
		if _, err := s.SealAudit(t.Context(), "uid:0"); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("SealAudit: %v, want failed precondition", err)
		}
		checkIntact(t, s)
		if s.AuditHead().Seq == 0 {
			logEvents(t, s, "a")
			sealLog(t, s)
		}
	}
}

// Sealed segments can be moved away. The rest of the log is still checked, read and copied.
func TestArchivedSegments(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, segments := sealed(t, dir)
	if err := os.Rename(segments[1].Path, filepath.Join(t.TempDir(), "archived")); err != nil {
		t.Fatal(err)
	}
	segments[1].Absent = true
	for range 2 {
		checkIntact(t, s)
		if diff := cmp.Diff(segments, s.AuditSegments()); diff != "" {
			t.Error(diff)
		}
		want := []string{"audit.seal audit-000000000003-000000000526.jsonl", "sandbox.stop c", "sandbox.stop d"}
		if diff := cmp.Diff(want, targets(t, wholeLog(t, s))); diff != "" {
			t.Errorf("the copy differs: %s", diff)
		}
		if diff := cmp.Diff(append([]string{"sandbox.stop a", "sandbox.stop b"}, want...), lastEntries(t, s, 1000)); diff != "" {
			t.Errorf("the entries differ: %s", diff)
		}
		s = reopen(t, s, dir)
	}
	logEvents(t, s, "e")
	checkIntact(t, s)
}

func TestChangedSegmentIsReported(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(log []byte) []byte{
		"changed": func(log []byte) []byte { return bytes.Replace(log, []byte("many-7"), []byte("many-8"), 1) },
		"cut":     func(log []byte) []byte { return log[:bytes.LastIndexByte(log[:len(log)-1], '\n')+1] },
		"emptied": func([]byte) []byte { return nil },
		"longer":  func(log []byte) []byte { return append(log, "more\n"...) },
		"rehashed": func(log []byte) []byte {
			head := audit.Head{}
			var out []byte
			for line := range bytes.Lines(log) {
				e, _ := audit.Parse(bytes.TrimSuffix(line, []byte("\n")))
				if out == nil {
					head = audit.Head{Seq: e.Seq - 1, Hash: e.Prev}
				}
				e.Actor = "uid:9"
				line, head, _ = head.Append(e.Time, e.Event)
				out = append(out, line...)
			}
			return out
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, segments := sealed(t, t.TempDir())
			edit(t, segments[1].Path, change)
			head, err := s.VerifyAudit(t.Context())
			if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), segments[1].Path) || strings.Contains(err.Error(), logName) {
				t.Errorf("VerifyAudit: %v, want data loss that names only the segment", err)
			}
			if head.Seq < segments[0].Last.Seq || head.Seq > segments[1].Last.Seq {
				t.Errorf("the intact part ends with entry %d, want an entry of the changed segment", head.Seq)
			}
			if s.AuditProblem() == nil {
				t.Error("AuditProblem is nil")
			}
		})
	}
}

// A problem that an administrator has acknowledged does not come back with the next check, not even after its file was
// sealed or the server was restarted. Another problem does.
func TestAcknowledgedProblemDoesNotComeBack(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	logMany(t, s)
	edit(t, s.AuditPath(), func(log []byte) []byte { return bytes.Replace(log, []byte("many-7"), []byte("many-8"), 1) })
	verify := func(what string, problem bool) {
		t.Helper()
		if _, err := s.VerifyAudit(t.Context()); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: VerifyAudit: %v, want data loss", what, err)
		}
		if err := s.AuditProblem(); (err != nil) != problem {
			t.Errorf("%s: AuditProblem: %v, want a problem: %t", what, err, problem)
		}
	}
	verify("at first", true)
	if _, err := s.AcknowledgeAudit(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	verify("acknowledged", false)
	sealed := sealLog(t, s)
	verify("sealed", false)
	s = reopen(t, s, dir)
	verify("reopened", false)
	edit(t, sealed.Path, func(log []byte) []byte { return bytes.Replace(log, []byte("many-2"), []byte("many-3"), 1) })
	verify("changed again", true)
}

// What keeps the log from being written is not a problem of a segment that was changed.
func TestChangedSegmentOfALogThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, segments := sealed(t, dir)
	edit(t, segments[1].Path, func(log []byte) []byte { return bytes.Replace(log, []byte("many-7"), []byte("many-8"), 1) })
	path := filepath.Join(dir, logName)
	if err := errors.Join(os.Rename(path, filepath.Join(dir, "aside")), os.Mkdir(path, 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.VerifyAudit(t.Context()); !errdefs.IsDataLoss(err) || errdefs.IsUnavailable(err) {
		t.Errorf("VerifyAudit: %v, want only data loss", err)
	}
	if err := s.AuditProblem(); err == nil || strings.Contains(err.Error(), path) {
		t.Errorf("AuditProblem: %v, want one that does not name the current file", err)
	}
	if err := s.Health(); !errdefs.IsUnavailable(err) {
		t.Errorf("Health: %v, want unavailable", err)
	}
}

// A crash may come between the steps of a seal. The next start completes it.
func TestInterruptedSeal(t *testing.T) {
	t.Parallel()
	for name, undo := range map[string]func(path string, seg audit.Segment) error{
		"before the rename":    func(path string, seg audit.Segment) error { return os.Rename(seg.Path, path) },
		"before the new file":  func(path string, seg audit.Segment) error { return os.Remove(path) },
		"before the new entry": func(path string, seg audit.Segment) error { return os.Truncate(path, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := open(t, dir)
			logMany(t, s)
			seg := sealLog(t, s)
			want := wholeLog(t, s)
			if err := errors.Join(s.Close(), undo(filepath.Join(dir, logName), seg)); err != nil {
				t.Fatal(err)
			}
			s = open(t, dir)
			checkIntact(t, s)
			if !bytes.Equal(wholeLog(t, s), want) {
				t.Error("the log differs")
			}
			if _, err := os.Stat(seg.Path); err != nil {
				t.Error(err)
			}
		})
	}
}

// Another program may change the file of a segment between the commit of the seal and the rename, while msbd does not run
// because it was killed there. The next start completes the seal, reports the change and keeps what the file contains.
func TestTamperingWithAnInterruptedSealIsReported(t *testing.T) {
	t.Parallel()
	lastLine := func(log []byte) int { return bytes.LastIndexByte(log[:len(log)-1], '\n') + 1 }
	for name, tamper := range map[string]func(log []byte) []byte{
		"not changed": nil,
		"last line changed": func(log []byte) []byte {
			n := lastLine(log)
			return append(log[:n:n], bytes.Replace(log[n:], []byte("uid:0"), []byte("uid:9"), 1)...)
		},
		"last line removed": func(log []byte) []byte { return log[:lastLine(log)] },
		"only a part left":  func(log []byte) []byte { return log[:10] },
		"zeros":             func(log []byte) []byte { return make([]byte, len(log)) },
		"line added":        func(log []byte) []byte { return append(log, "more\n"...) },
		"replaced":          func([]byte) []byte { return []byte("it was not me\n") },
	} {
		for _, running := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, running %v", name, running), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				s := open(t, dir)
				logMany(t, s)
				s.log.dir = filepath.Join(dir, "missing") // the rename fails
				seg := sealLog(t, s)
				s.log.dir = dir
				if !running {
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
				}
				path := filepath.Join(dir, filepath.Base(seg.Path))
				want, err := os.ReadFile(filepath.Join(dir, logName))
				if err != nil {
					t.Fatal(err)
				}
				if tamper != nil {
					want = tamper(want)
					edit(t, filepath.Join(dir, logName), func([]byte) []byte { return want })
				}
				if running {
					logEvents(t, s, "next")
				} else {
					s = open(t, dir)
				}
				for range 2 {
					if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
						t.Errorf("the segment has %d bytes, %v, want what the file had, %d bytes", len(got), err, len(want))
					}
					if got := targets(t, readLog(t, s)); got[0] != audit.LogSeal+" "+filepath.Base(path) {
						t.Errorf("the new file begins with %s, want the entry of the seal", got[0])
					}
					if tamper == nil {
						checkIntact(t, s)
					} else if err := s.AuditProblem(); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), filepath.Base(path)) {
						t.Errorf("AuditProblem: %v, want data loss naming the segment", err)
					}
					if err := s.Health(); err != nil {
						t.Error(err)
					}
					s = reopen(t, s, dir)
				}
			})
		}
	}
}

// A segment may be moved away at once, even before a crash. The current file then remains what it is.
func TestArchivedBeforeTheLogHasSettled(t *testing.T) {
	t.Parallel()
	for name, cut := range map[string]func(log []byte) []byte{
		"complete":                  func(log []byte) []byte { return log },
		"without the end":           func(log []byte) []byte { return log[:len(log)-50] },
		"a part of the first entry": func(log []byte) []byte { return log[:50] },
		"empty":                     func([]byte) []byte { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s, segments := sealed(t, dir)
			if err := errors.Join(s.Close(), os.Remove(segments[1].Path)); err != nil {
				t.Fatal(err)
			}
			edit(t, filepath.Join(dir, logName), cut)
			s = open(t, dir)
			checkIntact(t, s)
			if segments := s.AuditSegments(); !segments[1].Absent || len(targets(t, readLog(t, s))) != 3 {
				t.Errorf("the segments are %+v and the current file has %s", segments, readLog(t, s))
			}
		})
	}
}

// An older copy of the store may end with a seal whose segment was moved away since. The current file then belongs to a
// later segment.
func TestRollbackToAnArchivedSeal(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, fileName)
	s := open(t, dir)
	logEvents(t, s, "a", "b")
	archived := sealLog(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	earlier, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	logEvents(t, s, "c")
	sealLog(t, s)
	logEvents(t, s, "d")
	want := readLog(t, s)
	if err := errors.Join(s.Close(), os.Remove(archived.Path), os.WriteFile(path, earlier, 0o600)); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	if err := s.AuditProblem(); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "older copy") || strings.Contains(err.Error(), "altered") {
		t.Errorf("AuditProblem: %v, want data loss that only names an older copy", err)
	}
	if !bytes.HasPrefix(readLog(t, s), want) || len(s.AuditSegments()) != 2 {
		t.Errorf("the current file is %s, want the entries that it had; the segments are %v", readLog(t, s), s.AuditSegments())
	}
}

// While the file of a segment cannot be renamed, no entry is added.
func TestSealWithoutRename(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	logEvents(t, s, "a")
	obstacle := filepath.Join(dir, "audit-000000000001-000000000001.jsonl")
	s.log.dir = filepath.Join(dir, "missing") // the rename fails
	sealLog(t, s)
	if err := addKey(s, keyRecord("a")); err == nil {
		t.Error("a change was logged although the segment is not in its place")
	}
	s.log.dir = dir
	if err := addKey(s, keyRecord("a")); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(obstacle); err != nil {
		t.Error(err)
	}
	checkIntact(t, s)
}

// An older copy of the store does not know the segments that were sealed since. They remain part of the log.
func TestRollbackBeforeASeal(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "[state") // not a pattern
	path := filepath.Join(dir, fileName)
	s := open(t, dir)
	logEvents(t, s, "a", "b")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	earlier, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	logEvents(t, s, "c")
	sealLog(t, s)
	logEvents(t, s, "d")
	sealLog(t, s)
	logEvents(t, s, "e")
	want, segments := wholeLog(t, s), s.AuditSegments()
	if err := errors.Join(s.Close(), os.WriteFile(path, earlier, 0o600)); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	if err := s.AuditProblem(); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "the audit log has entry 7, but the store ends at entry 2") {
		t.Errorf("AuditProblem: %v, want data loss naming both ends", err)
	}
	for range 2 {
		if head, err := s.VerifyAudit(t.Context()); err != nil || head.Seq != 8 {
			t.Errorf("VerifyAudit: %v, %v, want entry 8", head, err)
		}
		log := wholeLog(t, s)
		if all := targets(t, log); !bytes.HasPrefix(log, want) || all[len(all)-1] != audit.StoreRollback {
			t.Errorf("the log is %v, want the earlier entries and then %s", all, audit.StoreRollback)
		}
		if diff := cmp.Diff(segments, s.AuditSegments()); diff != "" {
			t.Error(diff)
		}
		s = reopen(t, s, dir)
	}
}

func TestTailFollowsOverASeal(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	logEvents(t, s, "before")
	seen, stop := followAudit(t, s)
	want := []string{"sandbox.stop before", "sandbox.stop one", "audit.seal audit-000000000001-000000000002.jsonl", "sandbox.stop two"}
	got := []string{<-seen}
	logEvents(t, s, "one")
	sealLog(t, s)
	logEvents(t, s, "two")
	for range want[1:] {
		got = append(got, <-seen)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	stop()
}
