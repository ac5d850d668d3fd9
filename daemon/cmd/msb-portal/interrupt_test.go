package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// A run that is interrupted handles that as in a terminal, and the context keeps its state. What the code starts to clean up is not
// interrupted. FIFO stands for the path of a fifo that the code opens when it is to be interrupted.
func TestInterrupt(t *testing.T) {
	t.Parallel()
	const (
		python          = "import asyncio, os, subprocess, time\ndef begin(): open('FIFO', 'w').close()\n"
		interrupted     = "stderr: KeyboardInterrupt\n"
		nodeInterrupted = "stderr: Uncaught Error: Script execution was interrupted by `SIGINT`\n"
	)
	for i, tt := range []struct {
		language sandbox.Language
		set, get string // statements that define a variable, and show its value, which is 1
		code     string
		exit     int
		want     string // the end of what was printed
	}{
		{sandbox.Python, "kept = 1", "kept", python + "begin()\ntime.sleep(60)", 1, interrupted},
		{sandbox.Python, "kept = 1", "kept", python + "begin()\nwhile True: pass", 1, interrupted},
		{sandbox.Python, "kept = 1", "kept", python + "try:\n begin()\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('stop', subprocess.run(['sleep', '1.5']).returncode)", 0, "stdout: stop 0\n"},
		{sandbox.Python, "kept = 1", "kept", python + "try:\n begin()\n await asyncio.sleep(60)\nexcept BaseException: print('stop')", 0, "stdout: stop\n"},
		{sandbox.Python, "kept = 1", "kept", python + "os.system('echo >FIFO; exec sleep 60')", 0, "stdout: 2\n"},
		{sandbox.Python, "kept = 1", "kept", python + "subprocess.run(['sh', '-c', 'echo >FIFO; sleep 60'])", 1, interrupted},
		{sandbox.Node, "var kept = 1", "kept", "fs.writeFileSync('FIFO', ''); for (;;);", 1, nodeInterrupted},
		{sandbox.Node, "var kept = 1", "kept", "setTimeout(() => fs.writeFileSync('FIFO', ''), 10); await new Promise(() => {})", 1, nodeInterrupted},
		{sandbox.Node, "var kept = 1", "kept", "require('child_process').execSync('echo >FIFO; exec sleep 60')", 1, nodeInterrupted},
		{sandbox.Node, "var kept = 1", "kept", "await new Promise((r) => { process.once('SIGINT', r); setTimeout(() => fs.writeFileSync('FIFO', ''), 10) }); 'stop'", 0, "stdout: 'stop'\n"},
		{sandbox.Bash, "kept=1", "echo $kept", "sh -c 'echo >FIFO; exec sleep 60'; echo no", 130, ""},
		{sandbox.Bash, "kept=1", "echo $kept", "echo >FIFO; while :; do :; done", 130, ""},
		{sandbox.Bash, "kept=1", "echo $kept", "trap 'sleep 1.5; echo stop; trap - INT' INT; sh -c 'echo >FIFO; exec sleep 60'; echo after", 0, "stdout: stop\nstdout: after\n"},
	} {
		t.Run(fmt.Sprint(tt.language, i), func(t *testing.T) {
			t.Parallel()
			c := startGuest(t).connect(t)
			runCode(t, c, tt.language, tt.set)
			path := fifo(t)
			interrupt := make(chan struct{})
			go func() {
				wait(t, path)
				interrupt <- struct{}{}
			}()
			code := sandbox.Code{Language: tt.language, Text: strings.ReplaceAll(tt.code, "FIFO", path), Interrupts: interrupt}
			out, exit, err := collect(c.RunCode(t.Context(), code))
			if err != nil || exit != tt.exit || !strings.HasSuffix(text(out), tt.want) {
				t.Errorf("exit code %d, want %d, error %v; output\n%s", exit, tt.exit, err, text(out))
			}
			expect(t, c, tt.language, tt.get, true, "stdout: 1\n")
		})
	}
}

