// Package mount reads the options of mounts and takes mounts away.
package mount

import (
	"errors"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Options are options as in fstab, sorted by the system call that takes them.
type Options struct {
	Bind, Recursive bool
	Attr            uint64  // unix.MOUNT_ATTR_*
	Propagation     uintptr // unix.MS_SHARED and the like
	Data            string  // for the file system
	whole           uintptr // unix.MS_* of a file system as a whole
}

// Flags returns the options for mount(2).
func (o Options) Flags() uintptr {
	f := o.whole
	for _, a := range attributes {
		if a.flag != 0 && o.Attr&a.attr == a.attr {
			f |= a.flag
		}
	}
	return f
}

// attributes are options of a mount, with the numbers that mount_setattr(2) and mount(2) have for them. off
// undoes on.
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

var flags = map[string]uintptr{
	"sync": unix.MS_SYNCHRONOUS, "dirsync": unix.MS_DIRSYNC, "mand": unix.MS_MANDLOCK, "lazytime": unix.MS_LAZYTIME,
}

var propagation = map[string]uintptr{
	"private": unix.MS_PRIVATE, "rprivate": unix.MS_PRIVATE | unix.MS_REC,
	"shared": unix.MS_SHARED, "rshared": unix.MS_SHARED | unix.MS_REC,
	"slave": unix.MS_SLAVE, "rslave": unix.MS_SLAVE | unix.MS_REC,
	"unbindable": unix.MS_UNBINDABLE, "runbindable": unix.MS_UNBINDABLE | unix.MS_REC,
}

// ignoredOptions ask for the default, or are for a runtime that copies files.
var ignoredOptions = []string{"", "defaults", "async", "relatime", "norelatime", "strictatime", "tmpcopyup"}

// ParseOptions sorts options. Those that it does not know are for the file system.
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
		case flags[opt] != 0:
			o.whole |= flags[opt]
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

// unmountLimit bounds the wait for a file system that is still in use.
const unmountLimit = time.Second

// Unmount writes a file system's data and unmounts it, since the host may take its disk away next. It
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
	for end := time.Now().Add(unmountLimit); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		if time.Now().After(end) {
			return unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
	}
}
