package portal

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/sys/ctxio"
	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// maxEntryName limits the name of an entry of an archive, in bytes. The kernel's limit for a path does not apply, because
// the directories in it are opened one after another.
const maxEntryName = 16 << 10

// headerCost is how many bytes of memory a byte of a header can need. A header can consist of many records of a few bytes.
const headerCost = 16

// WriteTree implements portalv1.FileServiceServer.
func (s *fileServer) WriteTree(stream grpc.ClientStreamingServer[portalv1.WriteTreeRequest, portalv1.WriteTreeResponse]) error {
	req, err := stream.Recv()
	if err != nil && err != io.EOF {
		return err
	}
	start := req.GetStart()
	if start == nil {
		return status.Error(codes.InvalidArgument, "the first message has no start")
	}
	loc, err := locateForWriting(start.GetDirectory())
	if err != nil {
		return err
	}
	created, err := loc.makeDirectory(0o755)
	if err != nil {
		return fileError(loc.path, err)
	}
	archived := upload(stream, func(req *portalv1.WriteTreeRequest) ([]byte, bool) {
		_, ok := req.GetPart().(*portalv1.WriteTreeRequest_Data)
		return req.GetData(), ok
	})
	entries, err := extract(stream.Context(), s.memory, archived, loc.path, extractOptions{
		user: loc.user, keepOwners: start.GetKeepOwners(), root: created,
	})
	if err != nil {
		return fileError(loc.path, err)
	}
	return stream.SendAndClose(&portalv1.WriteTreeResponse{Entries: entries})
}

// archiveReader reads an archive. It remembers why it ended, because the reader of the entries reports some errors in its
// own words.
type archiveReader struct {
	io.Reader
	err error
	// inHeader says that a header is read. It may have 1 MiB, so memory holds it.
	inHeader bool
	memory   *memory
	held     int // of memory
}

func (r *archiveReader) Read(b []byte) (n int, err error) {
	if r.err != nil {
		return 0, r.err
	}
	n, r.err = r.Reader.Read(b)
	if r.inHeader {
		if err := r.memory.hold(n * headerCost); err != nil {
			r.err = err
			return 0, err
		}
		r.held += n * headerCost
	}
	return n, r.err
}

// header calls next, which reads the next header. It forgets the header before.
func (r *archiveReader) header(next func() (*tar.Header, error)) (*tar.Header, error) {
	r.memory.release(r.held)
	r.held, r.inHeader = 0, true
	defer func() { r.inHeader = false }()
	return next()
}

// extractOptions say how extract sets what an archive describes.
type extractOptions struct {
	// user owns the entries. If it is nil, they are the portal's.
	user *account
	// keepOwners gives the entries the owners in the archive, by number.
	keepOwners bool
	// root sets the attributes of the directory itself, if the archive has an entry "." for it.
	root bool
}

// extract extracts a tar archive into the directory, and returns the number of entries. No entry leads out of
// the directory: the names are local, and os.Root refuses to follow links that lead out. It reads archived to its end,
// or until ctx ends. budget limits what extract keeps of the headers.
func extract(ctx context.Context, budget *limit.Budget, archived io.Reader, directory string, o extractOptions) (entries uint64, err error) {
	root, err := os.OpenRoot(directory)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	in := bufio.NewReader(archived)
	if magic, _ := in.Peek(2); bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		return 0, status.Error(codes.InvalidArgument, "the archive is compressed with gzip: send an uncompressed tar archive")
	}
	m := &memory{budget: budget}
	defer m.close()
	source := &archiveReader{Reader: in, memory: m}
	x := extractor{
		extractOptions: o, ctx: ctx, memory: m, dir: root, path: directory,
		archive: tar.NewReader(source), directories: make(map[string]attributes), buf: make([]byte, pieceSize),
	}
	x.content = ctxio.Reader(ctx, x.archive)
	for {
		hdr, err := source.header(x.archive.Next)
		if err == io.EOF {
			break
		}
		name := ""
		if err == nil {
			if hdr.Typeflag == tar.TypeXGlobalHeader {
				continue // comments of the archive
			}
			name = hdr.Name
			err = x.entry(hdr)
		}
		if source.err != nil && source.err != io.EOF {
			err = source.err
		}
		if err != nil {
			return 0, x.entryError(name, err)
		}
		entries++
	}
	if source.err == io.EOF {
		// A complete archive ends with two blocks of zeros, after which Next does not read.
		return 0, status.Error(codes.InvalidArgument, "the archive is not complete: it has no end")
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return 0, err
	}
	return entries, x.finishDirectories()
}

