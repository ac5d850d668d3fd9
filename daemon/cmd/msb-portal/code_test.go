package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// runCode runs code that ends by itself and fails the test on an error of the portal.
func runCode(t testing.TB, c *connection, language sandbox.Language, code string) codeResult {
	t.Helper()
	r, err := c.runCode(t.Context(), sandbox.Code{Language: language, Text: code, Timeout: time.Minute})
	if err != nil {
		t.Fatalf("run %q: %v", code, err)
	}
	return r
}

// expect runs code and compares its success and output. If want ends with "…", it is only a prefix of the output.
func expect(t testing.TB, c *connection, language sandbox.Language, code string, success bool, want string) {
	t.Helper()
	r := runCode(t, c, language, code)
	got := text(r.Output)
	if start, open := strings.CutSuffix(want, "…"); open && strings.HasPrefix(got, start) {
		got = want
	}
	if r.Success != success || got != want {
		t.Errorf("run %q: success %t, output\n%swant %t,\n%s", code, r.Success, got, success, want)
	}
}

func TestPython(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	for _, tt := range []struct {
		code    string
		success bool
		want    string
	}{
		{"2+2", true, "stdout: 4\n"},
		{"", true, ""},
		{"x = 20", true, ""},
		{"print('a')\nx + 1\nx + 2", true, "stdout: a\nstdout: 22\n"},
		{"None", true, ""},
		{"_ + 1", true, "stdout: 23\n"},
		{"print('no newline', end='')", true, "stdout: no newline\n"},
		{"'ä€😀'", true, "stdout: 'ä€😀'\n"},
		{"import sys\nprint('a')\nprint('b', file=sys.stderr)\nprint('c')", true, "stdout: a\nstderr: b\nstdout: c\n"},
		{"import os\nprint('a')\nn = os.system('echo b')\nprint('c')", true, "stdout: a\nstdout: b\nstdout: c\n"},
		{"n = os.system('echo a; echo b >&2')", true, "stdout: a\nstderr: b\n"},
		{"n = os.system('echo a >&2; echo b')", true, "stderr: a\nstdout: b\n"},
		{
			"def f():\n    raise ValueError('no')\n\nf()", false,
			"stderr: Traceback (most recent call last):\n" +
				"stderr:   File \"<python-input-13>\", line 4, in <module>\n" +
				"stderr:     f()\n…",
		},
		{"import traceback\ntry:\n    f()\nexcept ValueError as e:\n    print(traceback.extract_tb(e.__traceback__)[-1].line)", true, "stdout: raise ValueError('no')\n"},
		{"x +", false, "stderr:   File \"<python-input-15>\", line 1\nstderr:     x +\n…"},
		{"x", true, "stdout: 20\n"},
		{"input()", false, "stderr: Traceback (most recent call last):\n…"},
		{"sys.exit()", true, ""},
		{"sys.exit(3)", false, ""},
		{"sys.exit('enough')", false, "stderr: enough\n"},
		{"class P:\n    a = 1\nimport pickle\npickle.loads(pickle.dumps(P())).a", true, "stdout: 1\n"},
		{"__name__", true, "stdout: '__main__'\n"},
		{"sorted(n for n in globals() if n.startswith('S'))", true, "stdout: []\n"},
		{"import asyncio\nasync def g():\n    await asyncio.sleep(0.01)\n    return 7\nawait g()", true, "stdout: 7\n"},
		{"y = await g()\nasyncio.run(g()) + y", true, "stdout: 14\n"},
		{"async def h(): 1/0\nawait h()", false, "stderr: Traceback (most recent call last):\nstderr:   File \"<python-input-26>\"…"},
		{"pid = os.fork()\nif pid: n = os.waitpid(pid, 0)\nelse: print('child')", true, "stdout: child\n"},
		{"import multiprocessing\np = multiprocessing.get_context('fork').Process(target=print, args=('other',))\np.start()\np.join()\np.exitcode", true, "stdout: other\nstdout: 0\n"},
		{"import subprocess\nsubprocess.run(['ls', '/proc/self/fd'], capture_output=True, text=True).stdout.split()", true, "stdout: ['0', '1', '2', '3']\n"},
		{"len(open('/proc/self/cmdline').read()) < 200", true, "stdout: True\n"}, // ps stays readable
		{"sys.stdout.close()", true, ""},
	} {
		expect(t, c, sandbox.Python, tt.code, tt.success, tt.want)
	}
}

