package main

import (
	"time"

	"github.com/urfave/cli/v2"
)

var imageList = &cli.Command{
	Name:      "list",
	Aliases:   []string{"ls"},
	UsageText: "msb image list [options]",
	Usage:     "list the images from which sandboxes can be started",
	Flags:     []cli.Flag{jsonFlag},
	Action:    listImages,
}

type imageInfo struct {
	Name      string     `json:"name"`
	Digest    string     `json:"digest"`
	SizeBytes int64      `json:"size_bytes"`
	CreatedAt *time.Time `json:"created_at"`
}

func listImages(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	a := admin(c)
	defer a.Close()
	images, err := a.Images(c.Context)
	if err != nil {
		return err
	}
	if c.Bool(jsonFlag.Name) {
		list := []imageInfo{} // not null
		for _, i := range images {
			list = append(list, imageInfo{i.GetName(), i.GetDigest(), i.GetSizeBytes(), jsonTime(i.GetCreatedAt())})
		}
		return printJSON(c, list)
	}
	if len(images) == 0 {
		return printNone(c, "images; import one with 'msb image import'", "")
	}
	rows := [][]string{{"NAME", "SIZE", "AGE", "DIGEST"}}
	for _, i := range images {
		rows = append(rows, []string{i.GetName(), size(i.GetSizeBytes()), age(time.Since(i.GetCreatedAt().AsTime())), i.GetDigest()})
	}
	return printTable(c.App.Writer, rows)
}
