package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

var imageImport = &cli.Command{
	Name:      "import",
	Usage:     "import images from an OCI archive",
	UsageText: "msb image import FILE",
	Description: "FILE is an OCI archive or the output of 'docker save'. The server reads it, so it must be on the server's\n" +
		"host. An imported image replaces an existing one of the same name; running sandboxes keep the old image.",
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
	progress := newProgress(c.App.ErrWriter, 0)
	images, err := a.ImportImage(c.Context, path, func(p *adminv1.ImportProgress) {
		progress.step(strings.TrimSpace(printable(p.GetPhase()+" "+p.GetImage())), p.GetDone(), p.GetTotal())
	})
	progress.end()
	if err != nil {
		return err
	}
	for _, image := range images {
		fmt.Fprintln(c.App.Writer, image.GetName())
	}
	fmt.Fprintf(c.App.ErrWriter, "imported in %s\n", time.Since(began).Round(100*time.Millisecond))
	return nil
}
