package container

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestHandOver checks what the portal can do with its descriptors, with cgroups of this machine.
func TestHandOver(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can create cgroups")
	}
	const uid = 65534
	path, err := os.MkdirTemp(hostCgroups(t), "msb-handover-")
	if err != nil {
		t.Fatal(err)
	}
	c := &cgroup{path: path, load: path + "/load", portal: path + "/portal"}
	t.Cleanup(func() {
		if err := removeGroups(path); err != nil {
			t.Error(err)
		}
	})
	for _, dir := range []string{c.load, c.portal, c.processes()} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	files, err := c.handOver(uid)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(files)
	if len(files) != 2 {
		t.Fatalf("handOver returned %d files, want 2", len(files))
	}
	group, processes := int(files[0].Fd()), int(files[1].Fd())
	if err := unix.Mkdirat(group, "load/x", 0o755); !errors.Is(err, unix.EROFS) {
		t.Errorf("create a cgroup through the first descriptor: %v, want EROFS", err)
	}
	if _, err := unix.Openat(group, "load/cgroup.kill", unix.O_WRONLY, 0); !errors.Is(err, unix.EROFS) {
		t.Errorf("open cgroup.kill through the first descriptor: %v, want EROFS", err)
	}
	if err := unix.Mkdirat(processes, "1", 0o755); err != nil {
		t.Errorf("create a cgroup through the second descriptor: %v", err)
	}
	if _, err := os.Stat(c.processes() + "/1"); err != nil {
		t.Error(err)
	}
	var above, root unix.Stat_t
	for dir, stat := range map[string]*unix.Stat_t{"../..": &above, ".": &root} {
		if err := unix.Fstatat(processes, dir, stat, 0); err != nil {
			t.Fatal(err)
		}
	}
	if above.Ino != root.Ino {
		t.Error("a path leads from the second descriptor to the cgroups above")
	}
	for _, name := range []string{path + "/cgroup.procs", c.load + "/cgroup.procs", c.processes(), c.processes() + "/cgroup.procs"} {
		var stat unix.Stat_t
		if err := unix.Stat(name, &stat); err != nil || stat.Uid != uid {
			t.Errorf("%s belongs to the user %d, %v, want %d", name, stat.Uid, err, uid)
		}
	}
}

// hostCgroups returns where this machine's cgroup2 file system is mounted.
func hostCgroups(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); f[2] == "cgroup2" {
			return filepath.Clean(f[1])
		}
	}
	t.Fatal("this machine has no cgroup2 file system")
	return ""
}
