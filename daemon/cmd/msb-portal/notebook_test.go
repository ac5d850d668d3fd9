package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// cell is code and what it prints. exit is its exit code.
type cell struct {
	code string
	exit int
	want string // as for expect
}

// runCells runs cells one after the other in the REPL of a language.
func runCells(t *testing.T, c *connection, language sandbox.Language, cells []cell) {
	t.Helper()
	for _, cell := range cells {
		out, exit, err := collect(c.RunCode(t.Context(), sandbox.Code{Language: language, Text: cell.code, Timeout: time.Minute}))
		got := text(out)
		if start, open := strings.CutSuffix(cell.want, "…"); open && strings.HasPrefix(got, start) {
			got = cell.want
		}
		if err != nil || exit != cell.exit || got != cell.want {
			t.Errorf("run %q: exit code %d, error %v, output\n%swant %d,\n%s", cell.code, exit, err, got, cell.exit, cell.want)
		}
	}
}

// A Python session behaves like a notebook.
func TestPythonNotebook(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	dir := t.TempDir()
	runCells(t, c, sandbox.Python, []cell{
		{"import os, sys, io, asyncio, warnings", 0, ""},
		// The start of the code.
		{"\ufeffprint(1)", 0, "stdout: 1\n"},
		{"    a = 2\n    if a:\n        print(a)\n\n    a + 1", 0, "stdout: 2\nstdout: 3\n"},
		{"\n\n  a = 4\n  a", 0, "stdout: 4\n"},
		{"  x = '''\nnot indented'''\n  x", 0, "stdout: '\\nnot indented'\n"},
		{"if True:\n  1\n 2", 1, "stderr:   File \"<python-input-6>\", line 3\nstderr:     2\n…"},
		// The end of the code.
		{"5;", 0, ""},
		{"(5) ; # a comment\n# and another", 0, ""},
		{"5 # ;", 0, "stdout: 5\n"},
		{"5  # a comment", 0, "stdout: 5\n"},
		{"sys.exit(3)", 3, ""},
		{"sys.exit()", 0, ""},
		{"sys.exit(256 + 7)", 7, ""},
		{"raise SystemExit('enough')", 1, "stderr: enough\n"},
		{"exit(4)", 4, ""},
		{"sys.exit(2**70)", 255, ""},
		{"class S(SystemExit):\n    code = property(lambda self: 1/0)\nraise S", 1, "…"},
		// Lines that are not Python.
		{"!echo $((6 * 7)); exit 3", 0, "stdout: 42\n"},
		{"_exit_code", 0, "stdout: 3\n"},
		{"name = 'world'\nfor i in range(2):\n    !echo hello {name} {i} {other} $((1 + {i}))", 0, "stdout: hello world 0 {other} 1\nstdout: hello world 1 {other} 2\n"},
		{fmt.Sprintf("%%cd %s", dir), 0, fmt.Sprintf("stdout: %s\n", dir)},
		{"os.getcwd()", 0, fmt.Sprintf("stdout: '%s'\n", dir)},
		{"%cd -", 0, "stdout: …"},
		{"%cd /nonexistent", 1, "stderr: Traceback (most recent call last):\n…"},
		{"%pip --version", 0, "stdout: pip …"},
		{"print('before')\n%timeit 1 + 1", 1, "stdout: before\nstderr: Traceback (most recent call last):\n…"},
		{"x = 7 %3\nx", 0, "stdout: 1\n"},
		{"'''\n!not a command\n%not a magic\n'''", 0, "stdout: '\\n!not a command\\n%not a magic\\n'\n"},
		// Streams and descriptors.
		{"os.dup2(os.open('/dev/null', os.O_WRONLY), 1); print('lost')", 0, ""},
		{"print('found')", 0, "stdout: found\n"},
		{"os.close(0); os.close(1); os.close(2)", 0, ""},
		{"print('found'); print('as well', file=sys.stderr)", 0, "stdout: found\nstderr: as well\n"},
		{"sys.stdout = io.StringIO(); print('lost')", 0, ""},
		{"print('found')", 0, "stdout: found\n"},
		{"sys.stdout.close(); sys.stderr.detach(); sys.stdin.close()", 0, "…"},
		{"print('found'); print(repr(sys.stdin.read()), file=sys.stderr)", 0, "stdout: found\nstderr: ''\n"},
		{"os.closerange(3, 256); print('goes on')", 0, "stdout: goes on\n"},
		// Warnings.
		{"def warn():\n    warnings.warn('careful')\nwarn()", 0, "stderr: <python-input-38>:2: UserWarning: careful\n…"},
		{"warn()", 0, "stderr: <python-input-38>:2: UserWarning: careful\n…"},
		// Tasks without await.
		{"async def double(x):\n    await asyncio.sleep(0.001)\n    return 2 * x\ntask = asyncio.create_task(double(4))", 0, ""},
		{"await task", 0, "stdout: 8\n"},
		{"asyncio.run(double(5))", 0, "stdout: 10\n"},
		{"[await double(i) for i in range(3)]", 0, "stdout: [0, 2, 4]\n"},
		{"async with asyncio.Lock(): print('locked')", 0, "stdout: locked\n"},
	})

	// A stream that the code makes for a descriptor closes it when it is deleted, but not that of the next run.
	for _, code := range []string{
		"sys.stdout = os.fdopen(1, 'w', 1)", "sys.stdout = io.TextIOWrapper(open(1, 'wb', 0), write_through=True)", "sys.__stdout__ = open(1, 'w')",
		"sys.stderr = os.fdopen(2, 'w', 1)", "sys.stdout = sys.stderr = open(2, 'w')", "sys.stdin = open(0)",
	} {
		runCells(t, c, sandbox.Python, []cell{
			{code + "; kept = 1", 0, ""},
			{"print('found', sys.stdin.read()); print('as well', file=sys.stderr)", 0, "stdout: found \nstderr: as well\n"},
			{"kept", 0, "stdout: 1\n"},
		})
	}

	// The event loop runs between runs.
	done := fifo(t)
	runCells(t, c, sandbox.Python, []cell{{fmt.Sprintf("state = 'new'\nasync def finish():\n    global state\n    await asyncio.sleep(0.01)\n    state = 'done'\n    open(%q, 'w').close()\nlater = asyncio.create_task(finish())", done), 0, ""}})
	wait(t, done)
	runCells(t, c, sandbox.Python, []cell{{"state", 0, "stdout: 'done'\n"}})
}