// extractor extracts the entries of an archive.
type extractor struct {
	extractOptions
	ctx     context.Context
	memory  *memory
	dir     *os.Root
	path    string // of dir
	archive *tar.Reader
	content io.Reader // of the current entry
	// directories has the attributes of the entries for directories by their clean names. They are set at the end, because
	// the mode may not permit to create files, which also changes the time of modification.
	directories map[string]attributes
	buf         []byte
}

// attributes are what extract sets of a file, besides its content.
type attributes struct {
	mode     uint32
	uid, gid uint32
	modified unix.Timespec
	xattrs   []xattr
}

// xattr is an extended attribute user.*.
type xattr struct{ name, value string }

// newAttributes returns the attributes in a header. It does not keep the header in memory.
func newAttributes(hdr *tar.Header) (attributes, error) {
	modified, err := unix.TimeToTimespec(hdr.ModTime)
	if err != nil {
		return attributes{}, err
	}
	a := attributes{mode: uint32(hdr.Mode & permissions), uid: uint32(hdr.Uid), gid: uint32(hdr.Gid), modified: modified}
	total := 0
	for record, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(record, xattrRecord)
		if !ok || !strings.HasPrefix(name, "user.") {
			continue
		}
		if total += len(name) + len(value); total > maxXattrs {
			return attributes{}, badEntry(hdr.Name, fmt.Sprintf("has more than %d KiB of extended attributes", maxXattrs>>10))
		}
		a.xattrs = append(a.xattrs, xattr{strings.Clone(unescapeXattr.Replace(name)), strings.Clone(value)})
	}
	return a, nil
}

// size returns how many bytes the attributes of the file name need in memory, with its name.
func (a attributes) size(name string) int {
	size := perAttributes + len(name)
	for _, x := range a.xattrs {
		size += perItem + len(x.name) + len(x.value)
	}
	return size
}

// entryError returns the gRPC status for an error of the entry name. An error other than that of a system call or a
// status is a fault of the archive.
func (x *extractor) entryError(name string, err error) error {
	var errno unix.Errno
	if errors.As(err, &errno) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fileError(filepath.Join(x.path, name), err)
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		return badEntry(name, "leads out of the directory")
	}
	if name == "" {
		return status.Errorf(codes.InvalidArgument, "this is not a complete tar archive (%v)", err)
	}
	return badEntry(name, "is not complete ("+err.Error()+")")
}

func badEntry(name, problem string) error {
	return status.Errorf(codes.InvalidArgument, "entry %s of the archive %s", quote(name), problem)
}

