package e2e

import (
	"syscall"
	"testing"
)

// A server that is told to end lets runs come to their end for a while, cuts off the others, and answers all.
func TestShutdownAnswersRequestsInProgress(t *testing.T) {
	s, key := statefulSandbox(t)
	// begin makes a call and returns when it has made its file in the sandbox.
	begin := func(file, method string, p params) <-chan response {
		t.Helper()
		answers := make(chan response, 1)
		go func() {
			a, err := s.call(key, method, p)
			if err != nil {
				t.Errorf("%s: %v", file, err)
			}
			answers <- a
		}()
		until(t, file, func() bool { return s.command(t, key, "box", "test", "-e", file).Success })
		return answers
	}
	shell := func(script string) params {
		return params{"sandbox": "box", "command": "sh", "args": []string{"-c", script}}
	}
	command := begin("/tmp/command", "sandbox.command.run", shell("touch /tmp/command; exec sleep 9999"))
	code := begin("/tmp/code", "sandbox.repl.run", params{"sandbox": "box", "language": "python", "code": "open('/tmp/code', 'w')\nwhile True: pass"})
	brief := begin("/tmp/brief", "sandbox.command.run", shell("touch /tmp/brief; sleep 4; echo done"))
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if a := <-brief; a.Error != nil || a.Status != 200 {
		t.Errorf("a run that ends soon: %v", a)
	}
	for what, answers := range map[string]<-chan response{"command": command, "code": code} {
		if a := <-answers; a.Error == nil || a.Status != 503 {
			t.Errorf("%s that goes on: %v", what, a)
		}
	}
	<-s.done
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	// What was cut off has ended in the sandbox, too, and the session is kept.
	if got := s.command(t, key, "box", "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c '[s]leep 9999'").text("stdout"); got != "0\n" {
		t.Errorf("%s commands are left", got)
	}
	s.wantStateKept(t, key, "box", "after a stop amid code")
}
