package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var serverBackup = &cli.Command{
	Name:      "backup",
	Usage:     "back up the API keys, the signing key and the audit log",
	UsageText: "msb server backup [options] FILE\n\nmsb server backup - | age --recipient ... >msb.backup.age",
	Description: "The backup is a consistent snapshot, taken while the server runs. It does not contain sandboxes and images.\n" +
		"If FILE is -, it is written to standard output.\n\n" +
		"Keep FILE as secret as the signing key: anyone who has it can run a server that accepts every API key. FILE\n" +
		"is readable by its owner only. If the backup fails, FILE is not created or changed.",
	Flags:  []cli.Flag{&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "replace FILE if it exists"}},
	Action: backup,
}

func backup(c *cli.Context) error {
	path, err := oneFile(c)
	if err != nil {
		return err
	}
	a := admin(c)
	defer a.Close()
	if path == "-" {
		if isTerminal(c.App.Writer) {
			return usageError(c, "the backup contains secrets and is not printed on a terminal: give a FILE, or redirect the output")
		}
		return writeBackup(c, a, c.App.Writer)
	}
	f, err := createFile(path)
	if err != nil {
		return err
	}
	defer f.discard()
	switch _, err := f.old(); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case !c.Bool("force"):
		return fmt.Errorf("%s already exists; use --force to replace it", path)
	}
	if err := writeBackup(c, a, f); err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := f.commit(); err != nil {
		return err
	}
	fmt.Fprintf(c.App.ErrWriter, "the backup was written to %s (%s). Keep it secret: it contains the signing key\n", printable(path), size(info.Size()))
	return nil
}

func writeBackup(c *cli.Context, a *client.Admin, w io.Writer) error {
	progress := newProgress(c.App.ErrWriter, 0)
	defer progress.end()
	if err := a.Backup(c.Context, io.MultiWriter(w, progress)); err != nil {
		return fmt.Errorf("back up: %w", err)
	}
	return nil
}

// oneFile returns the path of a file, which must be the only argument.
func oneFile(c *cli.Context) (string, error) {
	if err := checkNotEmpty(c); err != nil {
		return "", err
	}
	if c.NArg() != 1 {
		return "", usageError(c, "give one FILE")
	}
	return c.Args().First(), nil
}
