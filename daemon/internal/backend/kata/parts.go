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

// The parts of a sandbox are its shim and whatever that has started: the hypervisor, virtiofsd. They are
// found by the cgroup that Kata names for the sandbox, or by their arguments: the shim is outside of that
// cgroup at its beginning and end, and some hypervisors leave it. Ids are random, and so never name another's.

// isPart says whether a process belongs to a sandbox.
func isPart(pid int, id string) bool {
	cgroups, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	for line := range strings.Lines(string(cgroups)) {
		for name := range strings.SplitSeq(strings.TrimSuffix(line, "\n"), "/") {
			if name == "kata_"+id || name == id {
				// Not one that has ended, nor one of the kernel's threads, which end with the hypervisor.
				_, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
				return err == nil
			}
		}
	}
	args := process.Arguments(pid)
	return isShim(args, id) || isHypervisor(args, id) || isFirecracker(args, id) || isVirtiofsd(args, id)
}

// option says whether args hold an option, as a word of its own, with a value that is accepted.
func option(args []string, name string, accept func(value string) bool) bool {
	for i, arg := range args {
		if arg == name && i+1 < len(args) && accept(args[i+1]) {
			return true
		}
	}
	return false
}

func isShim(args []string, id string) bool {
	return option(args, "-id", func(v string) bool { return v == id })
}

func isHypervisor(args []string, id string) bool {
	return option(args, "-name", func(v string) bool { // QEMU
		name, _, _ := strings.Cut(v, ",")
		return name == "sandbox-"+id
	}) || option(args, "--api-socket", func(v string) bool { // Cloud Hypervisor
		return strings.HasPrefix(v, filepath.Join(vmRoot, id)+"/")
	})
}

// isFirecracker is true of its jailer, too, which leaves the cgroup and may end before it.
func isFirecracker(args []string, id string) bool {
	return option(args, "--id", func(v string) bool { return v == id })
}

func isVirtiofsd(args []string, id string) bool {
	shared := filepath.Join(hypervisor.SharedRoot, id) + "/"
	return slices.ContainsFunc(args, func(arg string) bool {
		_, value, found := strings.Cut(arg, "=") // --shared-dir=, or of the one in C: source=
		return found && strings.HasPrefix(value, shared)
	})
}

// killParts ends all processes of a sandbox and waits until they are dead.
func killParts(ctx context.Context, id string) error {
	for {
		pids, err := process.PIDs()
		if err != nil {
			return err
		}
		var errs []error
		found := false
		for _, pid := range pids {
			if !isPart(pid, id) {
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
			if !p.Dead() && isPart(pid, id) {
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

// findHypervisor takes hold of a sandbox's hypervisor, which is in its cgroup; nil when there is none. It is cheap.
func findHypervisor(id string) (*process.Process, error) {
	var procs []byte
	for _, root := range []string{"", "memory", "pids", "cpu", "devices", "systemd"} { // cgroup v2; some hierarchy of v1
		var err error
		if procs, err = os.ReadFile(filepath.Join("/sys/fs/cgroup", root, cgroupParent, "kata_"+id, "cgroup.procs")); err == nil {
			break
		}
	}
	for field := range strings.FieldsSeq(string(procs)) {
		pid, _ := strconv.Atoi(field)
		if !isHypervisor(process.Arguments(pid), id) {
			continue
		}
		p, err := process.Open(pid)
		if p == nil || err != nil {
			return nil, err
		}
		if isHypervisor(process.Arguments(pid), id) {
			return p, nil
		}
		p.Close()
	}
	return nil, nil
}
