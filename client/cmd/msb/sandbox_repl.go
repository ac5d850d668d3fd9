package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/msbd/msbd/client"
)

var sandboxRepl = &cli.Command{
	Name:      "repl",
	Usage:     "run code in a sandbox line by line",
	UsageText: "msb sandbox repl [options] NAME",
	Description: "Each input runs when it is complete; a Python block ends with an empty line. Variables are those of 'msb sandbox run',\n" +
		"and stay when the command ends. Ctrl-C interrupts the run, or discards the input. A second\nCtrl-C cancels the run. Ctrl-D ends the command.\n\n" +
		callExitCodes,
	Flags: []cli.Flag{languageFlag, timeoutFlag, namespaceFlag, serverURLFlag, verboseFlag},
	Action: func(c *cli.Context) error {
		name, err := oneSandbox(c)
		if err != nil {
			return err
		}
		language := c.String(languageFlag.Name)
		if language == "" {
			language = "python"
		}
		if name := languageAliases[language]; name != "" {
			language = name
		}
		if _, known := prompts[language]; !known {
			return usageError(c, "unknown language %q: use python, node or bash", language)
		}
		return withCallExitCode(callServer(c, name, func(r *client.Client) error {
			s := r.Sandbox(c.String(namespaceFlag.Name), name)
			// Not c.Context, which ends at the first Ctrl-C.
			ended, stop := signal.NotifyContext(context.WithoutCancel(c.Context), syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			code := client.Code{Language: language, Timeout: runTimeout(c)}
			return (&replSession{c: c, sandbox: s, code: code, input: newLineReader(ended, c), ended: ended}).run()
		}))
	},
}

// prompts has the prompts of each language: for the first line of an input, and for the others.
var prompts = map[string][2]string{
	"python": {">>> ", "... "}, "node": {"> ", "... "}, "bash": {"$ ", "> "},
}

// languageAliases has other names of languages, which the server also accepts.
var languageAliases = map[string]string{
	"py": "python", "python3": "python", "nodejs": "node", "javascript": "node", "js": "node", "typescript": "node", "ts": "node", "sh": "bash",
}

// replSession reads inputs and runs them.
type replSession struct {
	c       *cli.Context
	sandbox *client.Sandbox
	code    client.Code
	input   lineReader
	ended   context.Context // ends with SIGTERM or SIGHUP
}

// errInterrupted means that the user has discarded the input.
var errInterrupted = errors.New("interrupted")

func (r *replSession) run() error {
	for {
		text, err := r.read()
		switch {
		case err == io.EOF:
			return nil
		case err == errInterrupted:
			continue
		case err != nil:
			return err
		}
		if err := r.evaluate(text); err != nil {
			return err
		}
	}
}

// read reads a complete input.
func (r *replSession) read() (string, error) {
	prompt := prompts[r.code.Language]
	text := ""
	for shown := prompt[0]; ; shown = prompt[1] {
		line, err := r.input.readLine(shown)
		if err == io.EOF && text != "" {
			return text, nil
		}
		if err != nil {
			return "", err
		}
		text += line + "\n"
		if !incomplete(r.code.Language, text) {
			return text, nil
		}
	}
}

// evaluate runs an input. The first Ctrl-C interrupts it, and the second one cancels the run.
func (r *replSession) evaluate(text string) error {
	if len(bytes.TrimSpace([]byte(text))) == 0 {
		return nil
	}
	ctx, interrupt, stop := untilSecondInterrupt(r.ended)
	defer stop()
	code := r.code
	code.Interrupt = interrupt
	code.Source = text
	stdout, stderr := forTerminal(r.c.App.Writer), forTerminal(r.c.App.ErrWriter)
	code.Stdout, code.Stderr = stdout, stderr
	_, err := r.sandbox.Run(ctx, code)
	err = cmp.Or(err, flush(stdout), flush(stderr))
	switch {
	case r.ended.Err() != nil:
		return context.Canceled
	case errors.Is(err, context.Canceled):
		_, err = fmt.Fprintln(stderr, "\ninterrupted")
		return err
	case errors.Is(err, client.ErrRunTimeout), errors.Is(err, client.ErrRunFailed), err != nil && isClosed(interrupt):
		_, err = fmt.Fprintln(stderr, "msb: "+err.Error())
		return err
	}
	return err
}

// lineReader reads lines.
type lineReader interface {
	// readLine returns a line without its end. At the end of the input, the error is io.EOF. It is errInterrupted if the user
	// has discarded what was typed.
	readLine(prompt string) (string, error)
}

func newLineReader(ctx context.Context, c *cli.Context) lineReader {
	keys := interruptible(ctx, c.App.Reader)
	if isTerminal(c.App.Reader) && isTerminal(c.App.Writer) {
		t := &terminalReader{in: c.App.Reader.(*os.File), keys: keys}
		t.editor = term.NewTerminal(struct {
			io.Reader
			io.Writer
		}{t, c.App.Writer}, "")
		return t
	}
	return plainReader{bufio.NewReader(keys)}
}

// plainReader reads from what is not a terminal. It shows no prompts.
type plainReader struct{ r *bufio.Reader }

func (p plainReader) readLine(string) (string, error) {
	line, err := p.r.ReadString('\n')
	if line == "" {
		return "", err
	}
	return strings.TrimRight(line, "\r\n"), nil
}

// terminalReader reads from a terminal, with a history and keys for editing.
type terminalReader struct {
	in          *os.File
	keys        io.Reader // what is typed
	editor      *term.Terminal
	interrupted bool   // the user has typed Ctrl-C
	rest        []byte // keys that the editor has not read
}

// maxLine is the length at which the editor cuts off a line, in characters.
const maxLine = 4096

// discardLine are the keys that empty the line and end it. The editor would keep the line at Ctrl-C.
const discardLine = "\x05\x15\r"

// Read implements io.Reader for the editor.
func (t *terminalReader) Read(p []byte) (int, error) {
	if len(t.rest) == 0 {
		keys := make([]byte, len(p))
		n, err := t.keys.Read(keys)
		if err != nil {
			return 0, err
		}
		t.rest = keys[:n]
		if i := bytes.LastIndexByte(t.rest, 3); i >= 0 {
			t.interrupted = true
			t.rest = append([]byte(discardLine), t.rest[i+1:]...)
		}
	}
	n := copy(p, t.rest)
	t.rest = t.rest[n:]
	return n, nil
}

func (t *terminalReader) readLine(prompt string) (string, error) {
	state, err := term.MakeRaw(int(t.in.Fd()))
	if err != nil {
		return "", err
	}
	defer term.Restore(int(t.in.Fd()), state)
	if cols, rows, err := term.GetSize(int(t.in.Fd())); err == nil && cols > 0 && rows > 0 {
		_ = t.editor.SetSize(cols, rows)
	}
	t.editor.SetPrompt(prompt)
	line, err := t.editor.ReadLine()
	if err == term.ErrPasteIndicator { // the line was pasted
		err = nil
	}
	switch {
	case t.interrupted:
		t.interrupted = false
		return "", errInterrupted
	case utf8.RuneCountInString(line) >= maxLine:
		fmt.Fprintf(t.editor, "msb: the line was discarded, because it has more than %d characters: use 'msb sandbox run'\n", maxLine-1)
		return "", errInterrupted
	case err == io.EOF:
		fmt.Fprint(t.editor, "\n")
	}
	return line, err
}
