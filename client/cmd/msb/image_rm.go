package main

import (
	"fmt"

	"github.com/urfave/cli/v2"
)

var imageRm = &cli.Command{
	Name:      "rm",
	Usage:     "remove images and free their disk space",
	UsageText: "msb image rm NAME...",
	Description: "An image that a sandbox uses is not removed; the error names the sandboxes, which you can stop with\n" +
		"'msb sandbox stop'. If one NAME cannot be removed, the NAMEs after it are not removed either.",
	Action: removeImages,
}

func removeImages(c *cli.Context) error {
	if err := checkNotEmpty(c); err != nil {
		return err
	}
	if c.NArg() == 0 {
		return usageError(c, "give one or more NAMEs; 'msb image list' lists them")
	}
	a := admin(c)
	defer a.Close()
	for _, name := range c.Args().Slice() {
		if err := a.RemoveImage(c.Context, name); err != nil {
			return err
		}
		fmt.Fprintf(c.App.ErrWriter, "image %s was removed\n", name)
	}
	return nil
}
