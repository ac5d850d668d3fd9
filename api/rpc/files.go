package rpc

import "time"

// Names of the methods for files, in the order in which their params and results follow in this file.
const (
	MethodFSRead   = "sandbox.fs.read"
	MethodFSWrite  = "sandbox.fs.write"
	MethodFSList   = "sandbox.fs.list"
	MethodFSStat   = "sandbox.fs.stat"
	MethodFSExists = "sandbox.fs.exists"
	MethodFSMkdir  = "sandbox.fs.mkdir"
	MethodFSMove   = "sandbox.fs.move"
	MethodFSRemove = "sandbox.fs.remove"
	MethodFSWatch  = "sandbox.fs.watch"
)

// Limits of the results of methods for files.
const (
	// MaxReadFile is the most that sandbox.fs.read returns, in bytes.
	MaxReadFile = 8 << 20
	// MaxListFiles is the most entries that sandbox.fs.list returns.
	MaxListFiles = 10_000
)

// FileTarget names a file or a directory of a sandbox.
type FileTarget struct {
	Target
	// Path may begin with "~", the home directory of the user. A relative path begins at the workdir of the sandbox.
	Path string `json:"path"`
}

// FSReadParams holds the params of sandbox.fs.read.
type FSReadParams struct {
	FileTarget
	Encoding Encoding `json:"encoding,omitzero"`
	// Offset is where to begin, in bytes.
	Offset int `json:"offset,omitzero"`
	// Length is the maximum number of bytes. If it is absent, the file is read to its end.
	Length *int `json:"length,omitzero"`
}

// FSReadResult is the result of sandbox.fs.read.
type FSReadResult struct {
	// Content is the text, or base64, as Encoding says.
	Content  string   `json:"content"`
	Encoding Encoding `json:"encoding"`
	// Size is the size of the complete file, in bytes.
	Size int `json:"size"`
}

// FSWriteParams holds the params of sandbox.fs.write. The result is a WrittenFile.
type FSWriteParams struct {
	FileTarget
	Content  string   `json:"content"`
	Encoding Encoding `json:"encoding,omitzero"`
	FileOwner
}

// FileOwner has the permissions and the owner of new files.
type FileOwner struct {
	// Mode has the permission bits in octal, such as "0644".
	Mode string `json:"mode,omitzero"`
	// User is a name or number, optionally followed by ":" and a group. The default is the user of the sandbox.
	User string `json:"user,omitzero"`
}

// FileStat describes a file.
type FileStat struct {
	// Path is absolute. If it is not valid UTF-8, it has replacement characters, and PathBase64 has its bytes.
	Path       string   `json:"path"`
	PathBase64 []byte   `json:"path_base64,omitzero"`
	Type       FileType `json:"type"`
	// Size is in bytes.
	Size int `json:"size"`
	// Mode has the permission bits in octal, such as "0644".
	Mode string `json:"mode"`
	UID  int    `json:"uid"`
	GID  int    `json:"gid"`
	// User and Group are empty if UID and GID have no name in the sandbox.
	User       string    `json:"user"`
	Group      string    `json:"group"`
	ModifiedAt time.Time `json:"modified_at"`
}

// FileType is the type of a file.
type FileType string

const (
	FileTypeFile      FileType = "file"
	FileTypeDirectory FileType = "directory"
	FileTypeSymlink   FileType = "symlink"
	// FileTypeOther is a device, a pipe or a socket.
	FileTypeOther FileType = "other"
)

// FileInfo describes a file, and what a symbolic link leads to.
type FileInfo struct {
	FileStat
	// LinkTarget is what a symbolic link contains.
	LinkTarget string `json:"link_target,omitzero"`
	// Target is the file to which a symbolic link leads. It is nil if there is none.
	Target *FileStat `json:"target,omitzero"`
}

// WrittenFile is the result of sandbox.fs.write and sandbox.fs.mkdir.
type WrittenFile struct {
	FileInfo
	// Created reports whether the file or directory did not exist before.
	Created bool `json:"created"`
}

// FSListParams holds the params of sandbox.fs.list.
type FSListParams struct {
	FileTarget
	// Depth is how many levels to list. 0 means 1.
	Depth int `json:"depth,omitzero"`
}

// FSListResult is the result of sandbox.fs.list.
type FSListResult struct {
	// Entries are sorted by their names, each directory before its entries.
	Entries []FileInfo `json:"entries"`
}

// FSStatParams holds the params of sandbox.fs.stat. The result is a FileInfo. A symbolic link is not followed.
type FSStatParams struct{ FileTarget }

// FSExistsParams holds the params of sandbox.fs.exists.
type FSExistsParams struct{ FileTarget }

// FSExistsResult is the result of sandbox.fs.exists.
type FSExistsResult struct {
	Exists bool `json:"exists"`
}

// FSMkdirParams holds the params of sandbox.fs.mkdir. The result is a WrittenFile.
type FSMkdirParams struct {
	FileTarget
	FileOwner
}

// FSMoveParams holds the params of sandbox.fs.move. The result is a FileInfo.
type FSMoveParams struct {
	Target
	From string `json:"from"`
	To   string `json:"to"`
}

// FSRemoveParams holds the params of sandbox.fs.remove. The result is empty.
type FSRemoveParams struct {
	FileTarget
	// Recursive also removes a directory that is not empty.
	Recursive bool `json:"recursive,omitzero"`
}

// FSWatchParams holds the params of sandbox.fs.watch, which is answered only with a stream of events. The result is empty.
type FSWatchParams struct {
	FileTarget
	// Recursive includes everything below the path.
	Recursive bool `json:"recursive,omitzero"`
}

// FSChange is the data of an event EventChange.
type FSChange struct {
	Type FSChangeType `json:"type"`
	// Path is relative to the path in the request, and is encoded as in FileStat.
	Path       string `json:"path"`
	PathBase64 []byte `json:"path_base64,omitzero"`
}

// FSChangeType is the type of a change.
type FSChangeType string

const (
	FSCreate FSChangeType = "create"
	FSWrite  FSChangeType = "write"
	FSRemove FSChangeType = "remove"
	// FSRename means that the file was moved away from its path.
	FSRename FSChangeType = "rename"
	FSChmod  FSChangeType = "chmod"
	// FSOverflow means that there were too many changes, and some were not reported.
	FSOverflow FSChangeType = "overflow"
)
