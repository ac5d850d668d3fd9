package process

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func oomScore(t *testing.T, pid string) string {
	t.Helper()
	score, err := os.ReadFile("/proc/" + pid + "/oom_score_adj")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(score))
}

// mayLowerOOMScore reports whether this process has CAP_SYS_RESOURCE. Root in a container may lack it.
func mayLowerOOMScore(t *testing.T) bool {
	t.Helper()
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		t.Fatal(err)
	}
	return data[0].Effective>>unix.CAP_SYS_RESOURCE&1 == 1
}

// A protected process keeps its score to itself, because the kernel must kill what uses the memory. A score that an
// administrator has set is kept. Without CAP_SYS_RESOURCE, no score changes; TestService tests the protection of the
// service as root with all capabilities.
func TestOOMScore(t *testing.T) {
	initial := os.Getenv("OOM_TEST")
	if initial == "" {
		for _, initial := range []string{"0", "100"} {
			// Change the score of a child, so that this process keeps its own.
			cmd := exec.Command("sh", "-c", `echo "$OOM_TEST" >/proc/self/oom_score_adj && exec "$0" -test.run='^TestOOMScore$' -test.v`, os.Args[0])
			cmd.Env = append(os.Environ(), "OOM_TEST="+initial)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("with the score %s: %v\n%s", initial, err, out)
			}
		}
		return
	}
	want := initial
	err := ProtectFromOOM()
	switch {
	case initial == "0" && !mayLowerOOMScore(t):
		if !errors.Is(err, fs.ErrPermission) {
			t.Errorf("without CAP_SYS_RESOURCE: %v, want a permission error", err)
		}
	case err != nil:
		t.Error(err)
	case initial == "0":
		want = strconv.Itoa(protectedOOMScore)
	}
	if got := oomScore(t, "self"); got != want {
		t.Errorf("the process has the score %s, want %s", got, want)
	}
	for _, tt := range []struct {
		how   string
		start func(*exec.Cmd) error
		want  string
	}{
		{"usual", (*exec.Cmd).Start, want},
		{"unprotected", func(cmd *exec.Cmd) error { return WithoutOOMProtection(cmd.Start) }, strings.Replace(want, strconv.Itoa(protectedOOMScore), "0", 1)},
	} {
		cmd := exec.Command("sleep", "60")
		if err := tt.start(cmd); err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}()
		if got := oomScore(t, strconv.Itoa(cmd.Process.Pid)); got != tt.want {
			t.Errorf("the %s child has the score %s, want %s", tt.how, got, tt.want)
		}
	}
	if got := oomScore(t, "self"); got != want {
		t.Errorf("after it has started the children, the process has the score %s, want %s", got, want)
	}
}
