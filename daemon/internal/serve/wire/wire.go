// Package wire converts between values of the sandbox domain and what clients receive and send, where several packages under
// serve need the same. Only they import it. Everything that it converts comes from a sandbox or a client, so any value is
// possible.
package wire

import (
	"fmt"
	"math"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// maxText limits the name of a user and the reason of an exit, in bytes.
const maxText = 256

// FileInfo converts a description of a file. It converts the file to which a symbolic link leads, but not what that may lead
// to.
func FileInfo(f sandbox.FileInfo) rpc.FileInfo {
	info := rpc.FileInfo{FileStat: fileStat(f), LinkTarget: valid(f.LinkTarget)}
	if f.Target != nil {
		info.Target = new(fileStat(*f.Target))
	}
	return info
}

func fileStat(f sandbox.FileInfo) rpc.FileStat {
	path, base64 := Path(f.Path)
	return rpc.FileStat{
		Path: path, PathBase64: base64, Type: rpc.FileType(f.Type), Size: int(max(0, f.Size)), Mode: fmt.Sprintf("%04o", f.Mode&0o7777),
		UID: int(f.UID), GID: int(f.GID), User: bounded.Text(f.User, maxText), Group: bounded.Text(f.Group, maxText), ModifiedAt: Time(f.ModifiedAt),
	}
}

// Path returns a path as text. If it is not valid UTF-8, it also returns its bytes.
func Path(path string) (text string, bytes []byte) {
	if utf8.ValidString(path) {
		return path, nil
	}
	return valid(path), []byte(path)
}

func valid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

// FileChange converts a change of a file.
func FileChange(c sandbox.FileChange) rpc.FSChange {
	path, base64 := Path(c.Path)
	return rpc.FSChange{Type: rpc.FSChangeType(c.Type), Path: path, PathBase64: base64}
}

// Exit converts the end of a process.
func Exit(e sandbox.Exit) rpc.ProcessExit {
	exit := rpc.ProcessExit{ExitCode: e.Code, TimedOut: e.TimedOut, Reason: bounded.Text(e.Reason, maxText)}
	if e.Signal != 0 {
		exit.Signal = sandbox.SignalName(e.Signal)
	}
	return exit
}

// Time returns t in UTC. A time that RFC 3339 cannot express becomes the zero time.
func Time(t time.Time) time.Time {
	if t = t.UTC(); t.Year() < 0 || t.Year() > 9999 {
		return time.Time{}
	}
	return t
}

// Count converts a count of bytes.
func Count(n uint64) int { return int(min(n, math.MaxInt)) }