// entry extracts an entry.
func (x *extractor) entry(hdr *tar.Header) error {
	if err := x.ctx.Err(); err != nil {
		return err
	}
	if !filepath.IsLocal(hdr.Name) {
		return badEntry(hdr.Name, "leads out of the directory: use relative names without \"..\"")
	}
	if len(hdr.Name) > maxEntryName {
		return badEntry(hdr.Name, "has a name that is too long")
	}
	name := path.Clean(hdr.Name)
	if strings.Count(name, "/") >= maxDepth {
		return badEntry(hdr.Name, fmt.Sprintf("is in %d directories or more: use fewer", maxDepth))
	}
	// The kernel reserves the largest number. A hard link has the owner of the file.
	if x.keepOwners && hdr.Typeflag != tar.TypeLink && (hdr.Uid < 0 || hdr.Gid < 0 || hdr.Uid >= 1<<32-1 || hdr.Gid >= 1<<32-1) {
		return badEntry(hdr.Name, "has an owner that is not a valid number")
	}
	attrs, err := newAttributes(hdr)
	if err != nil {
		return err
	}
	if name == "." {
		if hdr.Typeflag != tar.TypeDir {
			return badEntry(hdr.Name, "is not a directory")
		}
		if x.root {
			return x.finishLater(name, attrs)
		}
		return nil
	}
	dir, err := x.parent(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	base := path.Base(name)
	switch hdr.Typeflag {
	case tar.TypeDir:
		if err := x.finishLater(name, attrs); err != nil {
			return err
		}
		return x.directory(dir, base)
	case tar.TypeReg, tar.TypeGNUSparse:
		return x.file(dir, base, attrs)
	case tar.TypeSymlink:
		return x.symlink(dir, base, hdr, attrs)
	case tar.TypeLink:
		return x.link(dir, base, name, hdr)
	case tar.TypeFifo:
		return x.pipe(dir, base, attrs)
	case tar.TypeChar, tar.TypeBlock:
		return badEntry(hdr.Name, "is a device: leave it out")
	}
	return badEntry(hdr.Name, "has an unknown type: leave it out")
}

// parent opens the directory of the entry name. It creates missing directories.
func (x *extractor) parent(name string) (*os.File, error) {
	dir := path.Dir(name)
	f, err := x.dir.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if !errors.Is(err, fs.ErrNotExist) || dir == "." {
		return f, err
	}
	above, err := x.parent(dir)
	if err != nil {
		return nil, err
	}
	defer above.Close()
	if err := x.makeDirectory(above, path.Base(dir), 0o755); err != nil {
		return nil, err
	}
	return openAt(above, path.Base(dir), unix.O_DIRECTORY|unix.O_NOFOLLOW)
}

// makeDirectory creates the directory base in dir, unless there is a file with this name.
func (x *extractor) makeDirectory(dir *os.File, base string, mode uint32) error {
	err := unix.Mkdirat(int(dir.Fd()), base, mode)
	if err == unix.EEXIST {
		return nil
	}
	if err == nil && x.user != nil {
		err = unix.Fchownat(int(dir.Fd()), base, int(x.user.uid), int(x.user.gid), unix.AT_SYMLINK_NOFOLLOW)
	}
	return err
}

// directory creates the directory base in dir, or keeps the one that exists.
func (x *extractor) directory(dir *os.File, base string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if err := remove(dir, base); err != nil {
			return err
		}
	}
	return x.makeDirectory(dir, base, 0o700)
}

// file writes a file under another name and then renames it, so that a file which exists is replaced in one step.
func (x *extractor) file(dir *os.File, base string, attrs attributes) (err error) {
	temporary := tempPrefix + rand.Text()
	fd, err := unix.Openat(int(dir.Fd()), temporary, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), base)
	defer func() {
		f.Close()
		if err != nil {
			_ = remove(dir, temporary)
		}
	}()
	// A file would be written without the buffer if it were not only a Writer.
	if _, err := io.CopyBuffer(struct{ io.Writer }{f}, x.content, x.buf); err != nil {
		return err
	}
	if err := x.chown(int(f.Fd()), "", attrs); err != nil {
		return err
	}
	if err := setAttributes(f, attrs); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return unix.Renameat(int(dir.Fd()), temporary, int(dir.Fd()), base)
}

