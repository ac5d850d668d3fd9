package main

import (
	"fmt"

	"github.com/urfave/cli/v2"
)

// manCommand is for the build, which installs what it prints.
var manCommand = &cli.Command{
	Name:   "man",
	Usage:  "print msb's man page, for 'man -l -'",
	Hidden: true,
	Action: func(c *cli.Context) error {
		if err := noArguments(c); err != nil {
			return err
		}
		describeForMan(c.App.Commands, "")
		page, err := c.App.ToManWithSection(1)
		if err != nil {
			return fmt.Errorf("make the man page: %w", err)
		}
		_, err = fmt.Fprint(c.App.Writer, page)
		return err
	},
}

// describeForMan gives each command its whole name, and its description, which urfave/cli's man page
// leaves out.
func describeForMan(commands []*cli.Command, above string) {
	for _, c := range commands {
		c.Name = above + c.Name
		if c.Description != "" {
			c.Usage += "\n\n" + c.Description
		}
		describeForMan(c.Subcommands, c.Name+" ")
	}
}
