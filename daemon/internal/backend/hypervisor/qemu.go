package hypervisor

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/backend/network"
	"github.com/msbd/msbd/daemon/internal/sys/portalport"
	"github.com/msbd/msbd/daemon/internal/sys/tsc"
)

// File names in a VM's directory.
const (
	monitorSocket = "qmp.sock"
	agentSocket   = "agent.sock"
	controlSocket = "ctl.sock"
	consoleLog    = "console.log"
	qemuLog       = "qemu.log"
	jailDir       = "root"
)

// agentPort is the QEMU id of the virtio-serial port that the guest's agent opens, and of its chardev.
const agentPort = "agent"

// The serial numbers of a VM's disks, by which the guest's agent finds them, and the name of the virtio-serial port on
// which the agent takes msbd's requests.
const (
	imageSerial = "msb-image"
	upperSerial = "msb-upper"
	controlPort = "msb.ctl"
)

// SharedRoot holds the directories that Kata's own driver shares with guests. Each shim mounts its sandbox's root file
// system there, in the shim's mount namespace.
const SharedRoot = "/run/kata-containers/shared/sandboxes"

// memoryHeadroomMiB is the memory that a VM has in addition to its sandbox's memory, for the guest's kernel and agent.
// It is more than they need, so that a sandbox reaches its memory limit before the VM is out of memory.
const memoryHeadroomMiB = 128

// A VM that has used less than its limit may use burst times the limit for burstSeconds, so that the start of a program is not
// delayed.
const (
	burst        = 2
	burstSeconds = 10
)

// hostTSC returns the frequency of the time stamp counter that an emulated guest reads, in kHz. Package tsc explains
// why the guest does not measure it.
var hostTSC = sync.OnceValue(tsc.KHz)

// tscArgument returns the argument of an emulated guest's kernel with this frequency, after a space.
func tscArgument() string {
	if khz := hostTSC(); khz > 0 {
		return " tsc_early_khz=" + strconv.Itoa(khz)
	}
	return ""
}

// The descriptors of QEMU, in the order of launch.files.
const (
	monitorFD = 3 + iota
	agentFD
	controlFD
	consoleFD
	imageFD
	upperFD
	tapFD
	kernelFD // not for a clone
	initrdFD // not for a clone
	memoryFD // of a template or a clone
	stateFD  // of a clone
)

// memory says how the memory of a VM is made. The zero memory is made by QEMU, and only this VM uses it.
type memory struct {
	// file holds the memory of a template. Without a state, the VM is the template, and shares it. With a state, the VM is
	// a clone, whose changes of the memory are its own.
	file *os.File
	// state is the rest of what a clone begins with, in the format of QEMU's migration.
	state *os.File
}

func (mem memory) isClone() bool    { return mem.state != nil }
func (mem memory) isTemplate() bool { return mem.file != nil && mem.state == nil }

// A launch holds what the QEMU of a VM inherits: it opens no files of the host by itself, except its own.
type launch struct {
	output *os.File   // where it writes its messages
	files  []*os.File // by descriptor
}

// close closes the copies of this process. Without them, the sockets close when QEMU dies.
func (l *launch) close() {
	for _, f := range append(l.files, l.output) {
		if f != nil {
			f.Close()
		}
	}
}

