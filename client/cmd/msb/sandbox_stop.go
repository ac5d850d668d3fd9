package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var sandboxStop = &cli.Command{
	Name:      "stop",
	Usage:     "stop a sandbox; what was written in it is gone",
	UsageText: "msb sandbox stop NAME",
	Description: "Its name is free again.\n\n" +
		callExitCodes,
	Flags:  []cli.Flag{withinFlag, serverURLFlag, verboseFlag},
	Action: stopSandbox,
}

func stopSandbox(c *cli.Context) error {
	name, err := oneSandbox(c)
	if err != nil {
		return err
	}
	err = remotely(c, "", func(r *client.Client) error {
		return r.Sandbox(c.String(withinFlag.Name), name).Stop(c.Context)
	})
	if err == nil {
		fmt.Fprintf(c.App.ErrWriter, "sandbox %s is stopped\n", name)
	}
	return exitOfCall(err)
}
