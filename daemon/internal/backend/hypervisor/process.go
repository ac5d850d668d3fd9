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

// A role is what a marked process does for its VM.
type role string

const (
	roleQEMU      role = "qemu"
	roleVirtiofsd role = "virtiofsd"
)

const markVariable = "MSB_VM"

// mark is the environment of a VM's process, and all of it: msbd's own may hold secrets.
func mark(r role, dir string) []string {
	return []string{markVariable + "=" + string(r) + ":" + dir}
}

// readMark is the role and the VM directory of a process, empty when it has no mark or is gone.
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

// A markedProcess was found by its mark.
type markedProcess struct {
	pid  int
	role role
}

// markedProcesses finds the processes of every VM, by VM directory. virtiofsd is two processes.
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

// killMarked ends the processes and waits until each is dead. A pid that has come to belong to
// another process meanwhile is left alone.
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
		// Read again: only now is the pid held to one process.
		if r, d := readMark(m.pid); r == m.role && d == dir {
			errs = append(errs, p.Kill(ctx))
		}
		p.Close()
	}
	return errors.Join(errs...)
}
