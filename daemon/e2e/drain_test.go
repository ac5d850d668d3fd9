package e2e

import (
	"syscall"
	"testing"
)

// TestShutdownAnswersRequestsInProgress tests that on SIGTERM the server waits a while for runs to end, cancels the
// others, and responds to all of them.
func TestShutdownAnswersRequestsInProgress(t *testing.T) {
	s, key := statefulSandbox(t)
	// start starts a run and returns when the run has created file in the sandbox.
	start := func(file, method string, p params) <-chan response {
		t.Helper()
		responses := make(chan response, 1)
		go func() {
			a, err := s.call(key, method, p)
			if err != nil {
				t.Errorf("%s: %v", file, err)
			}
			responses <- a
		}()
		until(t, file, func() bool { return s.command(t, key, "box", "test", "-e", file).Success })
		return responses
	}
	shell := func(script string) params {
		return params{"sandbox": "box", "command": "sh", "args": []string{"-c", script}}
	}
	command := start("/tmp/command", "sandbox.command.run", shell("touch /tmp/command; exec sleep 8888"))
	code := start("/tmp/code", "sandbox.repl.run", params{"sandbox": "box", "language": "python", "code": "open('/tmp/code', 'w')\nwhile True: pass"})
	short := start("/tmp/short", "sandbox.command.run", shell("touch /tmp/short; sleep 4; echo done"))
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if a := <-short; a.Error != nil || a.Status != 200 {
		t.Errorf("run that ends soon after SIGTERM: %v, want success", a)
	}
	for name, responses := range map[string]<-chan response{"command": command, "code": code} {
		if a := <-responses; a.Error == nil || a.Status != 502 {
			t.Errorf("%s that does not end: got %v, want an error and HTTP 502", name, a)
		}
	}
	<-s.done
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	// The canceled command has also ended inside the sandbox, and the Python session is kept.
	if got := s.command(t, key, "box", "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c '[s]leep 8888'").text("stdout"); got != "0\n" {
		t.Errorf("the canceled command still runs in the sandbox: grep -c prints %q, want 0", got)
	}
	s.wantStateKept(t, key, "box", "after a shutdown while code ran")
}
