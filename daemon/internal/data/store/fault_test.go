//go:build !race

// The race detector leaves this file out. It would make each case many times slower, and finds nothing in tests where one
// goroutine opens a state directory, or traces or kills a child process.

package store_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/msbd/msbd/api/audit"
)

// faults are the errors that a system call may return because of the disk or for lack of descriptors.
var faults = map[string][]syscall.Errno{
	"pwrite64":  {syscall.ENOSPC, syscall.EIO},
	"write":     {syscall.ENOSPC, syscall.EIO},
	"fdatasync": {syscall.EIO, syscall.ENOSPC},
	"fsync":     {syscall.EIO},
	"ftruncate": {syscall.ENOSPC},
	"fallocate": {syscall.ENOSPC},
	"renameat":  {syscall.EIO},
	"unlinkat":  {syscall.EIO},
	"openat":    {syscall.EMFILE},
}

var errnoNames = map[syscall.Errno]string{syscall.ENOSPC: "ENOSPC", syscall.EIO: "EIO", syscall.EMFILE: "EMFILE"}

// Each system call of a history that writes fails once. The step that made the call either returns the error and changes
// nothing, or succeeds nevertheless. Later steps succeed, and the next start finds the state that the server reported.
// Only after a failed sync that leaves it unknown what the disk has, every later step is refused, and the next start
// finds the change either made or not made. Normally, one call of each name, file and step fails; with MSB_SOAK, every
// call fails with every error.
func TestFailingCalls(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	stdout, calls := trace(t, historyOf(dir))
	want := parseSteps(t, stdout)
	thread := "" // the thread that runs history: strace counts the calls of each thread separately
	for _, c := range calls {
		if c.lines() > 0 {
			thread = c.thread
		}
	}
	count := map[string]int{}
	seen := map[string]bool{}
	step, sites := 0, 0
	for _, c := range calls {
		step += c.lines()
		file, inDir := c.file(dir)
		target := file
		if strings.HasPrefix(file, "backup-") {
			target = "" // its name is random
		}
		for _, counted := range slices.Compact([]string{"", target}) {
			count[c.thread+c.name+" "+counted]++
		}
		if !inDir || strings.HasPrefix(file, "audit") && c.name == "openat" && strings.Contains(c.args[2], "O_RDONLY") {
			continue // VerifyAudit, which history calls only to check the log
		}
		if c.thread != thread {
			t.Errorf("the call is in another thread, where it cannot be counted: %s", c)
		}
		for i, errno := range faults[c.name] {
			key := fmt.Sprint(step, c.name, file)
			if !soak && (seen[key] || i > 0) {
				continue
			}
			seen[key] = true
			sites++
			nth := count[thread+c.name+" "+target]
			t.Run(fmt.Sprintf("%s %d of %q %s", c.name, nth, target, errnoNames[errno]), func(t *testing.T) {
				t.Parallel()
				failOnce(t, c.name, target, nth, errno, want)
			})
		}
	}
	if sites < 100 {
		t.Errorf("only %d calls to fail were found, want at least 100", sites)
	}
}

func historyOf(dir string) *exec.Cmd {
	cmd := child("history", dir)
	cmd.Env = append(cmd.Env, historySteps+"=1000")
	return cmd
}

// failOnce runs a history in which the nth call of each thread with this name fails. If file is not empty, only calls for this
// file count. Without it, a call of the Go runtime in another thread may fail too.
func failOnce(t *testing.T, name, file string, nth int, errno syscall.Errno, want []step) {
	dir := filepath.Join(t.TempDir(), "state")
	options := []string{"-s", "512", "-e", fmt.Sprintf("inject=%s:error=%s:when=%d", name, errnoNames[errno], nth)}
	switch file {
	case "":
	case filepath.Base(dir):
		options = append(options, "-P", dir)
	default:
		options = append(options, "-P", filepath.Join(dir, file))
	}
	stdout, calls := trace(t, historyOf(dir), options...)
	steps := parseSteps(t, stdout)
	if !slices.ContainsFunc(calls, func(c call) bool { return c.name == name && c.result < 0 && c.injected }) {
		t.Fatal("strace made no call fail")
	}
	var last state
	first, stopped := true, 0
	for i, s := range steps {
		if s.Err == "" || s.Did != "start" {
			last = s.State
		}
		if s.Err != "" && first && !strings.Contains(s.Err, errno.Error()) {
			t.Errorf("%s: error %q, want %v in it", s.Did, s.Err, errno)
		}
		first = first && s.Err == ""
		switch {
		case stopped > 0:
			if s.Err == "" && s.Did != "prune" || !s.needsRestart() { // there is nothing to prune
				t.Errorf("%s: error %q, health %q, want both to ask for a restart", s.Did, s.Err, s.Health)
			}
		case s.needsRestart():
			stopped = i
		case s.Health != "":
			t.Errorf("after %s: the store has not recovered: %s", s.Did, s.Health)
		}
	}
	if stopped > 0 && (name != "fdatasync" || !strings.Contains(steps[stopped].Err, "only a restart shows")) {
		t.Errorf("%s must not ask for a restart: %s", steps[stopped].Did, steps[stopped].Err)
	}
	if len(steps) != len(want) && steps[0].Err == "" {
		t.Errorf("only %d steps of %d were done", len(steps), len(want))
	}
	if stopped > 0 {
		checkAfterRestart(t, dir, steps[stopped-1].State, want[stopped].State)
	} else {
		checkAfterRestart(t, dir, last)
	}
}

