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

// watchInterval is how often a watched server is asked.
const watchInterval = time.Second

// clearTerminal moves to the upper left corner and erases what is there.
const clearTerminal = "\x1b[H\x1b[J"

// watchStatus shows the status until Ctrl-C, also when there is none. A terminal is drawn anew each time;
// else each change is printed: as a line of JSON, or as text with an empty line behind it.
func watchStatus(c *cli.Context) error {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	var last []byte
	for {
		st, asked := askStatus(c)
		if c.Context.Err() != nil {
			return nil
		}
		if errors.Is(asked, errdefs.ErrPermissionDenied) {
			return asked // and so will be every later answer
		}
		// The document has nothing of the time that passes: it changes when the server does.
		document, err := json.Marshal(statusDocument(st, asked))
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
			err = showStatus(c, st, asked)
		case changed:
			err = showStatus(c, st, asked)
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

// showStatus prints the status for people, or why there is none.
func showStatus(c *cli.Context, st *adminv1.GetStatusResponse, err error) error {
	if err == nil {
		return printStatus(c, st)
	}
	return paintedTable(c.App.Writer, [][]string{{"server", err.Error()}}, func(int) colour { return red })
}
