// Package localsock listens on the admin socket: it binds the Unix socket, or takes it from systemd. Only
// package daemon imports this package.
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
	// Group is the Unix group that may use the socket, if the host has it.
	Group = "msb"

	dialTimeout = 2 * time.Second
	// maxPath is what fits in a sockaddr_un with its final zero.
	maxPath = 107
)

// Listen returns the listener of the socket at path. If systemd passed a listening socket to this
// process, that is it. Otherwise the directory of path is made if needed (0750), a socket that nobody
// listens on is removed, and a new one bound (0660), both of Group. A socket that somebody
// listens on is errdefs.ErrAlreadyExists.
func Listen(path string) (net.Listener, error) {
	gid := groupID(Group)
	if l, err := activated(); err != nil {
		return nil, err
	} else if l != nil {
		if l.Addr().String() == path { // systemd's rights for it may keep Group out
			if err := errors.Join(prepareDir(filepath.Dir(path), gid), restrict(path, gid)); err != nil {
				return nil, errors.Join(err, l.Close())
			}
		}
		return l, nil
	}
	if len(path) > maxPath {
		return nil, fmt.Errorf("admin socket %s: the path is longer than the %d bytes that a socket may have; "+
			"use another --run-dir: %w", path, maxPath, errdefs.ErrInvalidArgument)
	}
	if err := prepareDir(filepath.Dir(path), gid); err != nil {
		return nil, err
	}
	// Two daemons that start at once must not both find the socket stale, and the second remove what
	// the first just bound.
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

// restrict gives the socket to its group.
func restrict(path string, gid int) error {
	if err := errors.Join(os.Chown(path, -1, gid), os.Chmod(path, 0o660)); err != nil {
		return fmt.Errorf("restrict admin socket: %w", err)
	}
	return nil
}

// activated returns the socket that systemd passed, or nil.
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
		err = fmt.Errorf("systemd passed something else than one Unix socket: leave only the admin socket in the .socket unit: %w",
			errdefs.ErrInvalidArgument)
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

// prepareDir makes dir, or takes the one that is there unless others could put a socket of their own
// in it.
func prepareDir(dir string, gid int) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return fmt.Errorf("make run directory: %w", err)
	}
	// Chmod after Mkdir because of the umask.
	switch err := os.Mkdir(dir, 0o750); {
	case err == nil:
		if err := errors.Join(os.Chown(dir, -1, gid), os.Chmod(dir, 0o750)); err != nil {
			return fmt.Errorf("restrict run directory: %w", err)
		}
		return nil
	case !errors.Is(err, fs.ErrExist):
		return fmt.Errorf("make run directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("check run directory: %w", err)
	}
	owner := info.Sys().(*syscall.Stat_t)
	if !info.IsDir() || info.Mode().Perm()&0o022 != 0 || int(owner.Uid) != os.Geteuid() {
		return fmt.Errorf("run directory %s (%s, of user %d) must be a directory of the user who runs msbd, in which nobody else "+
			"can put a socket: 'chmod go-w %[1]s', or use another --run-dir: %[4]w", dir, info.Mode(), owner.Uid, errdefs.ErrFailedPrecondition)
	}
	if info.Mode().Perm() != 0o750 {
		return nil
	}
	// Made by us when Group may not have been there yet.
	if err := os.Chown(dir, -1, gid); err != nil {
		return fmt.Errorf("restrict run directory: %w", err)
	}
	return nil
}

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

// removeStale removes a socket that nobody listens on.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("check admin socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("admin socket %s: something else is there (%s); move it away, or use another --run-dir: %w",
			path, info.Mode(), errdefs.ErrFailedPrecondition)
	}
	conn, err := net.DialTimeout("unix", path, dialTimeout)
	if err == nil {
		_ = conn.Close()
		return fmt.Errorf("another msbd is running on %s: stop it with 'msb server stop', or use another --run-dir: %w",
			path, errdefs.ErrAlreadyExists)
	}
	// Only a refusal says that nobody listens; a full backlog, for one, does not.
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("see whether another msbd is running: %w", err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove stale admin socket: %w", err)
	}
	return nil
}

// groupID is the id of a group that this process may give files to, or -1, which chown takes for no
// change: users who run a msbd of their own need not be in it.
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
