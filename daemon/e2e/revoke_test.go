package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// run is a command that goes on for as long as it may, called over HTTP with a key.
type run struct {
	mark   string // tells it from others in the sandbox's process list
	answer chan response
}

// startRun returns once the command is there.
func (s *server) startRun(t *testing.T, key, sandbox, mark string) *run {
	t.Helper()
	r := &run{mark: mark, answer: make(chan response, 1)}
	go func() {
		a, err := s.call(key, "sandbox.command.run", params{"sandbox": sandbox, "command": "sleep", "args": []string{mark}})
		if err != nil {
			t.Errorf("sleep %s: %v", mark, err)
		}
		r.answer <- a
	}()
	return r
}

// cut proves that the run's key was refused amid it.
func (r *run) wantRefused(t *testing.T) {
	t.Helper()
	var a response
	until(t, "the answer to sleep "+r.mark, func() bool {
		select {
		case a = <-r.answer:
			return true
		default:
			return false
		}
	})
	if a.Status != 401 || a.Error == nil || a.Error.Code != -32002 {
		t.Errorf("sleep %s: %v, want HTTP 401", r.mark, a)
	}
}

// goesOn proves that the run has no answer yet.
func (r *run) wantRunning(t *testing.T) {
	t.Helper()
	select {
	case a := <-r.answer:
		t.Errorf("sleep %s has ended: %v", r.mark, a)
	default:
	}
}

func TestInvalidatedKeysCancelRuns(t *testing.T) {
	parallel(t)
	s := testServer(t)
	if err := s.importImages("python"); err != nil {
		t.Fatal(err)
	}
	key := s.newKey(t)
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
	observer := key
	// runs says whether a command runs in the sandbox.
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
	ended := func(r *run) {
		t.Helper()
		r.wantRefused(t)
		until(t, "the end of sleep "+r.mark, func() bool { return !runs(r) })
	}

	bystander := start(s.newKey(t, "--name", "bystander"), "9000")
	for i, refuse := range []struct {
		name    string
		flags   []string
		command []string
	}{
		{name: "revoked", command: []string{"server", "key", "revoke", "revoked"}},
		{name: "rotated", command: []string{"server", "key", "rotate", "rotated"}},
		{name: "expired", flags: []string{"--expire", (patience * 8 * time.Second).String()}}, // by itself
	} {
		key := s.newKey(t, append(refuse.flags, "--name", refuse.name)...)
		r := start(key, fmt.Sprint(9001+i))
		if refuse.command != nil {
			s.mustMSB(t, refuse.command...)
			if ok, err := s.accepts(key); ok || err != nil {
				t.Errorf("%s: accepted: %t, %v", refuse.name, ok, err)
			}
		}
		ended(r)
		bystander.wantRunning(t)
	}
	if !runs(bystander) {
		t.Error("another key's run has ended, too")
	}

	// A grace period is one for runs, too.
	old := s.newKey(t, "--name", "graceful")
	r := start(old, "9010")
	made := strings.TrimSpace(s.mustMSB(t, "server", "key", "rotate", "--grace", "1h", "graceful"))
	for _, key := range []string{old, made} {
		if ok, err := s.accepts(key); !ok || err != nil {
			t.Errorf("in the grace period: accepted: %t, %v", ok, err)
		}
	}
	r.wantRunning(t)

	// Code is interrupted, and its session stays for others.
	coder := s.newKey(t, "--name", "coder")
	s.python(t, coder, "box", "x = 41")
	code := make(chan response, 1)
	go func() {
		a, _ := s.call(coder, "sandbox.repl.run", params{"sandbox": "box", "language": "python", "code": "open('/tmp/begun', 'w')\nwhile True: pass"})
		code <- a
	}()
	until(t, "the code", func() bool { return s.command(t, observer, "box", "test", "-e", "/tmp/begun").Success })
	s.mustMSB(t, "server", "key", "revoke", "coder")
	if a := <-code; a.Status != 401 {
		t.Errorf("code of a revoked key: %v", a)
	}
	s.wantStateKept(t, observer, "box", "after code of a revoked key")

	// Nobody's goes on after a reset.
	s.mustMSB(t, "server", "reset", "--yes")
	observer = s.newKey(t)
	ended(bystander)
	ended(r)
}