// A Node session behaves like a notebook.
func TestNodeNotebook(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/module.mjs", []byte("export default 7; export const named = 8;"), 0o600); err != nil {
		t.Fatal(err)
	}
	runCells(t, c, sandbox.Node, []cell{
		// Declarations.
		{"const a = 1; let b = 2; class C { m() { return 3 } }", 0, ""},
		{"const a = 10, { b, c = 20 } = { b: 2 }; class C { m() { return 4 } }; [a, b, c, new C().m()]", 0, "stdout: [ 10, 2, 20, 4 ]\n"},
		{"const d = (() => { throw new Error('no') })()", 1, "stderr: Uncaught Error: no\n…"},
		{"const d = 5; d", 0, "stdout: 5\n"},
		{"let e; e", 0, ""},
		{"function f() { return d } f()", 0, "stdout: 5\n"},
		{"for (const i of [1, 2]) console.log(i); typeof i", 0, "stdout: 1\nstdout: 2\nstdout: 'undefined'\n"},
		{"const g = await Promise.resolve(6); class D {}; function h() { return g } h()", 0, "stdout: 6\n"},
		{"const g = 7; typeof D + h()", 0, "stdout: 'function7'\n"},
		// Imports.
		{"import os from 'node:os'; import { join, sep as slash } from 'node:path'; import * as url from 'node:url'; [typeof os.EOL, join('a', 'b'), slash, typeof url.URL]", 0, "stdout: [ 'string', 'a/b', '/', 'function' ]\n"},
		{fmt.Sprintf("import seven, { named } from %q; seven + named", dir+"/module.mjs"), 0, "stdout: 15\n"},
		{fmt.Sprintf("import { absent } from %q", dir+"/module.mjs"), 1, "stderr: Uncaught SyntaxError: The module …"},
		// The end of the code.
		{"1 + 1 // a comment", 0, "stdout: 2\n"},
		{"await 3 /* a comment */ // and another", 0, "stdout: 3\n"},
		{"({ a: await 1 }) // a comment", 0, "stdout: { a: 1 }\n"},
		{"'use strict'; 5;", 0, "stdout: 5\n"},
		{"return 1", 1, "stderr: REPL17:1\n…"},
		{"throw new Proxy({}, { get() { throw 1 } })", 1, "stderr: …"},
		// Exits.
		{"process.exit(3)", 3, ""},
		{"try { process.exit(4) } catch { console.log('CATCH') } finally { console.log('finally') }", 4, ""},
		{"await null; try { process.exit(5) } catch { console.log('CATCH') }", 5, ""},
		{"setTimeout(() => process.exit(6), 1); await new Promise(() => {})", 6, ""},
		{"process.exitCode = 7; process.exit()", 7, ""},
		{"const notCaught = new Promise((done) => { process.exit(8) }).catch(() => console.log('CATCH')); await notCaught", 8, ""},
		{"[a, d, g]", 0, "stdout: [ 10, 5, 7 ]\n"},
		{"process.on('exit', (code) => console.log('exit with', code)); process.exit(9)", 9, "stdout: exit with 9\n"},
		{"process.removeAllListeners('exit'); process.removeAllListeners('SIGINT'); process.removeAllListeners('uncaughtException'); 1", 0, "stdout: 1\n"},
		// Errors show no frames of the REPL.
		{"throw new Error('a', { cause: new TypeError('b') })", 1, "stderr: Uncaught Error: a\nstderr:     at REPL28:1:7 {\nstderr:   [cause]: TypeError: b\nstderr:       at REPL28:1:31\nstderr: }\n"},
		{"throw new AggregateError([new Error('a')], 'many')", 1, "stderr: Uncaught AggregateError: many\nstderr:     at REPL29:1:7 {\nstderr:   [errors]: [\nstderr:     Error: a\nstderr:         at REPL29:1:27\nstderr:   ]\nstderr: }\n"},
		{"console.trace('here', 1)", 0, "stderr: Trace: here 1\nstderr:     at REPL30:1:9\n"},
		{"process.on('uncaughtException', (e) => console.log('handled', e.message)); setTimeout(() => { throw new Error('a') }, 1); await new Promise((done) => setTimeout(done, 20)); 'ok'", 0, "stdout: handled a\nstdout: 'ok'\n"},
		{"process.removeAllListeners('uncaughtException'); setTimeout(() => { throw new Error('a') }, 1); await new Promise(() => {})", 1, "stderr: Uncaught Error: a\n…"},
		// Streams.
		{"await require('stream/promises').pipeline(require('stream').Readable.from(['a\\n']), process.stdout); 'piped'", 0, "stdout: a\nstdout: 'piped'\n"},
		// Types.
		{
			"const types = typeof require('node:module').stripTypeScriptTypes === 'function'; if (types) console.log('types')", 0, "…",
		},
	})
	// Types are removed by Node itself, since version 22.13.
	_, exit, err := collect(c.RunCode(t.Context(), sandbox.Code{Language: sandbox.Node, Text: "process.exit(types ? 0 : 1)"}))
	if err != nil {
		t.Fatal(err)
	}
	typed := []cell{
		{"interface P { x: number }; const p: P = { x: 1 }; p.x as number", 0, "stdout: 1\n"},
		{"enum Color { Red, Green }; Color.Green", 0, "stdout: 1\n"},
		{"const q: number = 2; await Promise.resolve(q!)", 0, "stdout: 2\n"},
	}
	if exit != 0 {
		typed = []cell{{"const p: number = 1", 1, "stderr: REPL36:1\n…"}}
	}
	runCells(t, c, sandbox.Node, typed)
}

