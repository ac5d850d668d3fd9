package portal

import (
	"archive/tar"
	"bufio"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/sys/ctxio"
	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// xattrRecord is the prefix of the PAX records for extended attributes.
const xattrRecord = "SCHILY.xattr."

// The name of a PAX record has no "=". GNU tar escapes it in this way.
var (
	escapeXattr   = strings.NewReplacer("%", "%25", "=", "%3D")
	unescapeXattr = strings.NewReplacer("%25", "%", "%3D", "=")
)

// ReadTree implements portalv1.FileServiceServer.
func (s *fileServer) ReadTree(req *portalv1.ReadTreeRequest, stream grpc.ServerStreamingServer[portalv1.ReadTreeResponse]) error {
	loc, err := locate(req.GetRoot())
	if err != nil {
		return err
	}
	real, err := filepath.EvalSymlinks(loc.path)
	if err != nil {
		return fileError(loc.path, err)
	}
	info, err := os.Stat(real)
	if err != nil {
		return fileError(loc.path, err)
	}
	if !info.IsDir() && !info.Mode().IsRegular() {
		return status.Errorf(codes.FailedPrecondition, "%s is neither a directory nor a regular file", quote(loc.path))
	}
	out := bufio.NewWriterSize(pieces(func(data []byte) error { return stream.Send(&portalv1.ReadTreeResponse{Data: data}) }), pieceSize)
	if err := archive(stream.Context(), s.memory, out, real, filepath.Base(loc.path), false); err != nil {
		return fileError(loc.path, err)
	}
	return fileError(loc.path, out.Flush())
}

// archive writes the file or directory at path to out as a tar archive. It does not follow a symbolic link at path. The
// names in the archive begin with "./", except that a file other than a directory is called name. With complete,
// archive fails if a file cannot be archived. Otherwise, it leaves out sockets, devices and pipes. budget limits what
// archive keeps of the names in the tree. archive ends with ctx.
func archive(ctx context.Context, budget *limit.Budget, out io.Writer, path, name string, complete bool) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	a := archiver{
		walk: newWalk(ctx, budget, path), w: tar.NewWriter(out), name: name, complete: complete,
		names: newNameTable(), links: make(map[inode]string), buf: make([]byte, pieceSize),
	}
	defer a.end()
	a.root = len(a.path)
	base := filepath.Base(path)
	if path == "/" {
		base = "."
	}
	if info, err := os.Lstat(path); err != nil {
		return err
	} else if info.IsDir() {
		a.name = "."
	}
	if err := a.add(dir, base); err != nil {
		return err
	}
	return a.w.Close()
}

// inode identifies a file that has several names.
type inode struct{ device, number uint64 }

// archiver writes files to a tar archive.
type archiver struct {
	*walk
	root     int    // the length of the path of the tree
	name     string // of the tree in the archive
	w        *tar.Writer
	complete bool
	names    nameTable
	links    map[inode]string // the names in the archive of the files that have several links
	buf      []byte
}