func TestNode(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	for _, tt := range []struct {
		code    string
		success bool
		want    string
	}{
		{"2+2", true, "stdout: 4\n"},
		{"", true, ""},
		{"const x = 20; let y = 1; function f() { return null.a }", true, ""},
		{"y += x\ny", true, "stdout: 21\n"},
		{"const x = 20", true, ""},
		{"undefined", true, ""},
		{"{ a: 1 }", true, "stdout: { a: 1 }\n"},
		{"{ let b = 2; b }", true, "stdout: 2\n"},
		{"console.log('a'); console.error('b'); console.log('c')", true, "stdout: a\nstderr: b\nstdout: c\n"},
		{"process.stdout.write('ä€😀'); process.stdout.end()", true, "stdout: ä€😀Stream…"},
		{"f()", false, "stderr: Uncaught TypeError: Cannot read properties of null (reading 'a')\nstderr:     at f (REPL3:1:53)\nstderr:     at REPL11:1:1\n"},
		{"1 +", false, "stderr: REPL12:1\nstderr: 1 +\n…"},
		{"throw 5", false, "stderr: Uncaught 5\n"},
		{"const z = await new Promise((done) => setTimeout(done, 5, 'later')); z", true, "stdout: 'later'\n"},
		{"z + x", true, "stdout: 'later20'\n"},
		{"await Promise.reject(new Error('no'))", false, "stderr: Uncaught Error: no\nstderr:     at REPL16:1:…"},
		{"async function main() { await null; console.log('main'); return 3 }\nmain()", true, "stdout: main\nstdout: 3\n"},
		{"Promise.reject(new Error('unheard')); 1", false, "stdout: 1\nstderr: Uncaught Error: unheard\n…"},
		{"setTimeout(() => { throw new Error('async') }, 1); new Promise(() => {})", false, "stderr: Uncaught Error: async\n…"},
		{"require('node:path').join('a', 'b') + typeof fs.readFileSync", true, "stdout: 'a/bfunction'\n"},
		{"(await import('node:os')).EOL", true, "stdout: '\\n'\n"},
		{"import('node:os').then((os) => os.EOL)", true, "stdout: '\\n'\n"},
		{"process.exit()", true, ""},
		{"console.log('bye'); process.exit(3); console.log('not this')", false, "stdout: bye\n"},
		{"n = require('child_process').execSync('echo a >&2; cd /proc/$$/fd; echo *', { stdio: ['ignore', 'pipe', 'inherit'] }); String(n)", true, "stderr: a\nstdout: '0 1 2 3\\n'\n"},
		{"fs.readFileSync('/proc/self/cmdline').length < 200", true, "stdout: true\n"}, // ps stays readable
		{"x", true, "stdout: 20\n"},
	} {
		expect(t, c, sandbox.Node, tt.code, tt.success, tt.want)
	}
}

