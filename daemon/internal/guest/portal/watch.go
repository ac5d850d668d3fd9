package portal

import (
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

const (
	// maxWatches limits the calls of WatchFiles at a time.
	maxWatches = 64
	// maxWatchedDirectories limits the directories of one call.
	maxWatchedDirectories = 8192
)

// watchMask are the events of a directory that a watcher needs.
const watchMask = unix.IN_CREATE | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
	unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR | unix.IN_DONT_FOLLOW

// WatchFiles implements portalv1.FileServiceServer.
func (s *fileServer) WatchFiles(req *portalv1.WatchFilesRequest, stream grpc.ServerStreamingServer[portalv1.WatchFilesResponse]) error {
	loc, err := locate(req.GetPath())
	if err != nil {
		return err
	}
	select {
	case s.watches <- struct{}{}:
		defer func() { <-s.watches }()
	default:
		return status.Errorf(codes.ResourceExhausted, "%d calls watch files in the sandbox already: end one first", maxWatches)
	}
	w, err := newWatcher(req, loc.path, stream.Send)
	if err != nil {
		return err
	}
	defer w.file.Close()
	// The end of the call interrupts reads.
	defer context.AfterFunc(stream.Context(), func() { _ = w.file.SetReadDeadline(time.Unix(1, 0)) })()
	err = w.run()
	if ctx := stream.Context(); ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	return err
}

// watcher reports changes of files. It uses inotify without a library, because the ones that exist lose the directories
// that are renamed, and cannot tell which events are older than the listing of a new directory.
//
// Events that are not read wait in the kernel, which keeps a limited number of them and then reports an overflow.
type watcher struct {
	// file is the inotify instance.
	file *os.File
	// path is the watched path, as the client names it.
	path string
	// directory is the real path of the watched directory.
	directory string
	// only is the name in directory of a watched file. If it is empty, everything in the directory is watched.
	only      string
	recursive bool
	infos     bool
	send      func(*portalv1.WatchFilesResponse) error
	names     nameTable
	// directories has the watched directories by their watch descriptors. The paths are relative, and "" is directory.
	directories map[int32]string
	// listed has the paths that were reported because they were in a new directory. The kernel may report their creation
	// with events that are in its queue already.
	listed map[string]bool
}

// newWatcher starts to watch the path of a request.
func newWatcher(req *portalv1.WatchFilesRequest, path string, send func(*portalv1.WatchFilesResponse) error) (*watcher, error) {
	w := &watcher{
		path: path, recursive: req.GetRecursive(), infos: req.GetInfos(), send: send,
		names: newNameTable(), listed: make(map[string]bool),
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fileError(path, err)
	}
	info, err := os.Stat(real)
	if err != nil {
		return nil, fileError(path, err)
	}
	w.directory = real
	if !info.IsDir() {
		// A watch of the file itself would not follow its path when another file replaces it.
		w.directory, w.only, w.recursive = filepath.Dir(real), filepath.Base(real), false
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, status.Errorf(codes.ResourceExhausted, "the sandbox watches too many files (%v): end programs that watch files", err)
	}
	w.file = os.NewFile(uintptr(fd), "inotify")
	if err := w.restart(); err != nil {
		w.file.Close()
		return nil, err
	}
	return w, nil
}

// restart watches all directories, without reporting what is in them.
func (w *watcher) restart() error {
	for wd := range w.directories {
		w.unwatch(wd)
	}
	w.directories = make(map[int32]string)
	clear(w.listed)
	return w.add("", func(string) error { return nil })
}

// control calls f with the descriptor of the inotify instance.
func (w *watcher) control(f func(fd int)) {
	if raw, err := w.file.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { f(int(fd)) })
	}
}

func (w *watcher) unwatch(wd int32) {
	delete(w.directories, wd)
	// It fails if the directory was removed.
	w.control(func(fd int) { _, _ = unix.InotifyRmWatch(fd, uint32(wd)) })
}

// add watches the directory at the relative path rel, and if the watcher is recursive, those below it. It calls found
// with the relative paths of what is in a directory, after the directory is watched.
func (w *watcher) add(rel string, found func(rel string) error) error {
	path := filepath.Join(w.directory, rel)
	var wd int
	var err error
	w.control(func(fd int) { wd, err = unix.InotifyAddWatch(fd, path, watchMask) })
	switch {
	case rel != "" && (vanished(err) || err == unix.EACCES):
		return nil // only the events of its parent report it
	case err == unix.ENOSPC: // this is not about a disk
		return status.Error(codes.ResourceExhausted, "the kernel of the sandbox can watch no more directories: watch fewer, or end programs that watch files")
	case err != nil:
		return fileError(path, err)
	}
	w.directories[int32(wd)] = rel
	if len(w.directories) > maxWatchedDirectories {
		return status.Errorf(codes.ResourceExhausted, "%s has more than %d directories: watch a directory below it, or not recursively", quote(w.path), maxWatchedDirectories)
	}
	if !w.recursive {
		return nil
	}
	entries, err := os.ReadDir(path)
	if err != nil && !vanished(err) && !errors.Is(err, fs.ErrPermission) {
		return fileError(path, err)
	}
	for _, entry := range entries {
		child := filepath.Join(rel, entry.Name())
		if err := found(child); err != nil {
			return err
		}
		if entry.IsDir() {
			if err := w.add(child, found); err != nil {
				return err
			}
		}
	}
	return nil
}