// An interrupt hits the programs that the run has started, but not those of earlier runs. A run can be interrupted more than once.
func TestInterruptAndPrograms(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	server, program, begun, again := fifo(t), fifo(t), fifo(t), fifo(t)
	runCode(t, c, sandbox.Python, fmt.Sprintf("import subprocess, time\nserver = subprocess.Popen(['cat', %q])\ntime.sleep(.1)", server))
	interrupts := make(chan struct{})
	go func() {
		for _, path := range []string{begun, again} {
			wait(t, path)
			interrupts <- struct{}{}
		}
	}()
	out, exit, err := collect(c.RunCode(t.Context(), sandbox.Code{Language: sandbox.Python, Interrupts: interrupts, Text: fmt.Sprintf(`
try: subprocess.run(['sh', '-c', 'sh -c "echo >%s; exec cat %s"; true'])
except KeyboardInterrupt: print('first')
try:
    open(%q, 'w').close()
    time.sleep(60)
except KeyboardInterrupt: print('second')
server.poll()`, begun, program, again)}))
	if err != nil || exit != 0 || text(out) != "stdout: first\nstdout: second\n" {
		t.Errorf("exit code %d, error %v; output\n%s", exit, err, text(out))
	}
	for path, want := range map[string]bool{server: true, program: false} {
		if got := runs(t, path); got != want {
			t.Errorf("the program that reads %s runs: %t, want %t", path, got, want)
		}
	}
}

// runs reports whether a program has an argument.
func runs(t *testing.T, argument string) bool {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if line, err := os.ReadFile(file); err == nil && slices.Contains(strings.Split(string(line), "\x00"), argument) {
			return true
		}
	}
	return false
}

// A run that is interrupted while it waits for its turn is interrupted when it begins. The run in progress goes on.
func TestInterruptBeforeTheRunBegins(t *testing.T) {
	t.Parallel()
	for language, code := range map[portalv1.RunCodeRequest_Language][2]string{
		python: {"print(open('FIFO').read())", "while True: pass"},
		node:   {"console.log(fs.readFileSync('FIFO', 'utf8'))", "await new Promise(() => {})"},
		bash:   {"cat FIFO", "while :; do sleep 60; done"},
	} {
		t.Run(language.String(), func(t *testing.T) {
			t.Parallel()
			c := startGuest(t).dial(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			c.code(t, &portalv1.RunCodeRequest{Language: language, Code: ""}) // starts the interpreter
			path := fifo(t)
			firstEnded := make(chan string, 1)
			go func() {
				_, printed, err := c.code(t, &portalv1.RunCodeRequest{Language: language, Code: strings.ReplaceAll(code[0], "FIFO", path)})
				firstEnded <- fmt.Sprint(printed, err)
			}()
			release, err := os.OpenFile(path, os.O_WRONLY, 0) // waits until the first run reads from it
			if err != nil {
				t.Fatal(err)
			}
			second, err := c.portal.RunCode(ctx, &portalv1.RunCodeRequest{Language: language, Code: code[1], Id: "second"})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := second.Header(); err != nil {
				t.Fatal(err)
			}
			for range 2 { // they count as one, because the run has not begun
				if _, err := c.portal.InterruptRun(ctx, &portalv1.InterruptRunRequest{Id: "second"}); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := release.WriteString("released\n"); err != nil {
				t.Fatal(err)
			}
			release.Close()
			if got := <-firstEnded; !strings.HasPrefix(got, "released\n") || !strings.HasSuffix(got, "<nil>") {
				t.Errorf("the first run: %q", got)
			}
			for {
				response, err := second.Recv()
				if err != nil {
					t.Fatalf("the run that was interrupted: %v", err)
				}
				if result := response.GetResult(); result != nil {
					if result.GetSuccess() || result.GetStateLost() {
						t.Errorf("the run that was interrupted: %v", result)
					}
					break
				}
			}
			if _, err := c.portal.InterruptRun(ctx, &portalv1.InterruptRunRequest{Id: "second"}); status.Code(err) != codes.NotFound {
				t.Errorf("interrupt of a run that has ended: %v, want NOT_FOUND", err)
			}
		})
	}
}

// What an interrupted print has written arrives once. The interrupt comes when the bytes are written, but not yet returned to
// Python's buffer.
func TestInterruptAfterAWrite(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	const code = `
import sys
def trace(frame, event, arg):
    if frame.f_code.co_name == "write" and frame.f_locals.get("n"):
        sys.settrace(None)
        raise KeyboardInterrupt
    return trace
try:
    sys.settrace(trace)
    print("once")
except KeyboardInterrupt:
    print("interrupted")
`
	expect(t, c, sandbox.Python, code, true, "stdout: once\nstdout: interrupted\n")
}
