package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

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

// progress is a writer that counts bytes and shows their number on a terminal.
type progress struct {
	w           io.Writer // nil if it is not a terminal
	done, total int64     // in bytes; total is 0 if it is unknown
	printed     time.Time // when the number was last shown
}

func newProgress(w io.Writer, total int64) *progress {
	if !isTerminal(w) {
		w = nil
	}
	return &progress{w: w, total: total}
}

// Write counts the bytes in b and updates the terminal every 100 ms.
func (p *progress) Write(b []byte) (int, error) {
	p.done += int64(len(b))
	if p.w != nil && time.Since(p.printed) > 100*time.Millisecond {
		p.printed = time.Now()
		p.print()
	}
	return len(b), nil
}

func (p *progress) print() {
	if p.total > 0 {
		fmt.Fprintf(p.w, "\r%s of %s (%d%%)\x1b[K", size(p.done), size(p.total), 100*p.done/p.total)
	} else {
		fmt.Fprintf(p.w, "\r%s\x1b[K", size(p.done))
	}
}

func (p *progress) end() {
	if p.w != nil && p.done > 0 {
		p.print()
		fmt.Fprintln(p.w)
	}
}
