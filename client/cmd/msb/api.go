package main

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var apiCommand = &cli.Command{
	Name:  "api",
	Usage: "print the server's description of its API, an OpenRPC document",
	Description: "It is for programs that make clients or documentation of it: methods, parameters, results, scopes and errors.\n" +
		"The server and the key are found as 'msb sandbox --help' says.\n\n" + callExitCodes,
	Flags:  []cli.Flag{serverURLFlag, verboseFlag},
	Action: printAPI,
}

func printAPI(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	var doc bytes.Buffer
	err := remotely(c, "", func(r *client.Client) error {
		raw, err := r.Discover(c.Context)
		if err != nil {
			return err
		}
		return json.Indent(&doc, raw, "", "  ")
	})
	if err != nil {
		return exitOfCall(err)
	}
	_, err = fmt.Fprintln(c.App.Writer, doc.String())
	return err
}
