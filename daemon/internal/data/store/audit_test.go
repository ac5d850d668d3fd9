package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

func logEvents(t testing.TB, s *Store, targets ...string) {
	t.Helper()
	var events []audit.Event
	for _, target := range targets {
		events = append(events, audit.Event{Action: audit.SandboxStop, Actor: "uid:0", Target: target})
	}
	commit(t, s, keys.Change{Events: events})
}

// logMany logs more events than the outbox holds, so that earlier entries are only in the file.
func logMany(t testing.TB, s *Store) {
	t.Helper()
	targets := make([]string, outboxLimit+10)
	for i := range targets {
		targets[i] = fmt.Sprint("many-", i)
	}
	logEvents(t, s, targets...)
	logEvents(t, s, "after-many")
}

func readLog(t testing.TB, s *Store) []byte {
	t.Helper()
	data, err := os.ReadFile(s.AuditPath())
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// checkLog checks that the log is intact and that its file ends with the head of the log.
func checkLog(t testing.TB, s *Store) {
	t.Helper()
	head, err := s.VerifyAudit(context.Background())
	if err != nil || head != s.AuditHead() {
		t.Errorf("VerifyAudit: %v, %v, want the head %v", head, err, s.AuditHead())
	}
	if err := errors.Join(s.AuditProblem(), s.Health()); err != nil {
		t.Error(err)
	}
	if fromFile, err := audit.Verify(bytes.NewReader(readLog(t, s))); err != nil || fromFile != head {
		t.Errorf("the file ends with %v, %v, the log with %v", fromFile, err, head)
	}
}

func targets(t testing.TB, log []byte) []string {
	t.Helper()
	var out []string
	for line := range bytes.Lines(log) {
		e, err := audit.Parse(bytes.TrimSuffix(line, []byte("\n")))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, strings.TrimSuffix(e.Action+" "+e.Target, " "))
	}
	return out
}

func TestAuditLogSurvivesReopening(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	checkLog(t, s)
	if err := s.Audit(audit.Event{Action: audit.ServerStart, Actor: audit.ActorServer}); err != nil {
		t.Fatal(err)
	}
	logEvents(t, s, "a", "b")
	s = reopen(t, s, dir)
	checkLog(t, s)
	logEvents(t, s, "c")
	checkLog(t, s)
	want := []string{"server.start", "sandbox.stop a", "sandbox.stop b", "sandbox.stop c"}
	if diff := cmp.Diff(want, targets(t, readLog(t, s))); diff != "" {
		t.Error(diff)
	}
	log, err := s.OpenAudit()
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	logEvents(t, s, "later")
	if copied, err := io.ReadAll(log); err != nil || len(targets(t, copied)) != len(want) {
		t.Errorf("OpenAudit returned %v, %v, want the log without later entries", targets(t, copied), err)
	}
	for range 3 {
		logMany(t, s)
	}
	checkLog(t, s)
	checkLog(t, reopen(t, s, dir))
}

// Concurrent changes share commits. A refused change leaves no trace, and each other change is stored and logged once.
func TestGroupCommit(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	want := map[string]bool{}
	var wg sync.WaitGroup
	for i := range 64 {
		id := fmt.Sprintf("key-%d", i)
		refused := i%8 == 0
		want[id] = !refused
		wg.Go(func() {
			c := keys.Change{Put: []keys.Record{keyRecord(id)}, Events: []audit.Event{{Action: audit.KeyCreate, Target: id}}}
			if refused {
				c.Events = append(c.Events, audit.Event{Action: audit.KeyCreate, Target: strings.Repeat("x", audit.MaxLine)})
			}
			if err := s.CommitKeys(c); errdefs.IsInvalidArgument(err) != refused || err != nil != refused {
				t.Errorf("%s: %v", id, err)
			}
		})
	}
	wg.Wait()
	s = reopen(t, s, dir)
	checkLog(t, s)
	logged, stored := map[string]int{}, map[string]int{}
	for _, target := range targets(t, readLog(t, s)) {
		logged[strings.TrimPrefix(target, "key.create ")]++
	}
	for _, r := range loaded(t, s).Records {
		stored[r.ID]++
	}
	for id, accepted := range want {
		if times := map[bool]int{true: 1}[accepted]; logged[id] != times || stored[id] != times {
			t.Errorf("%s: %d times in the log, %d times in the store, want %d", id, logged[id], stored[id], times)
		}
	}
	if len(logged) != 56 || len(stored) != 56 {
		t.Errorf("%d keys logged, %d stored, want 56", len(logged), len(stored))
	}
}

