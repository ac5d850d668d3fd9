package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/version"
	"github.com/msbd/msbd/client"
)

var versionCommand = &cli.Command{
	Name:      "version",
	UsageText: "msb version [options]",
	Usage:     "print the versions of msb and of the running server",
	Flags:     []cli.Flag{jsonFlag},
	Action:    printVersion,
}

func printVersion(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context, 2*time.Second)
	defer cancel()
	a := admin(c)
	defer a.Close()
	status, err := a.Status(ctx)
	if c.Bool(jsonFlag.Name) {
		doc := struct {
			MSB  string  `json:"msb"`
			MSBD *string `json:"msbd"` // null if the server is not running or does not answer
		}{MSB: version.String()}
		if err == nil {
			doc.MSBD = &status.Version
		}
		return printJSON(c, doc)
	}
	fmt.Fprintln(c.App.Writer, "msb  "+version.String())
	switch {
	case err == nil:
		fmt.Fprintln(c.App.Writer, "msbd "+status.GetVersion())
	case errors.Is(err, client.ErrNotRunning):
		fmt.Fprintln(c.App.Writer, "msbd is not running")
	default:
		fmt.Fprintf(c.App.Writer, "msbd unknown (%v)\n", err)
	}
	return nil
}
