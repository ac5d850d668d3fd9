package hypervisor

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/tsc"
)

// Names in a VM's directory.
const (
	monitorSocket   = "qmp.sock"
	agentSocket     = "agent.sock"
	virtiofsdSocket = "vfs.sock"
	consoleLog      = "console.log"
	qemuLog         = "qemu.log"
	virtiofsdLog    = "virtiofsd.log"
)

// agentPort names the port that the guest's agent opens, and QEMU's objects behind it.
const agentPort = "agent"

// SharedRoot is where Kata's shim keeps what it shares with guests, in its own mount namespace.
const SharedRoot = "/run/kata-containers/shared/sandboxes"

// memoryHeadroomMiB is what a VM has beyond its sandbox's memory, for its kernel and agent. It is more than they need, so
// that a sandbox meets its own limit first.
const memoryHeadroomMiB = 128

// hostTSC is the speed of the counter that an emulated guest reads. See package tsc for what happens if the guest
// measures it itself.
var hostTSC = sync.OnceValue(tsc.KHz)

// qemuCommand is the command line of a VM. It runs in the VM's directory, to which the sockets and
// logs are relative; monitor is the listening QMP socket.
func (s *Service) qemuCommand(dir string, st state, monitor *os.File) *exec.Cmd {
	accel, cpu, kernelArgs := "kvm", "host", ""
	if s.cfg.Accelerator == "tcg" {
		// An emulated guest is no security boundary anyway.
		accel, cpu, kernelArgs = "tcg,thread=multi,tb-size=256", "max", " mitigations=off"
		if khz := hostTSC(); khz > 0 {
			kernelArgs += " tsc_early_khz=" + strconv.Itoa(khz)
		}
	}
	// The kernel keeps something of each page.
	memory := strconv.Itoa(st.MemoryMiB+st.MemoryMiB/32+memoryHeadroomMiB) + "M"
	cmd := exec.Command(s.cfg.QEMU,
		"-name", st.ID,
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-accel", accel, "-cpu", cpu, "-smp", strconv.Itoa(st.VCPUs), "-m", memory,
		"-machine", "q35,memory-backend=mem,usb=off,sata=off,smbus=off,vmport=off",
		"-object", "memory-backend-memfd,id=mem,share=on,size="+memory, // shared with virtiofsd
		"-bios", "qboot.rom", "-kernel", s.cfg.Kernel, "-initrd", s.cfg.Initrd,
		// Only a panic may speak: below loglevel 1 not even that would.
		"-append", "console=ttyS0 quiet loglevel=1 panic=-1 reboot=t cryptomgr.notests random.trust_cpu=on"+
			// An unlucky schedule of the host must not look like a broken timer, and there is one bus to look at.
			" no_timer_check pci=lastbus=0"+kernelArgs,
		"-chardev", "file,id=console,append=on,path="+consoleLog,
		"-device", "isa-serial,chardev=console",
		"-chardev", "socket,id=monitor,server=on,wait=off,fd=3",
		"-mon", "chardev=monitor,mode=control",
		"-device", "virtio-rng-pci",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id="+agentPort+",server=on,wait=off,path="+agentSocket,
		"-device", "virtserialport,id="+agentPort+",chardev="+agentPort+",name=kata.agent.0",
		"-chardev", "socket,id=shared,path="+virtiofsdSocket,
		"-device", "vhost-user-fs-pci,chardev=shared,tag=kataShared",
	)
	cmd.Dir = dir
	cmd.Env = mark(roleQEMU, dir)
	cmd.ExtraFiles = []*os.File{monitor}
	return cmd
}

// virtiofsdCommand serves the sandbox's shared directory on the listening socket.
func (s *Service) virtiofsdCommand(dir string, st state, socket *os.File) *exec.Cmd {
	cmd := exec.Command(s.cfg.Virtiofsd[0], slices.Concat(s.cfg.Virtiofsd[1:], []string{"--fd=3",
		"--shared-dir=" + filepath.Join(SharedRoot, st.ID, "shared"),
		"--cache=always", // auto is three times slower, and nobody writes beside the guest
		"--sandbox=namespace",
		"--announce-submounts", // the root file system is a mount below the directory
		"--log-level=error",
	})...)
	cmd.Dir = "/"
	cmd.Env = mark(roleVirtiofsd, dir)
	cmd.ExtraFiles = []*os.File{socket}
	return cmd
}

// spawn starts a VM's process in a session of its own, with its output in the log; in another mount
// namespace unless ns is nil.
func spawn(cmd *exec.Cmd, log string, ns *os.File) (*os.Process, error) {
	out, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(cmd.Path), err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if ns == nil {
		err = cmd.Start()
	} else {
		err = inMountNamespace(ns, cmd.Start)
	}
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(cmd.Path), err)
	}
	return cmd.Process, nil
}

// listen makes a listening socket that a child will own: whoever connects early waits in its queue.
func listen(path string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	return l.File()
}

// inMountNamespace runs f on a thread that has entered the mount namespace, so that the processes
// which f starts are born there.
func inMountNamespace(ns *os.File, f func() error) error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with this goroutine, so nothing else runs in there.
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS)
		}
		if err != nil {
			result <- fmt.Errorf("enter the shim's mount namespace: %w", err)
			return
		}
		result <- f()
	}()
	return <-result
}

// requireFile says early and clearly what a boot would fail on.
func requireFile(what, path string) error {
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("find the guest's %s: %s does not exist: build it with `make guest`, or install msbd again: %w", what, path, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("find the guest's %s: %q: %w: %w", what, path, err, errdefs.ErrFailedPrecondition)
	}
	return nil
}
