package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var serverReset = &cli.Command{
	Name:      "reset",
	Usage:     "replace the signing key of the running server: every API key made before is refused",
	UsageText: "msb server reset [--yes]",
	Description: "Every earlier API key is refused from before the command returns, for good, and what it has in progress is\n" +
		"cut. Sandboxes run on. At a server's start, 'msb server start --reset-key' does the same.",
	Flags: []cli.Flag{yesFlag},
	Action: func(c *cli.Context) error {
		if err := noArguments(c); err != nil {
			return err
		}
		if err := confirm(c, resetConsequence); err != nil {
			return err
		}
		a := admin(c)
		defer a.Close()
		return reset(c, a)
	},
}

const resetConsequence = "This makes every API key of this server invalid, for good."

func reset(c *cli.Context, a *client.Admin) error {
	resp, err := a.Reset(c.Context)
	if err != nil {
		return fmt.Errorf("replace the signing key: %w", err)
	}
	fmt.Fprintf(c.App.ErrWriter, "the signing key was replaced: every API key made before is refused (%d were live). "+
		"Make new ones with 'msb server keygen'\n", resp.GetInvalidated())
	return nil
}
