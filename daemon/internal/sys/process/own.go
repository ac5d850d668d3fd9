package process

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// OpenIf returns process pid if wanted reports true for it, and otherwise nil. Use it only with a condition that no other
// user can meet, such as being in a cgroup that only root can move processes to. The caller must close the Process.
func OpenIf(pid int, wanted func(pid int) bool) (*Process, error) {
	p, err := Open(pid)
	if p == nil || err != nil {
		return nil, err
	}
	// The pid is not reused while the process lives. So if it still lives in the end, all that was read is about it.
	if wanted(pid) && !p.Dead() {
		return p, nil
	}
	p.Close()
	return nil, nil
}

// UIDs is a range of user ids that a server uses only for its own processes. The zero UIDs is empty.
type UIDs struct{ First, Count uint32 }

// Contains reports whether uid is in the range.
func (u UIDs) Contains(uid uint32) bool { return uid >= u.First && uid-u.First < u.Count }

// OpenOwn returns process pid if it is one that this server started, and otherwise nil. This is the only place that
// decides this for a process whose ID was not recorded. Any local user can start a process with any arguments and any
// environment, and can start a setuid program with them. So the process must also run only as this server's user, or
// only as a user in uids. Its executable must be one of programs, which are absolute paths. wanted then decides by what
// the process says about itself. The caller must close the Process.
func OpenOwn(pid int, uids UIDs, programs []string, wanted func(pid int) bool) (*Process, error) {
	return OpenIf(pid, func(pid int) bool { return isOwner(pid, uids) && runsOneOf(pid, programs) && wanted(pid) })
}

// FindOwn returns all processes of this host for which OpenOwn returns a process. It returns them also with an error.
// The caller must close them.
func FindOwn(uids UIDs, programs []string, wanted func(pid int) bool) ([]*Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var found []*Process
	var errs []error
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || !isOwner(pid, uids) { // OpenOwn checks again; this saves it most processes of a host
			continue
		}
		p, err := OpenOwn(pid, uids, programs, wanted)
		if p != nil {
			found = append(found, p)
		}
		errs = append(errs, err)
	}
	return found, errors.Join(errs...)
}

// isOwner reports whether all user ids of process pid are this program's effective user id, or all are the same id of
// uids. The real user id of a setuid program is that of the user who started it.
func isOwner(pid int, uids UIDs) bool {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, rest, _ := strings.Cut(string(status), "\nUid:")
	line, _, _ := strings.Cut(rest, "\n")
	ids := strings.Fields(line) // real, effective, saved, of file accesses
	if len(ids) != 4 || len(slices.Compact(ids)) != 1 {
		return false
	}
	uid, err := strconv.ParseUint(ids[0], 10, 32)
	return err == nil && (int(uid) == os.Geteuid() || uids.Contains(uint32(uid)))
}

// runsOneOf reports whether the executable of process pid is one of programs. An executable that was replaced while
// it ran, such as by an upgrade, is recognized by the path that it had. It must be on the same file system as its
// replacement, because a path may mean another file in another mount namespace. A kernel thread and a process that has
// ended have no executable.
func runsOneOf(pid int, programs []string) bool {
	link := fmt.Sprintf("/proc/%d/exe", pid)
	exe, err := os.Stat(link)
	if err != nil {
		return false
	}
	target, _ := os.Readlink(link)
	old, replaced := strings.CutSuffix(target, " (deleted)")
	return slices.ContainsFunc(programs, func(program string) bool {
		file, err := os.Stat(program)
		if err == nil && os.SameFile(exe, file) {
			return true
		}
		if !replaced {
			return false
		}
		if path, linkErr := filepath.EvalSymlinks(program); linkErr == nil {
			program = path
		}
		if err != nil { // the program was removed
			file, err = os.Stat(filepath.Dir(program))
		}
		return err == nil && program == old && device(exe) == device(file)
	})
}

func device(info os.FileInfo) uint64 { return uint64(info.Sys().(*syscall.Stat_t).Dev) }

// KillAll kills the processes and waits until each is dead. It kills children before their parents, so that the parents
// reap them.
func KillAll(ctx context.Context, processes []*Process) error {
	parents := make(map[int]int, len(processes))
	for _, p := range processes {
		parents[p.PID], _ = Parent(p.PID) // 0 if the process has ended
	}
	var errs []error
	for _, p := range childrenFirst(processes, parents) {
		errs = append(errs, p.Kill(ctx))
	}
	return errors.Join(errs...)
}

// childrenFirst sorts processes so that each comes before its parent. parents has the pid of each process's parent. A
// child may have a smaller pid than its parent, because pids start again at the beginning when they reach their maximum.
func childrenFirst(processes []*Process, parents map[int]int) []*Process {
	ancestors := func(p *Process) (n int) { // among processes
		for parent, ok := parents[p.PID]; ok && n < len(parents); parent, ok = parents[parent] {
			n++
		}
		return n
	}
	return slices.SortedStableFunc(slices.Values(processes), func(a, b *Process) int {
		return cmp.Compare(ancestors(b), ancestors(a))
	})
}

// CloseAll closes the processes.
func CloseAll(processes []*Process) {
	for _, p := range processes {
		p.Close()
	}
}
