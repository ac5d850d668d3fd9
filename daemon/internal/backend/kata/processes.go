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

// The processes of a sandbox are its shim and the processes that the shim has started, such as QEMU and virtiofsd. They
// are found by the cgroup that Kata names after the sandbox. They are also found by their arguments, because the shim
// is outside of that cgroup when it starts and when it ends. Sandbox ids are random, so an id never matches a process
// of another sandbox.

// belongsTo reports whether process pid belongs to sandbox id.
func belongsTo(pid int, id string) bool {
	cgroups, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	for line := range strings.Lines(string(cgroups)) {
		for name := range strings.SplitSeq(strings.TrimSuffix(line, "\n"), "/") {
			if name == "kata_"+id || name == id {
				// Skip a process without an executable. It has ended, or it is a kernel thread, which ends with the
				// hypervisor.
				_, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
				return err == nil
			}
		}
	}
	args := process.Arguments(pid)
	return isShim(args, id) || isQEMU(args, id) || isVirtiofsd(args, id)
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
			// Check again, because another process may have got the pid before p was opened. Skip a process that is
			// dead but not reaped yet.
			if !p.Dead() && belongsTo(pid, id) {
				found = true
				errs = append(errs, p.Kill(ctx))
			}
			p.Close()
		}
		// Search again, because a process may have started another one before it was killed.
		if err := errors.Join(errs...); err != nil || !found {
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
