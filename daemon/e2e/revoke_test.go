package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// run is a sleep command in a sandbox that ends only when it is canceled.
type run struct {
	mark     string // the argument of sleep, which identifies the run in the sandbox's process list
	response chan response
}

// startRun calls the command with an API key and does not wait until it runs.
func (s *server) startRun(t *testing.T, key, sandbox, mark string) *run {
	t.Helper()
	r := &run{mark: mark, response: make(chan response, 1)}
	go func() {
		a, err := s.call(key, "sandbox.command.run", params{"sandbox": sandbox, "command": "sleep", "args": []string{mark}})
		if err != nil {
			t.Errorf("sleep %s: %v", mark, err)
		}
		r.response <- a
	}()
	return r
}

// wantRefused waits for the response of the run and checks that it is the one for a refused API key.
func (r *run) wantRefused(t *testing.T) {
	t.Helper()
	var a response
	until(t, "the response of sleep "+r.mark, func() bool {
		select {
		case a = <-r.response:
			return true
		default:
			return false
		}
	})
	if a.Status != 401 || a.Error == nil || a.Error.Code != -32002 {
		t.Errorf("sleep %s: got %v, want HTTP 401, error -32002", r.mark, a)
	}
}

// wantRunning checks that the run has no response yet.
func (r *run) wantRunning(t *testing.T) {
	t.Helper()
	select {
	case a := <-r.response:
		t.Errorf("sleep %s has ended, want it to keep running: %v", r.mark, a)
	default:
	}
}

// TestInvalidatedKeysCancelRuns tests that the runs of a key are canceled when the key is revoked, is rotated without
// a grace period, expires or is reset, and that the runs of other keys are not.
func TestInvalidatedKeysCancelRuns(t *testing.T) {
	parallel(t)
	s, key := pythonServer(t)
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
	observer := key
	// runs reports whether the command of a run is in the sandbox's process list.
	runs := func(r *run) bool {
		t.Helper()
		got := s.command(t, observer, "box", "sh", "-c", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '").text("stdout")
		return strings.Contains(got, "sleep "+r.mark+" ")
	}
	start := func(key, mark string) *run {
		t.Helper()
		r := s.startRun(t, key, "box", mark)
		until(t, "sleep "+mark, func() bool { return runs(r) })
		return r
	}
	wantCanceled := func(r *run) {
		t.Helper()
		r.wantRefused(t)
		until(t, "the end of sleep "+r.mark, func() bool { return !runs(r) })
	}

	bystander := start(s.newKey(t, "--name", "bystander"), "9000")
	for i, end := range []struct {
		name    string
		flags   []string
		command []string
	}{
		{name: "revoked", command: []string{"server", "key", "revoke", "--yes", "revoked"}},
		{name: "rotated", command: []string{"server", "key", "rotate", "rotated"}},
		{name: "expired", flags: []string{"--expire", (patience * 8 * time.Second).String()}}, // needs no command
	} {
		key := s.newKey(t, append(end.flags, "--name", end.name)...)
		r := start(key, fmt.Sprint(9001+i))
		if end.command != nil {
			s.mustMSB(t, end.command...)
			if ok, err := s.accepts(key); ok || err != nil {
				t.Errorf("%s key: accepted: %t, error %v, want it refused", end.name, ok, err)
			}
		}
		wantCanceled(r)
		bystander.wantRunning(t)
	}
	if !runs(bystander) {
		t.Error("the run of another key was canceled")
	}

	// During the grace period of a rotated key, its runs continue.
	old := s.newKey(t, "--name", "graceful")
	r := start(old, "9010")
	successor := strings.TrimSpace(s.mustMSB(t, "server", "key", "rotate", "--grace", "1h", "graceful"))
	for _, key := range []string{old, successor} {
		if ok, err := s.accepts(key); !ok || err != nil {
			t.Errorf("key in the grace period: accepted: %t, error %v", ok, err)
		}
	}
	r.wantRunning(t)

	// Code of a revoked key is interrupted. The session stays available to other keys.
	coder := s.newKey(t, "--name", "coder")
	s.python(t, coder, "box", "x = 41")
	code := make(chan response, 1)
	go func() {
		a, _ := s.call(coder, "sandbox.repl.run", params{"sandbox": "box", "language": "python", "code": "open('/tmp/begun', 'w')\nwhile True: pass"})
		code <- a
	}()
	until(t, "the code", func() bool { return s.command(t, observer, "box", "test", "-e", "/tmp/begun").Success })
	s.mustMSB(t, "server", "key", "revoke", "--yes", "coder")
	if a := <-code; a.Status != 401 {
		t.Errorf("code of a revoked key: got %v, want HTTP 401", a)
	}
	s.wantStateKept(t, observer, "box", "after code of a revoked key")

	// A reset cancels all runs.
	s.mustMSB(t, "server", "reset", "--yes")
	observer = s.newKey(t)
	wantCanceled(bystander)
	wantCanceled(r)
}
