package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

var sandboxExec = &cli.Command{
	Name:  "exec",
	Usage: "run a program in a sandbox and exit with its exit code",
	UsageText: "msb sandbox exec [options] NAME -- PROGRAM [ARGUMENT...]\n\n" +
		"msb sandbox exec my-env -- sh -c 'uname -r; exit 3'",
	Description: "Options must come before NAME: everything after it belongs to the program. The program is run without a\n" +
		"shell, unless PROGRAM is one. Its output is printed when it has exited.\n\n" +
		"Exit codes: the exit code of the program; " + runExitCodes +
		"126 the program is not executable; 127 the sandbox has no such program; 130 interrupted (the run is canceled).",
	Flags:  []cli.Flag{timeoutFlag, namespaceFlag, jsonFlag, serverURLFlag, verboseFlag},
	Action: execCommand,
}

func execCommand(c *cli.Context) error {
	arguments := c.Args().Slice()
	if len(arguments) > 1 && arguments[1] == "--" {
		arguments = append(arguments[:1:1], arguments[2:]...)
	}
	switch {
	case len(arguments) < 2 || arguments[0] == "" || arguments[1] == "":
		return usageError(c, "give the name of one sandbox and a program")
	case strings.HasPrefix(c.Args().Get(1), "-") && c.Args().Get(1) != "--":
		return usageError(c, "put %q before %q", c.Args().Get(1), arguments[0])
	}
	name := arguments[0]
	var res *rpc.CommandRunResult
	err := callServer(c, name, func(r *client.Client) (err error) {
		res, err = r.Sandbox(c.String(namespaceFlag.Name), name).RunCommand(c.Context, arguments[1], arguments[2:], runTimeout(c))
		return err
	})
	if err != nil {
		return withRunExitCode(adviseShell(c, err, name, arguments[1:]))
	}
	if c.Bool(jsonFlag.Name) {
		err = printJSON(c, res)
	} else {
		err = printLines(c, res.Output)
	}
	if err == nil && len(res.Output) == 0 && len(arguments) == 2 && isTerminal(os.Stdin) {
		fmt.Fprintf(c.App.ErrWriter, "msb: %s ran without a terminal and without standard input; interactive programs are not supported\n", printable(arguments[1]))
	}
	if err == nil && res.ExitCode != 0 {
		return cli.Exit("", res.ExitCode)
	}
	return withRunExitCode(err)
}

// adviseShell replaces the server's advice to use a shell, which names params of the API, by a command line of msb.
func adviseShell(c *cli.Context, err error, name string, command []string) error {
	e, ok := errors.AsType[*client.Error](err)
	if !ok || !errors.Is(err, client.ErrCommandNotFound) {
		return err
	}
	text, _, advised := strings.Cut(e.Message, "; use command ")
	if !advised {
		return err
	}
	if namespace := c.String(namespaceFlag.Name); namespace != "" {
		name = "--namespace " + namespace + " " + name
	}
	script := strings.ReplaceAll(strings.Join(command, " "), "'", `'\''`)
	own := *e
	own.Message = fmt.Sprintf("%s; run: msb exec %s -- sh -c '%s'", text, name, script)
	return &own
}
