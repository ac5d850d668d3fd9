package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// A context has variables, a directory and a count of its own. It can be restarted and removed.
func TestContexts(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	dir := t.TempDir()
	created, err := c.CreateContext(t.Context(), sandbox.ContextRequest{Name: "a.b_C-1", Language: sandbox.Python, Cwd: dir})
	if want := (sandbox.Context{Name: "a.b_C-1", Language: sandbox.Python, Cwd: dir, PID: created.PID}); err != nil || created != want || created.PID == 0 {
		t.Fatalf("created %+v, error %v, want %+v", created, err, want)
	}
	other, err := c.CreateContext(t.Context(), sandbox.ContextRequest{Language: sandbox.Node, User: "0"})
	if err != nil || other.Name == "" || other.Language != sandbox.Node || other.User != "0" {
		t.Fatalf("created %+v, error %v", other, err)
	}
	in := func(name, code string) (output string, exit sandbox.Exit, err error) {
		p, err := c.RunCode(t.Context(), sandbox.Code{Context: name, Text: code, Timeout: time.Minute})
		if err != nil {
			return "", exit, err
		}
		out, exit, _, err := collectReports(p)
		return text(out), exit, err
	}
	for i, tt := range []struct {
		context, code, want string
		exit                sandbox.Exit
	}{
		{created.Name, "import os; x = 1; os.getcwd()", fmt.Sprintf("stdout: '%s'\n", dir), sandbox.Exit{Runs: 1}},
		{created.Name, "x", "stdout: 1\n", sandbox.Exit{Runs: 2}},
		{other.Name, "typeof x", "stdout: 'undefined'\n", sandbox.Exit{Runs: 1}},
		{created.Name, "import sys; sys.exit(9)", "", sandbox.Exit{Code: 9, Runs: 3}},
		{created.Name, "os._exit(3)", "stderr: the python process exited with status 3; its state is lost\n", sandbox.Exit{Code: 3, Runs: 4, StateLost: true}},
		{created.Name, "'x' in globals()", "stdout: False\n", sandbox.Exit{Runs: 1}},
	} {
		if got, exit, err := in(tt.context, tt.code); err != nil || got != tt.want || exit != tt.exit {
			t.Errorf("run %d: output %q, exit %+v, error %v, want %q, %+v", i, got, exit, err, tt.want, tt.exit)
		}
	}
	expect(t, c, sandbox.Python, "'x' in globals()", true, "stdout: False\n")

	// Errors of requests.
	for what, err := range map[string]error{
		"a name that is taken":   second(c.CreateContext(t.Context(), sandbox.ContextRequest{Name: created.Name, Language: sandbox.Node})),
		"the name of a language": second(c.CreateContext(t.Context(), sandbox.ContextRequest{Name: "python", Language: sandbox.Node})),
		"a name with a slash":    second(c.CreateContext(t.Context(), sandbox.ContextRequest{Name: "a/b", Language: sandbox.Node})),
		"a long name":            second(c.CreateContext(t.Context(), sandbox.ContextRequest{Name: strings.Repeat("x", 65), Language: sandbox.Node})),
		"an unknown language":    second(c.CreateContext(t.Context(), sandbox.ContextRequest{Language: "ruby"})),
		"an unknown user":        second(c.CreateContext(t.Context(), sandbox.ContextRequest{Language: sandbox.Node, User: "nope"})),
		"no such directory":      second(c.CreateContext(t.Context(), sandbox.ContextRequest{Language: sandbox.Node, Cwd: "/nope"})),
		"a missing interpreter": second(c.CreateContext(t.Context(), sandbox.ContextRequest{
			Name: "none", Language: sandbox.Node, Environment: sandbox.Environment{Env: []string{"PATH=/nope"}},
		})),
		"an unknown context":             third(in("nope", "1")),
		"the restart of an unknown one":  second(c.RestartContext(t.Context(), "nope", sandbox.Environment{})),
		"the removal of an unknown one":  c.RemoveContext(t.Context(), "nope"),
		"another language than its own":  codeError(t, c, sandbox.Code{Context: created.Name, Language: sandbox.Node}),
		"the removal of one that failed": c.RemoveContext(t.Context(), "none"),
	} {
		class := errdefs.IsInvalidArgument
		switch {
		case what == "a name that is taken":
			class = errdefs.IsAlreadyExists
		case what == "a missing interpreter":
			class = errdefs.IsFailedPrecondition
		case strings.Contains(what, "unknown one"), what == "an unknown context", what == "the removal of one that failed":
			class = errdefs.IsNotFound
		}
		if !class(err) {
			t.Errorf("%s: error %v", what, err)
		}
	}

	// A restart ends the run in progress.
	started := fifo(t)
	ended := make(chan string, 1)
	go func() {
		got, exit, err := in(created.Name, fmt.Sprintf("x = 5\nopen(%q, 'w').close()\nwhile True: pass", started))
		ended <- fmt.Sprint(got, exit.StateLost, err)
	}()
	wait(t, started)
	if all, err := c.ListContexts(t.Context()); err != nil || len(all) != 3 || all[0].Name != created.Name || !all[0].Busy || all[0].Runs != 2 || all[2].Name != "python" || all[2].Busy {
		t.Errorf("contexts: %+v, error %v", all, err)
	}
	restarted, err := c.RestartContext(t.Context(), created.Name, sandbox.Environment{})
	if err != nil || restarted.PID == 0 || restarted.Runs != 0 {
		t.Errorf("restarted: %+v, error %v", restarted, err)
	}
	if got, want := <-ended, "stderr: the python process was killed, because the context was restarted; its state is lost\ntrue <nil>"; got != want {
		t.Errorf("the run that was in progress: %q, want %q", got, want)
	}
	if got, _, err := in(created.Name, "import os; [os.getcwd(), 'x' in globals()]"); err != nil || got != fmt.Sprintf("stdout: ['%s', False]\n", dir) {
		t.Errorf("after the restart: %q, error %v", got, err)
	}
	// So does its removal, and a run that waits fails.
	go func() {
		got, _, err := in(created.Name, fmt.Sprintf("open(%q, 'w').close()\nwhile True: pass", started))
		ended <- fmt.Sprint(got, err)
	}()
	wait(t, started)
	waiting := make(chan error, 1)
	go func() {
		_, _, err := in(created.Name, "1")
		waiting <- err
	}()
	if err := c.RemoveContext(t.Context(), created.Name); err != nil {
		t.Error(err)
	}
	if got := <-ended; !strings.Contains(got, "the context was removed; its state is lost") {
		t.Errorf("the run that was in progress: %q", got)
	}
	if err := <-waiting; !errdefs.IsNotFound(err) {
		t.Errorf("the run that waited: error %v, want NotFound", err)
	}
	if all, err := c.ListContexts(t.Context()); err != nil || len(all) != 2 {
		t.Errorf("contexts after the removal: %+v, error %v", all, err)
	}
}