// prepareLaunch opens what the QEMU of the VM m inherits, and creates its sockets and logs. The caller must close the
// result.
func (s *Service) prepareLaunch(m *machine, mem memory, slot *network.Slot) (l *launch, err error) {
	l = &launch{}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if l.output, err = s.createLog(m, qemuLog); err != nil {
		return nil, err
	}
	for _, f := range []struct {
		fd   int
		open func() (*os.File, error)
	}{
		{monitorFD, func() (*os.File, error) { return listen(filepath.Join(m.dir, monitorSocket)) }},
		{agentFD, func() (*os.File, error) { return listen(filepath.Join(m.dir, agentSocket)) }},
		{controlFD, func() (*os.File, error) { return listen(filepath.Join(m.dir, controlSocket)) }},
		{consoleFD, func() (*os.File, error) { return s.createLog(m, consoleLog) }},
		{imageFD, func() (*os.File, error) { return os.Open(m.Disks.Image) }},
		{upperFD, func() (*os.File, error) { return os.OpenFile(m.Disks.Upper, os.O_RDWR, 0) }},
		{tapFD, func() (*os.File, error) { return duplicate(slot.Tap()) }},
		{kernelFD, unless(mem.isClone(), s.cfg.Kernel)},
		{initrdFD, unless(mem.isClone(), s.cfg.Initrd)},
		{memoryFD, func() (*os.File, error) { return reopen(mem.file, os.O_RDWR) }},
		{stateFD, func() (*os.File, error) { return reopen(mem.state, os.O_RDONLY) }},
	} {
		file, err := f.open()
		if err != nil {
			return nil, fmt.Errorf("prepare the start of QEMU: %w", err)
		}
		if l.files = append(l.files, file); len(l.files) != f.fd-2 {
			panic("hypervisor: the descriptors of QEMU are not in order")
		}
	}
	return l, nil
}

// unless returns a function that opens path to read it, or returns nil if not is set.
func unless(not bool, path string) func() (*os.File, error) {
	return func() (*os.File, error) {
		if not {
			return nil, nil
		}
		return os.Open(path)
	}
}

func duplicate(file *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), file.Name()), nil
}

// qemuCommand returns the command that runs QEMU for the VM st. A clone has the same devices as its template.
func (s *Service) qemuCommand(st state, mem memory) []string {
	accel, cpu, processors, kernelArgs := "kvm", "host", st.VCPUs, ""
	if s.cfg.Accelerator == "tcg" {
		// Emulation is faster without mitigations. They are not needed, because an emulated guest is no security
		// boundary in any case. Without erms, kernels and programs copy and clear memory with instructions of 8 or
		// more bytes, instead of with one that QEMU emulates byte by byte: that is 4 to 6 times as fast. With
		// norandmaps, a program is at the same addresses each time, so QEMU needs to translate it only once. The kernel's
		// statistics about pressure take time at each switch between threads. An emulator gains nothing from huge pages, and
		// needs long to clear one.
		//
		// Linux does not boot with fsrm but without erms. QEMU emulates fsrm since some version between 7.2 and 10.
		//
		// The VM has one processor. With more, a processor of QEMU 7.2 sometimes continues to execute code that another
		// processor has changed. Linux changes its own code, for example at the first CPU quota, and then such a guest
		// hangs. If all processors share one thread of QEMU, guests do not hang, but some phases are many times slower.
		// (QEMU 10 did not hang.)
		processors = 1
		accel, cpu, kernelArgs = "tcg,tb-size=256", "max,-erms,-fsrm", " mitigations=off norandmaps psi=0 transparent_hugepage=madvise"+tscArgument()
	}
	size, machine := strconv.Itoa(st.guestMemoryMiB())+"M", "q35,usb=off,sata=off,smbus=off,vmport=off"
	var options []string
	if mem.file != nil {
		machine += ",memory-backend=memory"
		options = append(options, "-object", fmt.Sprintf("memory-backend-file,id=memory,size=%s,share=%s,mem-path=%s",
			size, map[bool]string{false: "on", true: "off"}[mem.isClone()], fdPath(memoryFD)))
	}
	if mem.isClone() {
		options = append(options, "-incoming", "defer")
	} else {
		options = append(options, "-kernel", fdPath(kernelFD), "-initrd", fdPath(initrdFD),
			// At loglevel 1 the kernel prints only panics. At a lower level it would not even print those.
			"-append", "console=ttyS0 quiet loglevel=1 panic=-1 reboot=t cryptomgr.notests random.trust_cpu=on"+
				// Skip the timer check, which can fail on a busy host, and probe only the one PCI bus that there is.
				" no_timer_check pci=lastbus=0"+
				// The other security modules have no rules in a guest, but are asked at many system calls.
				" lsm=landlock,yama"+kernelArgs)
	}
	return append([]string{
		s.cfg.QEMU, "-name", st.ID,
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-accel", accel, "-cpu", cpu, "-smp", strconv.Itoa(processors), "-m", size,
		"-machine", machine, "-bios", "qboot.rom",
		"-add-fd", fdSet(consoleFD), "-chardev", "file,id=console,append=on,path=" + fdSetPath(consoleFD),
		"-device", "isa-serial,chardev=console",
		"-chardev", "socket,id=monitor,server=on,wait=off,fd=" + strconv.Itoa(monitorFD),
		"-mon", "chardev=monitor,mode=control",
		"-device", "virtio-rng-pci",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=" + agentPort + ",server=on,wait=off,fd=" + strconv.Itoa(agentFD),
		"-device", "virtserialport,id=" + agentPort + ",chardev=" + agentPort + ",name=kata.agent.0",
		"-chardev", "socket,id=control,server=on,wait=off,fd=" + strconv.Itoa(controlFD),
		"-device", "virtserialport,chardev=control,name=" + controlPort,
		"-add-fd", fdSet(imageFD), "-add-fd", fdSet(upperFD),
		"-drive", s.drive("image", imageFD, "read-only=on"),
		"-device", "virtio-blk-pci,drive=image,serial=" + imageSerial,
		// The disk ends with the sandbox, so nothing is gained by waiting until its data is durable. Space that the guest
		// frees is freed on the host.
		"-drive", s.drive("upper", upperFD, "discard=unmap,cache.no-flush=on"),
		// If the host's disk is full, the guest gets an error. By default QEMU would stop the VM.
		"-device", "virtio-blk-pci,drive=upper,serial=" + upperSerial + ",werror=report,rerror=report,discard=on",
		"-netdev", "tap,id=network,fd=" + strconv.Itoa(tapFD),
		// A guest that was restored need not announce its address, which is the same in each network.
		"-device", "virtio-net-pci,netdev=network,mac=" + portalport.GuestMAC + ",romfile=,rx_queue_size=1024,guest_announce=off",
	}, options...)
}

