package sandbox

import (
	"context"
	"io"
	"time"
)

// Path is a path in a sandbox.
type Path struct {
	// Path need not be valid UTF-8. A relative path begins at the workdir of the sandbox, and "~" is the home directory of the
	// user.
	Path string
	// User is the user who owns new files and directories, as in RunOptions.
	User string
	// Workdir is the workdir of the sandbox. The Manager sets it.
	Workdir string
}

// FileType is the type of a file.
type FileType string

const (
	RegularFile FileType = "file"
	Directory   FileType = "directory"
	Symlink     FileType = "symlink"
	OtherFile   FileType = "other" // a device, a pipe or a socket
)

// FileInfo describes a file in a sandbox. Everything in it comes from the sandbox.
type FileInfo struct {
	Path       string // absolute; need not be valid UTF-8
	Type       FileType
	Size       int64  // in bytes
	Mode       uint32 // the permission bits, with setuid, setgid and sticky: at most 07777
	UID, GID   uint32
	User       string // empty if UID has no name
	Group      string // empty if GID has no name
	ModifiedAt time.Time
	LinkTarget string    // what a symbolic link contains
	Target     *FileInfo // the file to which a symbolic link leads, with its real path; nil if there is none
	Xattrs     map[string][]byte
}

// WriteOptions say how WriteFile writes a file.
type WriteOptions struct {
	// Mode has the permission bits. If it is nil, they are those of the file that is replaced, or 0644.
	Mode *uint32
	// Offset, if not nil, is where to write into an existing file. Otherwise the file is replaced in one step.
	Offset *int64
	// Xattrs are the extended attributes user.* to set.
	Xattrs map[string][]byte
	// Length is how many bytes will be written, if that is known. Otherwise it is 0.
	Length int64
}

// Files are the files of a sandbox. If a path does not exist, the error is errdefs.ErrNotFound. If it is of the wrong type, or
// the kernel of the sandbox refuses the operation, it is errdefs.ErrFailedPrecondition. If the disk of the sandbox is full, it
// is ErrSandboxFull.
type Files interface {
	// StatFile describes a file. It does not follow a symbolic link at the end of the path.
	StatFile(ctx context.Context, path Path, xattrs bool) (FileInfo, error)
	// ListFiles calls each for the entries of a directory, down to depth levels, in lexical order, each directory before its
	// entries. It returns the error of each.
	ListFiles(ctx context.Context, path Path, depth int, each func(FileInfo) error) error
	// ReadFile returns a description of a file and its bytes from offset, at most length of them unless length is negative.
	ReadFile(ctx context.Context, path Path, offset, length int64) (FileInfo, io.ReadCloser, error)
	// WriteFile writes data to a file and creates missing parent directories. created says that the file did not exist. If
	// data fails, the file is not changed, except with an offset.
	WriteFile(ctx context.Context, path Path, o WriteOptions, data io.Reader) (info FileInfo, created bool, err error)
	// MakeDirectory creates a directory, with the permission bits mode or, if mode is nil, 0755, and its missing parents. It
	// succeeds if the directory exists.
	MakeDirectory(ctx context.Context, path Path, mode *uint32) (info FileInfo, created bool, err error)
	// MoveFile renames a file or directory. It replaces a file at to, and creates missing parents of it.
	MoveFile(ctx context.Context, from, to Path) (FileInfo, error)
	// RemoveFile removes a file or an empty directory, or with recursive any directory.
	RemoveFile(ctx context.Context, path Path, recursive bool) error
	// ReadTree returns a file or directory as a tar archive, with names relative to path.
	ReadTree(ctx context.Context, path Path) (io.ReadCloser, error)
	// WriteTree extracts a tar archive into a directory. With keepOwners, the entries get the owners in the archive.
	WriteTree(ctx context.Context, path Path, keepOwners bool, archive io.Reader) (entries uint64, err error)
	// WatchFiles reports changes of a file, or of the files in a directory. It returns once it watches. The caller must close
	// the Watch.
	WatchFiles(ctx context.Context, path Path, o WatchOptions) (Watch, error)
}

// WatchOptions say what WatchFiles reports.
type WatchOptions struct {
	// Recursive includes everything below the path.
	Recursive bool
	// Infos describes the file in the events Create, Write and Chmod.
	Infos bool
}

// Watch is a sequence of changes of files. Only one goroutine may call Next, but another may call Close.
type Watch interface {
	// Next returns the next change. Its errors are those of Process.Next.
	Next() (FileChange, error)
	Close() error
}

// ChangeType is the type of a change of a file.
type ChangeType string

const (
	FileCreated  ChangeType = "create"
	FileWritten  ChangeType = "write"
	FileRemoved  ChangeType = "remove"
	FileRenamed  ChangeType = "rename" // moved away from its path
	FileChmodded ChangeType = "chmod"
	// ChangesLost means that there were too many changes, and some were not reported.
	ChangesLost ChangeType = "overflow"
)

// FileChange is a change of a file. Everything in it comes from the sandbox.
type FileChange struct {
	Type ChangeType
	Path string    // relative to the watched path; need not be valid UTF-8
	Info *FileInfo // nil unless WatchOptions.Infos is set and the file still exists
}
