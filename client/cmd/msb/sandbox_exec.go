package main

import (
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

var sandboxExec = &cli.Command{
	Name:  "exec",
	Usage: "run a program in a sandbox, and end as it did",
	UsageText: "msb sandbox exec [--timeout TIME] [--json] NAME -- PROGRAM [ARGUMENT...]\n\n" +
		"msb sandbox exec my-env -- sh -c 'uname -r; exit 3'",
	Description: "Options come before the NAME: all that comes behind it is the program's. There is no shell, unless the\n" +
		"program is one. What it prints is shown when it has ended.\n\n" +
		"Exit codes: the program's own; 127 the sandbox has no such program; " + runExitCodes,
	Flags:  []cli.Flag{timeoutFlag, withinFlag, jsonFlag, serverURLFlag, verboseFlag},
	Action: execCommand,
}

func execCommand(c *cli.Context) error {
	arguments := c.Args().Slice()
	if len(arguments) > 1 && arguments[1] == "--" {
		arguments = append(arguments[:1:1], arguments[2:]...)
	}
	switch {
	case len(arguments) < 2 || arguments[0] == "" || arguments[1] == "":
		return usage(c, "name one sandbox and a program")
	case strings.HasPrefix(c.Args().Get(1), "-") && c.Args().Get(1) != "--":
		return usage(c, "put %q before %q", c.Args().Get(1), arguments[0])
	}
	name := arguments[0]
	var res *rpc.CommandRunResult
	err := remotely(c, name, func(r *client.Client) (err error) {
		res, err = r.Sandbox(c.String(withinFlag.Name), name).RunCommand(c.Context, arguments[1], arguments[2:], c.Duration(timeoutFlag.Name))
		return err
	})
	if err != nil {
		return exitOfRun(err)
	}
	if c.Bool(jsonFlag.Name) {
		err = printJSON(c, res)
	} else {
		err = printLines(c, res.Output)
	}
	if err == nil && res.ExitCode != 0 {
		return cli.Exit("", res.ExitCode)
	}
	return exitOfRun(err)
}