// Open repairs what a power loss may do to an audit log that was not synced.
func TestLostEndIsRestored(t *testing.T) {
	t.Parallel()
	tests := map[string]func(log []byte) []byte{
		"empty":      func([]byte) []byte { return nil },
		"half":       func(log []byte) []byte { return log[:len(log)/2] },
		"last byte":  func(log []byte) []byte { return log[:len(log)-1] },
		"zeros":      func(log []byte) []byte { clear(log[len(log)/2:]); return log },
		"all zeros":  func(log []byte) []byte { clear(log); return log },
		"other byte": func(log []byte) []byte { log[len(log)-200] ^= 1; return log },
	}
	for name, damage := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := open(t, dir)
			logEvents(t, s, "a", "b", "c", "d")
			want := readLog(t, s)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			edit(t, filepath.Join(dir, logName), damage)
			s = open(t, dir)
			checkLog(t, s)
			if diff := cmp.Diff(want, readLog(t, s)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// bbolt uses the state before the last one if the last one is unreadable, as after a crash during a commit. That must
// not undo an acknowledged change.
func TestUnreadableLastState(t *testing.T) {
	t.Parallel()
	for _, logged := range []bool{true, false} {
		t.Run(fmt.Sprint("logged ", logged), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := open(t, dir)
			logEvents(t, s, "a")
			var id int
			last := keys.Change{Put: []keys.Record{keyRecord("last")}}
			if logged {
				last.Events = []audit.Event{{Action: audit.KeyRevoke, Target: "last"}}
			}
			commit(t, s, last)
			if err := s.db.View(func(tx *bbolt.Tx) error { id = tx.ID(); return nil }); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			edit(t, filepath.Join(dir, fileName), func(d []byte) []byte {
				d[id%2*os.Getpagesize()+50] ^= 4
				return d
			})
			s, err := Open(dir)
			if logged {
				if !errdefs.IsDataLoss(err) {
					t.Errorf("Open: %v, want data loss", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if n := len(loaded(t, s).Records); n != 0 {
				t.Errorf("%d keys, want none", n)
			}
			checkLog(t, s)
		})
	}
}

// While the log cannot be written, changes that must be logged are refused. They succeed again once it can be written.
func TestLogThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	tests := map[string]func(path string) error{
		"directory":     func(path string) error { return os.Mkdir(path, 0o700) },
		"symbolic link": func(path string) error { return os.Symlink("elsewhere", path) },
		"FIFO":          func(path string) error { return unix.Mkfifo(path, 0o600) },
	}
	for name, block := range tests {
		for _, running := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, running %v", name, running), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				path, aside := filepath.Join(dir, logName), filepath.Join(dir, "aside")
				s := open(t, dir)
				logEvents(t, s, "a")
				if !running {
					if err := s.Close(); err != nil {
						t.Fatal(err)
					}
				}
				if err := errors.Join(os.Rename(path, aside), block(path)); err != nil {
					t.Fatal(err)
				}
				if !running {
					s = open(t, dir)
				}
				err := addKey(s, keyRecord("new"))
				if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), path) {
					t.Errorf("a change that cannot be logged: %v, want unavailable naming the file", err)
				}
				if n := len(loaded(t, s).Records); n != 0 {
					t.Errorf("%d keys, want none", n)
				}
				if err := s.SaveUsage(nil, moment); err != nil {
					t.Errorf("a change that is not logged: %v", err)
				}
				if err := s.Health(); !errdefs.IsUnavailable(err) {
					t.Errorf("Health: %v, want unavailable", err)
				}
				if head := s.AuditHead(); head.Seq != 1 {
					t.Errorf("AuditHead: %v, want entry 1", head)
				}
				if _, err := os.Lstat(filepath.Join(dir, "elsewhere")); !errors.Is(err, fs.ErrNotExist) {
					t.Error("the link was followed")
				}
				if err := errors.Join(os.Remove(path), os.Rename(aside, path)); err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(s.Probe(), s.Health()); err != nil {
					t.Errorf("Health after the repair: %v", err)
				}
				if err := addKey(s, keyRecord("new")); err != nil {
					t.Error(err)
				}
				checkLog(t, s)
			})
		}
	}
}

