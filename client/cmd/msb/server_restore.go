package main

import (
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"
)

var serverRestore = &cli.Command{
	Name:      "restore",
	Usage:     "bring back the keys and the signing key of a backup",
	UsageText: "msb server restore FILE [--yes]",
	Description: "The running server takes over the backup's signing key, so that its API keys are good from then on. Keys that\n" +
		"were revoked since the backup stay revoked. If the present signing key is another one, the keys that were made\n" +
		"with it are refused. Nothing changes unless the whole archive is good. Sandboxes run on. - is standard input.",
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
		return usage(c, "standard input is a terminal: name a FILE")
	}
	if err := confirm(c, "This replaces the server's signing key by that of "+path+
		": if they differ, every present API key that is not in the backup is refused, for good."); err != nil {
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
	fmt.Fprintf(c.App.ErrWriter, "the backup of %s is restored: %d API keys of it are live, %d that were live before are refused; the signing key is %s\n",
		localTime(resp.GetTakenAt()), resp.GetLive(), resp.GetInvalidated(), resp.GetSigningKeyId())
	return nil
}
