package main

import (
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"
)

var serverRestore = &cli.Command{
	Name:      "restore",
	Usage:     "restore the API keys and the signing key from a backup",
	UsageText: "msb server restore [options] FILE",
	Description: "The running server replaces its signing key with the backup's, so the API keys in the backup become valid. If\n" +
		"the current signing key is a different one, the keys created with it become invalid. If the backup is damaged,\n" +
		"nothing is changed. Sandboxes keep running. If FILE is -, the backup is read from standard input.\n\n" +
		"Keys that were revoked since the backup stay revoked. A reset since the backup is undone: the keys that it\n" +
		"invalidated become valid again. If you reset the server because a key leaked, revoke that key after the restore.",
	Flags:  []cli.Flag{yesFlag},
	Action: restore,
}

func restore(c *cli.Context) error {
	path, err := oneFile(c)
	if err != nil {
		return err
	}
	file, total := os.Stdin, int64(0)
	if path != "-" {
		if file, err = os.Open(path); err != nil {
			return err
		}
		defer file.Close()
		info, err := file.Stat()
		if err != nil {
			return err
		}
		total = info.Size()
	} else if isTerminal(file) {
		return usageError(c, "standard input is a terminal: give a FILE")
	}
	if err := confirm(c, "This replaces the server's signing key with that of "+path+
		". If they differ, every current API key that is not in the backup becomes invalid permanently. A reset since the backup is undone."); err != nil {
		return err
	}
	a := admin(c)
	defer a.Close()
	progress := newProgress(c.App.ErrWriter, total)
	resp, err := a.Restore(c.Context, io.TeeReader(file, progress))
	progress.end()
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	fmt.Fprintf(c.App.ErrWriter, "the backup of %s was restored: it contains %s; %s; the signing key is %s\n",
		localTime(resp.GetTakenAt()), plural(resp.GetLive(), "live API key", "live API keys"),
		plural(resp.GetInvalidated(), "other API key became invalid", "other API keys became invalid"), resp.GetSigningKeyId())
	return nil
}
