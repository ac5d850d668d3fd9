package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

var quietFlag = &cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "do not show the progress"}

var sandboxCp = &cli.Command{
	Name:  "cp",
	Usage: "copy files and directories to and from a sandbox",
	UsageText: "msb sandbox cp [options] FILE|DIR|- NAME:PATH\n" +
		"msb sandbox cp [options] NAME:PATH FILE|DIR|-\n\n" +
		"msb sandbox cp project my-env:/srv\n" +
		"msb sandbox cp my-env:/var/log/app.log .",
	Description: "If the target is a directory, the copy gets the name of the source in it. If the source is a directory and ends\n" +
		"with /., its entries are copied. Modes and links are kept, and files that exist are replaced. A relative PATH\n" +
		"begins at the workdir of the sandbox. A local path that has a colon needs a / before it, as in ./a:b.\n\n" +
		"- is standard input or output. A file has its bytes there, and a directory is a tar archive.\n\n" +
		callExitCodes,
	Flags: []cli.Flag{
		quietFlag,
		&cli.StringFlag{Name: "user", Aliases: []string{"u"}, Usage: "make `USER` the owner of what is copied to the sandbox"},
		namespaceFlag, serverURLFlag, verboseFlag,
	},
	Action: copyFiles,
}

// remotePath matches NAME:PATH.
var remotePath = regexp.MustCompile(`^([A-Za-z0-9][A-Za-z0-9_-]*):(?s:(.+))$`)

// splitRemote splits NAME:PATH. name is empty for a local path.
func splitRemote(text string) (name, path string) {
	match := remotePath.FindStringSubmatch(text)
	if match == nil || runtime.GOOS == "windows" && len(match[1]) == 1 { // a drive
		return "", text
	}
	return match[1], match[2]
}

func copyFiles(c *cli.Context) error {
	if c.NArg() != 2 {
		return usageError(c, "give a source and a target")
	}
	if err := checkNotEmpty(c); err != nil {
		return err
	}
	fromName, from := splitRemote(c.Args().First())
	toName, to := splitRemote(c.Args().Get(1))
	if (fromName == "") == (toName == "") {
		return usageError(c, "one of source and target must be NAME:PATH, and the other one a path of this machine")
	}
	ctx, stop := endWith(c.Context, syscall.SIGHUP)
	defer stop()
	c.Context = ctx
	progress := newProgress(c.App.ErrWriter, 0)
	if c.Bool(quietFlag.Name) {
		progress = newProgress(io.Discard, 0)
	}
	o := client.CopyOptions{
		User: c.String("user"), Progress: progress.set,
		Skipped: func(path string) {
			fmt.Fprintf(c.App.ErrWriter, "msb: %s was not copied, because it is not a file, a directory or a link\n", printable(path))
		},
	}
	err := callServer(c, fromName+toName, func(r *client.Client) error {
		f := r.Sandbox(c.String(namespaceFlag.Name), fromName+toName).Files()
		if toName != "" {
			return upload(c, f, from, to, o, progress)
		}
		return download(c, f, from, to, o, progress)
	})
	progress.end()
	return withCallExitCode(err)
}

// isDirectory reports whether a file of the sandbox is a directory or a link to one.
func isDirectory(info *rpc.FileInfo) bool {
	return info.Type == rpc.FileTypeDirectory || info.Target != nil && info.Target.Type == rpc.FileTypeDirectory
}

// upload copies from a local path to a path of the sandbox.
func upload(c *cli.Context, f client.Files, from, to string, o client.CopyOptions, progress *progress) error {
	info, err := f.Stat(c.Context, to)
	if err != nil && (!errdefs.IsNotFound(err) || noSandbox(err)) {
		return err
	}
	directory := err == nil && isDirectory(info)
	if from == "-" {
		counted := io.TeeReader(interruptible(c.Context, c.App.Reader), progress)
		if directory {
			_, err = f.WriteTree(c.Context, to, counted, o.User)
		} else {
			_, err = f.Write(c.Context, to, counted, client.WriteOptions{User: o.User})
		}
		return err
	}
	local, err := os.Stat(from)
	if err != nil {
		return err
	}
	contents := local.IsDir() && endsWithDot(filepath.ToSlash(from))
	if (directory || strings.HasSuffix(to, "/")) && !contents {
		absolute, err := filepath.Abs(from)
		if err != nil {
			return err
		}
		to = path.Join(to, filepath.Base(absolute))
	}
	return f.Upload(c.Context, from, to, o)
}

// endsWithDot reports whether a path means the entries of a directory.
func endsWithDot(path string) bool { return path == "." || strings.HasSuffix(path, "/.") }

// localBase returns the name of the copy of a file of the sandbox in a directory: the last element of the path that the user has
// given. If it has none, such as ".", it is that of the file's path, unless the sandbox has sent one that is not a name.
func localBase(from string, info *rpc.FileInfo) string {
	name := path.Base(from)
	if name == "." || name == ".." || name == "~" || name == "/" {
		name = path.Base(info.Path)
	}
	if !filepath.IsLocal(name) || name == "." || strings.ContainsAny(name, `/\\`) {
		return ""
	}
	return name
}

// download copies from a path of the sandbox to a local path.
func download(c *cli.Context, f client.Files, from, to string, o client.CopyOptions, progress *progress) error {
	info, err := f.Stat(c.Context, from)
	if err != nil {
		return err
	}
	contents := isDirectory(info) && endsWithDot(from)
	name := localBase(from, info)
	if info.Target != nil {
		from = info.Target.Path // the archive of a link has only the link
		if info.Target.PathBase64 != nil {
			from = string(info.Target.PathBase64)
		}
	}
	if to == "-" {
		open := func() (io.ReadCloser, error) { return f.Open(c.Context, from) }
		out := forTerminal(c.App.Writer)
		if isDirectory(info) {
			if isTerminal(c.App.Writer) {
				return errors.New("a tar archive is not printed on a terminal: redirect standard output")
			}
			open = func() (io.ReadCloser, error) { return f.OpenTree(c.Context, from) }
		}
		content, err := open()
		if err != nil {
			return err
		}
		defer content.Close()
		_, err = io.Copy(io.MultiWriter(out, progress), content)
		return cmp.Or(err, flush(out))
	}
	local, err := os.Stat(to)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	into := err == nil && local.IsDir()
	if err != nil && strings.HasSuffix(filepath.ToSlash(to), "/") && !isDirectory(info) {
		return fmt.Errorf("there is no directory %s", to)
	}
	if !into {
		return f.Download(c.Context, from, to, o)
	}
	if to, err = filepath.EvalSymlinks(to); err != nil { // the user has named this link; Download follows none
		return err
	}
	if !contents {
		if name == "" {
			return fmt.Errorf("the name of the copy is not known: give it, as in %s", filepath.Join(to, "NAME"))
		}
		to = filepath.Join(to, name)
	}
	return f.Download(c.Context, from, to, o)
}
