package timerslack

import (
	"errors"
	"io/fs"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// slack returns the slack of a child process, which inherits it.
func slack(t *testing.T, start func(*exec.Cmd) error) string {
	t.Helper()
	cmd := exec.Command("cat", "/proc/self/timerslack_ns")
	var out strings.Builder
	cmd.Stdout = &out
	if err := start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out.String())
}

func TestSlack(t *testing.T) {
	if err := SetAll(Service); errors.Is(err, fs.ErrPermission) {
		t.Skip("SetAll needs CAP_SYS_NICE")
	} else if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := SetAll(Default); err != nil {
			t.Error(err)
		}
	}()
	if got := slack(t, (*exec.Cmd).Start); got != "1000000" {
		t.Errorf("a child process has the slack %s ns, want that of the service", got)
	}
	if got := slack(t, func(cmd *exec.Cmd) error { return WithDefault(cmd.Start) }); got != "50000" {
		t.Errorf("a child of WithDefault has the slack %s ns, want the default", got)
	}
	// WithDefault leaves the slack as it was.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := WithDefault(func() error { return WithDefault(func() error { return nil }) })
	got, _ := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil || time.Duration(got) != Service {
		t.Errorf("after WithDefault: %v, slack %d ns, want that of the service", err, got)
	}
}
