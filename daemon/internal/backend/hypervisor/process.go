package hypervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// A role is the function of a process in its VM.
type role string

const (
	roleQEMU      role = "qemu"
	roleVirtiofsd role = "virtiofsd"
)

const markVariable = "MSB_VM"

// markEnv returns the environment of the process with role r in the VM directory dir. It consists only of the mark. The
// process does not inherit msbd's environment, which may hold secrets.
func markEnv(r role, dir string) []string {
	return []string{markVariable + "=" + string(r) + ":" + dir}
}

// readMark returns the role and the VM directory in the mark of process pid. They are empty if the process has no mark
// or does not exist.
func readMark(pid int) (r role, dir string) {
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return "", ""
	}
	for entry := range bytes.SplitSeq(env, []byte{0}) {
		if value, ok := strings.CutPrefix(string(entry), markVariable+"="); ok {
			name, dir, _ := strings.Cut(value, ":")
			return role(name), dir
		}
	}
	return "", ""
}

// A markedProcess is a process that was found by its mark.
type markedProcess struct {
	pid  int
	role role
}

// markedProcesses returns the processes of all VMs by VM directory. A VM has two virtiofsd processes.
func markedProcesses() (map[string][]markedProcess, error) {
	pids, err := process.PIDs()
	if err != nil {
		return nil, err
	}
	found := make(map[string][]markedProcess)
	for _, pid := range pids {
		if r, dir := readMark(pid); r != "" {
			found[dir] = append(found[dir], markedProcess{pid: pid, role: r})
		}
	}
	return found, nil
}

// killMarked kills the found processes of the VM directory dir, and waits until each is dead. If another process has
// got one of the pids in the meantime, killMarked skips it.
func killMarked(ctx context.Context, dir string, found []markedProcess) error {
	var errs []error
	for _, m := range found {
		p, err := process.Open(m.pid)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if p == nil {
			continue
		}
		// Read the mark again, because another process may have got the pid before p was opened.
		if r, d := readMark(m.pid); r == m.role && d == dir {
			errs = append(errs, p.Kill(ctx))
		}
		p.Close()
	}
	return errors.Join(errs...)
}
