package vmm

import (
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"
)

func TestChooseAccelerator(t *testing.T) {
	name, reason, err := chooseAccelerator("tcg", t.TempDir())
	if name != "tcg" || reason == "" || err != nil {
		t.Errorf("tcg: %q, %q, %v", name, reason, err)
	}
	name, reason, err = chooseAccelerator("auto", t.TempDir())
	if (name != "tcg" && name != "kvm") || reason == "" || err != nil {
		t.Errorf("auto: %q, %q, %v", name, reason, err)
	}
	t.Logf("auto: %s: %s", name, reason)
	if _, err := os.Stat("/dev/kvm"); err != nil {
		_, _, err := chooseAccelerator("kvm", t.TempDir())
		wantError(t, err, "/dev/kvm")
	}
}

func TestFastKVMAsksOnce(t *testing.T) {
	for _, verdict := range []error{nil, errors.New("killed")} {
		dir, asked := t.TempDir(), 0
		for range 2 {
			fast, err := fastKVM(dir, func() error { asked++; return verdict })
			if fast != (verdict == nil) || err != nil {
				t.Errorf("fastKVM = %v, %v after %v", fast, err, verdict)
			}
		}
		if asked != 1 {
			t.Errorf("the probe was asked %d times", asked)
		}
	}
}

// A vCPU that hangs must not hang the daemon; and the child is the probe, nothing else.
func TestProbe(t *testing.T) {
	begin := time.Now()
	err := runProbe()
	if took := time.Since(begin); took > 10*probeLimit {
		t.Errorf("the probe took %v", took)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if openKVM() != nil && (exit == nil || exit.ExitCode() != 1) {
		t.Errorf("without KVM the probe ends with %v", err)
	}
}
