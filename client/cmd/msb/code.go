package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/rpc"
)

var languageFlag = &cli.StringFlag{
	Name: "language", Aliases: []string{"l"}, Usage: "`LANGUAGE` of the code: python, node or bash", DefaultText: "that of the file's extension, or python",
}

// codeHelp is a part of the help of commands that run code.
const codeHelp = "CODE is the code itself or the name of a file that has it. Without CODE, or if it is -, the code is read from\n" +
	"standard input. If the code ends with an expression, its value is printed."

// interruptHelp is a part of the help of commands that run code.
const interruptHelp = "The first Ctrl-C interrupts the code, and the second one ends msb."

// scriptLanguages has the language of files with these extensions.
var scriptLanguages = map[string]string{
	".py": "python", ".js": "node", ".mjs": "node", ".cjs": "node", ".ts": "node", ".sh": "bash", ".bash": "bash",
}

// scriptName matches the names of files that contain code. Code itself does not look like this.
var scriptName = regexp.MustCompile(`^[^\s()'"]+\.(py|js|mjs|cjs|ts|sh|bash)$`)

// readCode returns the code that an argument of a command stands for, and its language. The argument may be "".
func readCode(c *cli.Context, argument string) (code, language string, err error) {
	language = c.String(languageFlag.Name)
	if argument == "" || argument == "-" {
		if isTerminal(os.Stdin) {
			fmt.Fprintln(c.App.ErrWriter, "type the code, then press Ctrl-D")
		}
		code, err = readAllCode(interruptible(c.Context, os.Stdin))
	} else if info, statErr := os.Stat(argument); statErr == nil && info.Mode().IsRegular() {
		if language == "" {
			language = scriptLanguages[filepath.Ext(argument)]
		}
		code, err = readCodeFile(argument)
	} else if scriptName.MatchString(argument) {
		return "", "", usageError(c, "there is no file %q", argument)
	} else {
		code = argument
	}
	if language == "" {
		language = "python"
	}
	return code, language, err
}

func readCodeFile(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", cli.Exit(err.Error(), exitNotRun)
	}
	defer f.Close()
	return readAllCode(f)
}

func readAllCode(r io.Reader) (string, error) {
	code, err := io.ReadAll(io.LimitReader(r, rpc.MaxBody+1))
	if errors.Is(err, context.Canceled) {
		return "", err
	}
	if err != nil {
		return "", cli.Exit(fmt.Sprintf("read the code: %v", err), exitNotRun)
	}
	if len(code) > rpc.MaxBody {
		return "", cli.Exit(fmt.Sprintf("the code is longer than the maximum size of a request, %s: split it into several runs", size(rpc.MaxBody)), exitUsage)
	}
	return string(code), nil
}
