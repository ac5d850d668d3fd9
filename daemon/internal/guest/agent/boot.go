package agent

import (
	"fmt"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/guest/agent/container"
	"github.com/msbd/msbd/daemon/internal/guest/agent/devices"
	"github.com/msbd/msbd/daemon/internal/guest/agent/network"
	"github.com/msbd/msbd/daemon/internal/sys/timerslack"
)

// mountSystem mounts the file systems that the rest of the agent needs. The initramfs has none of them.
func mountSystem() error {
	if err := moveRoot(); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	for _, m := range []struct {
		source, target, fstype string
		flags                  uintptr
		data                   string
	}{
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"cgroup2", container.CgroupRoot, "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// bringUp prepares the machine for containers. It sets the agent's timer slack, raises the limits of processes, loads kernel
// modules, enables cgroup controllers and sets up the network.
func bringUp(log *slog.Logger) error {
	if err := timerslack.SetAll(timerslack.Service); err != nil {
		log.Warn("the agent will wake up more often than necessary", "err", err)
	}
	if err := container.RaiseProcessLimits(); err != nil {
		log.Warn("could not raise the limits of processes", "err", err)
	}
	if err := devices.LoadModules(log); err != nil {
		return fmt.Errorf("load modules: %w", err)
	}
	// Enable one controller per write, because if one of several fails, the kernel enables none of them.
	for _, controller := range []string{"cpu", "cpuset", "io", "memory", "pids"} {
		if err := os.WriteFile(container.CgroupRoot+"/cgroup.subtree_control", []byte("+"+controller), 0); err != nil {
			log.Warn("could not enable a cgroup controller", "controller", controller, "err", err)
		}
	}
	return network.SetUp(log)
}

// moveRoot mounts the initramfs over itself, because pivot_root does not work on the initramfs mount that the kernel
// creates.
func moveRoot() error {
	if err := unix.Mount("/", "/newroot", "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if err := unix.Chdir("/newroot"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return unix.Chdir("/")
}
