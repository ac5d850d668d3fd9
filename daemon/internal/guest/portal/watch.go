package portal

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

const (
	// maxWatches limits the calls of WatchFiles at a time.
	maxWatches = 64
	// maxWatchedDirectories limits the directories of one call.
	maxWatchedDirectories = 8192
	// maxListed limits the paths that one call remembers as listed.
	maxListed = 64 << 10
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
	w, err := newWatcher(stream.Context(), s.memory, req, loc.path, stream.Send)
	if err != nil {
		return err
	}
	defer w.close()
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
	// ctx is that of the call. Its end also ends the reading of directories.
	ctx context.Context
	// memory holds the paths in directories and listed.
	memory *memory
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
	// with events that are in its queue already. If there are too many, some creations are reported twice.
	listed map[string]bool
}

// newWatcher starts to watch the path of a request. It ends with ctx. budget limits the paths that it keeps. The caller must
// call close.
func newWatcher(ctx context.Context, budget *limit.Budget, req *portalv1.WatchFilesRequest, path string, send func(*portalv1.WatchFilesResponse) error) (*watcher, error) {
	w := &watcher{
		ctx: ctx, memory: &memory{budget: budget}, path: path, recursive: req.GetRecursive(), infos: req.GetInfos(), send: send,
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
		w.close()
		return nil, err
	}
	return w, nil
}

// close ends the watch.
func (w *watcher) close() {
	w.memory.close()
	w.file.Close()
}

// restart watches all directories, without reporting what is in them.
func (w *watcher) restart() error {
	for wd := range w.directories {
		w.unwatch(wd)
	}
	w.directories = make(map[int32]string)
	w.forgetListed()
	return w.add("", func(string) error { return nil })
}

// control calls f with the descriptor of the inotify instance.
func (w *watcher) control(f func(fd int)) {
	if raw, err := w.file.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { f(int(fd)) })
	}
}

func (w *watcher) unwatch(wd int32) {
	w.forget(wd)
	// It fails if the directory was removed.
	w.control(func(fd int) { _, _ = unix.InotifyRmWatch(fd, uint32(wd)) })
}

// forget removes a directory that is not watched any more from directories.
func (w *watcher) forget(wd int32) {
	if rel, ok := w.directories[wd]; ok {
		w.memory.release(pathSize(rel))
		delete(w.directories, wd)
	}
}

// pathSize returns how many bytes of memory a path in a map needs.
func pathSize(rel string) int { return 2*perItem + len(rel) }

// add watches the directory at the relative path rel, and if the watcher is recursive, those below it. It calls found
// with the relative paths of what is in a directory, after the directory is watched.
func (w *watcher) add(rel string, found func(rel string) error) error {
	var waiting []string // directories that are not watched yet
	wait := func(rel string) error {
		waiting = append(waiting, rel)
		if len(w.directories)+len(waiting) > maxWatchedDirectories {
			return status.Errorf(codes.ResourceExhausted, "%s has more than %d directories: watch a directory below it, or not recursively", quote(w.path), maxWatchedDirectories)
		}
		return w.memory.hold(pathSize(rel))
	}
	err := wait(rel)
	for err == nil && len(waiting) > 0 {
		rel, waiting = waiting[0], waiting[1:]
		var watched bool
		if watched, err = w.watch(rel); err != nil {
			break
		}
		if !watched {
			w.memory.release(pathSize(rel)) // only the events of its parent report it
		} else if w.recursive {
			err = w.readDirectory(rel, func(rel string, isDir bool) error {
				err := found(rel)
				if err == nil && isDir {
					err = wait(rel)
				}
				return err
			})
		}
	}
	return err
}

// watch watches the directory at the relative path rel, whose path is held by memory. It returns false if that is not
// possible.
func (w *watcher) watch(rel string) (bool, error) {
	path := filepath.Join(w.directory, rel)
	var wd int
	var err error
	w.control(func(fd int) { wd, err = unix.InotifyAddWatch(fd, path, watchMask) })
	switch {
	case rel != "" && (vanished(err) || err == unix.EACCES):
		return false, nil
	case err == unix.ENOSPC: // this is not about a disk
		return false, status.Error(codes.ResourceExhausted, "the kernel of the sandbox can watch no more directories: watch fewer, or end programs that watch files")
	case err != nil:
		return false, fileError(path, err)
	}
	w.forget(int32(wd)) // it may have been watched at another path
	w.directories[int32(wd)] = rel
	return true, nil
}

// readDirectory calls visit for the entries of the directory at the relative path rel, with their relative paths. There are
// none if it was removed or cannot be read.
func (w *watcher) readDirectory(rel string, visit func(rel string, isDir bool) error) error {
	path := filepath.Join(w.directory, rel)
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err == nil {
		defer dir.Close()
	}
	for err == nil {
		if err := w.ctx.Err(); err != nil {
			return status.FromContextError(err).Err()
		}
		var entries []fs.DirEntry
		entries, err = dir.ReadDir(1024)
		slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
		for _, entry := range entries {
			if err := visit(filepath.Join(rel, entry.Name()), entry.IsDir()); err != nil {
				return err
			}
		}
	}
	if err != io.EOF && !vanished(err) && !errors.Is(err, fs.ErrPermission) {
		return fileError(path, err)
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
		w.forgetOldListed()
	}
}

// forgetOldListed empties listed if the kernel has no more events that may be older than the listing.
func (w *watcher) forgetOldListed() {
	if len(w.listed) == 0 {
		return
	}
	w.control(func(fd int) {
		if waiting, err := unix.IoctlGetInt(fd, unix.TIOCINQ); err == nil && waiting == 0 {
			w.forgetListed()
		}
	})
}

// forgetListed empties listed.
func (w *watcher) forgetListed() {
	for rel := range w.listed {
		w.memory.release(pathSize(rel))
	}
	w.listed = make(map[string]bool) // an empty one needs less memory than one that was emptied
}

// list adds a path to listed.
func (w *watcher) list(rel string) {
	if len(w.listed) == maxListed {
		w.forgetListed()
	}
	if !w.listed[rel] && w.memory.hold(pathSize(rel)) == nil {
		w.listed[rel] = true
	}
}

// unlist removes a path from listed, and reports whether it was there.
func (w *watcher) unlist(rel string) bool {
	if !w.listed[rel] {
		return false
	}
	w.memory.release(pathSize(rel))
	delete(w.listed, rel)
	return true
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
	case strings.HasPrefix(name, tempPrefix):
		return nil
	}

	rel := filepath.Join(parent, name)
	isDir := mask&unix.IN_ISDIR != 0
	switch {
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		if mask&unix.IN_CREATE != 0 && w.unlist(rel) {
			return nil
		}
		if err := w.report(portalv1.WatchFilesResponse_TYPE_CREATE, rel); err != nil {
			return err
		}
		if isDir && w.recursive {
			return w.add(rel, func(rel string) error {
				w.list(rel)
				return w.report(portalv1.WatchFilesResponse_TYPE_CREATE, rel)
			})
		}
		return nil
	case mask&unix.IN_DELETE != 0:
		w.unlist(rel)
		return w.report(portalv1.WatchFilesResponse_TYPE_REMOVE, rel)
	case mask&unix.IN_MOVED_FROM != 0:
		w.unlist(rel)
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
		w.forget(wd)
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
