// Package localsock listens on the admin socket. It binds the Unix socket itself or takes it from systemd
// (socket activation). Only package daemon imports this package.
package localsock

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

const (
	// Group is the Unix group that may use the socket, if that group exists on the host.
	Group = "msb"

	dialTimeout = 2 * time.Second
	// maxPath is the longest path, in bytes, that fits in a sockaddr_un with its terminating NUL.
	maxPath = 107
)

// Listen returns a listener on the admin socket. If systemd passed a Unix socket to this process, Listen
// uses that socket, whatever its path. Otherwise it creates the directory of path if needed (mode 0750),
// removes a socket there on which no process listens, and binds a new one (mode 0660). The directory and
// the socket belong to Group. If another process listens on path, the error is errdefs.ErrAlreadyExists.
func Listen(path string) (net.Listener, error) {
	gid := groupID(Group)
	if l, err := activated(); err != nil {
		return nil, err
	} else if l != nil {
		if l.Addr().String() == path { // the modes set by systemd may lock out Group
			if err := errors.Join(prepareDir(filepath.Dir(path), gid), restrict(path, gid)); err != nil {
				return nil, errors.Join(err, l.Close())
			}
		}
		return l, nil
	}
	if len(path) > maxPath {
		return nil, fmt.Errorf("admin socket %s: the path exceeds the limit of %d bytes for a socket; "+
			"use a shorter --run-dir: %w", path, maxPath, errdefs.ErrInvalidArgument)
	}
	if err := prepareDir(filepath.Dir(path), gid); err != nil {
		return nil, err
	}
	// Without the lock, two daemons that start at once could both find the socket stale, and the second
	// could remove the socket that the first has just bound.
	unlock, err := lock(path + ".lock")
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeStale(path); err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("bind admin socket: %w", err)
	}
	if err := restrict(path, gid); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// restrict sets the group of the socket to gid and its mode to 0660.
func restrict(path string, gid int) error {
	if err := errors.Join(os.Chown(path, -1, gid), os.Chmod(path, 0o660)); err != nil {
		return fmt.Errorf("restrict admin socket: %w", err)
	}
	return nil
}

// activated returns the Unix socket that systemd passed to this process, or nil if it passed none.
func activated() (net.Listener, error) {
	listeners, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("take sockets from systemd: %w", err)
	}
	var admin net.Listener
	for _, l := range listeners {
		if _, ok := l.(*net.UnixListener); ok && admin == nil {
			admin = l
			continue
		}
		err = fmt.Errorf("systemd passed more than one socket or a socket that is not a Unix socket: "+
			"leave only the admin socket in the .socket unit: %w", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		for _, l := range listeners {
			if l != nil {
				err = errors.Join(err, l.Close())
			}
		}
		return nil, err
	}
	return admin, nil
}

// prepareDir creates dir. If dir exists, prepareDir checks that no other user could place a socket in it:
// it must belong to the user of this process and must not be writable by its group or others.
func prepareDir(dir string, gid int) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return fmt.Errorf("create run directory: %w", err)
	}
	// The umask may have cleared bits of Mkdir's mode, so Chmod sets it again.
	switch err := os.Mkdir(dir, 0o750); {
	case err == nil:
		if err := errors.Join(os.Chown(dir, -1, gid), os.Chmod(dir, 0o750)); err != nil {
			return fmt.Errorf("restrict run directory: %w", err)
		}
		return nil
	case !errors.Is(err, fs.ErrExist):
		return fmt.Errorf("create run directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("check run directory: %w", err)
	}
	owner := info.Sys().(*syscall.Stat_t)
	if !info.IsDir() || info.Mode().Perm()&0o022 != 0 || int(owner.Uid) != os.Geteuid() {
		return fmt.Errorf("run directory %s (%s, owned by user %d) must be a directory that belongs to the user who runs msbd "+
			"and that no other user can write to: run 'chmod go-w %[1]s', or use another --run-dir: %[4]w",
			dir, info.Mode(), owner.Uid, errdefs.ErrFailedPrecondition)
	}
	if info.Mode().Perm() != 0o750 {
		return nil
	}
	// An earlier run created dir, perhaps before Group existed.
	if err := os.Chown(dir, -1, gid); err != nil {
		return fmt.Errorf("restrict run directory: %w", err)
	}
	return nil
}

// lock waits for an exclusive lock on the file at path, which it creates if needed.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock admin socket: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock admin socket: %w", err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// removeStale removes the socket at path if no process listens on it.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("check admin socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("admin socket %s: a file that is not a socket is there (%s); move it away, or use another --run-dir: %w",
			path, info.Mode(), errdefs.ErrFailedPrecondition)
	}
	conn, err := net.DialTimeout("unix", path, dialTimeout)
	if err == nil {
		_ = conn.Close()
		return fmt.Errorf("another msbd is running on %s: stop it with 'msb server stop', or use another --run-dir: %w",
			path, errdefs.ErrAlreadyExists)
	}
	// Only ECONNREFUSED proves that no process listens. Other errors do not; a full backlog, for example, is EAGAIN.
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("check whether another msbd is running: %w", err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove stale admin socket: %w", err)
	}
	return nil
}

// groupID returns the id of the named group. It returns -1, with which chown changes nothing, if the group does
// not exist or this process may not give files to it. Users who run their own msbd need not be members.
func groupID(name string) int {
	g, err := user.LookupGroup(name)
	if err != nil {
		return -1
	}
	gid, err := strconv.Atoi(g.Gid)
	if err != nil {
		return -1
	}
	if os.Geteuid() == 0 || gid == os.Getegid() {
		return gid
	}
	if groups, err := os.Getgroups(); err != nil || !slices.Contains(groups, gid) {
		return -1
	}
	return gid
}
