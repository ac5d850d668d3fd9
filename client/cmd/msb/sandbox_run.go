package main

import (
	"fmt"
	"io"
	"os"
	"regexp"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

var languageFlag = &cli.StringFlag{Name: "language", Aliases: []string{"l"}, Usage: "`LANGUAGE` of the code: python, node or bash", Value: "python"}

var sandboxRun = &cli.Command{
	Name:  "run",
	Usage: "run code in a sandbox",
	UsageText: "msb sandbox run [options] NAME [CODE]\n\n" +
		"msb sandbox run my-env 'x = 6 * 7; x'\n" +
		"msb sandbox run my-env <program.py",
	Description: "Without CODE, or if CODE is -, the code is read from standard input. Variables and functions that it defines\n" +
		"stay available to later runs. If the code ends with an expression, its value is printed.\n\n" +
		"Exit codes: 0 success; 1 the code raised an exception; " + runExitCodes +
		"130 interrupted (the run is canceled).",
	Flags: []cli.Flag{
		languageFlag, timeoutFlag, namespaceFlag, jsonFlag, serverURLFlag, verboseFlag,
	},
	Action: runCode,
}

// scriptName matches the names of files that people give in place of the code.
var scriptName = regexp.MustCompile(`^\S+\.(py|js|mjs|cjs)$`)

func runCode(c *cli.Context) error {
	if n := c.NArg(); n != 1 && n != 2 {
		return usageError(c, "give the name of one sandbox, and the code as one argument or on standard input")
	}
	if c.NArg() == 2 && c.Args().First() != "" && c.Args().Get(1) == "" {
		return usageError(c, "the code is empty")
	}
	if err := checkNotEmpty(c); err != nil {
		return err
	}
	name, code := c.Args().First(), c.Args().Get(1)
	if scriptName.MatchString(code) {
		if info, err := os.Stat(code); err == nil && info.Mode().IsRegular() {
			return usageError(c, "%q is the name of a file, but CODE is the code itself; to run the file, use <%[1]s", code)
		}
	}
	if code == "" || code == "-" {
		var err error
		if code, err = readCode(c); err != nil {
			return err
		}
	}
	var res *rpc.ReplRunResult
	err := callServer(c, name, func(r *client.Client) (err error) {
		res, err = r.Sandbox(c.String(namespaceFlag.Name), name).RunCode(c.Context, c.String("language"), code, runTimeout(c))
		return err
	})
	if err != nil {
		return withRunExitCode(err)
	}
	if c.Bool(jsonFlag.Name) {
		err = printJSON(c, res)
	} else {
		err = printLines(c, res.Output)
	}
	if err == nil && res.Status != rpc.StatusSuccess {
		return cli.Exit("", exitFailure)
	}
	return withRunExitCode(err)
}

func readCode(c *cli.Context) (string, error) {
	if isTerminal(os.Stdin) {
		fmt.Fprintln(c.App.ErrWriter, "type the code, then press Ctrl-D")
	}
	code, err := io.ReadAll(io.LimitReader(os.Stdin, rpc.MaxBody+1))
	if err != nil {
		return "", cli.Exit(fmt.Sprintf("read the code: %v", err), exitNotRun)
	}
	if len(code) > rpc.MaxBody {
		return "", cli.Exit(fmt.Sprintf("the code is longer than the maximum size of a request, %s: split it into several runs", size(rpc.MaxBody)), exitUsage)
	}
	return string(code), nil
}