func second[T any](_ T, err error) error      { return err }
func third[T, U any](_ T, _ U, e error) error { return e }

func codeError(t *testing.T, c *connection, code sandbox.Code) error {
	_, _, err := collect(c.RunCode(t.Context(), code))
	return err
}

// report is a JSON text that code has reported.
type report struct {
	isError bool
	text    string
}

// collectReports is like collect. It also returns what the code has reported.
func collectReports(p sandbox.Process) (out output, exit sandbox.Exit, reports []report, err error) {
	defer p.Close()
	var piece bytes.Buffer
	for {
		event, err := p.Next()
		switch event := event.(type) {
		case sandbox.Output:
			out = append(out, event)
		case sandbox.Piece:
			if piece.Write(event.Data); event.Last {
				reports = append(reports, report{event.Error, piece.String()})
				piece.Reset()
			}
		case sandbox.Exit:
			return out, event, reports, nil
		case nil:
			return out, exit, reports, err
		}
	}
}

// Values that code shows and text that it prints arrive in their order.
func TestOrderOfResults(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	const alternations = 1000
	var want strings.Builder
	for i := range alternations {
		fmt.Fprintf(&want, "t%[1]d d%[1]d ", i)
	}
	// Some of the values are so large that they need several messages.
	for language, code := range map[sandbox.Language]string{
		sandbox.Python: "for i in range(%d):\n    print(f't{i} ', end='')\n    display({'text/plain': f'd{i} ' + i %% 10 // 9 * 'x' * 100_000}, raw=True)",
		sandbox.Node: "const show = (text) => display({ [Symbol.for('Jupyter.display')]: () => ({ 'text/plain': text }) });\n" +
			"for (let i = 0; i < %d; i++) { process.stdout.write(`t${i} `); show(`d${i} ` + (i %% 10 === 9 ? 'x'.repeat(100_000) : '')); }",
	} {
		p, err := c.RunCode(t.Context(), sandbox.Code{Language: language, Text: fmt.Sprintf(code, alternations), Results: true, Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		got, err := arrivals(t, p)
		same := 0
		for same < min(len(got), want.Len()) && got[same] == want.String()[same] {
			same++
		}
		if rest := want.String()[same:]; err != nil || got[same:] != rest {
			t.Errorf("%s: error %v; after %d bytes, %.50q arrived, want %.50q", language, err, same, got[same:], rest)
		}
	}
	// A signal handler that prints while the code shows a value does not take the answer of the portal from it.
	handler := `import signal, sys
def handler(signum, frame):
    try: print(file=sys.stderr)
    except RuntimeError: pass # it hit another print
previous = signal.signal(signal.SIGALRM, handler)
previous = signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
for i in range(1000): display(i)
previous = signal.setitimer(signal.ITIMER_REAL, 0)`
	if r, err := c.runCode(t.Context(), sandbox.Code{Language: sandbox.Python, Text: handler, Results: true, Timeout: time.Minute}); err != nil || !r.Success {
		t.Errorf("signal handler that prints: success %t, error %v", r.Success, err)
	}
}

// arrivals returns the texts that code has printed and shown, in the order in which they arrived, without the letter x at the
// end of those that it has shown.
func arrivals(t *testing.T, p sandbox.Process) (string, error) {
	defer p.Close()
	var all strings.Builder
	var shown bytes.Buffer
	for {
		event, err := p.Next()
		switch event := event.(type) {
		case sandbox.Output:
			all.Write(event.Data)
		case sandbox.Piece:
			if shown.Write(event.Data); event.Last {
				data, _ := decodeReport(t, shown.String())["data"].(map[string]any)
				all.WriteString(strings.TrimRight(fmt.Sprint(data["text/plain"]), "x"))
				shown.Reset()
			}
		default:
			return all.String(), err
		}
	}
}

// With results, code reports the values that it shows and its exception.
func TestResults(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	main := func(data string) report { return report{text: `{"data": ` + data + `, "is_main": true}`} }
	shown := func(data string) report { return report{text: `{"data": ` + data + `, "is_main": false}`} }
	rich := `class Rich:
    def __repr__(self): return 'rich'
    def _repr_html_(self): return '<b>'
    def _repr_markdown_(self): return '**'
    def _repr_svg_(self): return '<svg>'
    def _repr_png_(self): return b'\x89PNG'
    def _repr_jpeg_(self): return b'\xff\xd8'
    def _repr_pdf_(self): return b'%PDF'
    def _repr_latex_(self): return '$x$'
    def _repr_json_(self): return {'a': [1, None]}
    def _repr_javascript_(self): return 'x'
Rich()`
	all := `{"text/html": "<b>", "text/markdown": "**", "image/svg+xml": "<svg>", "image/png": "iVBORw==", "image/jpeg": "/9g=",
		"application/pdf": "JVBERg==", "text/latex": "$x$", "application/json": {"a": [1, null]}, "application/javascript": "x", "text/plain": %s}`
	for _, tt := range []struct {
		language sandbox.Language
		code     string
		output   string
		reports  []report
	}{
		{sandbox.Python, "1 + 1", "", []report{main(`{"text/plain": "2"}`)}},
		{sandbox.Python, "print('a'); display('b', 3); print('c'); 'd'", "stdout: a\nstdout: c\n", []report{
			shown(`{"text/plain": "'b'"}`), shown(`{"text/plain": "3"}`), main(`{"text/plain": "'d'"}`),
		}},
		{sandbox.Python, rich, "", []report{main(fmt.Sprintf(all, `"rich"`))}},
		{sandbox.Python, "class Bundle:\n    def _repr_mimebundle_(self, **kwargs): return {'text/x': 'y', 'text/plain': 'z'}\nBundle()", "", []report{main(`{"text/x": "y", "text/plain": "z"}`)}},
		{sandbox.Python, "class Broken:\n    def _repr_html_(self): 1/0\n    def __repr__(self): return 'still shown'\nBroken()", "", []report{main(`{"text/plain": "still shown"}`)}},
		{sandbox.Python, "class NotANumber:\n    def _repr_json_(self): return float('nan')\n    def _repr_png_(self): return 5\n    def _repr_html_(self): return 'h'\n    def __repr__(self): return 'n'\nNotANumber()", "", []report{main(`{"text/html": "h", "text/plain": "n"}`)}},
		{sandbox.Python, "class Anything:\n    def __getattr__(self, name): return lambda: name\n    def __repr__(self): return 'any'\nAnything()", "", []report{main(`{"text/plain": "any"}`)}},
		{sandbox.Python, "display({'text/html': 'h'}, raw=True)", "", []report{shown(`{"text/html": "h"}`)}},
		{sandbox.Python, "class Silent(Exception):\n    def __str__(self): 1/0\nraise Silent", "", []report{{true, `{"name": "Silent", "value": "<Silent that cannot be printed>"}`}}},
		{sandbox.Python, "class Unprintable:\n    def __repr__(self): raise ValueError('no')\nUnprintable()", "", []report{{true, `{"name": "ValueError", "value": "no"}`}}},
		{sandbox.Python, "'x' * 200_000", "", []report{main(`{"text/plain": "'` + strings.Repeat("x", 200_000) + `'"}`)}},
		{sandbox.Python, "'\\ud800'", "", []report{main(`{"text/plain": "'\\ud800'"}`)}},
		{sandbox.Python, "print('a')\n1 / 0", "stdout: a\n", []report{{true, `{"name": "ZeroDivisionError", "value": "division by zero"}`}}},
		{sandbox.Python, "x +", "", []report{{true, `{"name": "SyntaxError", "value": "invalid syntax (<python-input-14>, line 1)"}`}}},
		{sandbox.Python, "import sys; sys.exit(3)", "", []report{{true, `{"name": "SystemExit", "value": "3"}`}}},
		{sandbox.Python, "sys.exit()", "", nil},
		{sandbox.Node, "1 + 1", "", []report{main(`{"text/plain": "2"}`)}},
		{sandbox.Node, "console.log('a'); await display({ b: 3 }); console.log('c'); 'd'", "stdout: a\nstdout: c\n", []report{
			shown(`{"text/plain": "{ b: 3 }"}`), main(`{"text/plain": "'d'"}`),
		}},
		{sandbox.Node, `class Rich { [Symbol.for('Jupyter.display')]() { return {
			'text/html': '<b>', 'text/markdown': '**', 'image/svg+xml': '<svg>', 'image/png': Buffer.from('89504e47', 'hex'), 'image/jpeg': Buffer.from('ffd8', 'hex'),
			'application/pdf': Buffer.from('%PDF'), 'text/latex': '$x$', 'application/json': { a: [1, null] }, 'application/javascript': 'x',
		} } }; new Rich()`, "", []report{main(fmt.Sprintf(all, `"Rich {}"`))}},
		{sandbox.Node, "await display.html('<i>'); display.png(Buffer.from('x'))", "", nil}, // compared below
		{sandbox.Node, "throw new RangeError('no')", "", []report{{true, `{"name": "RangeError", "value": "no"}`}}},
		{sandbox.Node, "throw 5", "", []report{{true, `{"name": "Error", "value": "5"}`}}},
		{sandbox.Node, "process.exit(3)", "", []report{{true, `{"name": "Exit", "value": "3"}`}}},
		{sandbox.Node, "({ [Symbol.for('Jupyter.display')]: () => ({ 'text/plain': 'x'.repeat(200_000) }) })", "", []report{main(`{"text/plain": "` + strings.Repeat("x", 200_000) + `"}`)}},
	} {
		p, err := c.RunCode(t.Context(), sandbox.Code{Language: tt.language, Text: tt.code, Results: true, Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		out, exit, reports, err := collectReports(p)
		if strings.HasPrefix(tt.code, "await display.html") {
			if len(reports) != 2 || !strings.Contains(reports[0].text, `"text/html":"<i>"`) || !strings.Contains(reports[1].text, `"image/png":"eA=="`) {
				t.Errorf("run %.100q: reports %v", tt.code, reports)
			}
			continue
		}
		failed := len(tt.reports) > 0 && tt.reports[len(tt.reports)-1].isError
		if err != nil || failed != (exit.Code != 0) || text(out) != tt.output || len(reports) != len(tt.reports) {
			t.Errorf("run %.100q: exit %+v, error %v, output %q, %d reports, want %q, %d reports: %.300v", tt.code, exit, err, text(out), len(reports), tt.output, len(tt.reports), reports)
			continue
		}
		for i, want := range tt.reports {
			got := decodeReport(t, reports[i].text)
			if want.isError {
				traceback, _ := got["traceback"].(string)
				if hasTraceback := traceback != ""; hasTraceback == strings.Contains(want.text, "xit") || strings.Contains(traceback, "repl") && !strings.Contains(traceback, "REPL") {
					t.Errorf("run %.100q: traceback %q", tt.code, traceback)
				}
				delete(got, "traceback")
			}
			if reports[i].isError != want.isError || !reflect.DeepEqual(got, decodeReport(t, want.text)) {
				t.Errorf("run %.100q: report %d is %.300v, want %.300v", tt.code, i, reports[i], want)
			}
		}
	}
}

func decodeReport(t *testing.T, text string) (decoded map[string]any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &decoded); err != nil {
		t.Fatalf("%.200s: %v", text, err)
	}
	return decoded
}

// An interpreter cannot make the portal take an answer for that of another run: the wrong message ends the session, and the answer
// of the run says that its state is lost.
func TestForgedMessages(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	// The code of a run can find the tokens, as it is in the same process. It can end its own run, but no other one.
	python := "import gc, os\ntokens = {v for o in gc.get_objects() if type(o) is dict for v in o.values() if type(v) is bytes and len(v) == 26}\n"
	node := "const forge = (token, text) => fs.writeSync(4, Buffer.concat([Buffer.from(token), Buffer.from(text)]));"
	for _, tt := range []struct {
		language sandbox.Language
		code     string
		ends     bool // it ends its run before it is killed
	}{
		{language: sandbox.Python, code: "import os\nos.write(504, b'+')\nwhile True: pass"},
		{language: sandbox.Python, code: "import os\nos.write(504, b'x' * 26 + b'.\\0')\nwhile True: pass"},
		{language: sandbox.Python, code: python + "assert len(tokens) == 2\nfor token in tokens: os.write(504, token + b'x')\nwhile True: pass"},
		{language: sandbox.Python, code: python + "for token in tokens: os.write(504, token + b'.\\0')\nwhile True: pass", ends: true},
		{language: sandbox.Node, code: node + "forge('x'.repeat(26), '.\\0'); for (;;);"},
		{language: sandbox.Node, code: node + "forge('x'.repeat(26), 'l\\x01text'); for (;;);"},
		{language: sandbox.Bash, code: "printf x >&504; while :; do :; done"},
		{language: sandbox.Bash, code: "token=${__msb[token]}; printf '%s.\\0' $token >&504; printf '%s.\\0' $token >&504; while :; do :; done", ends: true},
	} {
		out, exit, err := collect(c.RunCode(t.Context(), sandbox.Code{Language: tt.language, Text: tt.code, Timeout: time.Minute}))
		const reason = "because the code has written to a descriptor of the REPL"
		lost := exit != 0 && strings.Contains(text(out), reason+"; its state is lost\n")
		if own := exit == 0 && text(out) == ""; err != nil || !lost && !(own && tt.ends) {
			t.Errorf("run %q: exit %d, error %v, output %q", tt.code, exit, err, text(out))
		}
		next := "'next'"
		if tt.language == sandbox.Bash {
			next = "echo \\'next\\'"
		}
		out, exit, err = collect(c.RunCode(t.Context(), sandbox.Code{Language: tt.language, Text: next, Timeout: time.Minute}))
		got := text(out)
		if tt.ends && !lost && exit != 0 && strings.Contains(got, reason) {
			continue // the second message came after the next run had begun
		}
		if report := strings.Contains(got, reason); err != nil || exit != 0 || !strings.HasSuffix(got, "stdout: 'next'\n") || report == lost {
			t.Errorf("the run after %q: exit %d, error %v, output %q", tt.code, exit, err, got)
		}
	}
}

// The time that a run waits for its turn counts towards its time limit.
func TestWaitCountsTowardsTheTimeLimit(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	runCode(t, c, sandbox.Python, "import time")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	started := fifo(t)
	first := make(chan error, 1)
	go func() {
		_, err := c.runCode(ctx, sandbox.Code{Language: sandbox.Python, Text: fmt.Sprintf("open(%q, 'w').close()\ntime.sleep(60)", started)})
		first <- err
	}()
	wait(t, started)
	ran := t.TempDir() + "/ran"
	_, err := c.runCode(t.Context(), sandbox.Code{Language: sandbox.Python, Text: fmt.Sprintf("open(%q, 'w')", ran), Timeout: 100 * time.Millisecond})
	if !errors.Is(err, sandbox.ErrRunTimeout) || !strings.Contains(err.Error(), "before it began") {
		t.Errorf("run that waited: error %v, want ErrRunTimeout", err)
	}
	cancel()
	<-first
	expect(t, c, sandbox.Python, "5", true, "stdout: 5\n")
	if _, err := os.Stat(ran); !os.IsNotExist(err) {
		t.Errorf("the code of a run that had no turn was executed: %v", err)
	}
	// The part that passed before the call counts as well.
	_, err = c.runCode(t.Context(), sandbox.Code{Language: sandbox.Python, Text: "1", Timeout: time.Minute, Waited: time.Hour})
	if !errors.Is(err, sandbox.ErrRunTimeout) || !strings.Contains(err.Error(), "1m0s") {
		t.Errorf("run whose time had passed: error %v, want ErrRunTimeout", err)
	}
}

// A restart or a removal while the interpreter starts ends the start.
func TestRestartDuringAStart(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	dir := t.TempDir()
	started := fifo(t)
	// An interpreter that never is ready, the first two times.
	slow := fmt.Sprintf("#!/bin/sh\nif test -e %[1]s/2; then exec /usr/bin/python3 \"$@\"; fi\nif test -e %[1]s/1; then : >%[1]s/2; fi\n: >%[1]s/1\n: >%[2]s\nexec sleep 600\n", dir, started)
	if err := os.WriteFile(dir+"/python3", []byte(slow), 0o755); err != nil {
		t.Fatal(err)
	}
	environment := sandbox.Environment{Env: []string{"PATH=" + dir + ":/usr/bin:/bin"}}
	run := func(code string) chan error {
		ended := make(chan error, 1)
		go func() {
			_, err := c.runCode(t.Context(), sandbox.Code{Language: sandbox.Python, Text: code, Environment: environment})
			ended <- err
		}()
		return ended
	}
	first := run("while True: pass")
	wait(t, started)
	if err := c.RemoveContext(t.Context(), "python"); err != nil {
		t.Error(err)
	}
	if err := <-first; err == nil || !strings.Contains(err.Error(), "was restarted or removed while its interpreter started") {
		t.Errorf("the run whose context was removed: error %v", err)
	}
	second := run("while True: pass")
	wait(t, started)
	restarted, err := c.RestartContext(t.Context(), "python", environment)
	if err != nil || restarted.PID == 0 {
		t.Errorf("restarted: %+v, error %v", restarted, err)
	}
	if err := <-second; err == nil || !strings.Contains(err.Error(), "was restarted or removed while its interpreter started") {
		t.Errorf("the run whose context was restarted: error %v", err)
	}
	if err := <-run("1"); err != nil {
		t.Errorf("the run after the restart: error %v", err)
	}
}

// A value that is shown after the end of its run goes to the log, and an interrupt that cuts off a value does not spoil the answer.
func TestLateResults(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	run := func(language sandbox.Language, code string, timeout time.Duration) (string, error) {
		p, err := c.RunCode(t.Context(), sandbox.Code{Language: language, Text: code, Results: true, Timeout: timeout})
		if err != nil {
			t.Fatal(err)
		}
		_, _, reports, err := collectReports(p)
		var texts []string
		for _, r := range reports {
			if !r.isError {
				texts = append(texts, fmt.Sprint(decodeReport(t, r.text)["data"].(map[string]any)["text/plain"]))
			}
		}
		return strings.Join(texts, " "), err
	}
	during, after := fifo(t), fifo(t)
	shows := map[sandbox.Language]string{
		sandbox.Python: "import threading\ndef late(path):\n    open(path).read()\n    display('late')\n    open(path, 'w').close()\nfor path in %q, %q: threading.Thread(target=late, args=(path,)).start()",
	}
	for language, show := range shows {
		if got, err := run(language, fmt.Sprintf(show, during, after), time.Minute); got != "" || err != nil {
			t.Errorf("%s: %q, error %v", language, got, err)
		}
		pass := func(path string) {
			if err := os.WriteFile(path, nil, 0); err != nil { // waits for the reader
				t.Error(err)
			}
		}
		pass(after)
		wait(t, after)
		if got, err := run(language, fmt.Sprintf("open(%[1]q, 'w').close()\nopen(%[1]q).read()\n'mine'", during), time.Minute); got != "'mine'" || err != nil {
			t.Errorf("%s: a run during which a value of an earlier one was shown: %q, error %v", language, got, err)
		}
		log, _, err := collect(c.AttachProcess(t.Context(), sandbox.ProcessID{Tag: "repl:" + contextName[language]}, sandbox.AttachOptions{Replay: true, NoFollow: true}))
		if got := text(log); err != io.EOF || got != "stdout: 'late'\nstdout: 'late'\n" {
			t.Errorf("%s: the log is %q, error %v", language, got, err)
		}
	}
	// A pool that an earlier run has created works for the run that uses it.
	expect(t, c, sandbox.Python, "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(1)\npool.submit(print, 'one').result()", true, "stdout: one\n")
	expect(t, c, sandbox.Python, "pool.submit(print, 'two').result()", true, "stdout: two\n")

	for language, code := range map[sandbox.Language]string{
		sandbox.Python: "while True: display('x' * 1000000)", sandbox.Node: "for (;;) await display({ [Symbol.for('Jupyter.display')]: () => ({ 'text/plain': 'x'.repeat(1000000) }) })",
	} {
		if _, err := run(language, code, 2*time.Second); !errors.Is(err, sandbox.ErrRunTimeout) || strings.Contains(err.Error(), "lost") {
			t.Errorf("%s: values without end: error %v", language, err)
		}
		if got, err := run(language, "1", time.Minute); got != "1" || err != nil {
			t.Errorf("%s: the run after it: %q, error %v", language, got, err)
		}
	}
}

// An interrupt of a Node run that does not wait does not hit a later run that does.
func TestInterruptHitsItsRun(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	runCode(t, c, sandbox.Node, "1")
	if _, err := c.runCode(t.Context(), sandbox.Code{Language: sandbox.Node, Text: "for (;;);", Timeout: 300 * time.Millisecond}); !errors.Is(err, sandbox.ErrRunTimeout) {
		t.Fatal(err)
	}
	expect(t, c, sandbox.Node, "await null; const begin = Date.now(); while (Date.now() - begin < 1000); 'done'", true, "stdout: 'done'\n")
}

// A client that is attached to an interpreter gets what it prints while no run is in progress, and its end. One that reads too slowly
// does not make it wait, and gets an error.
func TestAttachedLog(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	runCode(t, c, sandbox.Python, "import os, threading\ndef late(path, text):\n    open(path).read()\n    print(text, flush=True)\n    open(path, 'w').close()")
	attach := func() sandbox.Process {
		p, err := c.AttachProcess(t.Context(), sandbox.ProcessID{Tag: "repl:python"}, sandbox.AttachOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if event, err := p.Next(); err != nil {
			t.Fatalf("the first event is %v, error %v", event, err)
		}
		return p
	}
	printLate := func(text string) {
		path := fifo(t)
		runCode(t, c, sandbox.Python, fmt.Sprintf("threading.Thread(target=late, args=(%q, %s)).start()", path, text))
		if err := os.WriteFile(path, nil, 0); err != nil { // waits for the reader
			t.Fatal(err)
		}
		wait(t, path)
	}
	follower, slow := attach(), attach()
	defer slow.Close()
	defer follower.Close()
	printLate("'late'")
	if event, err := follower.Next(); err != nil || !strings.HasPrefix(fmt.Sprintf("%s", event), "{stdout late") {
		t.Errorf("the event of late output is %s, error %v", event, err)
	}
	printLate("'x' * 8_000_000")
	expect(t, c, sandbox.Python, "'not kept waiting'", true, "stdout: 'not kept waiting'\n")
	for {
		if _, err := slow.Next(); err != nil {
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "read too slowly") {
				t.Errorf("a client that reads too slowly: error %v", err)
			}
			break
		}
	}
	ended := attach()
	defer ended.Close()
	expect(t, c, sandbox.Python, "os._exit(7)", false, "stderr: the python process exited with status 7; its state is lost\n")
	if event, err := ended.Next(); err != nil || event != (sandbox.Exit{Code: 7}) {
		t.Errorf("the event of the end is %v, error %v", event, err)
	}
}
