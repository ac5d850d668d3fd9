package main

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

var warmLanguages = []sandbox.Language{sandbox.Python, sandbox.Node}

// The first run of a sandbox uses the interpreter that was warmed, and sees nothing of that: no context, no process, no output, no
// variable, and the first number of a run.
func TestWarmInterpreterIsAsNew(t *testing.T) {
	t.Parallel()
	fresh, c := startGuest(t).connect(t), startGuest(t).connect(t)
	for range 2 { // the second call finds them warm
		wantWarm(t, c, warmLanguages, warmLanguages)
		rehearse(t, c, warmLanguages...)
	}
	warmed := children(t, c)
	if len(warmed) != 2 {
		t.Fatalf("the portal has the child processes %v, want an interpreter of each language", warmed)
	}
	if all, err := c.ListContexts(t.Context()); err != nil || len(all) > 0 {
		t.Errorf("contexts: %+v, error %v", all, err)
	}
	if n := processes(t, c); n != 0 {
		t.Errorf("%d processes are listed", n)
	}
	for language, code := range map[sandbox.Language][]string{
		sandbox.Python: {
			"import builtins, sys, os; print(sorted(globals()), sorted(vars(builtins)), sys.argv, sorted(sys.modules), os.environ.get('HOME'))",
			"1/0", // whose traceback has the number of the run
			"import inspect; [k for k in sys.modules['linecache'].cache if 'python-input' in k]",
		},
		sandbox.Node: {
			"Object.getOwnPropertyNames(globalThis).sort().filter(n => n !== '__msb_call').join()",
			"process.listeners('SIGINT').length + process.listeners('exit').length",
			"throw new Error('x')",
		},
	} {
		for i, text := range code {
			run := sandbox.Code{Language: language, Text: text, Timeout: time.Minute}
			want, wantExit := outcome(t, fresh, run)
			if got, exit := outcome(t, c, run); exit != wantExit || exit.Runs != uint32(i+1) || got != want {
				t.Errorf("%s, run %d: exit %+v, output\n%s\nin a new interpreter: exit %+v, output\n%s", language, i+1, exit, got, wantExit, want)
			}
		}
	}
	if now := children(t, c); !slices.Equal(now, warmed) {
		t.Errorf("child processes %v, want only those that were warmed: %v", now, warmed)
	}
	if all, err := c.ListContexts(t.Context()); err != nil || len(all) != 2 {
		t.Errorf("contexts: %+v, error %v", all, err)
	}
	if n := processes(t, c); n != 2 {
		t.Errorf("%d processes are listed, want the two interpreters", n)
	}
}

// A run with an environment, a workdir or a user never runs in a warmed interpreter, because that has those of the image.
func TestWarmInterpreterIsNotUsedWithAnotherEnvironment(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := dir + ":" + os.Getenv("PATH")
	if os.Geteuid() != 0 {
		t.Skip("a user is only chosen by root")
	}
	for name, tt := range map[string]struct {
		code sandbox.Code
		text string
		want string
	}{
		"env":     {sandbox.Code{Environment: sandbox.Environment{Env: []string{"ADDED=yes"}}}, "os.environ['ADDED']", "'yes'"},
		"workdir": {sandbox.Code{Environment: sandbox.Environment{Workdir: dir}}, "os.getcwd()", "'" + dir + "'"},
		"user":    {sandbox.Code{RunOptions: sandbox.RunOptions{User: "root"}}, "os.environ['LOGNAME'], os.getuid()", "('root', 0)"},
		"TZ":      {sandbox.Code{Environment: sandbox.Environment{Env: []string{"TZ=Asia/Tokyo"}}}, "import time; time.strftime('%z')", "'+0900'"},
		"PATH":    {sandbox.Code{Environment: sandbox.Environment{Env: []string{"PATH=" + path}}}, fmt.Sprintf("%q in os.environ['PATH']", dir), "True"},
		"python":  {sandbox.Code{Environment: sandbox.Environment{Env: []string{"PYTHONOPTIMIZE=2"}}}, "import sys; sys.flags.optimize", "2"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := startGuest(t).connect(t)
			wantWarm(t, c, warmLanguages, warmLanguages)
			warmed := children(t, c)
			tt.code.Language, tt.code.Text, tt.code.Timeout = sandbox.Python, "import os\n"+tt.text, time.Minute
			out, exit, err := collect(c.RunCode(t.Context(), tt.code))
			if got := text(out); err != nil || exit != 0 || got != "stdout: "+tt.want+"\n" {
				t.Errorf("output %q, exit %d, error %v, want %s", got, exit, err, tt.want)
			}
			if all, err := c.ListContexts(t.Context()); err != nil || len(all) != 1 || all[0].Runs != 1 || slices.Contains(warmed, int(all[0].PID)) {
				t.Errorf("contexts %+v, error %v; the warmed interpreters are %v", all, err, warmed)
			}
		})
	}
}