// A Bash session behaves like a terminal.
func TestBashNotebook(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	dir := t.TempDir()
	runCells(t, c, sandbox.Bash, []cell{
		{"x=1; f() { echo f $x; }; echo out; echo err >&2", 0, "stdout: out\nstderr: err\n"},
		{"f", 0, "stdout: f 1\n"},
		{"", 0, ""},
		{"(exit 3)", 3, ""},
		{"echo $?", 0, "stdout: 3\n"},
		{"exit 4; echo not this", 4, ""},
		{"f() { exit 5; }; f; echo not this", 5, ""},
		{"(exit 6; echo not this) || echo $x $?", 0, "stdout: 1 6\n"},
		{"return 7; echo not this", 7, ""},
		{"cd " + dir, 0, ""},
		{"pwd; echo $0 $#; set -- a b", 0, "stdout: " + dir + "\nstdout: bash 0\n"},
		{"echo $# $1 $LINENO\necho $LINENO", 0, "stdout: 2 a 1\nstdout: 2\n"},
		{"cat <<end\nhere\nend\nif true\nthen echo then\nfi", 0, "stdout: here\nstdout: then\n"},
		{"echo 'unterminated", 2, "stderr: bash: …"},
		{"echo a; fi", 2, "stderr: bash: …"},
		{"read line; echo \"<$line>\"", 0, "stdout: <>\n"},
		{"nosuchcommand", 127, "stderr: bash: nosuchcommand: command not found\n"},
		{"exec >/dev/null 2>&1; echo lost", 0, ""},
		{"echo found", 0, "stdout: found\n"},
		{"exec 0<&- 1>&- 2>&- 3>&- 4>&- 255>&-", 0, ""},
		{"echo found", 0, "stdout: found\n"},
		{"echo /proc/self/fd/*; ls /proc/self/fd | tr '\\n' ' '", 0, "stdout: …"},
		{"sh -c 'cd /proc/$$/fd; echo *'", 0, "stdout: 0 1 2 3\n"}, // 3 is that of the directory
		{"tr '\\0' ' ' </proc/$$/cmdline", 0, "stdout: bash --norc --noprofile --noediting -i \n"},
		{"set -e; false; echo not this", 1, ""},
		{"set +e; set -u; echo $nosuch", 1, "stderr: bash: nosuch: unbound variable\n"},
		{"set +u; printf() { echo no; }; alias eval=false; trap 'echo trap' EXIT; readonly r=1; IFS=x", 0, ""},
		{"echo goes on; unset -f printf", 0, "stdout: goes on\n"},
		{"declare -A map=([a]=b); export E=exported; sh -c 'echo $E'", 0, "stdout: exported\n"},
		{"echo ${map[a]} $r", 0, "stdout: b 1\n"},
		{"exec true", 1, "stderr: the bash process exited with status 0; its state is lost\n"},
		{"echo \"<$x>\"", 0, "stdout: <>\n"},
	})
	for _, code := range []string{
		"while :; do :; done", "sleep 60", "for i in 1 2 3; do sleep 60; done", "cat /dev/zero >/dev/null", "sleep 60 | cat", "(sleep 60); echo not this",
		"read x </dev/tcp/127.0.0.1/1 || sleep 60", "f() { while :; do :; done; }; f", "wait",
	} {
		if code == "wait" {
			code = "sleep 60 & wait"
		}
		ctx, cancel := context.WithCancel(t.Context())
		p, err := c.RunCode(ctx, sandbox.Code{Language: sandbox.Bash, Text: "kept=$((kept + 1)); echo begun; " + code})
		if err != nil {
			t.Fatal(err)
		}
		if event, err := p.Next(); err != nil {
			t.Fatalf("run %q: the first event is %v, error %v", code, event, err)
		}
		cancel()
		p.Close()
	}
	runCells(t, c, sandbox.Bash, []cell{{"echo $kept", 0, "stdout: 9\n"}})
}

