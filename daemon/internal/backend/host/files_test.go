package host

import (
	"os/exec"
	"strings"
	"testing"
)

// fileLimitChild is the name under which the test program calls RaiseFileLimit, runs a child process, and prints the
// new limit, the child's limit, and the error.
const fileLimitChild = "host-test-files"

func TestRaiseFileLimit(t *testing.T) {
	for name, tt := range map[string]struct{ limits, want string }{
		// Only the soft limit can be raised. The limit is too low for some sandboxes, but not for all.
		"soft limit": {"ulimit -Sn 1000; ulimit -Hn 5000", "5000 5000\n<nil>"},
		// A server with such a limit must not start, because the error would otherwise appear in a sandbox.
		"too low": {"ulimit -n 1000", "1000 1000\nthe limit of open files is 1000, with which sandboxes are not usable; raise it with"},
	} {
		t.Run(name, func(t *testing.T) {
			// Without this capability, nobody can raise the hard limit.
			out, err := exec.Command("setpriv", "--bounding-set=-sys_resource", "bash", "-c",
				tt.limits+"; exec -a "+fileLimitChild+" /proc/$PPID/exe").CombinedOutput()
			if err != nil || !strings.HasPrefix(string(out), tt.want) {
				t.Errorf("%q, %v; want %q", out, err, tt.want)
			}
		})
	}
}

func TestCheckFileLimit(t *testing.T) {
	for limit, want := range map[uint64]Check{
		1000:    {Status: Problem, Detail: "not usable", Remedy: "LimitNOFILE="},
		10_000:  {Status: Warning, Detail: "too low for max-connections 10000", Remedy: "LimitNOFILE="},
		20_000:  {Status: Warning, Detail: "cannot use more files", Remedy: "ulimit -n 1048576"},
		1 << 20: {Status: OK, Detail: "limit 1048576"},
	} {
		c := CheckFileLimit(limit, Options{Hypervisor: Kata}, 10_000)
		if c.Status != want.Status || !strings.Contains(c.Detail, want.Detail) || !strings.Contains(c.Remedy, want.Remedy) {
			t.Errorf("limit %d: %+v", limit, c)
		}
	}
	if c := CheckFileLimit(20_000, Options{}, 10_000); c.Status != OK { // the files of a sandbox need no descriptors
		t.Errorf("with the default driver: %+v", c)
	}
}