// run reports that the watch has started, and then the changes until the call ends or the watched path is removed.
func (w *watcher) run() error {
	if err := w.report(portalv1.WatchFilesResponse_TYPE_STARTED, ""); err != nil {
		return err
	}
	buf := make([]byte, pieceSize)
	for {
		n, err := w.file.Read(buf)
		if err != nil {
			return fileError(w.path, err)
		}
		for events := buf[:n]; len(events) >= unix.SizeofInotifyEvent; {
			// The fields of struct inotify_event are: wd, mask, cookie, len. The name follows.
			wd := int32(binary.NativeEndian.Uint32(events))
			mask := binary.NativeEndian.Uint32(events[4:])
			end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
			name := strings.TrimRight(string(events[unix.SizeofInotifyEvent:end]), "\x00")
			events = events[end:]
			if err := w.event(wd, mask, name); err != nil {
				return err
			}
		}
		w.forgetListed()
	}
}

// forgetListed empties listed if the kernel has no more events that may be older than the listing.
func (w *watcher) forgetListed() {
	if len(w.listed) == 0 {
		return
	}
	w.control(func(fd int) {
		if waiting, err := unix.IoctlGetInt(fd, unix.TIOCINQ); err == nil && waiting == 0 {
			clear(w.listed)
		}
	})
}

// event handles an event of the kernel. name is that of a file in the directory with the watch descriptor wd, or empty
// if the event is about the directory itself.
func (w *watcher) event(wd int32, mask uint32, name string) error {
	if mask&unix.IN_Q_OVERFLOW != 0 {
		// New directories may be among what was lost.
		if err := w.restart(); err != nil {
			return err
		}
		return w.report(portalv1.WatchFilesResponse_TYPE_OVERFLOW, "")
	}
	parent, ok := w.directories[wd]
	switch {
	case !ok:
		return nil // it was moved away
	case name == "":
		return w.selfEvent(wd, mask, parent == "")
	case w.only != "":
		if name == w.only {
			return w.fileEvent(mask)
		}
		return nil
	}

	rel := filepath.Join(parent, name)
	isDir := mask&unix.IN_ISDIR != 0
	switch {
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		if mask&unix.IN_CREATE != 0 && w.listed[rel] {
			delete(w.listed, rel)
			return nil
		}
		if err := w.report(portalv1.WatchFilesResponse_TYPE_CREATE, rel); err != nil {
			return err
		}
		if isDir && w.recursive {
			return w.add(rel, func(rel string) error {
				w.listed[rel] = true
				return w.report(portalv1.WatchFilesResponse_TYPE_CREATE, rel)
			})
		}
		return nil
	case mask&unix.IN_DELETE != 0:
		delete(w.listed, rel)
		return w.report(portalv1.WatchFilesResponse_TYPE_REMOVE, rel)
	case mask&unix.IN_MOVED_FROM != 0:
		delete(w.listed, rel)
		if isDir {
			// If it was moved to another place below the path, that is a new directory.
			for wd, watched := range w.directories {
				if watched == rel || strings.HasPrefix(watched, rel+"/") {
					w.unwatch(wd)
				}
			}
		}
		return w.report(portalv1.WatchFilesResponse_TYPE_RENAME, rel)
	}
	return w.reportChange(mask, rel)
}

// selfEvent handles an event about a watched directory itself. Except for the root, its parent reports the same event.
func (w *watcher) selfEvent(wd int32, mask uint32, root bool) error {
	switch {
	case mask&unix.IN_IGNORED != 0 && !root:
		delete(w.directories, wd)
		return nil
	case !root:
		return nil
	case mask&(unix.IN_DELETE_SELF|unix.IN_UNMOUNT|unix.IN_IGNORED) != 0:
		return w.end(portalv1.WatchFilesResponse_TYPE_REMOVE, "removed")
	case mask&unix.IN_MOVE_SELF != 0:
		return w.end(portalv1.WatchFilesResponse_TYPE_RENAME, "moved")
	case w.only != "":
		return nil
	}
	return w.reportChange(mask, "")
}

// fileEvent handles an event about the only watched file.
func (w *watcher) fileEvent(mask uint32) error {
	switch {
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		return w.report(portalv1.WatchFilesResponse_TYPE_CREATE, "")
	case mask&unix.IN_DELETE != 0:
		return w.end(portalv1.WatchFilesResponse_TYPE_REMOVE, "removed")
	case mask&unix.IN_MOVED_FROM != 0:
		// Another file may replace it, as editors do.
		return w.report(portalv1.WatchFilesResponse_TYPE_RENAME, "")
	}
	return w.reportChange(mask, "")
}

// reportChange reports a change of a file's content or attributes.
func (w *watcher) reportChange(mask uint32, rel string) error {
	switch {
	case mask&unix.IN_MODIFY != 0:
		return w.report(portalv1.WatchFilesResponse_TYPE_WRITE, rel)
	case mask&unix.IN_ATTRIB != 0:
		return w.report(portalv1.WatchFilesResponse_TYPE_CHMOD, rel)
	}
	return nil
}

// end reports the last event, and returns the error that ends the call.
func (w *watcher) end(last portalv1.WatchFilesResponse_Type, what string) error {
	if err := w.report(last, ""); err != nil {
		return err
	}
	return status.Errorf(codes.NotFound, "%s was %s", quote(w.path), what)
}

// report sends an event about the file at the relative path rel.
func (w *watcher) report(event portalv1.WatchFilesResponse_Type, rel string) error {
	resp := &portalv1.WatchFilesResponse{Type: event, Path: []byte(rel)}
	switch event {
	case portalv1.WatchFilesResponse_TYPE_CREATE, portalv1.WatchFilesResponse_TYPE_WRITE, portalv1.WatchFilesResponse_TYPE_CHMOD:
		if w.infos {
			// It is nil if the file is gone.
			resp.Info, _ = w.names.describePath(filepath.Join(w.path, rel))
		}
	}
	return w.send(resp)
}
