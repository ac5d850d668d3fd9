package vmm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
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
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("look for VM processes: %w", err)
	}
	found := make(map[string][]markedProcess)
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
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
		p, err := openProcess(m.pid)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if p == nil {
			continue
		}
		// Read again: only now is the pid held to one process.
		if r, d := readMark(m.pid); r == m.role && d == dir {
			errs = append(errs, p.kill(ctx))
		}
		p.close()
	}
	return errors.Join(errs...)
}

// A process is one process for sure, whatever becomes of its pid.
type process struct {
	pid  int
	file *os.File // a pidfd
}

// openProcess takes hold of a process; nil when there is none.
func openProcess(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return &process{pid: pid, file: os.NewFile(uintptr(fd), "pidfd:"+strconv.Itoa(pid))}, nil
}

func (p *process) close() { _ = p.file.Close() }

// wait blocks until the process is dead, reaped or not. It returns ctx's cause if that ends first.
func (p *process) wait(ctx context.Context) error {
	conn, err := p.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", p.pid, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = p.file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := conn.Read(isDead); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("wait for process %d: %w", p.pid, err)
	}
	return nil
}

// isDead says whether a pidfd has become readable, as it does when its process ends.
func isDead(pidfd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, _ := unix.Poll(fds, 0)
	return n == 1
}

// kill ends the process and waits until it is dead.
func (p *process) kill(ctx context.Context) error {
	var err error
	p.control(func(pidfd uintptr) { err = unix.PidfdSendSignal(int(pidfd), unix.SIGKILL, nil, 0) })
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.pid, err)
	}
	return p.wait(ctx)
}

func (p *process) dead() (dead bool) {
	p.control(func(pidfd uintptr) { dead = isDead(pidfd) })
	return dead
}

// control runs f on the pidfd; not at all once the process was closed.
func (p *process) control(f func(pidfd uintptr)) {
	if conn, err := p.file.SyscallConn(); err == nil {
		_ = conn.Control(f)
	}
}

// startTime is when the process began, in clock ticks since boot. A pid and its start time name a
// process across restarts of msbd.
func startTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, fmt.Errorf("read the start time of process %d: %w", pid, err)
	}
	// The second field, the program's name, may hold anything, even parentheses.
	_, rest, _ := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')'):]), " ")
	fields := strings.Fields(rest)
	const startTimeField = 22 - 3 // of proc(5), counted from the third field
	if len(fields) <= startTimeField {
		return 0, fmt.Errorf("read the start time of process %d: unexpected /proc/%d/stat", pid, pid)
	}
	return strconv.ParseUint(fields[startTimeField], 10, 64)
}