// Warm ends the interpreters of other languages, ignores those that the image does not have, and replaces one that has ended.
func TestWarmLanguages(t *testing.T) {
	t.Parallel()
	empty := t.TempDir()
	for _, program := range []string{"true", "sh"} {
		if err := os.Symlink("/bin/"+program, filepath.Join(empty, program)); err != nil {
			t.Fatal(err)
		}
	}
	bare := startGuest(t, "PATH="+empty).connect(t)
	wantWarm(t, bare, warmLanguages, nil)
	if got := children(t, bare); len(got) != 0 {
		t.Errorf("child processes %v", got)
	}

	c := startGuest(t).connect(t)
	wantWarm(t, c, warmLanguages[:1], warmLanguages[:1])
	first := children(t, c)
	if len(first) != 1 {
		t.Fatalf("child processes %v, want one", first)
	}
	kill, err := os.FindProcess(first[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := kill.Kill(); err != nil {
		t.Fatal(err)
	}
	waitGone(t, first[0])
	expect(t, c, sandbox.Python, "1 + 1", true, "stdout: 2\n") // not in the one that was killed
	wantWarm(t, c, warmLanguages, warmLanguages)
	wantWarm(t, c, nil, nil)
	all, err := c.ListContexts(t.Context())
	if err != nil || len(all) != 1 {
		t.Fatalf("contexts %+v, error %v", all, err)
	}
	for _, pid := range children(t, c) {
		if pid != int(all[0].PID) {
			waitGone(t, pid)
		}
	}
}

// A rehearsal runs only in an interpreter that was warmed and that no run has used.
func TestRehearsalNeedsWarmInterpreter(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	for _, warmed := range []bool{false, true} {
		if warmed {
			wantWarm(t, c, warmLanguages[:1], warmLanguages[:1])
			rehearse(t, c, sandbox.Python)
			expect(t, c, sandbox.Python, "1 + 1", true, "stdout: 2\n")
		}
		p, err := c.RunCode(t.Context(), sandbox.Code{Language: sandbox.Python, Text: "x = 1", Rehearsal: true})
		if err == nil {
			_, err = p.Next()
			p.Close()
		}
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("a rehearsal, with an interpreter that was warmed and used: %t: %v", warmed, err)
		}
	}
	expect(t, c, sandbox.Python, "'x' in globals()", true, "stdout: False\n")
}

// wantWarm warms interpreters and checks which the portal has then.
func wantWarm(t *testing.T, c *connection, wanted, want []sandbox.Language) {
	t.Helper()
	if got, err := c.Warm(t.Context(), wanted); err != nil || !slices.Equal(got, want) {
		t.Fatalf("warm %v: %v, error %v, want %v", wanted, got, err, want)
	}
}

// rehearse runs code with a value in the interpreters that were warmed.
func rehearse(t *testing.T, c *connection, languages ...sandbox.Language) {
	t.Helper()
	for _, language := range languages {
		got, exit := outcome(t, c, sandbox.Code{Language: language, Text: "1 + 1", Rehearsal: true})
		if got != "stdout: 2\n" || exit.Code != 0 || exit.Runs != 0 {
			t.Fatalf("a rehearsal of %s: output %q, exit %+v", language, got, exit)
		}
	}
}

// outcome runs code and returns what it printed and how it ended.
func outcome(t *testing.T, c *connection, code sandbox.Code) (string, sandbox.Exit) {
	t.Helper()
	p, err := c.RunCode(t.Context(), code)
	if err != nil {
		t.Fatal(err)
	}
	out, exit, _, err := collectReports(p)
	if err != nil {
		t.Fatal(err)
	}
	return text(out), exit
}

// waitGone returns once a process has ended.
func waitGone(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 60_000); n != 1 || err != nil {
		t.Fatalf("process %d has not ended: %v", pid, err)
	}
}

// children returns the child processes of the portal, except for the program that finds the portal.
func children(t *testing.T, c *connection) []int {
	t.Helper()
	result, err := c.runCommand(t.Context(), sandbox.Command{Program: "sh", Args: []string{"-c", "echo $$ $PPID"}})
	if err != nil {
		t.Fatal(err)
	}
	var self, portal int
	if _, err := fmt.Sscanf(text(result.Output), "stdout: %d %d", &self, &portal); err != nil {
		t.Fatal(err)
	}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	found := map[int]bool{}
	for _, name := range stats {
		stat, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if ppid, _ := strconv.Atoi(fields[1]); ppid == portal && pid != self && fields[0] != "Z" {
			found[pid] = true
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// processes returns how many processes the portal lists.
func processes(t *testing.T, c *connection) (n int) {
	t.Helper()
	if err := c.ListProcesses(t.Context(), func(sandbox.ProcessInfo) error { n++; return nil }); err != nil {
		t.Fatal(err)
	}
	return n
}
