package main

import (
	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

// findShell is a script that becomes bash, or sh if there is no bash.
const findShell = `if command -v bash >/dev/null 2>&1; then exec bash; fi; exec sh`

var sandboxShell = &cli.Command{
	Name:      "shell",
	Usage:     "open a shell in a sandbox",
	UsageText: "msb sandbox shell [options] NAME",
	Description: "The shell is bash, or sh if the sandbox has no bash. If standard input is not a terminal, the shell reads commands\n" +
		"from it.\n\n" +
		"Exit codes: the exit code of the shell, and those of 'msb sandbox exec'.",
	Flags: []cli.Flag{programEnvFlag, programDirFlag, userFlag, namespaceFlag, serverURLFlag, verboseFlag},
	Action: func(c *cli.Context) error {
		name, err := oneSandbox(c)
		if err != nil {
			return err
		}
		command := client.Command{
			Name: "sh", Args: []string{"-c", findShell}, Dir: c.String(programDirFlag.Name), Env: *c.Generic(programEnvFlag.Name).(*assignments),
			User: c.String(userFlag.Name),
		}
		return withRunExitCode(callServer(c, name, func(r *client.Client) error {
			return execAttached(c, r.Sandbox(c.String(namespaceFlag.Name), name), command, true, isTerminal(c.App.Reader))
		}))
	},
}