// TestTimeoutKeepsState checks that a session keeps its state when a run is interrupted.
func TestTimeoutKeepsState(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	for _, tt := range []struct {
		language       sandbox.Language
		set, code, get string
	}{
		{sandbox.Python, "x = 1", "while True: pass", "x"},
		{sandbox.Python, "import time\nx = 2", "time.sleep(60)", "x"},
		{sandbox.Python, "import asyncio\nx = 3", "await asyncio.sleep(60)", "x"},
		{sandbox.Python, "import os\nx = 4", "os.system('sleep 60')", "x"},
		{sandbox.Python, "x = 5", "import sys\nwhile True: print('x', end=''); print('y', end='', file=sys.stderr)", "x"},
		{sandbox.Node, "var x = 6", "for (;;);", "x"},
		{sandbox.Node, "x = 7", "await new Promise(() => {})", "x"},
		{sandbox.Node, "x = 8", "new Promise(() => {})", "x"},
		{sandbox.Node, "x = 9", "require('child_process').execSync('sleep 60')", "x"},
		{sandbox.Node, "x = 10", "for (;;) { console.log(1); console.error(2) }", "x"},
	} {
		runCode(t, c, tt.language, tt.set)
		r, err := c.runCode(t.Context(), sandbox.Code{Language: tt.language, Text: tt.code, Timeout: 300 * time.Millisecond})
		if !errors.Is(err, sandbox.ErrRunTimeout) {
			output := text(r.Output)
			t.Errorf("run %q: error %v, success %t, output that ends with\n%s\nwant sandbox.ErrRunTimeout",
				tt.code, err, r.Success, output[max(0, len(output)-300):])
		}
		expect(t, c, tt.language, tt.get, true, fmt.Sprintf("stdout: %s\n", tt.set[strings.LastIndex(tt.set, " ")+1:]))
	}
}

func TestRunThatCannotBeInterruptedLosesItsState(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	for language, code := range map[sandbox.Language]string{
		sandbox.Python: "import signal\nx = signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
		sandbox.Node:   "var x = 1; process.kill(process.pid, 'SIGSTOP')",
	} {
		_, err := c.runCode(t.Context(), sandbox.Code{Language: language, Text: code, Timeout: 3 * time.Second}) // long enough for the code to begin
		if !errors.Is(err, sandbox.ErrRunTimeout) || !strings.Contains(err.Error(), "its state is lost") {
			t.Errorf("run %q: %v, want sandbox.ErrRunTimeout and that the state is lost", code, err)
		}
		if r := runCode(t, c, language, "x"); r.Success || !strings.Contains(text(r.Output), "x") {
			t.Errorf("%s: x after its session was killed: success %t, output\n%s", language, r.Success, text(r.Output))
		}
	}
}

func TestCancelInterrupts(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	for language, code := range map[sandbox.Language]string{
		sandbox.Python: "x = 1\nopen(%q, 'w').close()\nwhile True: pass",
		sandbox.Node:   "var x = 1; fs.writeFileSync(%q, ''); for (;;);",
	} {
		runCode(t, c, language, "1")
		started := fifo(t)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			_, err := c.runCode(ctx, sandbox.Code{Language: language, Text: fmt.Sprintf(code, started)})
			ended <- err
		}()
		wait(t, started)
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("canceled %s run: %v, want context.Canceled", language, err)
		}
		expect(t, c, language, "x", true, "stdout: 1\n")
	}
}

// fifo creates a named pipe and returns its path.
func fifo(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// wait waits until a process has opened the fifo for writing and closed it, and returns what was written.
func wait(t testing.TB, fifo string) string {
	t.Helper()
	data, err := os.ReadFile(fifo)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestRunsOfOneLanguageAreSerialized(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	runCode(t, c, sandbox.Python, "import time\nn = 0")
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			r, err := c.runCode(t.Context(), sandbox.Code{Language: sandbox.Python, Text: "m = n\ntime.sleep(0.005)\nn = m + 1"})
			if err != nil || !r.Success {
				t.Errorf("run: %v\n%s", err, text(r.Output))
			}
		})
	}
	all.Wait()
	expect(t, c, sandbox.Python, "n", true, "stdout: 20\n")
}

func TestLanguagesDoNotWaitForEachOther(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	rendezvous := fifo(t)
	var all sync.WaitGroup
	all.Go(func() {
		expect(t, c, sandbox.Python, fmt.Sprintf("open(%q).read()", rendezvous), true, "stdout: 'from node'\n")
	})
	all.Go(func() {
		expect(t, c, sandbox.Node, fmt.Sprintf("fs.writeFileSync(%q, 'from node')", rendezvous), true, "")
	})
	all.Wait()
}

