// Package process refers to processes of this host, which need not be children of this program. The kernel reuses pids,
// but a Process always refers to the same process. Every package of the daemon may import it.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process refers to one process, even after the process has ended and its pid was reused. Call Close when the Process
// is no longer needed.
type Process struct {
	PID    int
	handle *os.Process // with a pidfd
}

// Open returns the process that has pid now. It returns nil if there is none. The caller must close the Process.
func Open(pid int) (*Process, error) {
	handle, err := os.FindProcess(pid)
	if err == nil {
		err = handle.WithHandle(func(uintptr) {})
	}
	if errors.Is(err, os.ErrNoHandle) && errors.Is(handle.Signal(syscall.Signal(0)), os.ErrProcessDone) {
		return nil, nil
	}
	if err != nil { // without a pidfd, os would use the pid, which may be reused
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return &Process{PID: pid, handle: handle}, nil
}

// Close releases the reference. The process keeps running.
func (p *Process) Close() { _ = p.handle.Release() }

// Wait blocks until the process has ended, whether or not it is reaped. If ctx ends first, Wait returns the cause of
// ctx.
func (p *Process) Wait(ctx context.Context) error {
	pidfd, err := p.pollable()
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
		return p.waitWithoutPoller(ctx)
	}
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", p.PID, err)
	}
	defer pidfd.Close()
	defer context.AfterFunc(ctx, func() { _ = pidfd.SetReadDeadline(time.Unix(1, 0)) })()
	conn, err := pidfd.SyscallConn()
	if err == nil {
		err = conn.Read(isDead)
	}
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", p.PID, err)
	}
	return nil
}

// waitWithoutPoller is like Wait but polls. It needs no file descriptor, because Kill must work even if this program
// has reached its limit of file descriptors.
func (p *Process) waitWithoutPoller(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !p.Dead() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// pollable duplicates the pidfd as a file that Go's poller watches, so that waiting does not block a thread.
func (p *Process) pollable() (*os.File, error) {
	var fd int
	var err error
	if noHandle := p.handle.WithHandle(func(pidfd uintptr) {
		if fd, err = unix.FcntlInt(pidfd, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			err = unix.SetNonblock(fd, true)
		}
	}); noHandle != nil {
		return nil, noHandle
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "pidfd:"+strconv.Itoa(p.PID)), nil
}

// isDead reports whether the process of pidfd has ended. A pidfd becomes readable when its process ends.
func isDead(pidfd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, _ := unix.Poll(fds, 0)
	return n == 1
}

// Signal sends a signal to the process. It returns nil if the process has ended.
func (p *Process) Signal(sig syscall.Signal) error {
	if err := p.handle.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("send %v to process %d: %w", sig, p.PID, err)
	}
	return nil
}

// Kill sends SIGKILL to the process and waits until it has ended.
func (p *Process) Kill(ctx context.Context) error {
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	return p.Wait(ctx)
}

// Dead reports whether the process has ended, whether or not it is reaped.
func (p *Process) Dead() (dead bool) {
	_ = p.handle.WithHandle(func(pidfd uintptr) { dead = isDead(pidfd) })
	return dead
}

// StartTime returns when process pid started, in clock ticks since boot. A pid together with the start time identifies
// a process across restarts of msbd.
func StartTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read the start time of process %d: %w", pid, err)
	}
	// The second field, the program's name in parentheses, may itself contain spaces and parentheses.
	_, rest, _ := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " ")
	fields := strings.Fields(rest)
	const startTimeField = 22 - 3 // of proc(5), counted from the third field
	if len(fields) <= startTimeField {
		return 0, fmt.Errorf("read the start time of process %d: unexpected /proc/%d/stat", pid, pid)
	}
	return strconv.ParseUint(fields[startTimeField], 10, 64)
}

// Arguments returns the arguments of process pid. The first is its program. If the process has ended, Arguments returns
// a single empty string.
func Arguments(pid int) []string {
	line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
}

// PIDs returns the pids of all processes of this host.
func PIDs() ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