// Code cannot escape from what the REPL makes of it, because the REPL does not paste it into other code as text.
func TestCodeIsNotPastedIntoAWrapper(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	runCells(t, c, sandbox.Python, []cell{
		{"1)\nprint('escaped'", 1, "stderr:   File \"<python-input-1>\", line 1\n…"},
		{"  x = 1\nelse:\n  print('escaped')", 1, "stderr: …"},
		{"await_ = 1\nreturn 5", 1, "stderr:   File \"<python-input-3>\", line 2\n…"},
	})
	runCells(t, c, sandbox.Node, []cell{
		{"await 1; }); console.log('escaped'); (async () => {", 1, "stderr: REPL1:1\n…"},
		{"await 1 })(); console.log('escaped'); (async () => { await 1", 1, "stderr: REPL2:1\n…"},
		{"a: 1 }); console.log('escaped'); ({", 1, "stderr: REPL3:1\n…"},
		{"{ a: 1 }); console.log('escaped'); ({ b: 2 }", 1, "stderr: REPL4:1\n…"},
		{"{ a: 1 }), ({ b: 2 }", 1, "stderr: REPL5:1\n…"},
		{"{ a: 1 } // a comment", 0, "stdout: { a: 1 }\n"},
		{"`${await 1}` + '/* */ // }'", 0, "stdout: '1/* */ // }'\n"},
		{"const text = `import x from 'y'\\nawait`; text.length", 0, "stdout: 23\n"},
	})
}

