package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/audit"
)

// All other changes to the log are detected. Keys still work, new entries continue from the end that the store knows, and
// the altered content of the file is kept.
func TestTamperingIsReported(t *testing.T) {
	t.Parallel()
	edited := func(change func(log []byte) []byte) func(t *testing.T, path string) {
		return func(t *testing.T, path string) { edit(t, path, change) }
	}
	tests := map[string]struct {
		tamper func(t *testing.T, path string)
		// atOpen is set if Open detects the change, which does not read the whole log.
		atOpen bool
		where  string
	}{
		"changed": {edited(func(log []byte) []byte {
			return bytes.Replace(log, []byte("many-2"), []byte("many-3"), 1)
		}), false, "line 4: changed"},
		"lines removed": {edited(func(log []byte) []byte {
			lines := bytes.SplitAfter(log, []byte("\n"))
			return bytes.Join(slices.Delete(lines, 2, 4), nil)
		}), true, "line 3: entry 5 is in the place of entry 3"},
		"line inserted": {edited(func(log []byte) []byte {
			return append([]byte("{}\n"), log...)
		}), true, "line 1: changed"},
		"truncated": {edited(func(log []byte) []byte {
			return log[:len(log)/3]
		}), true, ""},
		"removed": {func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}, true, "line 1: entry 524 is in the place of entry 1"},
		"text appended": {edited(func(log []byte) []byte {
			return append(log, "it was not me"...)
		}), true, "line 525"},
		"long line appended": {edited(func(log []byte) []byte {
			return append(log, strings.Repeat("x", 3*audit.MaxLine)...)
		}), true, "line 525: longer"},
	}
	for name, tt := range tests {
		for _, running := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, running %v", name, running), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				s := open(t, dir)
				logEvents(t, s, "a")
				logMany(t, s) // entry 524 is the last
				head := s.AuditHead()
				if !running {
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
				}
				tt.tamper(t, filepath.Join(dir, logName))
				before, _ := os.ReadFile(filepath.Join(dir, logName))
				if !running {
					s = open(t, dir)
				}
				if err := s.AuditProblem(); !running && (err != nil) != tt.atOpen {
					t.Errorf("AuditProblem after Open: %v, want an error: %t", err, tt.atOpen)
				}
				if err := addKey(s, keyRecord("new")); err != nil {
					t.Fatal(err)
				}
				if err := s.AuditProblem(); tt.atOpen && !errdefs.IsDataLoss(err) {
					t.Errorf("AuditProblem after a change: %v, want data loss", err)
				}
				_, err := s.VerifyAudit(context.Background())
				if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), tt.where) {
					t.Errorf("VerifyAudit: %v, want data loss at %q", err, tt.where)
				}
				if err := s.AuditProblem(); !errdefs.IsDataLoss(err) {
					t.Errorf("AuditProblem after VerifyAudit: %v, want data loss", err)
				}
				if !bytes.HasPrefix(readLog(t, s), before) {
					t.Error("the earlier content of the file was changed")
				}
				lines := bytes.Split(bytes.TrimSuffix(readLog(t, s), []byte("\n")), []byte("\n"))
				e, err := audit.Parse(lines[len(lines)-1])
				if err != nil || e.Prev != head.Hash || e.Action != audit.KeyCreate {
					t.Errorf("the last entry is %+v, %v, want the new key after entry %d", e, err, head.Seq)
				}
				s = reopen(t, s, dir)
				if saved := loaded(t, s); len(saved.Records) != 1 {
					t.Errorf("%d keys, want 1", len(saved.Records))
				}
				if err := s.Health(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// VerifyAudit detects a log that was rewritten with valid hashes, because its last hash differs from the store's.
func TestRewrittenLogIsDetected(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	logEvents(t, s, "a", "b")
	var forged []byte
	var head audit.Head
	for range 2 {
		line, next, err := head.Append(moment, audit.Event{Action: audit.KeyCreate, Actor: "uid:0"})
		if err != nil {
			t.Fatal(err)
		}
		forged, head = append(forged, line...), next
	}
	size := len(readLog(t, s))
	edit(t, s.AuditPath(), func([]byte) []byte { return forged })
	s.log.mu.Lock()
	s.log.published.end.Size += int64(len(forged) - size) // as if the forged log had the length of the real one
	s.log.mu.Unlock()
	if _, err := s.VerifyAudit(context.Background()); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "rewritten with new hashes") {
		t.Errorf("VerifyAudit: %v, want data loss", err)
	}
}

