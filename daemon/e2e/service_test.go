package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
)

// TestService installs msbd as a service of systemd's on a host of its own, the lab, and works with it there.
func TestService(t *testing.T) {
	parallel(t)
	script, err := filepath.Abs("testdata/service.sh")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(root, "daemon", "setup", "lab", "run.sh"), script, root)
	cmd.Env = append(os.Environ(), "LAB_SYSTEMD=1")
	// The lab ends with this test, however that ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}
