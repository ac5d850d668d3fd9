package main

import (
	"fmt"

	"github.com/urfave/cli/v2"
)

// manCommand is for the build, which installs the man page.
var manCommand = &cli.Command{
	Name:   "man",
	Usage:  "print the man page of msb, for 'man -l -'",
	Hidden: true,
	Action: func(c *cli.Context) error {
		if err := noArguments(c); err != nil {
			return err
		}
		describeForMan(c.App.Commands, "")
		page, err := c.App.ToManWithSection(1)
		if err != nil {
			return fmt.Errorf("generate the man page: %w", err)
		}
		_, err = fmt.Fprint(c.App.Writer, page)
		return err
	},
}

// describeForMan sets the name of each command to its full name and adds the description to its usage, because
// urfave/cli's man page has neither.
func describeForMan(commands []*cli.Command, above string) {
	for _, c := range commands {
		c.Name = above + c.Name
		if c.Description != "" {
			c.Usage += "\n\n" + c.Description
		}
		describeForMan(c.Subcommands, c.Name+" ")
	}
}
