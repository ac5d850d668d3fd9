package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var sandboxStop = &cli.Command{
	Name:      "stop",
	Usage:     "stop a sandbox and delete everything written in it",
	UsageText: "msb sandbox stop [options] NAME",
	Description: "The name of the sandbox can then be used again.\n\n" +
		callExitCodes,
	Flags:  []cli.Flag{namespaceFlag, serverURLFlag, verboseFlag},
	Action: stopSandbox,
}

func stopSandbox(c *cli.Context) error {
	name, err := oneSandbox(c)
	if err != nil {
		return err
	}
	err = callServer(c, "", func(r *client.Client) error {
		return r.Sandbox(c.String(namespaceFlag.Name), name).Stop(c.Context)
	})
	if err == nil {
		fmt.Fprintf(c.App.ErrWriter, "sandbox %s was stopped\n", name)
	}
	return withCallExitCode(err)
}
