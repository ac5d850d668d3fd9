package host

import (
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"
)

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

// Who names no directory gets nothing written.
func TestFastKVMWithoutCache(t *testing.T) {
	t.Chdir(t.TempDir())
	asked := 0
	for range 2 {
		if fast, err := fastKVM("", func() error { asked++; return nil }); !fast || err != nil {
			t.Errorf("fastKVM = %v, %v", fast, err)
		}
	}
	if asked != 2 {
		t.Errorf("the probe was asked %d times", asked)
	}
	if files, err := os.ReadDir("."); len(files) > 0 || err != nil {
		t.Errorf("left behind: %v, %v", files, err)
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
	if openKVM("/dev/kvm") != nil && (exit == nil || exit.ExitCode() != 1) {
		t.Errorf("without KVM the probe ends with %v", err)
	}
}
