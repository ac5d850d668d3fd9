package host

import (
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"
)

// Of a host that has been fast it is known; of one that has been slow it is not, for it may have been busy.
func TestFastKVM(t *testing.T) {
	slow := errors.New("killed")
	for name, tt := range map[string]struct {
		keep    bool
		answers []error // of one look after the other
		want    []bool
	}{
		"fast":             {true, []error{nil}, []bool{true, true}},
		"for a moment not": {true, []error{slow, slow, nil}, []bool{true, true}},
		"slow":             {true, []error{slow, slow, slow, nil}, []bool{false, true, true}},
		"only looked at":   {false, []error{nil, nil}, []bool{true, true}},
	} {
		dir, asked := t.TempDir(), 0
		for i, want := range tt.want {
			fast, err := fastKVM(dir, tt.keep, func() error { asked++; return tt.answers[asked-1] })
			if fast != want || err != nil {
				t.Errorf("%s: look %d: %v, %v", name, i, fast, err)
			}
		}
		if asked != len(tt.answers) {
			t.Errorf("%s: the probe was asked %d times, not %d", name, asked, len(tt.answers))
		}
		if files, err := os.ReadDir(dir); len(files) > 0 != tt.keep || err != nil {
			t.Errorf("%s: left behind: %v, %v", name, files, err)
		}
	}
}

// The doctor knows what the server knows.
func TestFastKVMOfAnother(t *testing.T) {
	dir := t.TempDir()
	for _, keep := range []bool{true, false} {
		fast, err := fastKVM(dir, keep, func() error {
			if !keep {
				return errors.New("asked")
			}
			return nil
		})
		if !fast || err != nil {
			t.Errorf("fastKVM = %v, %v", fast, err)
		}
	}
}

// Who names no directory gets nothing written.
func TestFastKVMWithoutCache(t *testing.T) {
	t.Chdir(t.TempDir())
	asked := 0
	for range 2 {
		if fast, err := fastKVM("", true, func() error { asked++; return nil }); !fast || err != nil {
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
	if took := time.Since(begin); took > 2*childLimit {
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
