package kata

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// The processes of a sandbox are its shim and whatever the shim has started: QEMU, virtiofsd. They are found by the cgroup
// that Kata names for the sandbox, or by their arguments: the shim is outside of that cgroup at its beginning and end. Ids
// are random, and so never name another's.

// belongsTo reports whether a process is one of a sandbox's.
func belongsTo(pid int, id string) bool {
	cgroups, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	for line := range strings.Lines(string(cgroups)) {
		for name := range strings.SplitSeq(strings.TrimSuffix(line, "\n"), "/") {
			if name == "kata_"+id || name == id {
				// Neither a process that has ended nor a kernel thread, which ends with the hypervisor.
				_, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
				return err == nil
			}
		}
	}
	args := process.Arguments(pid)
	return isShim(args, id) || isQEMU(args, id) || isVirtiofsd(args, id)
}

// hasOption reports whether args hold an option, as a word of its own, with a value that is accepted.
func hasOption(args []string, name string, accept func(value string) bool) bool {
	for i, arg := range args {
		if arg == name && i+1 < len(args) && accept(args[i+1]) {
			return true
		}
	}
	return false
}

func isShim(args []string, id string) bool {
	return hasOption(args, "-id", func(v string) bool { return v == id })
}

// isQEMU reports whether args are those of the QEMU that Kata's own driver starts for a sandbox.
func isQEMU(args []string, id string) bool {
	return hasOption(args, "-name", func(v string) bool {
		name, _, _ := strings.Cut(v, ",")
		return name == "sandbox-"+id
	})
}

func isVirtiofsd(args []string, id string) bool {
	shared := filepath.Join(hypervisor.SharedRoot, id) + "/"
	return slices.ContainsFunc(args, func(arg string) bool {
		_, value, found := strings.Cut(arg, "=") // --shared-dir=, or of the one in C: source=
		return found && strings.HasPrefix(value, shared)
	})
}

// killProcesses ends all processes of a sandbox and waits until they are dead.
func killProcesses(ctx context.Context, id string) error {
	for {
		pids, err := process.PIDs()
		if err != nil {
			return err
		}
		var errs []error
		found := false
		for _, pid := range pids {
			if !belongsTo(pid, id) {
				continue
			}
			p, err := process.Open(pid)
			if err != nil {
				errs = append(errs, err)
			}
			if p == nil {
				continue
			}
			// Look again: only now is the pid held to one process. A dead one may wait to be reaped.
			if !p.Dead() && belongsTo(pid, id) {
				found = true
				errs = append(errs, p.Kill(ctx))
			}
			p.Close()
		}
		// Look again: one that was killed may have started another.
		if err := errors.Join(errs...); err != nil || !found {
			return err
		}
	}
}

// findQEMU takes hold of the QEMU in a sandbox's cgroup. It returns nil if there is none. It is cheap.
func findQEMU(id string) (*process.Process, error) {
	var procs []byte
	for _, root := range []string{"", "memory", "pids", "cpu", "devices", "systemd"} { // cgroup v2; some hierarchy of v1
		var err error
		if procs, err = os.ReadFile(filepath.Join("/sys/fs/cgroup", root, cgroupParent, "kata_"+id, "cgroup.procs")); err == nil {
			break
		}
	}
	for field := range strings.FieldsSeq(string(procs)) {
		pid, _ := strconv.Atoi(field)
		if !isQEMU(process.Arguments(pid), id) {
			continue
		}
		p, err := process.Open(pid)
		if p == nil || err != nil {
			return nil, err
		}
		if isQEMU(process.Arguments(pid), id) {
			return p, nil
		}
		p.Close()
	}
	return nil, nil
}
