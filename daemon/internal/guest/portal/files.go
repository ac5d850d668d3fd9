package portal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// pieceSize limits the data in a message, in bytes.
const pieceSize = 64 << 10

// maxXattrs limits the extended attributes of a file, in bytes of all names and values together.
const maxXattrs = 64 << 10

// permissions are the bits of a mode that a request may set.
const permissions = 0o7777

// tempPrefix is how the names of the portal's own files begin, and tempPattern is their pattern for os.CreateTemp. They are
// renamed when they are complete.
const (
	tempPrefix  = ".msb-"
	tempPattern = tempPrefix + "*"
)

// fileServer implements portalv1.FileServiceServer. Its handlers use the files of the sandbox with the permissions of the
// portal, which is usually root.
type fileServer struct {
	portalv1.UnimplementedFileServiceServer
	// socket is where the portal listens, or empty. Clients may not dial it.
	socket string
	// watches has an element for each call of WatchFiles.
	watches chan struct{}
	// memory limits what the calls keep in memory for the files of trees.
	memory    *limit.Budget
	transfers *transfers
}

func newFileServer(socket string, t *transfers) *fileServer {
	return &fileServer{socket: socket, watches: make(chan struct{}, maxWatches), memory: newTreeMemory(), transfers: t}
}

// location is a path of a request.
type location struct {
	path string // absolute and clean
	// user owns what is created there. It is nil if the request names no user. Then the files are the portal's.
	user *account
}

// locate returns the location that p names.
func locate(p *portalv1.FilePath) (location, error) {
	path := string(p.GetPath())
	if path == "" {
		return location{}, status.Error(codes.InvalidArgument, "the path is empty: name a file")
	}
	if strings.ContainsRune(path+p.GetWorkdir(), 0) {
		return location{}, status.Errorf(codes.InvalidArgument, "path %s contains a NUL byte", quote(path))
	}
	var loc location
	if p.GetUser() != "" {
		var err error
		if loc.user, err = lookupUser(p.GetUser()); err != nil {
			return location{}, err
		}
	}
	if rest, ok := strings.CutPrefix(path, "~"); ok && (rest == "" || rest[0] == '/') {
		home := loc.user
		if home == nil {
			home = ownAccount()
		}
		path = home.home + "/" + rest
	}
	if !filepath.IsAbs(path) {
		path = filepath.Join(p.GetWorkdir(), path)
	}
	var err error
	if loc.path, err = filepath.Abs(path); err != nil {
		return location{}, status.Errorf(codes.FailedPrecondition, "the portal's working directory was removed: use an absolute path")
	}
	return loc, nil
}

// locateForWriting is like locate, but fails if the portal cannot create files that belong to the user.
func locateForWriting(p *portalv1.FilePath) (location, error) {
	loc, err := locate(p)
	if err == nil && loc.user != nil {
		_, err = loc.user.credential()
	}
	return loc, err
}

// chown gives an open file to the user of the location.
func (l location) chown(f *os.File) error {
	if l.user == nil {
		return nil
	}
	return unix.Fchown(int(f.Fd()), int(l.user.uid), int(l.user.gid))
}

// quote quotes a path for an error. It shows only the end of a long path.
func quote(path string) string {
	const maxPath = 512 // bytes
	if len(path) > maxPath {
		path = "…" + path[len(path)-maxPath:]
	}
	return fmt.Sprintf("%q", path)
}

// refusal is the code and the text of an error of the kernel. The text follows a path.
type refusal struct {
	code codes.Code
	text string
}