// Replacing the store by an earlier copy makes revoked keys valid again, so it must be reported.
func TestRollbackIsReported(t *testing.T) {
	t.Parallel()
	for name, rollBack := range map[string]func(path string, earlier []byte) error{
		"earlier copy": func(path string, earlier []byte) error { return os.WriteFile(path, earlier, 0o600) },
		"removed":      func(path string, _ []byte) error { return os.Remove(path) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, fileName)
			s := open(t, dir)
			if err := addKey(s, keyRecord("a")); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			earlier, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			s = open(t, dir)
			logEvents(t, s, "b", "c")
			before := readLog(t, s)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if err := rollBack(path, earlier); err != nil {
				t.Fatal(err)
			}
			s = open(t, dir)
			if err := s.AuditProblem(); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "older copy") {
				t.Errorf("AuditProblem: %v, want data loss naming an older copy", err)
			}
			if head, err := s.VerifyAudit(context.Background()); err != nil || head.Seq != 4 {
				t.Errorf("VerifyAudit: %v, %v, want entry 4", head, err)
			}
			if err := s.AuditProblem(); err == nil {
				t.Error("AuditProblem is nil after VerifyAudit, although the store was rolled back")
			}
			log := readLog(t, s)
			if !bytes.HasPrefix(log, before) || targets(t, log)[3] != audit.StoreRollback {
				t.Errorf("the log is %v, want the earlier entries and then %s", targets(t, log), audit.StoreRollback)
			}
			logEvents(t, s, "d")
			s = reopen(t, s, dir)
			if err := s.AuditProblem(); err == nil {
				t.Error("AuditProblem is nil after a restart, although no administrator has acknowledged the problem")
			}
			if _, err := s.AcknowledgeAudit(t.Context(), 0); err != nil {
				t.Error(err)
			}
			checkLog(t, s)
		})
	}
}