// checkAfterRestart starts a server and checks that it has the last state or one like those in alternatives, which come
// from another run of the same history.
func checkAfterRestart(t *testing.T, dir string, last state, alternatives ...state) {
	t.Helper()
	srv := mustStart(t, dir)
	got, err := observe(srv, last.Issued)
	if err != nil {
		t.Fatal(err)
	}
	if !got.same(last) && !slices.ContainsFunc(alternatives, got.like) {
		t.Errorf("after a restart: %d keys accepted, sandboxes %v, %d requests; before it: %d, %v, %d",
			len(got.Accepted), got.Sandboxes, got.Requests, len(last.Accepted), last.Sandboxes, last.Requests)
	}
	if err := checkAudit(srv, last.Head); err != nil {
		t.Error(err)
	}
	if err := srv.Audit(audit.Event{Action: audit.ServerStop, Actor: audit.ActorServer}); err != nil {
		t.Error(err)
	}
}

// While the disk is full, every change returns an error and changes nothing, and Health reports the problem. If only the
// audit log has no space, changes that are not logged still succeed.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		inject   string
		succeeds func(s step) bool
	}{
		// The 20th write to the store comes after the steps that issue two keys and put the sandboxes.
		"store": {"inject=pwrite64:error=ENOSPC:when=20+", func(step) bool { return false }},
		"log": {"inject=fallocate:error=ENOSPC:when=1+", func(s step) bool {
			return strings.Contains(s.Did, "sandbox") || s.Did == "put another"
		}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "state")
			stdout, _ := trace(t, historyOf(dir), "-e", tt.inject)
			steps := parseSteps(t, stdout)
			full := false
			for i, s := range steps[1:] {
				before := steps[i].State
				if full = full || s.Err != ""; !full || tt.succeeds(s) {
					continue
				}
				if s.Err == "" && s.Did != "prune" || s.Health == "" { // there is nothing to prune
					t.Errorf("%s: error %q, health %q, want both", s.Did, s.Err, s.Health)
				}
				if !s.State.same(before) || s.State.Head != before.Head {
					t.Errorf("%s failed but changed the state: %+v, before %+v", s.Did, s.State, before)
				}
			}
			if !full || len(steps) < 10 {
				t.Errorf("the disk was never full: %+v", steps)
			}
			checkAfterRestart(t, dir, steps[len(steps)-1].State)
		})
	}
}

// If all syncs fail from some moment on, no further change is acknowledged. The next start finds the change whose final
// sync failed either made and logged, or neither.
func TestPersistentSyncFailure(t *testing.T) {
	t.Parallel()
	for nth := 5; nth < 13; nth++ { // syncs of the first steps
		t.Run(fmt.Sprint(nth), func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "state")
			stdout, _ := trace(t, historyOf(dir), "-e", fmt.Sprintf("inject=fdatasync:error=EIO:when=%d+", nth))
			steps := parseSteps(t, stdout)
			var acknowledged state
			for _, s := range steps {
				if s.Err == "" {
					acknowledged = s.State
				} else if s.Health == "" && s.Did != "start" {
					t.Errorf("%s: %s, but Health reports no problem", s.Did, s.Err)
				}
			}
			srv := mustStart(t, dir)
			got, err := observe(srv, acknowledged.Issued)
			if err != nil {
				t.Fatal(err)
			}
			for _, key := range acknowledged.Accepted {
				if !slices.Contains(got.Accepted, key) {
					t.Error("an acknowledged key that was never revoked is refused")
				}
			}
			if err := checkAudit(srv, acknowledged.Head); err != nil {
				t.Error(err)
			}
		})
	}
}

// After a failed sync that leaves it unknown what the disk has, nothing is written until a restart, even though the disk
// works again. The restart finds the change either made and logged, or neither.
func TestNothingIsWrittenAfterAFailedSync(t *testing.T) {
	t.Parallel()
	// The last sync of the step "revoke a" is the one of bbolt's state.
	dir := filepath.Join(t.TempDir(), "state")
	_, calls := trace(t, historyOf(dir))
	step, syncs := 0, 0
	for _, c := range calls {
		if step += c.lines(); step > 7 {
			break
		}
		if c.name == "fdatasync" {
			syncs++
		}
	}
	dir = filepath.Join(t.TempDir(), "state")
	stdout, calls := trace(t, historyOf(dir), "-e", fmt.Sprintf("inject=fdatasync:error=EIO:when=%d", syncs))
	failed := false
	for _, c := range calls {
		if file, ok := c.file(dir); failed && ok && c.name != "openat" && (file == "msb.db" || file == "audit.jsonl") {
			t.Errorf("a call after the failed sync: %s", c)
		}
		failed = failed || c.injected
	}
	refused := false
	var acknowledged state
	for _, s := range parseSteps(t, stdout) {
		if s.Did == "revoke a" {
			refused = true
		}
		switch {
		case !refused && s.Err == "":
			acknowledged = s.State
		case !refused || s.Err == "" && s.Did != "prune" || !s.needsRestart(): // there is nothing to prune
			t.Errorf("%s: error %q, health %q, want both, and a request to restart", s.Did, s.Err, s.Health)
		}
	}
	srv := mustStart(t, dir)
	got, err := observe(srv, acknowledged.Issued)
	if err != nil {
		t.Fatal(err)
	}
	revocations := len(acknowledged.Accepted) - len(got.Accepted)
	log, err := os.ReadFile(srv.AuditPath())
	if n := bytes.Count(log, []byte(`"action":"key.revoke"`)); err != nil || n != revocations {
		t.Errorf("the log has %d revocations, %v, want %d", n, err, revocations)
	}
	if err := checkAudit(srv, acknowledged.Head); err != nil {
		t.Error(err)
	}
	if err := errors.Join(srv.Audit(audit.Event{Action: audit.ServerStop, Actor: audit.ActorServer}), srv.Health()); err != nil {
		t.Errorf("after the restart: %v", err)
	}
}
