package main

import (
	"fmt"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v2"
)

var imageImport = &cli.Command{
	Name:      "import",
	Usage:     "make the images of an OCI archive known to the server",
	UsageText: "msb image import FILE",
	Description: "FILE is an OCI archive, or what 'docker save' writes. The server reads it, so it must be on the\n" +
		"server's host. An image that has the name of an earlier one replaces it; running sandboxes keep theirs.",
	Action: importImage,
}

func importImage(c *cli.Context) error {
	file, err := oneFile(c)
	if err != nil {
		return err
	}
	path, err := filepath.Abs(file)
	if err != nil {
		return err
	}
	a := admin(c)
	defer a.Close()
	began := time.Now()
	fmt.Fprintf(c.App.ErrWriter, "importing %s …\n", path)
	images, err := a.ImportImage(c.Context, path)
	if err != nil {
		return err
	}
	for _, image := range images {
		fmt.Fprintln(c.App.Writer, image.GetName())
	}
	fmt.Fprintf(c.App.ErrWriter, "imported in %s\n", time.Since(began).Round(100*time.Millisecond))
	return nil
}
