package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

var serverRestore = &cli.Command{
	Name:      "restore",
	Usage:     "restore the API keys and the signing key from a backup",
	UsageText: "msb server restore [options] FILE",
	Description: "The running server replaces its signing key with the backup's, so the API keys in the backup become valid. If\n" +
		"the current signing key is a different one, the keys created with it become invalid. If the backup is damaged,\n" +
		"nothing is changed. Sandboxes keep running. If FILE is -, the backup is read from standard input.\n\n" +
		"Keys that were revoked since the backup stay revoked. A reset since the backup is undone: the keys that it\n" +
		"invalidated become valid again, also those that were created after the backup. If you reset the server because\n" +
		"a key leaked, revoke that key after the restore.",
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
			return fileError("read", path, err)
		}
		defer file.Close()
		info, err := file.Stat()
		if err != nil {
			return fileError("read", path, err)
		}
		if info.IsDir() {
			return fmt.Errorf("could not read %s: it is a directory", path)
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
	before, err := liveKeys(c.Context, a)
	if err != nil {
		return err
	}
	progress := newProgress(c.App.ErrWriter, total)
	resp, err := a.Restore(c.Context, io.TeeReader(file, progress))
	progress.end()
	if err != nil {
		err = fmt.Errorf("could not restore %s: %w", path, err)
	}
	if errdefs.IsInvalidArgument(err) {
		return cli.Exit(err.Error(), exitFailure) // the file is wrong, not the command line
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(c.App.ErrWriter, "the backup of %s was restored: it contains %s; %s; the signing key is %s\n",
		localTime(resp.GetTakenAt()), plural(resp.GetLive(), "live API key", "live API keys"),
		plural(resp.GetInvalidated(), "API key became invalid", "API keys became invalid"), resp.GetSigningKeyId())
	after, err := liveKeys(c.Context, a)
	if err != nil {
		return fmt.Errorf("the backup was restored, but msb could not count the API keys that are live now: %w", err)
	}
	became := 0
	for id := range after {
		if !before[id] {
			became++
		}
	}
	fmt.Fprintf(c.App.ErrWriter, "%s live now ('msb server key list' lists them); %s valid by the restore\n",
		plural(len(after), "API key is", "API keys are"), plural(became, "key became", "keys became"))
	return nil
}

// liveKeys returns the ids of the live keys.
func liveKeys(ctx context.Context, a *client.Admin) (map[string]bool, error) {
	ids := map[string]bool{}
	for key, err := range a.Keys(ctx, &adminv1.ListKeysRequest{State: adminv1.KeyState_KEY_STATE_LIVE}) {
		if err != nil {
			return nil, err
		}
		ids[key.GetId()] = true
	}
	return ids, nil
}