func TestDeadREPLIsReplaced(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	for _, tt := range []struct {
		language sandbox.Language
		code     string
		want     string
	}{
		{sandbox.Python, "import os\nx = 1\nprint('a', end='', file=__import__('sys').stderr, flush=True)\nos._exit(3)", "stderr: a\nstderr: the python process exited with status 3; its state is lost\n"},
		{sandbox.Python, "import os\nx = 1\nos.kill(os.getpid(), 9)", "stderr: the python process was killed by signal 9 (SIGKILL); its state is lost\n"},
		{sandbox.Python, "import os\nos.closerange(3, 1024)\nwhile True: pass", "stderr: the python process was killed, because the code has closed a descriptor of the REPL; its state is lost\n"},
		{sandbox.Python, "import os\nn = os.write(504, b'?')\nwhile True: pass", "stderr: the python process was killed, because the code has written to a descriptor of the REPL; its state is lost\n"},
		{sandbox.Node, "process.kill(process.pid, 'SIGKILL')", "stderr: the node process was killed by signal 9 (SIGKILL); its state is lost\n"},
	} {
		expect(t, c, tt.language, tt.code, false, tt.want)
		if r := runCode(t, c, tt.language, "x"); r.Success {
			t.Errorf("x still exists after %q", tt.code)
		}
	}

	// One that can take no more code, but has not exited yet, is replaced too.
	expect(t, c, sandbox.Python, "import atexit, os, time\natexit.register(time.sleep, 0.1)\nos.close(503)", true, "")
	expect(t, c, sandbox.Python, "1 + 1", true, "stderr: the python process exited with status 1 after the last run; its state is lost\nstdout: 2\n")

	// A process that exits in the background is reported, whether it exits during a run or between two runs.
	runCode(t, c, sandbox.Python, "import os, threading\nthreading.Timer(0.05, os._exit, [4]).start()")
	for {
		r := runCode(t, c, sandbox.Python, "1")
		if text(r.Output) == "stdout: 1\n" {
			continue
		}
		if want := "the python process exited with status 4"; !strings.Contains(text(r.Output), want) {
			t.Errorf("run after the process exited: output\n%swant one that contains %q", text(r.Output), want)
		}
		break
	}
}

// What is printed while no run is in progress goes to the log of the context, not into the output of the next run.
func TestOutputBetweenRuns(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	for language, tt := range map[sandbox.Language]struct{ late, child string }{
		sandbox.Python: {
			"import threading\ndef late():\n    open(%q).read()\n    print('late', flush=True)\n    open(%q, 'w').close()\nt = threading.Thread(target=late).start()",
			"import subprocess\np = subprocess.Popen(['sh', '-c', 'cat %s; echo child >&2; : > %s'])",
		},
		sandbox.Bash: {
			"{ read x <%s; echo late; : >%s; } &",
			"sh -c 'cat %s; echo child >&2; : > %s' &",
		},
		sandbox.Node: {
			"fs.readFile(%q, () => { console.log('late'); fs.writeFileSync(%q, '') })",
			"void require('child_process').spawn('sh', ['-c', 'cat %s; echo child >&2; : > %s'], { stdio: 'inherit' })",
		},
	} {
		for _, code := range []string{tt.late, tt.child} {
			ended, printed := fifo(t), fifo(t)
			expect(t, c, language, fmt.Sprintf(code, ended, printed), true, "")
			if err := os.WriteFile(ended, nil, 0); err != nil { // waits for the reader
				t.Fatal(err)
			}
			wait(t, printed)
			next := "1"
			if language == sandbox.Bash {
				next = "echo 1"
			}
			expect(t, c, language, next, true, "stdout: 1\n")
		}
		log, _, err := collect(c.AttachProcess(t.Context(), sandbox.ProcessID{Tag: "repl:" + contextName[language]}, sandbox.AttachOptions{Replay: true, NoFollow: true}))
		if want := "stdout: late\nstderr: child\n"; err != io.EOF || text(log) != want {
			t.Errorf("the log of %s: %v,\n%swant\n%s", language, err, text(log), want)
		}
	}
}

