package main

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var apiCommand = &cli.Command{
	Name:      "api",
	Usage:     "print the server's API description (OpenRPC)",
	UsageText: "msb api [options]",
	Description: "The document describes methods, parameters, results, scopes and errors. Programs can generate clients or\n" +
		"documentation from it. The server and the key are found as described in 'msb sandbox --help'.\n\n" + callExitCodes,
	Flags:  []cli.Flag{serverURLFlag, verboseFlag},
	Action: printAPI,
}

func printAPI(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	var doc bytes.Buffer
	err := callServer(c, "", func(r *client.Client) error {
		raw, err := r.Discover(c.Context)
		if err != nil {
			return err
		}
		return json.Indent(&doc, raw, "", "  ")
	})
	if err != nil {
		return withCallExitCode(err)
	}
	_, err = fmt.Fprintln(c.App.Writer, doc.String())
	return err
}
