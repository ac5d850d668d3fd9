package stream

import (
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// fileInfo describes a file as JSON.
type fileInfo struct {
	Path       string    `json:"path"`
	PathBase64 []byte    `json:"path_base64,omitempty"` // if the path is not valid UTF-8
	Type       string    `json:"type"`
	Size       int64     `json:"size"`
	Mode       string    `json:"mode"` // octal
	UID        uint32    `json:"uid"`
	GID        uint32    `json:"gid"`
	User       string    `json:"user"`
	Group      string    `json:"group"`
	ModifiedAt time.Time `json:"modified_at"`
	LinkTarget string    `json:"link_target,omitzero"`
	Target     *fileInfo `json:"target,omitzero"`
}

// describeFile returns what clients get about a file.
func describeFile(info sandbox.FileInfo) fileInfo {
	described := fileInfo{
		Path: info.Path, Type: string(info.Type), Size: info.Size, Mode: fmt.Sprintf("%04o", info.Mode), UID: info.UID, GID: info.GID,
		User: info.User, Group: info.Group, ModifiedAt: cleanTime(info.ModifiedAt).Truncate(time.Second), LinkTarget: info.LinkTarget,
	}
	if !utf8.ValidString(info.Path) {
		described.PathBase64 = []byte(info.Path)
	}
	if info.Target != nil {
		target := *info.Target
		target.Target = nil // a target is no symbolic link
		described.Target = new(describeFile(target))
	}
	return described
}

// cleanTime returns a time from a sandbox in UTC. If JSON and HTTP headers cannot represent it, it returns the Unix epoch,
// which http.ServeContent takes for an unknown time.
func cleanTime(t time.Time) time.Time {
	if t = t.UTC(); t.Year() < 0 || t.Year() > 9999 {
		return time.Unix(0, 0).UTC()
	}
	return t
}
