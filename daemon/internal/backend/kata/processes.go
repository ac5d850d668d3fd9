package kata

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// The processes of a sandbox are its shim and the processes that the shim has started, such as QEMU and virtiofsd. They
// are found by the cgroup that Kata names after the sandbox. They are also found by their executable and arguments,
// because the shim is outside of that cgroup when it starts and when it ends. Sandbox ids are random, so an id never
// matches a process of another sandbox.

// inCgroup reports whether process pid is in a cgroup with a name that Kata gives to cgroups of sandbox id.
func inCgroup(pid int, id string) bool {
	cgroups, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	for line := range strings.Lines(string(cgroups)) {
		for name := range strings.SplitSeq(strings.TrimSuffix(line, "\n"), "/") {
			if name == "kata_"+id || name == id {
				return true
			}
		}
	}
	return false
}

// cgroupMembers returns the pids of the processes in the cgroups of sandbox id. It does not search all processes for a
// cgroup with this name, because users may have a part of the tree where they can create one.
func cgroupMembers(id string) (pids []int) {
	for _, top := range cgroups(id) {
		_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Name() == "cgroup.procs" {
				procs, _ := os.ReadFile(path) // fails if the cgroup was just removed, and then it has no members
				for field := range strings.FieldsSeq(string(procs)) {
					if pid, err := strconv.Atoi(field); err == nil {
						pids = append(pids, pid)
					}
				}
			}
			return nil
		})
	}
	slices.Sort(pids) // cgroup v1 has a hierarchy for each controller
	return slices.Compact(pids)
}

// hasExecutable reports whether process pid has an executable. A kernel thread has none, and ends with the hypervisor for
// which it works.
func hasExecutable(pid int) bool {
	_, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil
}

// findProcesses returns the processes of sandbox id. programs are the executables of shims, QEMU and virtiofsd. Those in
// the sandbox's cgroups may have any executable and any user, because Kata can be configured to run QEMU as another user.
// The caller must close the processes. findProcesses returns them also with an error.
func findProcesses(id string, programs []string) ([]*process.Process, error) {
	found, err := process.FindOwn(process.UIDs{}, programs, func(pid int) bool {
		args := process.Arguments(pid)
		return !inCgroup(pid, id) && (isShim(args, id) || isQEMU(args, id) || isVirtiofsd(args, id))
	})
	errs := []error{err}
	for _, pid := range cgroupMembers(id) {
		p, err := process.OpenIf(pid, func(pid int) bool { return inCgroup(pid, id) && hasExecutable(pid) })
		if p != nil {
			found = append(found, p)
		}
		errs = append(errs, err)
	}
	return found, errors.Join(errs...)
}

// hasOption reports whether args have the option name, followed by a value in the next argument for which accept
// returns true.
func hasOption(args []string, name string, accept func(value string) bool) bool {
	for i, arg := range args {
		if arg == name && i+1 < len(args) && accept(args[i+1]) {
			return true
		}
	}
	return false
}

// isShim reports whether args are the arguments of sandbox id's shim.
func isShim(args []string, id string) bool {
	return hasOption(args, "-id", func(v string) bool { return v == id })
}

// isQEMU reports whether args are the arguments of the QEMU that Kata's own driver starts for sandbox id.
func isQEMU(args []string, id string) bool {
	return hasOption(args, "-name", func(v string) bool {
		name, _, _ := strings.Cut(v, ",")
		return name == "sandbox-"+id
	})
}

// isVirtiofsd reports whether args are the arguments of sandbox id's virtiofsd.
func isVirtiofsd(args []string, id string) bool {
	shared := filepath.Join(hypervisor.SharedRoot, id) + "/"
	return slices.ContainsFunc(args, func(arg string) bool {
		_, value, found := strings.Cut(arg, "=") // --shared-dir= for the Rust virtiofsd, source= for the C one
		return found && strings.HasPrefix(value, shared)
	})
}

// killProcesses kills all processes of sandbox id and waits until they are dead.
func killProcesses(ctx context.Context, id string, programs []string) error {
	for {
		found, err := findProcesses(id, programs)
		if len(found) > 0 {
			err = errors.Join(err, process.KillAll(ctx, found))
			process.CloseAll(found)
		}
		// Search again, because a process may have started another one before it was killed.
		if err != nil || len(found) == 0 {
			return err
		}
	}
}

// findQEMU returns the QEMU process in the cgroup of sandbox id, or nil if there is none. The caller must close the
// process. It is cheap enough to poll.
func findQEMU(id string) (*process.Process, error) {
	var procs []byte
	for _, root := range []string{"", "memory", "pids", "cpu", "devices", "systemd"} { // cgroup v2, or a hierarchy of v1
		var err error
		if procs, err = os.ReadFile(filepath.Join("/sys/fs/cgroup", root, cgroupParent, "kata_"+id, "cgroup.procs")); err == nil {
			break
		}
	}
	for field := range strings.FieldsSeq(string(procs)) {
		pid, _ := strconv.Atoi(field)
		qemu, err := process.OpenIf(pid, func(pid int) bool {
			return inCgroup(pid, id) && isQEMU(process.Arguments(pid), id)
		})
		if qemu != nil || err != nil {
			return qemu, err
		}
	}
	return nil, nil
}
