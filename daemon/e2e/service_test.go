package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
)

// TestService installs msbd as a systemd service on a separate, emulated host (the lab) and uses it there.
func TestService(t *testing.T) {
	parallel(t)
	script, err := filepath.Abs("testdata/service.sh")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(root, "daemon", "setup", "lab", "run.sh"), script, root)
	cmd.Env = append(os.Environ(), "LAB_SYSTEMD=1")
	// End the lab with this test, even if the test is killed. Pdeathsig is sent when the thread that started the lab
	// ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("testdata/service.sh: %v\n%s", err, out)
	}
}