// contextName has the names of the contexts of runs that name none.
var contextName = map[sandbox.Language]string{sandbox.Python: "python", sandbox.Node: "node", sandbox.Bash: "bash"}

func TestBigOutputIsComplete(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	const lines, width = 62500, 79
	for language, code := range map[sandbox.Language]string{
		sandbox.Python: "for i in range(62500): print(f'{i:079d}')",
		sandbox.Node:   "for (let i = 0; i < 62500; i++) console.log(String(i).padStart(79, '0'))",
	} {
		r := runCode(t, c, language, code)
		i := 0
		for line := range strings.Lines(text(r.Output)) {
			if want := fmt.Sprintf("stdout: %0*d\n", width, i); line != want {
				t.Fatalf("%s: line %d is %q, want %q", language, i, line, want)
			}
			i++
		}
		if i != lines {
			t.Fatalf("%s printed %d lines, want %d", language, i, lines)
		}
	}
	r, err := c.runCommand(t.Context(), sandbox.Command{Program: "sh", Args: []string{"-c", "head -c 5000000 /dev/zero | tr '\\0' x; echo done >&2"}})
	if printed := text(r.Output); err != nil || len(printed) != len("stdout: \nstderr: done\n")+5000000 {
		t.Errorf("command: %v, %d bytes of output", err, len(printed))
	}
}

// TestEndlessOutput reads part of an endless run and closes it. This interrupts the run, and a session keeps its state.
func TestEndlessOutput(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	for what, start := range map[string]func() (sandbox.Process, error){
		"code": func() (sandbox.Process, error) {
			return c.RunCode(t.Context(), sandbox.Code{Language: sandbox.Python, Text: "x = 1\nwhile True: print('y' * 10000)"})
		},
		"command": func() (sandbox.Process, error) {
			return c.RunCommand(t.Context(), sandbox.Command{Program: "yes"})
		},
	} {
		p, err := start()
		if err != nil {
			t.Fatal(err)
		}
		for size := 0; size < 20<<20; {
			event, err := p.Next()
			out, ok := event.(sandbox.Output)
			if err != nil || !ok {
				t.Fatalf("%s: next event %v, %v; want output", what, event, err)
			}
			size += len(out.Data)
		}
		p.Close()
	}
	expect(t, c, sandbox.Python, "x", true, "stdout: 1\n")
}

func TestREPLEnvironment(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	dir := t.TempDir()
	r, err := c.runCode(t.Context(), sandbox.Code{
		Language: sandbox.Python, Text: "import os\nos.environ['ADDED'], os.getcwd()", Environment: sandbox.Environment{Env: []string{"ADDED=yes"}, Workdir: dir},
	})
	if want := fmt.Sprintf("stdout: ('yes', '%s')\n", dir); err != nil || text(r.Output) != want {
		t.Errorf("error %v, output\n%swant %s", err, text(r.Output), want)
	}
	// An interpreter of the image may print anything before it fails.
	noisy := "#!/bin/sh\nhead -c 1000000 /dev/zero | tr '\\0' x\nprintf '\\033[2J the end' >&2\nexit 5\n"
	if err := os.WriteFile(filepath.Join(dir, "node"), []byte(noisy), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		run   sandbox.Code
		class func(error) bool
		want  string
	}{
		{sandbox.Code{Language: sandbox.Node, Environment: sandbox.Environment{Env: []string{"PATH=" + dir + ":/usr/bin:/bin"}}}, errdefs.IsFailedPrecondition, `\x1b[2J the end`},
		{sandbox.Code{Language: sandbox.Node, Environment: sandbox.Environment{Workdir: "/nonexistent"}}, errdefs.IsFailedPrecondition, `workdir "/nonexistent" does not exist`},
		{sandbox.Code{Language: sandbox.Node, Environment: sandbox.Environment{Env: []string{"PATH=/nonexistent"}}}, errdefs.IsFailedPrecondition, "; use a sandbox with an image that has it, such as microsandbox/node"},
		{sandbox.Code{Language: sandbox.Node, Environment: sandbox.Environment{Env: []string{"NODE_OPTIONS=--nonsense"}}}, errdefs.IsFailedPrecondition, "exited with status 9"},
		{sandbox.Code{Language: "ruby"}, errdefs.IsInvalidArgument, "language"},
	} {
		if _, err := c.runCode(t.Context(), tt.run); !tt.class(err) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("run %+v: %v, want an error containing %q", tt.run, err, tt.want)
		} else if len(err.Error()) > 3<<10 {
			t.Errorf("run %+v: an error of %d bytes", tt.run, len(err.Error()))
		}
	}
}

