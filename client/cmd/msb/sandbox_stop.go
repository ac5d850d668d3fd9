package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var sandboxStop = &cli.Command{
	Name:      "stop",
	Aliases:   []string{"rm"},
	Usage:     "stop sandboxes and delete everything written in them",
	UsageText: "msb sandbox stop [options] NAME...",
	Description: "The names of the sandboxes can then be used again. If one of them cannot be stopped, the others are stopped\n" +
		"nevertheless.\n\n" +
		callExitCodes,
	Flags:  []cli.Flag{namespaceFlag, serverURLFlag, verboseFlag},
	Action: stopSandboxes,
}

func stopSandboxes(c *cli.Context) error {
	if c.NArg() == 0 {
		return usageError(c, "give the name of a sandbox, or several names")
	}
	if err := checkNotEmpty(c); err != nil {
		return err
	}
	var failed []error
	for _, name := range c.Args().Slice() {
		err := callServer(c, "", func(r *client.Client) error {
			return r.Sandbox(c.String(namespaceFlag.Name), name).Stop(c.Context)
		})
		if err == nil {
			fmt.Fprintf(c.App.ErrWriter, "sandbox %s was stopped\n", name)
			continue
		}
		if len(failed) > 0 {
			err = fmt.Errorf("msb: %w", err) // each error is a line, and main begins only the first one with this
		}
		failed = append(failed, err)
		if _, answered := errors.AsType[*client.Error](err); !answered {
			break // the server cannot be reached, or msb was interrupted
		}
	}
	return withCallExitCode(errors.Join(failed...))
}
