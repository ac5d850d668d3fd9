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

// kvmObstacle returns the reason why KVM cannot be used, or nil if it can. It also tests KVM's speed, because on some
// hosts /dev/kvm opens and responds but is emulated, a hundred times slower than QEMU's emulation. If required is set,
// the settings require KVM, and kvmObstacle skips the speed test. If writeCache is set and KVM is fast, kvmObstacle
// records that in cacheDir.
func (m machine) kvmObstacle(required bool, cacheDir string, writeCache bool) *obstacle {
	const device = "/dev/kvm"
	cpu := m.processor()
	err := checkKVM(m.root + device)
	denied := errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)
	switch {
	case err == nil && required:
		return nil
	case cpu.flag == "" && (!required || !denied):
		return cpu.obstacle()
	case err != nil:
		return m.deviceObstacle(device, cpu.module, err)
	}
	fast, err := fastKVM(cacheDir, writeCache, runProbe)
	if err != nil {
		return &obstacle{what: err.Error(), fix: "mount /proc", fixableHere: true}
	}
	if !fast {
		obs := &obstacle{what: fmt.Sprintf("%s exists but is emulated: a small test program did not finish within %v", device, probeTimeout),
			fix: "use a machine whose processor supports virtualization"}
		if cpu.virtual {
			obs.fix = enableNesting
		}
		obs.fix += ", or set accelerator to kvm to use it anyway"
		return obs
	}
	return nil
}

// enableNesting is the fix for a virtual machine whose processor does not offer virtualization.
const enableNesting = "enable nested virtualization for this virtual machine"

// obstacle returns the obstacle for a processor that does not offer virtualization.
func (p processor) obstacle() *obstacle {
	obs := &obstacle{what: "the processor offers neither vmx nor svm", fix: enableInFirmware}
	if p.virtual {
		obs.fix = enableNesting
		obs.fixDetail = fmt.Sprintf(" with its provider, or on its host: modprobe -r %[1]s && modprobe %[1]s nested=1 "+
			"(/sys/module/%[1]s/parameters/nested must then read Y or 1), and run its QEMU with -cpu host", p.module)
	}
	return obs
}

// vsockObstacle returns the reason why vhost-vsock cannot be used, or nil if it can.
func (m machine) vsockObstacle() *obstacle {
	const device = "/dev/vhost-vsock"
	fd, err := unix.Open(m.root+device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return m.deviceObstacle(device, "vhost_vsock", err)
	}
	unix.Close(fd)
	return nil
}

// fastKVM reports whether probe succeeds, which means that KVM is fast. If writeCache is set, fastKVM caches a success
// in a file in dir. Until the next boot of the host, calls with the same dir return true without running probe. A
// failure is not cached, because the host may just be busy. If dir is empty, nothing is cached.
func fastKVM(dir string, writeCache bool, probe func() error) (bool, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return false, err
	}
	const fast = "fast"
	cache := "" // no file
	if dir != "" {
		cache = filepath.Join(dir, fmt.Sprintf(".kvm-%.36s", boot))
	}
	if cached, _ := os.ReadFile(cache); string(cached) == fast { // an unreadable or truncated file counts as absent
		return true, nil
	}
	for range probeAttempts {
		if probe() != nil {
			continue
		}
		if writeCache {
			_ = os.WriteFile(cache, []byte(fast), 0o600) // if this fails, the next call runs the probe again
		}
		return true, nil
	}
	return false, nil
}

// checkKVM checks that the device opens and has kvmAPIVersion, the only version of KVM's API.
func checkKVM(device string) error {
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
		return fmt.Errorf("%s has API version %d, want %d", device, version, kvmAPIVersion)
	}
	return nil
}

const (
	probeName = "msbd-kvm-probe"
	// probeAttempts is how many times the probe runs before KVM counts as slow, because the host may be busy.
	probeAttempts = 3
	// probeTimeout bounds the program on the vCPU.
	probeTimeout = 500 * time.Millisecond
	// childTimeout bounds the child process that runs the probe.
	childTimeout = 5 * time.Second
)

// runProbe runs the probe in a child process, because a vCPU that hangs can only be stopped by killing its process.
func runProbe() error {
	ctx, cancel := context.WithTimeout(context.Background(), childTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{probeName}
	return cmd.Run()
}

// RunProbeIfChild probes KVM and exits if this process is a child that Choose or Examine started. Otherwise it does
// nothing. Choose and Examine run the same program again as this child. Every program that calls them must call
// RunProbeIfChild first in main.
func RunProbeIfChild() {
	if os.Args[0] != probeName {
		return
	}
	if err := probeKVM(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}
