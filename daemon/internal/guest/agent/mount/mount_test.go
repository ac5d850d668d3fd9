package mount

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseMountOptions(t *testing.T) {
	for _, tt := range []struct {
		options string
		want    Options
		flags   uintptr
	}{
		{"", Options{}, 0},
		{"rbind,ro,rprivate", Options{
			Bind: true, Recursive: true, Attr: unix.MOUNT_ATTR_RDONLY, Propagation: unix.MS_PRIVATE | unix.MS_REC,
		}, unix.MS_RDONLY},
		{"nosuid,noexec,nodev,mode=755,size=64k", Options{
			Attr: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_NODEV, Data: "mode=755,size=64k",
		}, unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV},
		{"ro,rw,noatime,sync,relatime,tmpcopyup", Options{
			Attr: unix.MOUNT_ATTR_NOATIME, superblock: unix.MS_SYNCHRONOUS,
		}, unix.MS_NOATIME | unix.MS_SYNCHRONOUS},
	} {
		got := ParseOptions(strings.Split(tt.options, ","))
		if got != tt.want || got.Flags() != tt.flags {
			t.Errorf("ParseOptions(%q) = %+v with flags %#x, want %+v with %#x", tt.options, got, got.Flags(), tt.want, tt.flags)
		}
	}
}