var refusals = map[unix.Errno]refusal{
	unix.ENOENT:       {codes.NotFound, "does not exist"},
	unix.EEXIST:       {codes.AlreadyExists, "already exists"},
	unix.ENOSPC:       {codes.ResourceExhausted, "cannot be written: no space left in the sandbox: remove files"},
	unix.EDQUOT:       {codes.ResourceExhausted, "cannot be written: no space left in the quota of its owner: remove files"},
	unix.EMFILE:       {codes.ResourceExhausted, "cannot be opened: the portal has too many open files: try again when other calls have ended"},
	unix.ENFILE:       {codes.ResourceExhausted, "cannot be opened: the sandbox has too many open files: end programs"},
	unix.ENOMEM:       {codes.ResourceExhausted, "cannot be used: the sandbox is out of memory: end programs"},
	unix.ENAMETOOLONG: {codes.InvalidArgument, "is too long: a name has at most 255 bytes, and a path 4095"},
	unix.EINVAL:       {codes.InvalidArgument, "cannot be used: the file system does not accept the name or the position"},
	unix.EISDIR:       {codes.FailedPrecondition, "is a directory: name a file"},
	unix.ENOTDIR:      {codes.FailedPrecondition, "cannot be used: it, or a part of its path, is not a directory"},
	unix.ENOTEMPTY:    {codes.FailedPrecondition, "is a directory that is not empty: remove what is in it, or remove it recursively"},
	unix.EROFS:        {codes.FailedPrecondition, "is on a read-only file system: use another directory"},
	unix.EACCES:       {codes.FailedPrecondition, "cannot be accessed: the portal's user has no permission: change the file's mode or owner"},
	unix.EPERM:        {codes.FailedPrecondition, "cannot be changed: the kernel does not permit it to the portal's user"},
	unix.ETXTBSY:      {codes.FailedPrecondition, "is a program that is running: end it, or replace the file instead of changing it"},
	unix.EBUSY:        {codes.FailedPrecondition, "is in use, for example as a mount point: use another path"},
	unix.ELOOP:        {codes.FailedPrecondition, "leads through too many symbolic links: use another path"},
	unix.EXDEV:        {codes.FailedPrecondition, "is on another file system: copy it"},
	unix.EFBIG:        {codes.FailedPrecondition, "would be larger than the file system allows: write less"},
	unix.EMLINK:       {codes.FailedPrecondition, "would have more links than the file system allows: copy it"},
	unix.EOPNOTSUPP:   {codes.FailedPrecondition, "is on a file system that does not support this, such as extended attributes: use another directory"},
	unix.ENXIO:        {codes.FailedPrecondition, "is not a regular file"},
}

// fileError returns the gRPC status for an error of an operation on path. It returns an error that is a status already
// unchanged.
func fileError(path string, err error) error {
	var errno unix.Errno
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	case errors.As(err, &errno):
		if r, ok := refusals[errno]; ok {
			return status.Errorf(r.code, "%s %s", quote(path), r.text)
		}
		return status.Errorf(codes.FailedPrecondition, "%s cannot be used: %v", quote(path), errno)
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Errorf(codes.FailedPrecondition, "%s cannot be used: %v", quote(path), err)
}

// notRegular returns the error for a file that must be regular, but has the mode of a file of another type.
func notRegular(path string, mode uint32) error {
	if mode&unix.S_IFMT == unix.S_IFDIR {
		return fileError(path, unix.EISDIR)
	}
	return status.Errorf(codes.FailedPrecondition, "%s is not a regular file", quote(path))
}

func notDirectory(path string) error {
	return status.Errorf(codes.FailedPrecondition, "%s is not a directory", quote(path))
}

func changed(path string) error {
	return status.Errorf(codes.FailedPrecondition, "%s changed while it was read: try again", quote(path))
}

func checkMode(mode uint32) error {
	if mode&^permissions != 0 {
		return status.Errorf(codes.InvalidArgument, "mode %#o has bits other than permissions: use at most 07777", mode)
	}
	return nil
}

// maxNames limits the names of a nameTable.
const maxNames = 1024

// nameTable has the names of users and groups by their numbers. It looks up a name once, so one call should use the same
// table for all files. It forgets names when it has maxNames.
type nameTable struct{ users, groups map[uint32]string }

func newNameTable() nameTable {
	return nameTable{make(map[uint32]string), make(map[uint32]string)}
}

// user returns the name of a user, or "" if the user has none.
func (t nameTable) user(uid uint32) string {
	return lookupName(t.users, uid, func(id string) (string, error) {
		u, err := user.LookupId(id)
		if err != nil {
			return "", err
		}
		return u.Username, nil
	})
}

// group returns the name of a group, or "" if the group has none.
func (t nameTable) group(gid uint32) string {
	return lookupName(t.groups, gid, func(id string) (string, error) {
		g, err := user.LookupGroupId(id)
		if err != nil {
			return "", err
		}
		return g.Name, nil
	})
}

func lookupName(known map[uint32]string, id uint32, lookup func(string) (string, error)) string {
	name, ok := known[id]
	if !ok {
		name, _ = lookup(fmt.Sprint(id))
		name = strings.ToValidUTF8(name, "\uFFFD") // as protobuf requires
		if len(known) == maxNames {
			clear(known)
		}
		known[id] = name
	}
	return name
}

// info describes the file with status st.
func (t nameTable) info(path string, st *unix.Stat_t) *portalv1.FileInfo {
	info := &portalv1.FileInfo{
		Path: []byte(path), Size: st.Size, Mode: st.Mode & permissions,
		Uid: st.Uid, Gid: st.Gid, User: t.user(st.Uid), Group: t.group(st.Gid),
		ModifiedAt: &timestamppb.Timestamp{Seconds: st.Mtim.Sec, Nanos: int32(st.Mtim.Nsec)},
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		info.Type = portalv1.FileType_FILE_TYPE_REGULAR
	case unix.S_IFDIR:
		info.Type = portalv1.FileType_FILE_TYPE_DIRECTORY
	case unix.S_IFLNK:
		info.Type = portalv1.FileType_FILE_TYPE_SYMLINK
	default:
		info.Type = portalv1.FileType_FILE_TYPE_OTHER
	}
	return info
}

