package client

import (
	"archive/tar"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// CopyOptions are options of Upload and Download. Each field is optional.
type CopyOptions struct {
	// User is the owner of what is uploaded, as in WriteOptions.
	User string
	// Progress is called often, with the number of bytes of files that were copied so far. It may be called by another
	// goroutine, and by an upload that failed even after its end.
	Progress func(bytes int64)
	// Skipped is called with the path of each file of the tree that cannot be copied, because it is a socket, a pipe or a
	// device.
	Skipped func(path string)
}

func (o *CopyOptions) skip(path string) {
	if o.Skipped != nil {
		o.Skipped(path)
	}
}

// counted returns a reader that reports the progress.
func (o *CopyOptions) counted(r io.Reader, total *int64) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		n, err := r.Read(p)
		*total += int64(n)
		if o.Progress != nil && n > 0 {
			o.Progress(*total)
		}
		return n, err
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// Upload copies a local file or directory to the path remote in the sandbox. A file replaces the one at remote in one step. The
// entries of a directory, with their modes, times and links, are added to the directory remote; files that exist are replaced. A
// symbolic link is followed if it is local itself, and copied as a link if it is in the directory.
func (f Files) Upload(ctx context.Context, local, remote string, o CopyOptions) error {
	info, err := os.Stat(local)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return f.uploadTree(ctx, local, remote, &o)
	}
	if !info.Mode().IsRegular() {
		return errorf(errdefs.ErrInvalidArgument, "%s is neither a file nor a directory", local)
	}
	file, err := os.Open(local)
	if err != nil {
		return err
	}
	defer file.Close()
	options := WriteOptions{User: o.User}
	if runtime.GOOS != "windows" { // where files have no such mode
		options.Mode = fmt.Sprintf("%04o", info.Mode().Perm())
	}
	_, err = f.Write(ctx, remote, o.counted(file, new(int64)), options)
	return err
}

func (f Files) uploadTree(ctx context.Context, local, remote string, o *CopyOptions) error {
	r, w := io.Pipe()
	archived := make(chan error, 1)
	go func() {
		err := archiveTree(ctx, w, local, o)
		w.CloseWithError(err)
		archived <- err
	}()
	_, err := f.WriteTree(ctx, remote, r, o.User)
	r.CloseWithError(errStopped) // if the server has refused the archive
	if localErr := <-archived; localErr != nil && !errors.Is(localErr, errStopped) && !errors.Is(localErr, io.ErrClosedPipe) {
		return localErr // err is only its consequence
	}
	return err
}

var errStopped = errors.New("the transfer has ended")

// archiveTree writes the entries of a directory as a tar archive.
func archiveTree(ctx context.Context, w io.Writer, dir string, o *CopyOptions) error {
	archive := tar.NewWriter(w)
	linked := map[fileID]string{} // the names of files that have several
	var total int64
	err := filepath.WalkDir(dir, func(file string, _ fs.DirEntry, err error) error {
		if err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		stat := os.Lstat
		if name == "." {
			stat = os.Stat
		}
		info, err := stat(file)
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() && !info.IsDir() && info.Mode().Type() != fs.ModeSymlink {
			o.skip(file)
			return nil
		}
		target := ""
		if info.Mode().Type() == fs.ModeSymlink {
			if target, err = os.Readlink(file); err != nil {
				return err
			}
		}
		header, err := tar.FileInfoHeader(info, target)
		if err != nil {
			return err
		}
		header.Name = "./" + filepath.ToSlash(name)
		header.Format = tar.FormatPAX // which has fractions of seconds
		if !utf8.ValidString(header.Name) || !utf8.ValidString(target) {
			header.Format = tar.FormatGNU // which has names of any bytes
			header.AccessTime, header.ChangeTime, header.ModTime = time.Time{}, time.Time{}, header.ModTime.Round(time.Second)
		}
		if runtime.GOOS == "windows" { // where files have no such mode
			header.Mode = 0o644
			if info.IsDir() {
				header.Mode = 0o755
			}
		}
		header.Uid, header.Gid, header.Uname, header.Gname = 0, 0, "", "" // which the server does not use
		if id, several := idOf(info); several && info.Mode().IsRegular() {
			if first, seen := linked[id]; seen {
				header.Typeflag, header.Linkname, header.Size = tar.TypeLink, first, 0
				return archive.WriteHeader(header)
			}
			linked[id] = header.Name
		}
		if !info.Mode().IsRegular() {
			return archive.WriteHeader(header)
		}
		return archiveFile(archive, header, file, func(r io.Reader) io.Reader { return o.counted(r, &total) })
	})
	if err != nil {
		return err
	}
	return archive.Close()
}

