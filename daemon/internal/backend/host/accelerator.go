package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// kvmObstacle returns what keeps KVM from being used, or nil. A device that opens and answers is not enough:
// on some hosts it emulates, a hundred times slower than QEMU does. Who insists on it gets it nonetheless.
// With keep, cacheDir is written to.
func (m machine) kvmObstacle(insist bool, cacheDir string, keep bool) *obstacle {
	const device = "/dev/kvm"
	cpu := m.processor()
	err := openKVM(m.root + device)
	denied := errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)
	switch {
	case err == nil && insist:
		return nil
	case cpu.flag == "" && (!insist || !denied):
		return cpu.obstacle()
	case err != nil:
		return m.deviceObstacle(device, cpu.module, err)
	}
	fast, err := fastKVM(cacheDir, keep, runProbe)
	if err != nil {
		return &obstacle{what: err.Error(), fix: "mount /proc", fixableHere: true}
	}
	if !fast {
		l := &obstacle{what: fmt.Sprintf("%s is there, but emulated: a small program did not run in it within %v", device, probeLimit),
			fix: "use a machine whose processor does it"}
		if cpu.virtual {
			l.fix = nest
		}
		l.fix += ", or insist with accelerator kvm"
		return l
	}
	return nil
}

// nest is for a virtual machine that cannot have virtual machines of its own.
const nest = "turn on nested virtualisation for this virtual machine"

// lack is that of a processor without virtualisation.
func (p processor) obstacle() *obstacle {
	l := &obstacle{what: "the processor offers neither vmx nor svm", fix: firmware}
	if p.virtual {
		l.fix = nest
		l.fixDetail = fmt.Sprintf(", at its provider; or on its host: modprobe -r %[1]s && modprobe %[1]s nested=1 "+
			"(/sys/module/%[1]s/parameters/nested says Y or 1 then), and QEMU with -cpu host", p.module)
	}
	return l
}

// vsockObstacle returns what keeps vhost-vsock from being used, or nil.
func (m machine) vsockObstacle() *obstacle {
	const device = "/dev/vhost-vsock"
	fd, err := unix.Open(m.root+device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return m.deviceObstacle(device, "vhost_vsock", err)
	}
	unix.Close(fd)
	return nil
}

// fastKVM asks the probe. That KVM is fast is so until the next boot of the host, and is read from dir if it is known
// there; with keep, it is written there. That it is slow may be so for this moment, and is not.
func fastKVM(dir string, keep bool, probe func() error) (bool, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return false, err
	}
	const fast = "fast"
	cache := "" // no file, if there is no dir
	if dir != "" {
		cache = filepath.Join(dir, fmt.Sprintf(".kvm-%.36s", boot))
	}
	if cached, _ := os.ReadFile(cache); string(cached) == fast { // unreadable or cut short is the same as absent
		return true, nil
	}
	for range probeTries {
		if probe() != nil {
			continue
		}
		if keep {
			_ = os.WriteFile(cache, []byte(fast), 0o600) // at worst it is asked again
		}
		return true, nil
	}
	return false, nil
}

// openKVM checks that the device is there and speaks the one version of its API.
func openKVM(device string) error {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", device, err)
	}
	defer unix.Close(fd)
	version, err := unix.IoctlRetInt(fd, kvmGetAPIVersion)
	if err != nil {
		return fmt.Errorf("ask %s for its version: %w", device, err)
	}
	if version != kvmAPIVersion {
		return fmt.Errorf("%s has version %d, not %d", device, version, kvmAPIVersion)
	}
	return nil
}

const (
	probeName = "msbd-kvm-probe"
	// probeTries is how often KVM may be slow: the host may be busy.
	probeTries = 3
	// probeLimit is for the program in the vCPU, and childLimit for all that is around it.
	probeLimit = 500 * time.Millisecond
	childLimit = 5 * time.Second
)

// runProbe runs the probe in a child, because a vCPU that hangs can only be killed.
func runProbe() error {
	ctx, cancel := context.WithTimeout(context.Background(), childLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{probeName}
	return cmd.Run()
}

// MaybeProbeChild must be called first in main of every program that calls Choose or Examine: they run
// that program again, as a child which tries KVM. In such a child it does not return.
func MaybeProbeChild() {
	if os.Args[0] != probeName {
		return
	}
	if err := probeKVM(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}
