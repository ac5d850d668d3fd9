package container

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/guest/agent/mount"
)

// containerConfig describes the environment to build for a container's main process.
type containerConfig struct {
	Root          string
	ReadonlyRoot  bool
	Hostname      string
	Mounts        []*pb.Mount
	Devices       []*pb.LinuxDevice
	MaskedPaths   []string
	ReadonlyPaths []string
	Sysctl        map[string]string
}

// buildContainer sets up the container in this process's new namespaces. It changes files in the container's root only
// after pivot_root, so that links in the image cannot lead out of it.
func buildContainer(c *containerConfig) error {
	// The root of a cgroup namespace is its creator's cgroup. So create it here, in the container's cgroup.
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("create cgroup namespace: %w", err)
	}
	if c.Hostname != "" {
		if err := unix.Sethostname([]byte(c.Hostname)); err != nil {
			return fmt.Errorf("set hostname: %w", err)
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	mounts, err := planMounts(c.Mounts)
	if err != nil {
		return err
	}
	if err := enterRoot(c.Root); err != nil {
		return fmt.Errorf("enter root %s: %w", c.Root, err)
	}
	writeEtc("/", c.Hostname) // before anything is mounted in the root
	ownDev := false
	for _, m := range mounts {
		if err := m.mount(); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
		ownDev = ownDev || m.target == "/dev" && m.fstype == "tmpfs"
	}
	if ownDev {
		if err := populateDev(); err != nil {
			return fmt.Errorf("populate /dev: %w", err)
		}
	}
	for _, d := range c.Devices {
		if err := makeDevice(d); err != nil {
			return fmt.Errorf("create device %s: %w", d.Path, err)
		}
	}
	for key, value := range c.Sysctl {
		if err := os.WriteFile("/proc/sys/"+strings.ReplaceAll(key, ".", "/"), []byte(value), 0); err != nil {
			return fmt.Errorf("set sysctl %s: %w", key, err)
		}
	}
	for _, path := range c.ReadonlyPaths {
		if err := makeReadonly(path); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("make %s read-only: %w", path, err)
		}
	}
	for _, path := range c.MaskedPaths {
		if err := mask(path); err != nil {
			return fmt.Errorf("mask %s: %w", path, err)
		}
	}
	return nil
}

