package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// chooseAccelerator turns the setting into "kvm" or "tcg", with the reason. dir caches the one
// answer that takes time.
func chooseAccelerator(setting, dir string) (name, reason string, err error) {
	switch setting {
	case "tcg":
		return "tcg", "configured", nil
	case "kvm":
		if err := openKVM(); err != nil {
			return "", "", fmt.Errorf("use KVM: %w: %w", err, errdefs.ErrFailedPrecondition)
		}
		return "kvm", "configured", nil
	case "auto", "":
		if err := usableKVM(dir); err != nil {
			return "tcg", "KVM is not usable: " + err.Error(), nil
		}
		return "kvm", "KVM is usable", nil
	}
	return "", "", fmt.Errorf("use accelerator %q: need auto, kvm or tcg: %w", setting, errdefs.ErrInvalidArgument)
}

// usableKVM says what is wrong with this host's KVM. A device that opens and answers is not enough:
// on some hosts it emulates, a hundred times slower than QEMU does.
func usableKVM(dir string) error {
	if err := openKVM(); err != nil {
		return err
	}
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err
	}
	if !regexp.MustCompile(`(?m)^flags\s*:.* (vmx|svm)( |$)`).Match(cpuinfo) {
		return errors.New("the processor offers neither vmx nor svm")
	}
	fast, err := fastKVM(dir, runProbe)
	if err != nil {
		return err
	}
	if !fast {
		return fmt.Errorf("a small program did not run in it within %v", probeLimit)
	}
	return nil
}

// fastKVM asks the probe, once per boot of the host and dir.
func fastKVM(dir string, probe func() error) (bool, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return false, err
	}
	const fast, slow = "fast", "slow"
	cache := filepath.Join(dir, fmt.Sprintf(".kvm-%.36s", boot))
	cached, _ := os.ReadFile(cache) // unreadable or cut short is the same as absent
	if v := string(cached); v == fast || v == slow {
		return v == fast, nil
	}
	verdict := fast
	if probe() != nil {
		verdict = slow
	}
	_ = os.WriteFile(cache, []byte(verdict), 0o600) // at worst it is asked again
	return verdict == fast, nil
}

// openKVM checks that the device is there and speaks the one version of its API.
func openKVM() error {
	fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/kvm: %w", err)
	}
	defer unix.Close(fd)
	version, err := unix.IoctlRetInt(fd, kvmGetAPIVersion)
	if err != nil {
		return fmt.Errorf("ask /dev/kvm for its version: %w", err)
	}
	if version != kvmAPIVersion {
		return fmt.Errorf("/dev/kvm has version %d, not %d", version, kvmAPIVersion)
	}
	return nil
}

const (
	probeName  = "msbd-kvm-probe"
	probeLimit = 500 * time.Millisecond
)

// runProbe runs the probe in a child, because a vCPU that hangs can only be killed.
func runProbe() error {
	ctx, cancel := context.WithTimeout(context.Background(), probeLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{probeName}
	return cmd.Run()
}

// MaybeProbeChild must be called first in main of every program that calls New: the Service runs
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
