package host

import (
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"
)

// fastKVM caches that KVM is fast. It does not cache that KVM is slow, because the host may have been busy.
func TestFastKVM(t *testing.T) {
	slow := errors.New("killed")
	for name, tt := range map[string]struct {
		writeCache bool
		results    []error // of successive runs of the probe
		want       []bool  // of successive calls of fastKVM
	}{
		"fast":           {true, []error{nil}, []bool{true, true}},
		"briefly slow":   {true, []error{slow, slow, nil}, []bool{true, true}},
		"slow":           {true, []error{slow, slow, slow, nil}, []bool{false, true, true}},
		"fast, no cache": {false, []error{nil, nil}, []bool{true, true}},
	} {
		dir, runs := t.TempDir(), 0
		for i, want := range tt.want {
			fast, err := fastKVM(dir, tt.writeCache, func() error { runs++; return tt.results[runs-1] })
			if fast != want || err != nil {
				t.Errorf("%s: call %d: %v, %v", name, i, fast, err)
			}
		}
		if runs != len(tt.results) {
			t.Errorf("%s: the probe ran %d times, want %d", name, runs, len(tt.results))
		}
		if files, err := os.ReadDir(dir); len(files) > 0 != tt.writeCache || err != nil {
			t.Errorf("%s: files in the cache: %v, %v", name, files, err)
		}
	}
}

// A call without writeCache, such as the doctor's, uses what a call with writeCache, such as the server's, has cached.
func TestFastKVMUsesSharedCache(t *testing.T) {
	dir := t.TempDir()
	for _, writeCache := range []bool{true, false} {
		fast, err := fastKVM(dir, writeCache, func() error {
			if !writeCache {
				return errors.New("the probe ran, but its result is cached")
			}
			return nil
		})
		if !fast || err != nil {
			t.Errorf("fastKVM = %v, %v", fast, err)
		}
	}
}

// Without a directory, fastKVM writes no file.
func TestFastKVMWithoutCache(t *testing.T) {
	t.Chdir(t.TempDir())
	runs := 0
	for range 2 {
		if fast, err := fastKVM("", true, func() error { runs++; return nil }); !fast || err != nil {
			t.Errorf("fastKVM = %v, %v", fast, err)
		}
	}
	if runs != 2 {
		t.Errorf("the probe ran %d times, want 2", runs)
	}
	if files, err := os.ReadDir("."); len(files) > 0 || err != nil {
		t.Errorf("files were written: %v, %v", files, err)
	}
}

// A vCPU that hangs does not hang the daemon. The child process runs only the probe.
func TestProbe(t *testing.T) {
	begin := time.Now()
	err := runProbe()
	if took := time.Since(begin); took > 2*childTimeout {
		t.Errorf("the probe took %v", took)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if checkKVM("/dev/kvm") != nil && (exit == nil || exit.ExitCode() != 1) {
		t.Errorf("without KVM the probe returned %v, want exit code 1", err)
	}
}