// A session works on whatever the code does to the objects that the interpreter's programs use.
func TestSessionDoesNotDependOnTheCodesObjects(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	runCells(t, c, sandbox.Python, []cell{
		{"import builtins, os, sys", 0, ""},
		{"real, put = dict(vars(builtins)), setattr\nfor name in ('print', 'compile', 'eval', 'exec', 'len', 'getattr', 'setattr', 'isinstance', 'repr', 'BaseException', 'Exception', 'int', 'dict', 'bytes'): put(builtins, name, None)", 0, ""},
		{"1 + 1", 0, "stdout: 2\n"},
		{"1 / 0", 1, "stderr: …"},
		{"vars = real['vars']; vars(builtins).update(real)", 0, ""},
		{"os.read = os.write = os.dup2 = os.fstat = os.getpid = os.chdir = sys.exit = None", 0, ""},
		{"sys.modules.clear(); sys.displayhook = None; del sys.stdout", 0, "…"},
		{"2 + 2", 0, "…"},
		{"globals().clear()", 0, "…"},
		{"6 * 7", 0, "…"},
		{"x = 3\nassert x == 3", 0, "…"},
	})
	runCells(t, c, sandbox.Node, []cell{
		{"const saved = Array.prototype[Symbol.iterator]", 0, ""},
		{"Promise = JSON = Buffer = Error = Object.keys = setTimeout = setImmediate = Atomics = Set = Number = null", 0, "stdout: null\n"},
		{"1 + 1", 0, "stdout: 2\n"},
		{"process.stdout = process.stderr = null; process.cwd = process.exit = process.kill = null", 0, "stdout: null\n"},
		{"fs.writeSync = fs.readSync = require('node:vm').Script = require('node:util').inspect = null", 0, "stdout: null\n"},
		{"2 + 2", 0, "stdout: 4\n"},
		{"null.x", 1, "stderr: Uncaught TypeError: …"},
		{"globalThis.require = globalThis.process = globalThis.console = undefined", 0, ""},
		{"3 + 3", 0, "stdout: 6\n"},
	})
}

// A time limit, an interrupt and an exit end the run although the code catches every exception.
func TestNoExceptionKeepsARunFromItsEnd(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	for _, tt := range []struct {
		language sandbox.Language
		code     string
	}{
		{sandbox.Python, "import time\ntry:\n    time.sleep(60)\nexcept Exception:\n    print('CATCH')"},
		{sandbox.Node, "try { for (;;); } catch { console.log('CATCH') } finally { console.log('finally') }"},
		{sandbox.Node, "// await\ntry { for (;;); } catch { console.log('CATCH') }"},
		{sandbox.Node, "await null; try { for (;;); } catch { console.log('CATCH') }"},
		{sandbox.Node, "await null; try { await new Promise(() => {}) } catch { console.log('CATCH') }"},
		{sandbox.Node, "setTimeout(() => { try { for (;;); } catch { console.log('CATCH') } }); await new Promise(() => {})"},
	} {
		runCode(t, c, tt.language, "kept = 1")
		out, _, err := collect(c.RunCode(t.Context(), sandbox.Code{Language: tt.language, Text: tt.code, Timeout: 500 * time.Millisecond}))
		if err == nil || !strings.Contains(err.Error(), "reached its time limit") || strings.Contains(err.Error(), "lost") || strings.Contains(text(out), "CATCH") {
			t.Errorf("run %q: error %v, output\n%s", tt.code, err, text(out))
		}
		expect(t, c, tt.language, "kept", true, "stdout: 1\n")
	}
}

// Code that fails has run once, and the same code can be sent again.
func TestCodeSentAgainAfterAFailure(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	runCells(t, c, sandbox.Python, []cell{
		{"n = 0", 0, ""},
		{"n += 1\nmissing", 1, "stderr: Traceback (most recent call last):\n…"},
		{"n += 1\nmissing", 1, "stderr: Traceback (most recent call last):\n…"},
		{"n += 1\n!true\nmissing", 1, "stderr: Traceback (most recent call last):\n…"},
		{"n += 1\nnot valid python", 1, "stderr:   File \"<python-input-5>\", line 2\n…"},
		{"n", 0, "stdout: 3\n"},
	})
	again := "const once = ++n; let other = once; class Same {}; missing()"
	typed := "const typed: number = ++n; missing()"
	runCells(t, c, sandbox.Node, []cell{
		{"var n = 0", 0, ""},
		{again, 1, "stderr: Uncaught ReferenceError: missing is not defined\n…"},
		{again, 1, "stderr: Uncaught ReferenceError: missing is not defined\n…"},
		{"{ n++ }; missing()", 1, "stderr: Uncaught ReferenceError: missing is not defined\n…"},
		{"await null; n++; missing()", 1, "stderr: Uncaught ReferenceError: missing is not defined\n…"},
		{"n++; not javascript", 1, "stderr: REPL6:1\n…"},
		{"[n, once, other]", 0, "stdout: [ 4, 2, 2 ]\n"},
		{typed, 1, "stderr: …"},
		{"n === 4 || n === 5", 0, "stdout: true\n"},
	})
}
