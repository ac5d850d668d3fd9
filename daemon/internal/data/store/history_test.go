package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// state is the part of a server's state that its users can observe.
type state struct {
	// Issued holds all API keys that were issued, Accepted those that the server accepts.
	Accepted, Issued []string
	Sandboxes        []string
	Requests         uint64 // of all keys
	Head             audit.Head
}

// like reports whether s corresponds to a state of another run of the same history, in which the API keys have other
// values. It ignores keys that the other run issued beyond the number of keys in s.
func (s state) like(other state) bool {
	accepted := func(s state, issued int) (which []bool) {
		for _, key := range s.Issued[:issued] {
			which = append(which, slices.Contains(s.Accepted, key))
		}
		return which
	}
	n := len(s.Issued)
	return n <= len(other.Issued) && slices.Equal(accepted(s, n), accepted(other, n)) &&
		slices.Equal(s.Sandboxes, other.Sandboxes) && s.Requests == other.Requests
}

// step is a line that history prints: what it did, the result, and the state after it.
type step struct {
	Did   string
	Err   string // empty if the step was acknowledged
	State state
	// Health is the store's Health after the step, joined with any problem of its audit log; empty if there is none.
	Health string
}

// observe returns the state of a server. issued are the keys to try.
func observe(srv *server, issued []string) (state, error) {
	st := state{Issued: slices.Clone(issued), Head: srv.AuditHead()}
	for _, key := range issued {
		if _, err := srv.verifier.Verify(key, netip.Addr{}); err == nil {
			st.Accepted = append(st.Accepted, key)
		}
	}
	sandboxes, err := srv.Sandboxes()
	if err != nil {
		return st, err
	}
	for _, r := range sandboxes {
		st.Sandboxes = append(st.Sandboxes, r.ID+" "+string(r.State))
	}
	saved, err := srv.LoadKeys()
	for _, u := range saved.Usage {
		st.Requests += u.Requests
	}
	return st, err
}

// same reports whether users cannot tell two states of one run apart.
func (s state) same(other state) bool {
	return slices.Equal(s.Accepted, other.Accepted) && slices.Equal(s.Sandboxes, other.Sandboxes) && s.Requests == other.Requests
}

// The environment variables of history: API keys that may be accepted at the start, the number of steps to run, and
// whether to restart the server when its store asks for that.
const (
	historyIssued  = "MSB_TEST_ISSUED"
	historySteps   = "MSB_TEST_STEPS"
	historyRestart = "MSB_TEST_RESTART"
)

// needsRestart reports whether the store asks for a restart after the step.
func (s step) needsRestart() bool { return strings.Contains(s.Health, "restart msbd") }