// Only a limited number of problems is kept. If there are more, AuditProblem says so, and a rollback is among those that are
// kept.
func TestManyProblems(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, fileName)
	s := open(t, dir)
	const notKept = "after entry 10"
	for n := range maxProblems + 2 {
		logEvents(t, s, "a") // entry n+1
		edit(t, s.AuditPath(), func(log []byte) []byte { return append(log, "more\n"...) })
		if n == maxProblems-1 {
			if err := s.AuditProblem(); err == nil || strings.Contains(err.Error(), moreProblems) {
				t.Errorf("AuditProblem after %d problems: %v, want all of them", n, err)
			}
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	earlier, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	check := func(rolledBack bool) {
		t.Helper()
		s.log.mu.Lock()
		problems := slices.Clone(s.log.problems)
		s.log.mu.Unlock()
		if len(problems) != maxProblems || problems[len(problems)-1] != moreProblems ||
			strings.Contains(problems[0], "older copy") != rolledBack || strings.Contains(strings.Join(problems, ""), notKept) {
			t.Errorf("the problems are %q, want %d, a rollback: %t, and that there were more", problems, maxProblems, rolledBack)
		}
	}
	s = open(t, dir)
	logEvents(t, s, "b")
	check(false)
	logEvents(t, s, "c")
	if err := errors.Join(s.Close(), os.WriteFile(path, earlier, 0o600)); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	check(true)
	s = reopen(t, s, dir)
	check(true)
	problems, err := s.AcknowledgeAudit(t.Context(), 0)
	if err != nil || len(problems) != maxProblems || s.AuditProblem() != nil {
		t.Errorf("AcknowledgeAudit returns %d problems and %v, and leaves %v", len(problems), err, s.AuditProblem())
	}
}

// While msbd runs, a crash does not explain a change of the log. So it is a problem even if msbd can repair it, and the
// problem stays until an administrator acknowledges it, also after a clean check and a restart.
func TestRepairedTamperingIsReported(t *testing.T) {
	t.Parallel()
	// replaced writes the changed log to a new file, as editors do.
	replaced := func(change func(log []byte) []byte) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			log, err := os.ReadFile(path)
			if err == nil {
				err = os.WriteFile(path+".new", change(bytes.Clone(log)), 0o600)
			}
			if err := errors.Join(err, os.Rename(path+".new", path)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, tamper := range map[string]func(t *testing.T, path string){
		"last lines removed": func(t *testing.T, path string) {
			edit(t, path, func(log []byte) []byte {
				lines := bytes.SplitAfter(log, []byte("\n"))
				return bytes.Join(lines[:len(lines)-3], nil)
			})
		},
		"emptied": func(t *testing.T, path string) { edit(t, path, func([]byte) []byte { return nil }) },
		"removed": func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		},
		"actor changed": replaced(func(log []byte) []byte { return bytes.Replace(log, []byte("uid:0"), []byte("uid:9"), 1) }),
		"line removed": replaced(func(log []byte) []byte {
			return bytes.Join(slices.Delete(bytes.SplitAfter(log, []byte("\n")), 3, 4), nil)
		}),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := open(t, dir)
			for i := range 10 {
				logEvents(t, s, fmt.Sprint(i))
			}
			want := readLog(t, s)
			tamper(t, filepath.Join(dir, logName))
			logEvents(t, s, "next")
			if !bytes.HasPrefix(readLog(t, s), want) {
				t.Error("the log was not repaired")
			}
			for _, when := range []string{"after the next change", "after a clean check", "after a restart"} {
				if err := s.AuditProblem(); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "altered") {
					t.Errorf("AuditProblem %s: %v, want data loss", when, err)
				}
				switch when {
				case "after the next change":
					if head, err := s.VerifyAudit(t.Context()); err != nil || head.Seq != 11 {
						t.Errorf("VerifyAudit: %v, %v, want 11 intact entries", head, err)
					}
				case "after a clean check":
					s = reopen(t, s, dir)
				}
			}
			problems, err := s.AcknowledgeAudit(t.Context(), 7)
			if err != nil || len(problems) != 1 {
				t.Errorf("AcknowledgeAudit: %q, %v, want one problem", problems, err)
			}
			checkLog(t, s)
			s = reopen(t, s, dir)
			checkLog(t, s)
			lines := targets(t, readLog(t, s))
			if last := lines[len(lines)-1]; last != audit.LogAcknowledge {
				t.Errorf("the last entry is %s, want %s", last, audit.LogAcknowledge)
			}
			if problems, err := s.AcknowledgeAudit(t.Context(), 7); err != nil || problems != nil || s.AuditHead().Seq != uint64(len(lines)) {
				t.Errorf("AcknowledgeAudit without a problem: %q, %v, want no change", problems, err)
			}
		})
	}
}

// Once the log has settled, no crash explains a change of its last lines, so the next Open reports it.
func TestTamperingWithASettledLogIsReported(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(log []byte) []byte{
		"emptied":            func([]byte) []byte { return nil },
		"last lines removed": func(log []byte) []byte { return log[:bytes.Index(log, []byte("\n"))+1] },
		"actor changed":      func(log []byte) []byte { return bytes.ReplaceAll(log, []byte("uid:0"), []byte("uid:9")) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := open(t, dir)
			logEvents(t, s, "a", "b", "c")
			if err := errors.Join(s.settle(t.Context()), s.Close()); err != nil {
				t.Fatal(err)
			}
			s = open(t, dir)
			checkLog(t, s) // nothing was changed yet
			logEvents(t, s, "d")
			if err := errors.Join(s.settle(t.Context()), s.settle(t.Context()), s.Close()); err != nil {
				t.Fatal(err)
			}
			edit(t, filepath.Join(dir, logName), change)
			s = open(t, dir)
			if err := s.AuditProblem(); !errdefs.IsDataLoss(err) {
				t.Errorf("AuditProblem: %v, want data loss", err)
			}
		})
	}
}