// describe describes the file name in the directory dir, which has the absolute path path. It does not follow a symbolic
// link, but describes what the link leads to.
func (t nameTable) describe(dir int, name, path string) (*portalv1.FileInfo, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, err
	}
	info := t.info(path, &st)
	if info.Type == portalv1.FileType_FILE_TYPE_SYMLINK {
		// Some links in /proc cannot be read. Their content stays empty.
		target, err := readlinkAt(dir, name)
		if vanished(err) {
			return nil, err
		}
		info.LinkTarget = []byte(target)
		if real, err := filepath.EvalSymlinks(path); err == nil && unix.Lstat(real, &st) == nil {
			info.Target = t.info(real, &st)
		}
	}
	return info, nil
}

// describePath is describe for a path.
func (t nameTable) describePath(path string) (*portalv1.FileInfo, error) {
	return t.describe(unix.AT_FDCWD, path, path)
}

func readlinkAt(dir int, name string) (string, error) {
	var buf [unix.PathMax]byte
	n, err := unix.Readlinkat(dir, name, buf[:])
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// vanished reports whether err means that a file was removed, or replaced by one of another type, after it was listed.
func vanished(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ESRCH)
}

// xattrs returns the extended attributes user.* of an open file.
func xattrs(f *os.File) (map[string][]byte, error) {
	fd := int(f.Fd())
	// The kernel's limit for the names of a file is 64 KiB, and that for a value too.
	buf := make([]byte, maxXattrs)
	n, err := unix.Flistxattr(fd, buf)
	if err != nil || n == 0 {
		if err == unix.EOPNOTSUPP {
			err = nil
		}
		return nil, err
	}
	attrs := make(map[string][]byte)
	total := 0
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if !strings.HasPrefix(name, "user.") {
			continue
		}
		n, err := unix.Fgetxattr(fd, name, buf)
		if err == unix.ENODATA {
			continue // it was removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		if total += len(name) + n; total > maxXattrs {
			return nil, status.Errorf(codes.FailedPrecondition, "%s has more than %d KiB of extended attributes", quote(f.Name()), maxXattrs>>10)
		}
		attrs[name] = slices.Clone(buf[:n])
	}
	return attrs, nil
}

// StatFile implements portalv1.FileServiceServer.
func (s *fileServer) StatFile(_ context.Context, req *portalv1.StatFileRequest) (*portalv1.StatFileResponse, error) {
	loc, err := locate(req.GetFile())
	if err != nil {
		return nil, err
	}
	info, err := newNameTable().describePath(loc.path)
	if err != nil {
		return nil, fileError(loc.path, err)
	}
	// Files of other types cannot have attributes user.*.
	if req.GetXattrs() && (info.Type == portalv1.FileType_FILE_TYPE_REGULAR || info.Type == portalv1.FileType_FILE_TYPE_DIRECTORY) {
		f, err := os.OpenFile(loc.path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil, fileError(loc.path, err)
		}
		defer f.Close()
		attrs, err := xattrs(f)
		if err != nil {
			return nil, fileError(loc.path, err)
		}
		info.Xattrs = make(map[string][]byte, len(attrs))
		for name, value := range attrs {
			info.Xattrs[strings.ToValidUTF8(name, "\uFFFD")] = value // as protobuf requires
		}
	}
	return &portalv1.StatFileResponse{Info: info}, nil
}

// ListFiles implements portalv1.FileServiceServer.
func (s *fileServer) ListFiles(req *portalv1.ListFilesRequest, stream grpc.ServerStreamingServer[portalv1.ListFilesResponse]) error {
	loc, err := locate(req.GetDirectory())
	if err != nil {
		return err
	}
	dir, err := openDirectory(loc.path)
	if err != nil {
		return fileError(loc.path, err)
	}
	defer dir.Close()
	l := lister{newWalk(stream.Context(), s.memory, loc.path), newNameTable(), func(info *portalv1.FileInfo) error { return stream.Send(&portalv1.ListFilesResponse{Info: info}) }}
	defer l.end()
	return l.list(dir, max(req.GetDepth(), 1))
}

// openDirectory opens the directory at path, and follows symbolic links.
func openDirectory(path string) (*os.File, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, notDirectory(path)
	}
	return os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
}

// lister sends descriptions of the files in directories.
type lister struct {
	*walk
	names nameTable
	send  func(*portalv1.FileInfo) error
}