func TestTailAudit(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	ctx := t.Context()
	tail := func(last int) []string {
		t.Helper()
		var log []byte
		err := s.TailAudit(ctx, last, false, func(line []byte) error {
			log = append(append(log, line...), '\n')
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return targets(t, log)
	}
	if got := tail(10); len(got) != 0 {
		t.Errorf("TailAudit of an empty log gives %q", got)
	}
	var want []string
	for i := range 1000 {
		name := fmt.Sprint(i, "-", strings.Repeat("x", i*7%300))
		if i == 500 {
			name += strings.Repeat("y", 60<<10)
		}
		want = append(want, "sandbox.stop "+name)
	}
	for group := range slices.Chunk(want, 100) {
		var events []audit.Event
		for _, target := range group {
			events = append(events, audit.Event{Action: audit.SandboxStop, Target: strings.TrimPrefix(target, "sandbox.stop ")})
		}
		commit(t, s, keys.Change{Events: events})
	}
	for _, n := range []int{-1, 0, 1, 2, 99, 498, 499, 500, 501, 999, 1000, 1001, 1 << 40} {
		if diff := cmp.Diff(want[len(want)-min(max(n, 0), len(want)):], tail(n), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("the last %d: %s", n, diff)
		}
	}
	bad := errors.New("the reader has closed")
	if err := s.TailAudit(ctx, 5, true, func([]byte) error { return bad }); !errors.Is(err, bad) {
		t.Errorf("TailAudit: %v, want the error of line", err)
	}
}

// followAudit follows the log from its last entry. It returns a channel with the action and target of each entry, and a
// function that ends it.
func followAudit(t *testing.T, s *Store) (seen <-chan string, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	entries, done := make(chan string), make(chan error)
	go func() {
		done <- s.TailAudit(ctx, 1, true, func(line []byte) error {
			entries <- targets(t, append(bytes.Clone(line), '\n'))[0]
			return nil
		})
	}()
	return entries, func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("TailAudit: %v", err)
		}
	}
}

func TestTailAuditFollows(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	logEvents(t, s, "before")
	seen, stop := followAudit(t, s)
	expect := func(names ...string) {
		t.Helper()
		for _, want := range names {
			if got := <-seen; got != "sandbox.stop "+want {
				t.Errorf("got %q, want %q", got, want)
			}
		}
	}
	expect("before")
	logEvents(t, s, "one")
	expect("one")
	logEvents(t, s, "two", "three")
	logEvents(t, s, "four")
	expect("two", "three", "four")
	stop()
}

// TailAudit returns an error if another program replaces the log.
func TestTailAuditOfAReplacedLog(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	logEvents(t, s, "before")
	seen, done := make(chan struct{}), make(chan error)
	go func() {
		done <- s.TailAudit(t.Context(), 1, true, func([]byte) error { close(seen); return nil })
	}()
	<-seen
	if err := os.Remove(s.AuditPath()); err != nil {
		t.Fatal(err)
	}
	logEvents(t, s, "after")
	if err := <-done; !errdefs.IsDataLoss(err) {
		t.Errorf("TailAudit: %v, want data loss", err)
	}
}

func TestVerifyAuditEndsWithItsContext(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	logEvents(t, s, "a")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.VerifyAudit(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("VerifyAudit: %v, want canceled", err)
	}
	if err := s.AuditProblem(); err != nil {
		t.Errorf("AuditProblem after a canceled VerifyAudit: %v", err)
	}
}