// drive returns the argument of -drive for the disk in the file of descriptor fd, with the id and the options. All disks of a
// VM share one limit.
//
// These limits do not count the space that the guest frees. Those of -blockdev (its driver throttle) do: after the removal of a
// large file, all disks of the VM would stand still until the limit permits a write of that size.
func (s *Service) drive(id string, fd int, options string) string {
	// Locks would let a QEMU prevent the start of others with the same image. Nothing else writes to these files.
	// With auto-read-only, QEMU would first open a writable disk to read only, for which there is no descriptor.
	drive := fmt.Sprintf("if=none,id=%s,driver=raw,auto-read-only=off,file.driver=file,file.filename=%s,file.locking=off,throttling.group=disks,%s",
		id, fdSetPath(fd), options)
	for _, limit := range []struct {
		unit  string
		value int64
	}{{"bps", int64(s.cfg.DiskMiBPerSecond) << 20}, {"iops", int64(s.cfg.DiskOpsPerSecond)}} {
		if limit.value > 0 {
			drive += fmt.Sprintf(",throttling.%[1]s-total=%[2]d,throttling.%[1]s-total-max=%[3]d,throttling.%[1]s-total-max-length=%[4]d",
				limit.unit, limit.value, burst*limit.value, burstSeconds)
		}
	}
	return drive
}

// fdSet returns the argument of -add-fd that makes descriptor fd a set of its own, and fdSetPath the path by which
// options of QEMU refer to it.
func fdSet(fd int) string     { return fmt.Sprintf("fd=%d,set=%d", fd, fd) }
func fdSetPath(fd int) string { return fmt.Sprintf("/dev/fdset/%d", fd) }

// fdPath returns a path of descriptor fd for the options of QEMU that know no sets. QEMU opens the file again, so its
// user must be permitted to read it.
func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

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

// requireFile returns errdefs.ErrFailedPrecondition unless path is a regular file that all users may read, as QEMU does.
// Without this check, the server would start, and each boot of a VM would fail with a less clear message.
func requireFile(what, path string) error {
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err == nil && info.Mode()&0o004 == 0 {
		err = errors.New("QEMU runs as a user without rights and cannot read it; run: chmod a+r " + path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("find the guest's %s: %s does not exist; build it with `make guest` or reinstall msbd: %w", what, path, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("find the guest's %s: %q: %w: %w", what, path, err, errdefs.ErrFailedPrecondition)
	}
	return nil
}