func archiveFile(archive *tar.Writer, header *tar.Header, file string, counted func(io.Reader) io.Reader) error {
	content, err := os.Open(file)
	if err != nil {
		return err
	}
	defer content.Close()
	if err := archive.WriteHeader(header); err != nil {
		return err
	}
	n, err := io.Copy(archive, counted(io.LimitReader(content, header.Size)))
	if err == nil && n < header.Size {
		return errorf(errdefs.ErrUnavailable, "%s became shorter while it was read: copy it again", file)
	}
	return err
}

// Download copies a file or directory of the sandbox to a local path. A file replaces the one at local in one step. The entries of
// a directory, with their modes, times and links, are added to the directory local, which is created if necessary; files that
// exist are replaced. A symbolic link at local itself is not followed.
//
// The sandbox is not trusted: nothing is written outside of local, whatever it sends, hard links lead only to files of the same
// download, and files lose the bits that let programs run as another user.
func (f Files) Download(ctx context.Context, remote, local string, o CopyOptions) error {
	tree, err := f.OpenTree(ctx, remote)
	if err != nil {
		return err
	}
	defer tree.Close()
	return extractTree(ctx, tar.NewReader(tree), local, &o)
}

// extractTree extracts an archive: if it begins with a directory, into the directory local, and otherwise its only entry to local.
func extractTree(ctx context.Context, archive *tar.Reader, local string, o *CopyOptions) (err error) {
	header, err := archive.Next()
	if err != nil {
		return archiveError(err)
	}
	x := &extraction{o: o, archive: archive, files: map[string]bool{}}
	existing, statErr := os.Lstat(local)
	if header.Typeflag != tar.TypeDir {
		if statErr == nil && existing.IsDir() {
			return errorf(errdefs.ErrInvalidArgument, "%s is a directory", local)
		}
		if statErr == nil && !existing.Mode().IsRegular() {
			return errorf(errdefs.ErrAlreadyExists, "%s exists and is not a file: remove it first", local)
		}
		if header.Typeflag != tar.TypeReg {
			return errorf(errdefs.ErrInvalidArgument, "in the sandbox, this is neither a file nor a directory")
		}
		if x.root, err = os.OpenRoot(filepath.Dir(local)); err != nil {
			return err
		}
		defer x.root.Close()
		return x.extract(header, filepath.Base(local))
	}
	if statErr == nil && !existing.IsDir() { // also a link, which an earlier download may have made
		return errorf(errdefs.ErrAlreadyExists, "%s exists and is not a directory: remove it first", local)
	}
	if err := os.MkdirAll(local, 0o777); err != nil {
		return err
	}
	if x.root, err = os.OpenRoot(local); err != nil {
		return err
	}
	defer x.root.Close()
	if statErr != nil {
		x.directories = append(x.directories, directory{".", *header})
	}
	for {
		if header, err = archive.Next(); err == io.EOF {
			return x.finish()
		}
		if err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			return errors.Join(archiveError(err), x.finish())
		}
		name, err := localName(header.Name)
		if err == nil {
			err = x.extract(header, name)
		}
		if err != nil {
			return errors.Join(err, x.finish())
		}
	}
}