// history makes every kind of change to a server and prints each step. It does not retry a step that fails. It runs in
// one thread, so that a test can find the n-th system call of one run in another.
func history(dir string) error {
	runtime.LockOSThread()
	ctx := context.Background()
	issued := strings.Fields(os.Getenv(historyIssued))
	report := func(s step) error {
		line, err := json.Marshal(s)
		if err == nil {
			_, err = os.Stdout.Write(append(line, '\n'))
		}
		return err
	}
	srv, err := start(dir)
	if err != nil {
		return report(step{Did: "start", Err: err.Error()})
	}
	st, err := observe(srv, issued)
	if err := errors.Join(err, srv.Probe(), report(step{Did: "start", State: st})); err != nil {
		return err
	}

	issue := func(name string) func() error {
		return func() error {
			key, _, err := srv.issuer.Issue(ctx, keys.IssueRequest{Name: name, CreatedBy: 1000})
			issued = append(issued, key.Reveal())
			return err
		}
	}
	putSandbox := func(id string, state sandbox.State) func() error {
		return func() error {
			name := sandbox.Name{Namespace: "default", Name: id}
			return srv.PutSandbox(sandbox.Record{ID: id, Name: name, State: state, CreatedAt: time.Unix(0, 0).UTC()})
		}
	}
	var archive bytes.Buffer
	steps := []struct {
		name string
		do   func() error
	}{
		{"issue a", issue("a")},
		{"issue b", issue("b")},
		{"put sandbox", putSandbox("box-1", sandbox.Starting)},
		{"put another", putSandbox("box-2", sandbox.Running)},
		{"change sandbox", putSandbox("box-1", sandbox.Running)},
		{"save usage", func() error {
			key, err := srv.issuer.Find("a")
			return errors.Join(err, srv.SaveUsage(map[string]keys.Usage{key.ID: {Requests: 42}}, time.Now()))
		}},
		{"revoke a", func() error { _, err := srv.issuer.Revoke(ctx, "a", 0); return err }},
		{"rotate b", func() error {
			key, _, _, err := srv.issuer.Rotate(ctx, keys.RotateRequest{Ref: "b", Grace: "1h"})
			issued = append(issued, key.Reveal())
			return err
		}},
		{"backup", func() error {
			archive.Reset()
			return srv.backups.Write(ctx, &archive, 0)
		}},
		{"log much", func() error {
			return srv.CommitKeys(keys.Change{Events: slices.Repeat([]audit.Event{{Action: audit.SandboxStop, Actor: "uid:0"}}, 600)})
		}},
		{"issue c", issue("c")},
		{"seal", func() error { _, err := srv.SealAudit(ctx, "uid:0"); return err }},
		{"delete sandbox", func() error { return srv.DeleteSandbox("box-1") }},
		{"reset", func() error { _, err := srv.issuer.Reset(ctx, 0); return err }},
		{"issue d", issue("d")},
		{"prune", func() error { _, err := srv.issuer.Prune(ctx, "", false, 0); return err }},
		{"restore", func() error {
			_, err := srv.backups.Restore(ctx, bytes.NewReader(archive.Bytes()), 0)
			return err
		}},
		{"issue e", issue("e")},
	}
	first, err := strconv.Atoi(os.Getenv(historySteps))
	if err != nil {
		return err
	}
	for _, s := range steps[:min(first, len(steps))] {
		done := step{Did: s.name}
		if err := s.do(); err != nil {
			done.Err = err.Error()
		}
		issued = slices.DeleteFunc(issued, func(key string) bool { return key == "" })
		if done.State, err = observe(srv, issued); err != nil {
			return err
		}
		health := srv.Health()
		if health != nil {
			health = errors.Join(srv.Probe(), srv.Health())
		}
		if err := errors.Join(health, checkAudit(srv, srv.AuditHead())); err != nil {
			done.Health = err.Error()
		}
		if err := report(done); err != nil {
			return err
		}
		if done.needsRestart() && os.Getenv(historyRestart) != "" {
			if err := srv.Close(); err != nil {
				return err
			}
			if srv, err = start(dir); err != nil {
				return err
			}
		}
	}
	return srv.Close()
}

func parseSteps(t testing.TB, stdout []byte) (steps []step) {
	t.Helper()
	for line := range bytes.Lines(stdout) {
		var s step
		if err := json.Unmarshal(line, &s); err != nil {
			t.Fatalf("%v:\n%s", err, line)
		}
		steps = append(steps, s)
	}
	return steps
}

// checkAudit checks that the audit log is intact, that its file agrees with the store, and that it has the acknowledged
// entry.
func checkAudit(srv *server, acknowledged audit.Head) error {
	log, err := srv.OpenAudit()
	if err != nil {
		return err
	}
	file, err := io.ReadAll(log)
	if err := errors.Join(err, log.Close()); err != nil {
		return err
	}
	if head, err := audit.Verify(bytes.NewReader(file)); err != nil || head != srv.AuditHead() {
		return fmt.Errorf("the audit log ends with %v, %v, want %v", head, err, srv.AuditHead())
	}
	if current, err := os.ReadFile(srv.AuditPath()); err != nil || !bytes.HasSuffix(file, current) {
		return fmt.Errorf("the current file of the audit log is not its end: %w", err)
	}
	if head, err := srv.VerifyAudit(context.Background()); err != nil || head != srv.AuditHead() {
		return fmt.Errorf("VerifyAudit: %v, %w", head, err)
	}
	if err := srv.AuditProblem(); err != nil {
		return err
	}
	if hash := []byte(`"hash":"` + acknowledged.Hash + `"`); acknowledged.Seq > 0 && !bytes.Contains(file, hash) {
		return fmt.Errorf("audit entry %d, which was acknowledged, is missing", acknowledged.Seq)
	}
	return nil
}
