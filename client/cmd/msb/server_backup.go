package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var serverBackup = &cli.Command{
	Name:      "backup",
	Usage:     "write the keys, the signing key and the audit log to a file",
	UsageText: "msb server backup FILE [--force]\nmsb server backup - | age --recipient ... >msb.backup.age",
	Description: "The server runs on meanwhile, and the archive is of one moment. FILE is readable by its owner only, and as\n" +
		"secret as the signing key: whoever has it can be a server that takes every API key. It is there whole or not\n" +
		"at all. Sandboxes and images are not part of it. - is standard output.",
	Flags:  []cli.Flag{&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "replace FILE if it is there"}},
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
			return usage(c, "an archive with secrets is not printed on a terminal: name a FILE, or send the output to one")
		}
		return writeBackup(c, a, c.App.Writer)
	}
	if err := mayPlace(path, c.Bool("force")); err != nil {
		return err
	}
	f, err := createFile(path)
	if err != nil {
		return err
	}
	defer f.discard()
	if err := writeBackup(c, a, f); err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := f.place(); err != nil {
		return err
	}
	fmt.Fprintf(c.App.ErrWriter, "%s has the backup (%s). Keep it as secret as the signing key: it is in there\n", printable(path), size(info.Size()))
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

// oneFile is the only argument of a command.
func oneFile(c *cli.Context) (string, error) {
	if err := noneEmpty(c); err != nil {
		return "", err
	}
	if c.NArg() != 1 {
		return "", usage(c, "name one FILE")
	}
	return c.Args().First(), nil
}

// mayPlace says whether a new file may come to path.
func mayPlace(path string, replace bool) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file; - is standard output", path)
	case !replace:
		return fmt.Errorf("%s is there already; --force replaces it", path)
	}
	return nil
}

// progress tells whoever sits at a terminal how much has passed through it.
type progress struct {
	w           io.Writer // nil: nobody sits there
	done, total int64     // bytes; a total of 0 is not known
	said        time.Time
}

func newProgress(w io.Writer, total int64) *progress {
	if !isTerminal(w) {
		w = nil
	}
	return &progress{w: w, total: total}
}

// Write counts.
func (p *progress) Write(b []byte) (int, error) {
	p.done += int64(len(b))
	if p.w != nil && time.Since(p.said) > 100*time.Millisecond {
		p.said = time.Now()
		p.say()
	}
	return len(b), nil
}

func (p *progress) say() {
	if p.total > 0 {
		fmt.Fprintf(p.w, "\r%s of %s (%d%%)\x1b[K", size(p.done), size(p.total), 100*p.done/p.total)
	} else {
		fmt.Fprintf(p.w, "\r%s\x1b[K", size(p.done))
	}
}

func (p *progress) end() {
	if p.w != nil && p.done > 0 {
		p.say()
		fmt.Fprintln(p.w)
	}
}