func archiveError(err error) error {
	switch {
	case errdefs.IsUnavailable(err): // the transfer says why
	case err == io.EOF, errors.Is(err, tar.ErrHeader), errors.Is(err, io.ErrUnexpectedEOF):
		return errorf(errdefs.ErrUnavailable, "the sandbox has sent an archive that is not complete: %w", err)
	}
	return err
}

// localName returns the name of an entry as a local path.
func localName(name string) (string, error) {
	local := filepath.FromSlash(path.Clean(name))
	if !filepath.IsLocal(local) {
		return "", errorf(errdefs.ErrInvalidArgument, "the sandbox has sent a file with the name %q, which leads out of the directory", name)
	}
	return local, nil
}

// extraction extracts an archive into root, which keeps every operation inside of it.
type extraction struct {
	root    *os.Root
	archive *tar.Reader
	o       *CopyOptions
	total   int64
	// files has the names of the files that were extracted.
	files map[string]bool
	// directories get their modes and times when they have their entries.
	directories []directory
}

type directory struct {
	name   string
	header tar.Header
}

// extract extracts an entry. A file is complete or not there.
func (x *extraction) extract(header *tar.Header, name string) error {
	if parent := filepath.Dir(name); parent != "." {
		if err := x.root.MkdirAll(parent, 0o777); err != nil {
			return err
		}
	}
	switch header.Typeflag {
	case tar.TypeDir:
		if name == "." { // the target itself, whose mode is the user's
			return nil
		}
		x.directories = append(x.directories, directory{name, *header})
		if err := x.root.Mkdir(name, 0o700); !errors.Is(err, fs.ErrExist) {
			return err
		}
		info, err := x.root.Stat(name)
		if err == nil && !info.IsDir() {
			return errorf(errdefs.ErrAlreadyExists, "%s exists and is not a directory: remove it first", filepath.Join(x.root.Name(), name))
		}
		return err
	case tar.TypeReg, tar.TypeLink, tar.TypeSymlink:
	default:
		x.o.skip(header.Name)
		return nil
	}
	temporary := filepath.Join(filepath.Dir(name), ".msb-"+rand.Text())
	err := x.create(header, temporary)
	if err == nil {
		err = x.root.Rename(temporary, name)
	}
	if err == nil {
		x.files[name] = header.Typeflag != tar.TypeSymlink
	} else {
		_ = x.root.Remove(temporary)
		if info, statErr := x.root.Lstat(name); statErr == nil && info.IsDir() {
			return errorf(errdefs.ErrAlreadyExists, "%s is a directory, but a file in the sandbox: remove it first", filepath.Join(x.root.Name(), name))
		}
	}
	return err
}

// create creates a file or a link.
func (x *extraction) create(header *tar.Header, name string) error {
	switch header.Typeflag {
	case tar.TypeSymlink:
		return x.root.Symlink(header.Linkname, name)
	case tar.TypeLink:
		target, err := localName(header.Linkname)
		if err == nil && !x.files[target] {
			err = errorf(errdefs.ErrInvalidArgument, "the sandbox has sent a link to %q, which is not a file of the archive", header.Linkname)
		}
		if err != nil {
			return err
		}
		return x.root.Link(target, name)
	}
	file, err := x.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, x.o.counted(x.archive, &x.total))
	if err == nil {
		err = file.Chmod(mode(header))
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return archiveError(err)
	}
	return x.root.Chtimes(name, time.Time{}, header.ModTime)
}

// mode returns the permissions of an entry, without the bits that let a program run as another user.
func mode(header *tar.Header) fs.FileMode { return header.FileInfo().Mode().Perm() }

// finish sets the modes and times of directories, the innermost first.
func (x *extraction) finish() error {
	var err error
	for _, d := range slices.Backward(x.directories) {
		err = errors.Join(err, x.root.Chmod(d.name, mode(&d.header)), x.root.Chtimes(d.name, time.Time{}, d.header.ModTime))
	}
	return err
}
