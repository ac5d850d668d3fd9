package main

import (
	"fmt"
	"time"

	"github.com/urfave/cli/v2"
)

var keyPrune = &cli.Command{
	Name:      "prune",
	Usage:     "delete the records of expired and revoked API keys",
	UsageText: "msb server key prune [options]",
	Description: "The deleted records are listed. The keys remain invalid, and their entries in the audit log remain. Of each\n" +
		"revoked key, the server keeps the id, so that its use causes no alarm.",
	Flags: []cli.Flag{
		&cli.StringFlag{Name: "dead-for", Usage: "delete only records of keys that have been expired or revoked for at least `DURATION`, such as 30d (default: all)"},
		&cli.BoolFlag{Name: "dry-run", Usage: "list the records that would be deleted, and delete none"},
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
		if err := printKeys(c, keys, time.Now()); err != nil {
			return err
		}
	}
	deleted := plural(len(keys), "record of an API key was deleted", "records of API keys were deleted")
	if c.Bool("dry-run") {
		deleted = plural(len(keys), "record of an API key would be deleted", "records of API keys would be deleted")
	}
	fmt.Fprintln(c.App.ErrWriter, deleted)
	return nil
}
