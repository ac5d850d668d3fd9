package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

// watchInterval is the interval at which --watch requests the status.
const watchInterval = time.Second

// clearTerminal moves the cursor to the upper left corner and clears the terminal.
const clearTerminal = "\x1b[H\x1b[J"

// watchStatus shows the status until Ctrl-C, even while the server is not running. A terminal is redrawn each time.
// Otherwise it prints each change, as a line of JSON or as text followed by an empty line.
func watchStatus(c *cli.Context) error {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	var last []byte
	for {
		st, statusErr := askStatus(c)
		if c.Context.Err() != nil {
			return nil
		}
		if errors.Is(statusErr, errdefs.ErrPermissionDenied) {
			return statusErr // trying again would not help
		}
		// The document contains no durations, so it changes only when the server's status does.
		document, err := json.Marshal(statusDocument(st, statusErr))
		changed := !bytes.Equal(document, last)
		last = document
		switch {
		case err != nil:
		case c.Bool(jsonFlag.Name):
			if changed {
				_, err = fmt.Fprintf(c.App.Writer, "%s\n", document)
			}
		case isTerminal(c.App.Writer):
			fmt.Fprint(c.App.Writer, clearTerminal)
			err = showStatus(c, st, statusErr)
		case changed:
			err = showStatus(c, st, statusErr)
			fmt.Fprintln(c.App.Writer)
		}
		if err != nil {
			return err
		}
		select {
		case <-c.Context.Done():
			return nil
		case <-tick.C:
		}
	}
}

// showStatus prints the status for people, or err if there is no status.
func showStatus(c *cli.Context, st *adminv1.GetStatusResponse, err error) error {
	if err == nil {
		return printStatus(c, st)
	}
	return printColored(c.App.Writer, [][]string{{"server", err.Error()}}, func(int) color { return red })
}
