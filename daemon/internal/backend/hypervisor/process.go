package hypervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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

// marked returns this server's processes whose mark names a VM directory for which wanted returns true. A VM of an earlier
// version has two virtiofsd processes. A process that still builds its jail executes this program. The caller must close the processes. marked returns them also with an error.
func (s *Service) marked(wanted func(dir string) bool) ([]*process.Process, error) {
	return process.FindOwn(s.cfg.UIDs, append(s.cfg.Programs[:len(s.cfg.Programs):len(s.cfg.Programs)], "/proc/self/exe"), func(pid int) bool {
		r, dir := readMark(pid)
		return r != "" && wanted(dir)
	})
}

// killAll kills the processes of the VM directory dir, and waits until each is dead: those that its state file records,
// those in the VM's cgroup, to which only root can move a process, and those whose mark names it.
func (s *Service) killAll(ctx context.Context, dir string) error {
	st, _ := readState(dir) // without a valid state file, the marks remain
	var found []*process.Process
	var errs []error
	for _, id := range st.Processes {
		p, err := id.Open()
		if p != nil {
			found = append(found, p)
		}
		errs = append(errs, err)
	}
	id := filepath.Base(dir)
	for _, pid := range cgroupMembers(id) {
		p, err := process.OpenIf(pid, func(pid int) bool { return slices.Contains(cgroupMembers(id), pid) })
		if p != nil {
			found = append(found, p)
		}
		errs = append(errs, err)
	}
	recorded := len(found)
	marked, err := s.marked(func(d string) bool { return d == dir })
	for _, m := range marked {
		if slices.ContainsFunc(found[:recorded], func(p *process.Process) bool { return p.PID == m.PID }) {
			m.Close()
			continue
		}
		found = append(found, m)
	}
	defer process.CloseAll(found)
	return errors.Join(append(errs, err, process.KillAll(ctx, found))...)
}
