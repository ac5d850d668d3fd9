package process

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"
)

// nobody is the user id of another user.
const nobody = 65534

// copyProgram copies /bin/sleep to the path program with these permissions.
func copyProgram(t *testing.T, program string, mode os.FileMode) {
	t.Helper()
	data, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program+".new", data, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(program+".new", mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(program+".new", program); err != nil {
		t.Fatal(err)
	}
}

// start runs cmd as user uid until the test ends, and returns its pid once it executes the program at the path runs.
func start(t *testing.T, uid uint32, runs string, cmd *exec.Cmd) int {
	t.Helper()
	if uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	cmd.Dir = "/"
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	program, err := os.Stat(runs)
	if err != nil {
		t.Fatal(err)
	}
	for limit := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		if exe, err := os.Stat(fmt.Sprintf("/proc/%d/exe", cmd.Process.Pid)); err == nil && os.SameFile(exe, program) {
			return cmd.Process.Pid
		}
		if time.Now().After(limit) {
			t.Fatalf("process %d does not execute %s", cmd.Process.Pid, runs)
		}
	}
}

// A process is this server's only if its user, its executable and its arguments are right, however it looks otherwise.
func TestOpenOwn(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can run processes as another user")
	}
	dir, err := os.MkdirTemp("/tmp", "msb-own") // another user must reach it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"program", "other", "upgraded", "removed", "below"} {
		copyProgram(t, path(name), 0o755)
	}
	copyProgram(t, path("setuid"), 0o755|os.ModeSetuid)
	if err := os.Symlink("program", path("link")); err != nil {
		t.Fatal(err)
	}
	// In another mount namespace, another file has the path of a program.
	elsewhere := exec.Command("/bin/sh", "-ec", `mount --bind "$1" "$2"; exec "$2" 1000`, "sh", path("other"), path("below"))
	elsewhere.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}

	sleep := func(name string) *exec.Cmd { return exec.Command(path(name), "1000") }
	yes := func(int) bool { return true }
	reserved := UIDs{First: 1_900_000_000, Count: 2}
	tests := map[string]struct {
		pid     int
		program string
		wanted  func(int) bool
		want    bool
	}{
		"own":                               {start(t, 0, path("program"), sleep("program")), path("program"), yes, true},
		"through a link":                    {start(t, 0, path("program"), sleep("link")), path("link"), yes, true},
		"upgraded":                          {start(t, 0, path("upgraded"), sleep("upgraded")), path("upgraded"), yes, true},
		"removed":                           {start(t, 0, path("removed"), sleep("removed")), path("removed"), yes, true},
		"of a reserved user":                {start(t, reserved.First+1, path("program"), sleep("program")), path("program"), yes, true},
		"of a user after the reserved ones": {start(t, reserved.First+reserved.Count, path("program"), sleep("program")), path("program"), yes, false},
		"of another user":                   {start(t, nobody, path("program"), sleep("program")), path("program"), yes, false},
		"setuid, run by another user":       {start(t, nobody, path("setuid"), sleep("setuid")), path("setuid"), yes, false},
		"another program":                   {start(t, 0, path("other"), sleep("other")), path("program"), yes, false},
		"another file with this path":       {start(t, 0, path("other"), elsewhere), path("below"), yes, false},
		"unwanted":                          {start(t, 0, path("program"), sleep("program")), path("program"), func(int) bool { return false }, false},
		"does not exist":                    {1 << 22, path("program"), yes, false},
	}
	copyProgram(t, path("upgraded"), 0o755) // now it is another file
	if err := os.Remove(path("removed")); err != nil {
		t.Fatal(err)
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			p, err := OpenOwn(tt.pid, reserved, []string{"/nowhere/else", tt.program}, tt.wanted)
			if (p != nil) != tt.want || err != nil {
				t.Errorf("OpenOwn = %v, %v; want a process: %t", p, err, tt.want)
			}
			if p != nil {
				p.Close()
			}
			found, err := FindOwn(reserved, []string{"/nowhere/else", tt.program}, tt.wanted)
			defer CloseAll(found)
			isIt := func(p *Process) bool { return p.PID == tt.pid }
			if slices.ContainsFunc(found, isIt) != tt.want || err != nil {
				t.Errorf("FindOwn = %v, %v; want the process among them: %t", found, err, tt.want)
			}
		})
	}
}

func TestChildrenFirst(t *testing.T) {
	var processes []*Process
	for _, pid := range []int{5, 100, 3, 90, 7} {
		processes = append(processes, &Process{PID: pid})
	}
	// 100 → 3 → 5; the parents of 90 and 7 are others
	order := childrenFirst(processes, map[int]int{100: 1, 3: 100, 5: 3, 90: 1, 7: 42})
	var got []int
	for _, p := range order {
		got = append(got, p.PID)
	}
	if want := []int{5, 3, 100, 90, 7}; !slices.Equal(got, want) {
		t.Errorf("order %v, want %v", got, want)
	}
}
