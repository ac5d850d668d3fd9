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

	"github.com/msbd/msbd/daemon/internal/sys/process"
	"github.com/msbd/msbd/daemon/internal/sys/tsc"
)

// File names in a VM's directory.
const (
	monitorSocket   = "qmp.sock"
	agentSocket     = "agent.sock"
	virtiofsdSocket = "vfs.sock"
	consoleLog      = "console.log"
	qemuLog         = "qemu.log"
	virtiofsdLog    = "virtiofsd.log"
)

// agentPort is the QEMU id of the virtio-serial port that the guest's agent opens, and of its chardev.
const agentPort = "agent"

// SharedRoot holds the directories that Kata's shims share with guests. Each shim mounts its sandbox's root file system
// there, in the shim's mount namespace.
const SharedRoot = "/run/kata-containers/shared/sandboxes"

// memoryHeadroomMiB is the memory that a VM has in addition to its sandbox's memory, for the guest's kernel and agent.
// It is more than they need, so that a sandbox reaches its memory limit before the VM is out of memory.
const memoryHeadroomMiB = 128

// hostTSC returns the frequency of the time stamp counter that an emulated guest reads, in kHz. Package tsc explains
// why the guest does not measure it.
var hostTSC = sync.OnceValue(tsc.KHz)

// qemuCommand returns the command that runs QEMU for the VM st. QEMU runs in the VM's directory dir. The paths of its
// sockets and logs are relative to dir. monitor is the listening QMP socket.
func (s *Service) qemuCommand(dir string, st state, monitor *os.File) *exec.Cmd {
	accel, cpu, processors, kernelArgs := "kvm", "host", st.VCPUs, ""
	if s.cfg.Accelerator == "tcg" {
		// Emulation is faster without mitigations. They are not needed, because an emulated guest is no security
		// boundary in any case. Without erms, kernels and programs copy and clear memory with instructions of 8 or
		// more bytes, instead of with one that QEMU emulates byte by byte: that is 4 to 6 times as fast. With
		// norandmaps, a program is at the same addresses each time, so QEMU needs to translate it only once.
		//
		// Linux does not boot with fsrm but without erms. QEMU emulates fsrm since some version between 7.2 and 10.
		//
		// The VM has one processor. With more, a processor of QEMU 7.2 sometimes continues to execute code that another
		// processor has changed. Linux changes its own code, for example at the first CPU quota, and then such a guest
		// hangs. If all processors share one thread of QEMU, guests do not hang, but some phases are many times slower.
		// (QEMU 10 did not hang.)
		processors = 1
		accel, cpu, kernelArgs = "tcg,tb-size=256", "max,-erms,-fsrm", " mitigations=off norandmaps"
		if khz := hostTSC(); khz > 0 {
			kernelArgs += " tsc_early_khz=" + strconv.Itoa(khz)
		}
	}
	// The guest's kernel uses some memory to manage each page, so add 1/32.
	memory := strconv.Itoa(st.MemoryMiB+st.MemoryMiB/32+memoryHeadroomMiB) + "M"
	cmd := exec.Command(s.cfg.QEMU,
		"-name", st.ID,
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-accel", accel, "-cpu", cpu, "-smp", strconv.Itoa(processors), "-m", memory,
		"-machine", "q35,memory-backend=mem,usb=off,sata=off,smbus=off,vmport=off",
		"-object", "memory-backend-memfd,id=mem,share=on,size="+memory, // shared with virtiofsd
		"-bios", "qboot.rom", "-kernel", s.cfg.Kernel, "-initrd", s.cfg.Initrd,
		// At loglevel 1 the kernel prints only panics. At a lower level it would not even print those.
		"-append", "console=ttyS0 quiet loglevel=1 panic=-1 reboot=t cryptomgr.notests random.trust_cpu=on"+
			// Skip the timer check, which can fail on a busy host, and probe only the one PCI bus that there is.
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
	cmd.Env = markEnv(roleQEMU, dir)
	cmd.ExtraFiles = []*os.File{monitor}
	return cmd
}

// virtiofsdCommand returns the command that runs virtiofsd for the VM st in the VM directory dir. virtiofsd serves the
// sandbox's shared directory on the listening socket. It keeps a descriptor for each file that the guest's kernel
// remembers. --inode-file-handles of the Rust virtiofsd would not save them, because the files of overlayfs cannot be
// opened by handle.
func (s *Service) virtiofsdCommand(dir string, st state, socket *os.File) *exec.Cmd {
	cmd := exec.Command(s.cfg.Virtiofsd[0], slices.Concat(s.cfg.Virtiofsd[1:], []string{"--fd=3",
		"--shared-dir=" + filepath.Join(SharedRoot, st.ID, "shared"),
		"--cache=always", // auto is three times slower, and only the guest writes to the directory
		"--sandbox=namespace",
		"--announce-submounts", // the root file system is a mount below the shared directory
		"--log-level=error",
	})...)
	cmd.Dir = "/"
	cmd.Env = markEnv(roleVirtiofsd, dir)
	cmd.ExtraFiles = []*os.File{socket}
	return cmd
}

// spawn starts a VM's process in its own session, in the mount namespace ns unless that is nil. The process appends its
// output to log.
func spawn(cmd *exec.Cmd, log string, ns *os.File) (*os.Process, error) {
	out, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(cmd.Path), err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	start := cmd.Start
	if ns != nil {
		start = func() error { return inMountNamespace(ns, cmd.Start) }
	}
	if err := process.WithoutOOMProtection(start); err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(cmd.Path), err)
	}
	return cmd.Process, nil
}

// listen creates a listening Unix socket for a child process. Clients that connect before the child accepts wait in the
// socket's queue.
func listen(path string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	return l.File()
}

// inMountNamespace runs f on a thread that has entered the mount namespace ns, so that the processes that f starts are
// in ns.
func inMountNamespace(ns *os.File, f func() error) error {
	result := make(chan error, 1)
	go func() {
		// The thread is never unlocked, so it ends with this goroutine and no other goroutine runs in ns.
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

// requireFile returns errdefs.ErrFailedPrecondition unless path is a regular file. Without this check, the server would
// start, and each boot of a VM would fail with a less clear message.
func requireFile(what, path string) error {
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("find the guest's %s: %s does not exist; build it with `make guest` or reinstall msbd: %w", what, path, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("find the guest's %s: %q: %w: %w", what, path, err, errdefs.ErrFailedPrecondition)
	}
	return nil
}