// code runs code with raw requests. It returns whether the code succeeded, and its output.
func (c *rpc) code(t testing.TB, req *portalv1.RunCodeRequest) (bool, string, error) {
	t.Helper()
	stream, err := c.portal.RunCode(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	var printed strings.Builder
	for {
		resp, err := stream.Recv()
		if err != nil {
			return false, printed.String(), err
		}
		if result := resp.GetResult(); result != nil {
			return result.GetSuccess(), printed.String(), nil
		}
		printed.Write(resp.GetOutput().GetData())
	}
}

const (
	python = portalv1.RunCodeRequest_LANGUAGE_PYTHON
	node   = portalv1.RunCodeRequest_LANGUAGE_NODE
	bash   = portalv1.RunCodeRequest_LANGUAGE_BASH
)

// A run of Python gets the whole of its input, whatever earlier runs have done with sys.stdin.
func TestPythonInput(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	for _, code := range []string{
		"import os, sys", "input()", "sys.stdin.read(1)", "sys.stdin.buffer.peek()", "sys.stdin.buffer.raw.read(1)", "os.read(0, 1)",
		"sys.stdin.seek(2)", "sys.stdin.buffer.seek(2)", "next(sys.stdin)", "open('/dev/stdin').read()", "sys.stdin.reconfigure(encoding='latin1')",
		"sys.stdin.close()", "sys.stdin.detach()", "sys.stdin.buffer.detach()", "sys.stdin = None", "os.close(0)", "os.dup2(1, 0)", "sys.stdin = open(0)", "sys.stdin.readline = None",
		"import io; sys.stdin = io.TextIOWrapper(sys.stdin.buffer)", "import fileinput; next(fileinput.input(()))",
	} {
		if ok, printed, err := c.code(t, &portalv1.RunCodeRequest{Language: python, Code: code + ";", Input: []byte("the\nother\n")}); err != nil || !ok {
			t.Fatalf("%q: success %t, %v, output %q", code, ok, err, printed)
		}
		ok, printed, err := c.code(t, &portalv1.RunCodeRequest{
			Language: python, Code: "print(sys.stdin.tell(), repr(sys.stdin.read()), sys.stdin.encoding)", Input: []byte("first\nzwölf\n"),
		})
		if want := "0 'first\\nzwölf\\n' utf-8\n"; err != nil || !ok || printed != want {
			t.Errorf("after %q: success %t, %v, output %q, want %q", code, ok, err, printed, want)
		}
	}
	// A stream that is deleted closes the buffer from which it was made, but not that of the next run.
	for _, code := range []string{"f = io.TextIOWrapper(sys.stdin.buffer)", "f = io.TextIOWrapper(sys.stdin.buffer); f.read()"} {
		if ok, printed, err := c.code(t, &portalv1.RunCodeRequest{Language: python, Code: code}); err != nil || !ok {
			t.Errorf("%q: success %t, %v, output %q", code, ok, err, printed)
		}
	}
}

// TestCodeOptions runs code with an environment, a working directory and an input of its own.
func TestCodeOptions(t *testing.T) {
	t.Parallel()
	c := startGuest(t, "SET=image").dial(t)
	workdir := t.TempDir()
	if err := os.Mkdir(workdir+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	sandboxEnv := &portalv1.Environment{Workdir: workdir, Env: []string{"SANDBOX=1"}}
	big := bytes.Repeat([]byte("input"), 100_000)
	type request = portalv1.RunCodeRequest
	for language, code := range map[portalv1.RunCodeRequest_Language]struct {
		show, change, keep, input, line, large, leave string
	}{
		python: {
			show:   "import os, sys; print(os.environ.get('SET'), os.environ.get('NEW'), os.environ.get('SANDBOX'), os.getcwd())",
			change: "os.environ['NEW'] = 'changed'; os.environ['KEPT'] = 'kept'",
			keep:   "print(os.environ.get('NEW'), os.environ.get('KEPT'))",
			input:  "print(repr(sys.stdin.read()))",
			line:   "print(repr(input()))",
			large:  "print(len(sys.stdin.buffer.read()))",
			leave:  "os.chdir('sub')",
		},
		node: {
			show:   "console.log(process.env.SET ?? 'None', process.env.NEW ?? 'None', process.env.SANDBOX, process.cwd())",
			change: "process.env.NEW = 'changed'; process.env.KEPT = 'kept'; undefined",
			keep:   "console.log(process.env.NEW ?? 'None', process.env.KEPT)",
			input:  "console.log(`'${fs.readFileSync(0)}'`)",
			line:   "text = ''; for await (const piece of process.stdin) { text += piece; if (text.includes('\\n')) break }; console.log(`'${text.split('\\n')[0]}'`)",
			large:  "console.log(await new Promise((end) => { let n = 0; process.stdin.on('data', (d) => { n += d.length }).on('end', () => end(n)) }))",
			leave:  "process.chdir('sub')",
		},
		bash: {
			show:   `echo "${SET-None} ${NEW-None} ${SANDBOX-None} $PWD"`,
			change: "export NEW=changed KEPT=kept",
			keep:   "echo ${NEW-None} $KEPT",
			input:  "printf \"'%s'\\n\" \"$(cat)\"",
			line:   "read -r line; printf \"'%s'\\n\" \"$line\"",
			large:  "wc -c",
			leave:  "cd sub",
		},
	} {
		for i, tt := range []struct {
			req  *request
			want string
		}{
			{&request{Code: code.show}, "image None 1 " + workdir + "\n"},
			{&request{Code: code.show, Env: []string{"SET=run", "NEW=a=b", "NEW=c=d"}, Cwd: "sub"}, "run c=d 1 " + workdir + "/sub\n"},
			{&request{Code: code.show}, "image None 1 " + workdir + "\n"},
			{&request{Code: code.show, Env: []string{"NEW="}}, "image  1 " + workdir + "\n"},
			{&request{Code: code.show, Cwd: "/usr"}, "image None 1 /usr\n"},
			{&request{Code: code.change, Env: []string{"NEW=run"}}, ""},
			{&request{Code: code.keep}, "None kept\n"},
			{&request{Code: code.input}, "''\n"},
			{&request{Code: code.input, Input: []byte("first")}, "'first'\n"},
			{&request{Code: code.line, Input: []byte("line\nnot read\n")}, "'line'\n"},
			{&request{Code: code.input}, "''\n"},
			{&request{Code: code.large, Input: big}, fmt.Sprintln(len(big))},
			{&request{Code: code.line, Input: []byte("äöü\n")}, "'äöü'\n"},
			{&request{Code: code.leave, Cwd: "/"}, ""}, // fails, and the directory is restored
			{&request{Code: code.leave}, ""},
			{&request{Code: code.show}, "image None 1 " + workdir + "/sub\n"},
		} {
			tt.req.Language, tt.req.Environment = language, sandboxEnv
			ok, printed, err := c.code(t, tt.req)
			fails := tt.req.GetCode() == code.leave && tt.req.GetCwd() != ""
			if err != nil || ok == fails || !fails && printed != tt.want {
				t.Errorf("%v, run %d, %q: success %t, %v, output %q, want %q", language, i, tt.req.GetCode(), ok, err, printed, tt.want)
			}
		}
	}
	for want, req := range map[string]*request{
		`cwd "nope" does not exist in the sandbox`:  {Cwd: "nope"},
		`user "nope" does not exist in the sandbox`: {User: "nope"},
		"use NAME=value": {Env: []string{"x"}},
	} {
		req.Language = python
		_, _, err := c.code(t, req)
		wantStatus(t, "code", err, codes.InvalidArgument, want)
	}
}

// TestCodeOfUsers checks that each user has a REPL of their own, and that runs without a user do not share one with those
// that name the same user.
func TestCodeOfUsers(t *testing.T) {
	t.Parallel()
	c := startGuest(t, "HOME=/image").dial(t)
	// The test's own python3 may be one that only root can run.
	environment := &portalv1.Environment{Workdir: "/", Env: []string{"PATH=/usr/bin:/bin"}}
	for _, tt := range []struct{ user, code, want string }{
		{"", "import os; x = 'root'", ""},
		{"daemon", "import os; x = os.getuid()", ""},
		{"0", "'x' in globals()", "False\n"},
		{"root", "import os; x = 'named'; os.environ['USER'], os.environ['HOME']", "('root', '/root')\n"},
		{"0", "x", "'named'\n"},
		{"", "x, os.environ['HOME']", "('root', '/image')\n"},
		{"1:1", "x, os.getgid(), os.environ['HOME'], open('/dev/stdin').read()", "(1, 1, '/usr/sbin', '')\n"},
		{"daemon:sys", "'x' in globals()", "False\n"},
	} {
		ok, printed, err := c.code(t, &portalv1.RunCodeRequest{Language: python, User: tt.user, Code: tt.code, Environment: environment})
		if err != nil || !ok || printed != tt.want {
			t.Errorf("as %q, %q: success %t, %v, output %q, want %q", tt.user, tt.code, ok, err, printed, tt.want)
		}
	}
	// A directory that the user may not enter is an error of the run, and the REPL works on.
	closed := t.TempDir()
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	ok, printed, err := c.code(t, &portalv1.RunCodeRequest{Language: python, User: "daemon", Cwd: closed, Code: "print('not this')"})
	if err != nil || ok || !strings.Contains(printed, "PermissionError") || strings.Contains(printed, "not this") {
		t.Errorf("run in a closed directory: success %t, %v, output %q", ok, err, printed)
	}
	if ok, printed, err := c.code(t, &portalv1.RunCodeRequest{Language: python, User: "daemon", Code: "os.getcwd()"}); err != nil || !ok || printed != "'/'\n" {
		t.Errorf("the next run: success %t, %v, output %q", ok, err, printed)
	}
	// Contexts whose interpreter could not be started take no place. Four run, and 32 is the most.
	broken := &portalv1.Environment{Env: []string{"PATH=/nonexistent"}}
	for i := range 40 {
		if _, _, err := c.code(t, &portalv1.RunCodeRequest{Language: python, User: fmt.Sprint(5000 + i), Environment: broken}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("REPL without an interpreter: %v, want FailedPrecondition", err)
		}
	}
	for i := range 29 {
		_, _, err := c.code(t, &portalv1.RunCodeRequest{Language: python, User: fmt.Sprint(6000 + i), Environment: environment})
		if i < 28 && err != nil {
			t.Errorf("context %d: %v", i+5, err)
		} else if i == 28 {
			wantStatus(t, "context 33", err, codes.ResourceExhausted, "run the code in one of them")
		}
	}
}

// TestGraceOfCode checks that a run which ignores the interrupt is killed after its grace.
func TestGraceOfCode(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	_, _, err := c.code(t, &portalv1.RunCodeRequest{
		Language: python, Code: "import signal\nx = signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
		Timeout: durationpb.New(3 * time.Second), Grace: durationpb.New(time.Millisecond), // long enough for the code to begin
	})
	wantStatus(t, "code", err, codes.DeadlineExceeded, "its state is lost")
}
