package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var serverReset = &cli.Command{
	Name:      "reset",
	Usage:     "replace the server's signing key, which invalidates all API keys",
	UsageText: "msb server reset [options]",
	Description: "All existing API keys stop working before the command returns, and their running requests are\n" +
		"canceled. Sandboxes keep running. The server must be running; if it is not, use 'msb server start --reset-key',\n" +
		"which also starts it.\n\n" +
		"Restoring a backup from before the reset undoes the reset: the keys that it invalidated become valid again, also\n" +
		"those that were created after the backup. If a key or the state directory leaked, delete the older backups and\n" +
		"create a new one.",
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

const resetConsequence = "This permanently invalidates every API key of this server."

func reset(c *cli.Context, a *client.Admin) error {
	resp, err := a.Reset(c.Context)
	if err != nil {
		return fmt.Errorf("replace the signing key: %w", err)
	}
	fmt.Fprintf(c.App.ErrWriter, "the signing key was replaced, and all existing API keys are invalid (%s). "+
		"Create new ones with 'msb server keygen'\n", plural(resp.GetInvalidated(), "key was live", "keys were live"))
	return nil
}
