package main

import (
	"fmt"
	"time"

	"github.com/urfave/cli/v2"
)

var keyPrune = &cli.Command{
	Name:      "prune",
	Usage:     "forget API keys that are expired or revoked",
	UsageText: "msb server key prune [--dead-for DURATION] [--dry-run] [--json]",
	Description: "The keys are refused as before; only the records go, and are listed. What was done with the keys stays in the\n" +
		"audit log.",
	Flags: []cli.Flag{
		&cli.StringFlag{Name: "dead-for", Usage: "only keys that have been expired or revoked for `DURATION`, such as 30d (default: any time)"},
		&cli.BoolFlag{Name: "dry-run", Usage: "change nothing, and list what would be forgotten"},
		jsonFlag,
	},
	Action: pruneKeys,
}

func pruneKeys(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	a := admin(c)
	defer a.Close()
	keys, err := a.PruneKeys(c.Context, c.String("dead-for"), c.Bool("dry-run"))
	if err != nil {
		return err
	}
	if c.Bool(jsonFlag.Name) {
		return printJSON(c, keysJSON(keys))
	}
	if len(keys) > 0 {
		if err := keyTable(c, keys, time.Now()); err != nil {
			return err
		}
	}
	done := "were forgotten"
	if c.Bool("dry-run") {
		done = "would be forgotten"
	}
	fmt.Fprintf(c.App.ErrWriter, "%d API keys %s\n", len(keys), done)
	return nil
}
