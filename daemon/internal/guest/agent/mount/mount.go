// Package mount parses mount options and unmounts file systems.
package mount

import (
	"errors"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Options are parsed mount options, grouped by the system call and the argument that takes them.
type Options struct {
	Bind, Recursive bool
	Attr            uint64  // unix.MOUNT_ATTR_* of the mount
	Propagation     uintptr // unix.MS_SHARED, unix.MS_PRIVATE and so on
	Data            string  // options for the file system, separated by commas
	superblock      uintptr // unix.MS_* flags of the file system's superblock
}

// Flags returns the flags for mount(2).
func (o Options) Flags() uintptr {
	f := o.superblock
	for _, a := range attributes {
		if a.flag != 0 && o.Attr&a.attr == a.attr {
			f |= a.flag
		}
	}
	return f
}

// attributes are the options that set and clear attributes of a mount, with their values in mount_setattr(2) and
// mount(2).
var attributes = []struct {
	on, off string
	attr    uint64
	flag    uintptr
}{
	{"ro", "rw", unix.MOUNT_ATTR_RDONLY, unix.MS_RDONLY},
	{"nosuid", "suid", unix.MOUNT_ATTR_NOSUID, unix.MS_NOSUID},
	{"nodev", "dev", unix.MOUNT_ATTR_NODEV, unix.MS_NODEV},
	{"noexec", "exec", unix.MOUNT_ATTR_NOEXEC, unix.MS_NOEXEC},
	{"noatime", "atime", unix.MOUNT_ATTR_NOATIME, unix.MS_NOATIME},
	{"nodiratime", "diratime", unix.MOUNT_ATTR_NODIRATIME, unix.MS_NODIRATIME},
	{"nosymfollow", "symfollow", unix.MOUNT_ATTR_NOSYMFOLLOW, unix.MS_NOSYMFOLLOW},
}

// superblockFlags are the options that apply to a file system, and so to all of its mounts.
var superblockFlags = map[string]uintptr{
	"sync": unix.MS_SYNCHRONOUS, "dirsync": unix.MS_DIRSYNC, "mand": unix.MS_MANDLOCK, "lazytime": unix.MS_LAZYTIME,
}

var propagation = map[string]uintptr{
	"private": unix.MS_PRIVATE, "rprivate": unix.MS_PRIVATE | unix.MS_REC,
	"shared": unix.MS_SHARED, "rshared": unix.MS_SHARED | unix.MS_REC,
	"slave": unix.MS_SLAVE, "rslave": unix.MS_SLAVE | unix.MS_REC,
	"unbindable": unix.MS_UNBINDABLE, "runbindable": unix.MS_UNBINDABLE | unix.MS_REC,
}

// ignoredOptions are options that have no effect. Most of them request the default. A mount with norelatime or
// strictatime keeps the default, relatime. tmpcopyup is for runtimes that copy files into a tmpfs.
var ignoredOptions = []string{"", "defaults", "async", "relatime", "norelatime", "strictatime", "tmpcopyup"}

// ParseOptions parses mount options as in fstab(5). Unknown options are passed to the file system (Data).
func ParseOptions(options []string) Options {
	var o Options
	var data []string
next:
	for _, opt := range options {
		for _, a := range attributes {
			switch opt {
			case a.on:
				o.Attr |= a.attr
				continue next
			case a.off:
				o.Attr &^= a.attr
				continue next
			}
		}
		switch {
		case opt == "bind":
			o.Bind = true
		case opt == "rbind":
			o.Bind, o.Recursive = true, true
		case superblockFlags[opt] != 0:
			o.superblock |= superblockFlags[opt]
		case propagation[opt] != 0:
			o.Propagation = propagation[opt]
		case slices.Contains(ignoredOptions, opt):
		default:
			data = append(data, opt)
		}
	}
	o.Data = strings.Join(data, ",")
	return o
}

// unmountTimeout bounds the wait for a file system that is still in use.
const unmountTimeout = time.Second

// Unmount syncs the file system at target and unmounts it. It syncs because the host may unplug the disk next. If the
// file system is still in use after 1 s, Unmount detaches it, and the kernel unmounts it after its last use. Unmount
// does nothing if target is not a mount point.
func Unmount(target string) error {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, target, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, 0, &st)
	if err != nil || st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return nil
	}
	if f, err := unix.Open(target, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0); err == nil {
		_ = unix.Syncfs(f)
		unix.Close(f)
	}
	for end := time.Now().Add(unmountTimeout); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		if time.Now().After(end) {
			return unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
	}
}