func (x *extractor) pipe(dir *os.File, base string, attrs attributes) error {
	if err := remove(dir, base); err != nil {
		return err
	}
	if err := unix.Mknodat(int(dir.Fd()), base, unix.S_IFIFO|0o600, 0); err != nil {
		return err
	}
	f, err := openAt(dir, base, unix.O_NONBLOCK|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := x.chown(int(f.Fd()), "", attrs); err != nil {
		return err
	}
	return setAttributes(f, attrs)
}

func (x *extractor) symlink(dir *os.File, base string, hdr *tar.Header, attrs attributes) error {
	if hdr.Linkname == "" {
		return badEntry(hdr.Name, "is a symbolic link to nothing")
	}
	if err := remove(dir, base); err != nil {
		return err
	}
	if err := unix.Symlinkat(hdr.Linkname, int(dir.Fd()), base); err != nil {
		return err
	}
	if err := x.chown(int(dir.Fd()), base, attrs); err != nil {
		return err
	}
	return setTime(int(dir.Fd()), base, attrs)
}

func (x *extractor) link(dir *os.File, base, name string, hdr *tar.Header) error {
	target := path.Clean(hdr.Linkname)
	if !filepath.IsLocal(hdr.Linkname) || len(target) > maxEntryName {
		return badEntry(hdr.Name, "is a link that leads out of the directory")
	}
	if target == name {
		return nil
	}
	from, err := x.dir.OpenFile(path.Dir(target), os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err == nil {
		defer from.Close()
		var st unix.Stat_t
		err = unix.Fstatat(int(from.Fd()), path.Base(target), &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return badEntry(hdr.Name, "is a link to "+quote(hdr.Linkname)+", which does not exist")
	}
	if err != nil {
		return err
	}
	if err := remove(dir, base); err != nil {
		return err
	}
	return unix.Linkat(int(from.Fd()), path.Base(target), int(dir.Fd()), base, 0)
}

// finishLater remembers the attributes of the directory name for finishDirectories.
func (x *extractor) finishLater(name string, attrs attributes) error {
	if before, ok := x.directories[name]; ok {
		x.memory.release(before.size(name))
	}
	if err := x.memory.hold(attrs.size(name)); err != nil {
		return err
	}
	x.directories[strings.Clone(name)] = attrs // name may be a part of a large header
	return nil
}

// finishDirectories sets the attributes of the directories, each after those below it.
func (x *extractor) finishDirectories() error {
	for _, name := range slices.Backward(slices.Sorted(maps.Keys(x.directories))) {
		err := x.ctx.Err()
		if err == nil {
			err = x.finishDirectory(name, x.directories[name])
		}
		if err != nil {
			return x.entryError(name, err)
		}
	}
	return nil
}

func (x *extractor) finishDirectory(name string, attrs attributes) error {
	dir, err := x.parent(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	f, err := openAt(dir, path.Base(name), unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer f.Close()
	// A directory that existed before keeps its owner.
	if x.keepOwners {
		if err := x.chown(int(f.Fd()), "", attrs); err != nil {
			return err
		}
	}
	return setAttributes(f, attrs)
}

// chown sets the owner of the file base in dir, or of the open file dir if base is empty.
func (x *extractor) chown(dir int, base string, attrs attributes) error {
	uid, gid := attrs.uid, attrs.gid
	if !x.keepOwners {
		if x.user == nil {
			return nil
		}
		uid, gid = x.user.uid, x.user.gid
	}
	return unix.Fchownat(dir, base, int(uid), int(gid), unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH)
}

// setAttributes sets the attributes of an open file, except its owner. The kernel may clear bits of the mode when the
// owner changes, so the owner must be set before.
func setAttributes(f *os.File, attrs attributes) error {
	for _, x := range attrs.xattrs {
		if err := unix.Fsetxattr(int(f.Fd()), x.name, []byte(x.value), 0); err != nil {
			return err
		}
	}
	if err := unix.Fchmod(int(f.Fd()), attrs.mode); err != nil {
		return err
	}
	return setTime(int(f.Fd()), "", attrs)
}

// setTime sets the time of modification of the file base in dir, or of the open file dir if base is empty.
func setTime(dir int, base string, attrs attributes) error {
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, attrs.modified}
	return unix.UtimesNanoAt(dir, base, times, unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH)
}

// remove removes the file base in dir, if there is one.
func remove(dir *os.File, base string) error {
	if err := unix.Unlinkat(int(dir.Fd()), base, 0); err != unix.ENOENT {
		return err
	}
	return nil
}