// enterRoot makes root the root of this mount namespace and unmounts everything else.
func enterRoot(root string) error {
	if err := unix.Mount(root, root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	old, err := unix.Open("/", unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(old)
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Fchdir(old); err != nil {
		return err
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the old root: %w", err)
	}
	return unix.Chdir("/")
}

// plannedMount is a mount to make in the container. The source of a bind mount is opened before the container's root is
// entered.
type plannedMount struct {
	target string
	fstype string
	source string
	opts   mount.Options
	tree   int  // for a bind mount, a descriptor of a detached copy of the source's mount; else -1
	dir    bool // the mount point is a directory
}

// planMounts translates the mounts of a spec and opens the sources of bind mounts.
func planMounts(specs []*pb.Mount) ([]plannedMount, error) {
	mounts := make([]plannedMount, 0, len(specs))
	for _, s := range specs {
		m := plannedMount{
			target: filepath.Clean("/" + s.Destination),
			fstype: s.Type,
			source: s.Source,
			opts:   mount.ParseOptions(s.Options),
			tree:   -1,
			dir:    true,
		}
		switch {
		case s.Type == guestMountType:
			m.opts.Attr |= unix.MOUNT_ATTR_RDONLY
			m.opts.Bind = true
		case s.Type == "bind":
			m.opts.Bind = true
		case s.Type == "cgroup":
			m.fstype, m.opts.Data = "cgroup2", ""
		}
		if m.opts.Bind {
			if err := m.openSource(); err != nil {
				return nil, fmt.Errorf("bind %s: %w", s.Source, err)
			}
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

// openSource sets tree to a detached copy of a bind mount's source, and dir according to the source's type.
func (m *plannedMount) openSource() error {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if m.opts.Recursive {
		flags |= unix.AT_RECURSIVE
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, m.source, flags)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(tree, &st); err != nil {
		unix.Close(tree)
		return err
	}
	m.tree, m.dir = tree, st.Mode&unix.S_IFMT == unix.S_IFDIR
	return nil
}

// mount creates the mount point and mounts m there.
func (m *plannedMount) mount() error {
	target, err := makeMountpoint(m.target, m.dir)
	if err != nil {
		return fmt.Errorf("create mount point: %w", err)
	}
	if m.tree < 0 {
		err = unix.Mount(m.source, target, m.fstype, m.opts.Flags(), m.opts.Data)
	} else {
		err = attachTree(m.tree, target, m.opts.Attr)
	}
	if err != nil {
		return err
	}
	if m.opts.Propagation != 0 {
		return unix.Mount("", target, "", m.opts.Propagation, "")
	}
	return nil
}

// attachTree mounts a detached mount at target with attributes (unix.MOUNT_ATTR_*), and closes its descriptor.
func attachTree(tree int, target string, attr uint64) error {
	defer unix.Close(tree)
	if attr != 0 {
		set := &unix.MountAttr{Attr_set: attr}
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, set); err != nil {
			return fmt.Errorf("set attributes: %w", err)
		}
	}
	return unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// makeMountpoint creates a directory or file at path, with its parents, unless it exists. If path is a symbolic link, it
// uses the link's target. It returns the path of the mount point.
func makeMountpoint(path string, dir bool) (string, error) {
	for range 40 {
		link, err := os.Readlink(path)
		if err != nil {
			break
		}
		if !filepath.IsAbs(link) {
			link = filepath.Join(filepath.Dir(path), link)
		}
		path = link
	}
	if dir {
		return path, os.MkdirAll(path, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY|unix.O_NONBLOCK, 0o644)
	if err != nil {
		if _, statErr := os.Lstat(path); statErr == nil {
			return path, nil // it exists and cannot be opened, such as a socket, but it can be a mount point
		}
		return "", err
	}
	return path, f.Close()
}

// populateDev creates the devices and links in a new /dev that programs expect.
func populateDev() error {
	for _, d := range []*pb.LinuxDevice{
		{Path: "/dev/null", Type: "c", Major: 1, Minor: 3, FileMode: 0o666},
		{Path: "/dev/zero", Type: "c", Major: 1, Minor: 5, FileMode: 0o666},
		{Path: "/dev/full", Type: "c", Major: 1, Minor: 7, FileMode: 0o666},
		{Path: "/dev/random", Type: "c", Major: 1, Minor: 8, FileMode: 0o666},
		{Path: "/dev/urandom", Type: "c", Major: 1, Minor: 9, FileMode: 0o666},
		{Path: "/dev/tty", Type: "c", Major: 5, Minor: 0, FileMode: 0o666},
	} {
		if err := makeDevice(d); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1",
		"/dev/stderr": "/proc/self/fd/2", "/dev/ptmx": "pts/ptmx",
	} {
		if err := os.Symlink(target, name); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// makeDevice creates the device node or FIFO d with its owner and mode. It does nothing if the path exists.
func makeDevice(d *pb.LinuxDevice) error {
	types := map[string]uint32{"c": unix.S_IFCHR, "u": unix.S_IFCHR, "b": unix.S_IFBLK, "p": unix.S_IFIFO}
	if err := os.MkdirAll(filepath.Dir(d.Path), 0o755); err != nil {
		return err
	}
	err := unix.Mknod(d.Path, types[d.Type]|d.FileMode&0o777, int(unix.Mkdev(uint32(d.Major), uint32(d.Minor))))
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	if err != nil {
		return err
	}
	// mknod applied the umask to the mode.
	if err := unix.Chmod(d.Path, d.FileMode&0o777); err != nil {
		return err
	}
	return unix.Chown(d.Path, int(d.UID), int(d.GID))
}

// makeReadonly mounts path read-only over itself.
func makeReadonly(path string) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return err
	}
	return attachTree(tree, path, unix.MOUNT_ATTR_RDONLY)
}

// mask hides the content of a file or directory. It does nothing if the path does not exist.
func mask(path string) error {
	st, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.IsDir() {
		return unix.Mount("tmpfs", path, "tmpfs", unix.MS_RDONLY, "size=0k")
	}
	return unix.Mount("/dev/null", path, "", unix.MS_BIND, "")
}

// bindConsole bind-mounts the terminal at fd over /dev/console.
func bindConsole(fd int) error {
	target, err := makeMountpoint("/dev/console", false)
	if err != nil {
		return err
	}
	tree, err := unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return err
	}
	return attachTree(tree, target, 0)
}
