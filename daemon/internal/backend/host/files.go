package host

import (
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"
)

// Limits of open files. With Kata's own driver, virtiofsd needs a file descriptor for each file of a sandbox that the guest's kernel remembers,
// which are all files that the sandbox has used, until the guest is short of memory. Without descriptors, no program
// starts in the sandbox.
const (
	// wantedFiles is the limit that the server sets, and at most what virtiofsd uses.
	wantedFiles = 1 << 20
	// lowFiles is a limit that a sandbox may reach, for example with large packages of npm.
	lowFiles = 1 << 18
	// minFiles is a limit with which sandboxes are not usable.
	minFiles = 1 << 12
)

// RaiseFileLimit raises the soft limit of open files of this process to wantedFiles, and the hard limit if it is lower, as
// far as it may, and returns the new soft limit. Processes that it starts inherit it: containerd, and through it Kata's
// shims and their virtiofsd. It returns errdefs.ErrFailedPrecondition if the limit is too low to run sandboxes.
func RaiseFileLimit() (uint64, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("read the limit of open files: %w", err)
	}
	// A hard limit may be a thousand times wantedFiles. Go has raised this process's soft limit to it. Child processes must
	// not inherit that, because some programs allocate memory for each possible descriptor, or close all of them.
	wanted := syscall.Rlimit{Cur: wantedFiles, Max: max(limit.Max, wantedFiles)}
	// Only root with CAP_SYS_RESOURCE may raise the hard limit, and not beyond fs.nr_open. Use syscall.Setrlimit, not
	// unix.Setrlimit: otherwise Go would give child processes the old soft limit.
	if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &wanted) == nil {
		return wanted.Cur, nil
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: limit.Max, Max: limit.Max}); err != nil {
		return 0, fmt.Errorf("raise the limit of open files: %w", err)
	}
	if limit.Max < minFiles {
		return limit.Max, fmt.Errorf("the limit of open files is %d, with which sandboxes are not usable; %s: %w",
			limit.Max, raiseFiles, errdefs.ErrFailedPrecondition)
	}
	return limit.Max, nil
}

const raiseFiles = "raise it with 'ulimit -n 1048576' before the start, or with LimitNOFILE=1048576 in the systemd unit"

// CheckFileLimit judges the limit of open files of a server with the settings o and at most maxConnections connections.
func CheckFileLimit(limit uint64, o Options, maxConnections int) Check {
	const name = "open files"
	// In addition to the connections, each sandbox needs a few open files.
	need := uint64(maxConnections) + 1000
	switch {
	case limit < minFiles:
		return problem(name, raiseFiles, "the limit is %d, with which sandboxes are not usable", limit)
	case limit < need:
		return warning(name, fmt.Sprintf("ulimit -n %d, or LimitNOFILE= of the systemd unit", max(need, wantedFiles)),
			"the limit is %d, which is too low for max-connections %d", limit, maxConnections)
	case limit < lowFiles && o.ownDriver():
		return warning(name, raiseFiles, "the limit is %d, so a sandbox cannot use more files than that, and then starts no program any more", limit)
	}
	return ok(name, "limit %d", limit)
}