// add adds the current file, which is name in dir, and everything below it to the archive. A file that does not exist is
// left out.
func (a *archiver) add(dir *os.File, name string) error {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if vanished(err) {
		return nil
	}
	if err != nil {
		return fileError(a.current(), err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR, unix.S_IFREG:
		f, err := openAt(dir, name, unix.O_NOFOLLOW|unix.O_NONBLOCK)
		if vanished(err) {
			return nil
		}
		if err != nil {
			return fileError(a.current(), err)
		}
		defer f.Close()
		return a.addOpen(f)
	case unix.S_IFLNK:
		hdr := a.header(&st, tar.TypeSymlink)
		if hdr.Linkname, err = readlinkAt(int(dir.Fd()), name); err != nil {
			if vanished(err) {
				return nil
			}
			return fileError(a.current(), err)
		}
		return a.w.WriteHeader(hdr)
	case unix.S_IFIFO:
		if a.complete {
			return a.w.WriteHeader(a.header(&st, tar.TypeFifo))
		}
	default:
		if a.complete {
			return status.Errorf(codes.FailedPrecondition, "%s is a socket or device, which cannot be copied: remove it first", quote(a.current()))
		}
	}
	return nil
}

// addOpen adds the current file, which is an open file or directory.
func (a *archiver) addOpen(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fileError(a.current(), err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err := a.addDirectory(f, &st); err != nil || isGenerated(f) {
			return err
		}
		return a.entries(f, func(name string) error { return a.add(f, name) })
	case unix.S_IFREG:
		return a.addRegular(f, &st)
	}
	return changed(a.current())
}

// addDirectory adds the current file, which is an open directory with the status st, without what is in it.
func (a *archiver) addDirectory(f *os.File, st *unix.Stat_t) (err error) {
	hdr := a.header(st, tar.TypeDir)
	hdr.Name += "/"
	if hdr.PAXRecords, err = a.records(f); err != nil {
		return err
	}
	return a.w.WriteHeader(hdr)
}

// addRegular adds the current file, which is an open regular file with the status st.
func (a *archiver) addRegular(f *os.File, st *unix.Stat_t) (err error) {
	hdr := a.header(st, tar.TypeReg)
	if st.Nlink > 1 {
		id := inode{uint64(st.Dev), st.Ino}
		if first, ok := a.links[id]; ok {
			hdr.Typeflag, hdr.Linkname = tar.TypeLink, first
			return a.w.WriteHeader(hdr)
		}
		if err := a.memory.hold(perAttributes + len(hdr.Name)); err != nil {
			return err
		}
		a.links[id] = hdr.Name
	}
	hdr.Size = st.Size
	if hdr.PAXRecords, err = a.records(f); err != nil {
		return err
	}
	if err := a.w.WriteHeader(hdr); err != nil {
		return err
	}
	n, err := io.CopyBuffer(a.w, io.LimitReader(ctxio.Reader(a.ctx, f), st.Size), a.buf)
	if err == nil && n < st.Size {
		err = changed(a.current())
	}
	return fileError(a.current(), err)
}

// records returns the PAX records for the extended attributes of the current file, which is open.
func (a *archiver) records(f *os.File) (map[string]string, error) {
	attrs, err := xattrs(f)
	if err != nil {
		return nil, fileError(a.current(), err)
	}
	records := make(map[string]string, len(attrs))
	for name, value := range attrs {
		records[xattrRecord+escapeXattr.Replace(name)] = string(value)
	}
	return records, nil
}

// header returns the header of the current file, which has the status st.
func (a *archiver) header(st *unix.Stat_t, typeflag byte) *tar.Header {
	return &tar.Header{
		Format: tar.FormatPAX, Typeflag: typeflag, Name: a.name + string(a.path[a.root:]), Mode: int64(st.Mode & permissions),
		Uid: int(st.Uid), Gid: int(st.Gid), Uname: a.names.user(st.Uid), Gname: a.names.group(st.Gid),
		ModTime: time.Unix(st.Mtim.Unix()),
	}
}

// moveByCopy moves a file or directory to another file system. It does not replace the destination, nor remove the
// source, before the copy is complete. Until then, the end of ctx ends it.
func moveByCopy(ctx context.Context, budget *limit.Budget, source, destination string) error {
	info, err := os.Lstat(source)
	if err != nil {
		return fileError(source, err)
	}
	temp, err := os.MkdirTemp(filepath.Dir(destination), tempPattern)
	if err != nil {
		return err
	}
	defer func() { _ = removeTree(context.WithoutCancel(ctx), budget, temp) }()
	const name = "file"
	tree, into := io.Pipe()
	archived := make(chan error, 1)
	go func() {
		err := archive(ctx, budget, into, source, name, true)
		into.CloseWithError(err)
		archived <- err
	}()
	_, err = extract(ctx, budget, tree, temp, extractOptions{keepOwners: true, root: true})
	tree.CloseWithError(err) // so that archive ends
	<-archived
	if err != nil {
		return err
	}
	complete := temp
	if !info.IsDir() {
		complete = filepath.Join(temp, name)
	}
	if err := unix.Rename(complete, destination); err != nil {
		return err
	}
	// The move is done, so the end of the call must not leave a part of the source.
	return fileError(source, removeTree(context.WithoutCancel(ctx), budget, source))
}