// list describes the files in the current file, which is the open directory dir, down to depth levels.
func (l lister) list(dir *os.File, depth uint32) error {
	return l.entries(dir, func(name string) error {
		info, err := l.names.describe(int(dir.Fd()), name, l.current())
		if vanished(err) {
			return nil
		}
		if err != nil {
			return fileError(l.current(), err)
		}
		if err := l.send(info); err != nil {
			return err
		}
		if info.Type != portalv1.FileType_FILE_TYPE_DIRECTORY || depth == 1 {
			return nil
		}
		sub, err := openAt(dir, name, unix.O_DIRECTORY|unix.O_NOFOLLOW)
		if vanished(err) {
			return nil
		}
		if err != nil {
			return fileError(l.current(), err)
		}
		defer sub.Close()
		return l.list(sub, depth-1)
	})
}

// MakeDirectory implements portalv1.FileServiceServer.
func (s *fileServer) MakeDirectory(_ context.Context, req *portalv1.MakeDirectoryRequest) (*portalv1.MakeDirectoryResponse, error) {
	loc, err := locateForWriting(req.GetDirectory())
	if err != nil {
		return nil, err
	}
	mode := uint32(0o755)
	if req.Mode != nil {
		mode = req.GetMode()
	}
	if err := checkMode(mode); err != nil {
		return nil, err
	}
	created, err := loc.makeDirectory(mode)
	if err != nil {
		return nil, fileError(loc.path, err)
	}
	info, err := newNameTable().describePath(loc.path)
	if err != nil {
		return nil, fileError(loc.path, err)
	}
	return &portalv1.MakeDirectoryResponse{Info: info, Created: created}, nil
}

// makeDirectory creates a directory, unless there is one, and its parents.
func (l location) makeDirectory(mode uint32) (created bool, err error) {
	err = unix.Mkdir(l.path, 0o700)
	if err == unix.ENOENT && l.path != "/" {
		if err := l.makeParents(); err != nil {
			return false, err
		}
		err = unix.Mkdir(l.path, 0o700)
	}
	if err == unix.EEXIST {
		if info, err := os.Stat(l.path); err != nil || !info.IsDir() {
			return false, notDirectory(l.path)
		}
		return false, nil
	}
	if err != nil {
		return false, fileError(l.path, err)
	}
	dir, err := os.OpenFile(l.path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false, err
	}
	defer dir.Close()
	if err := l.chown(dir); err != nil {
		return false, err
	}
	return true, unix.Fchmod(int(dir.Fd()), mode)
}

// makeParents creates the missing directories above the location.
func (l location) makeParents() error {
	_, err := location{filepath.Dir(l.path), l.user}.makeDirectory(0o755)
	return err
}

// MoveFile implements portalv1.FileServiceServer.
func (s *fileServer) MoveFile(ctx context.Context, req *portalv1.MoveFileRequest) (*portalv1.MoveFileResponse, error) {
	source, err := locate(req.GetSource())
	if err != nil {
		return nil, err
	}
	destination, err := locateForWriting(req.GetDestination())
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(source.path); err != nil {
		return nil, fileError(source.path, err)
	}
	if strings.HasPrefix(destination.path, strings.TrimSuffix(source.path, "/")+"/") {
		return nil, intoItself(source.path)
	}
	if err := destination.makeParents(); err != nil {
		return nil, fileError(destination.path, err)
	}
	err = unix.Rename(source.path, destination.path)
	if err == unix.EXDEV {
		err = moveByCopy(ctx, s.memory, source.path, destination.path)
	}
	switch {
	case err == unix.EINVAL:
		return nil, intoItself(source.path)
	case err == unix.ENOENT:
		return nil, fileError(source.path, err)
	case err != nil:
		return nil, fileError(destination.path, err)
	}
	info, err := newNameTable().describePath(destination.path)
	if err != nil {
		return nil, fileError(destination.path, err)
	}
	return &portalv1.MoveFileResponse{Info: info}, nil
}

func intoItself(path string) error {
	return status.Errorf(codes.InvalidArgument, "%s cannot be moved to a path below itself: use another path", quote(path))
}

// RemoveFile implements portalv1.FileServiceServer.
func (s *fileServer) RemoveFile(ctx context.Context, req *portalv1.RemoveFileRequest) (*portalv1.RemoveFileResponse, error) {
	loc, err := locate(req.GetFile())
	if err != nil {
		return nil, err
	}
	if loc.path == "/" {
		return nil, status.Error(codes.InvalidArgument, "the root directory cannot be removed: name a file or directory in it")
	}
	if !req.GetRecursive() {
		err = os.Remove(loc.path)
	} else if _, err = os.Lstat(loc.path); err == nil { // removeTree succeeds if there is no such file
		err = removeTree(ctx, s.memory, loc.path)
	}
	if err != nil {
		return nil, fileError(loc.path, err)
	}
	return &portalv1.RemoveFileResponse{}, nil
}
