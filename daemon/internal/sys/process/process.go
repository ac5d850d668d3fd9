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

// Descriptor returns a new descriptor for the file that the process has open as descriptor fd. It needs the right to
// trace the process. The caller must close the descriptor.
func (p *Process) Descriptor(fd int) (int, error) {
	var own int
	var err error
	if noHandle := p.handle.WithHandle(func(pidfd uintptr) { own, err = unix.PidfdGetfd(int(pidfd), fd, 0) }); noHandle != nil {
		err = noHandle
	}
	if err != nil {
		return -1, fmt.Errorf("get descriptor %d of process %d: %w", fd, p.PID, err)
	}
	return own, nil
}

// Dead reports whether the process has ended, whether or not it is reaped.
func (p *Process) Dead() (dead bool) {
	_ = p.handle.WithHandle(func(pidfd uintptr) { dead = isDead(pidfd) })
	return dead
}

// An ID identifies one process of this host until the host's next boot, also across restarts of msbd, because a pid is
// not reused with the same start time. Code that starts a process that outlives msbd must record its ID.
type ID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // when the process started, in clock ticks since boot
}

// ID returns the ID of the process, which may have ended. It returns an error if the process has been reaped.
func (p *Process) ID() (ID, error) {
	start, err := StartTime(p.PID)
	if err != nil {
		return ID{}, err
	}
	// If it was reaped, another process may have got the pid, and start may be its start time.
	if err := p.handle.Signal(syscall.Signal(0)); errors.Is(err, os.ErrProcessDone) {
		return ID{}, fmt.Errorf("read the start time of process %d: %w", p.PID, err)
	}
	return ID{PID: p.PID, Start: start}, nil
}

// Open returns the process that id identifies, or nil if it has ended. The caller must close the Process.
func (id ID) Open() (*Process, error) {
	if id.PID <= 0 {
		return nil, nil
	}
	p, err := Open(id.PID)
	if p == nil || err != nil {
		return nil, err
	}
	if found, err := p.ID(); err != nil || found != id || p.Dead() { // there is an error if it was just reaped
		p.Close()
		return nil, nil
	}
	return p, nil
}

// Fields of /proc/PID/stat (proc(5)), counted from the third.
const (
	parentField    = 4 - 3
	startTimeField = 22 - 3
)

// stat returns the fields of /proc/PID/stat from the third.
func stat(pid int) ([]string, error) {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, fmt.Errorf("read the state of process %d: %w", pid, err)
	}
	// The second field, the program's name in parentheses, may itself contain spaces and parentheses.
	fields := strings.Fields(string(line[bytes.LastIndexByte(line, ')')+1:]))
	if len(fields) <= startTimeField {
		return nil, fmt.Errorf("read the state of process %d: unexpected /proc/%d/stat", pid, pid)
	}
	return fields, nil
}

// StartTime returns when process pid started, in clock ticks since boot. There are 100 in a second.
func StartTime(pid int) (uint64, error) {
	fields, err := stat(pid)
	if err != nil {
		return 0, err
	}
	start, err := strconv.ParseUint(fields[startTimeField], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read the start time of process %d: %w", pid, err)
	}
	return start, nil
}

// Parent returns the pid of the parent of process pid, or 0 if the parent is in another pid namespace.
func Parent(pid int) (int, error) {
	fields, err := stat(pid)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(fields[parentField])
}

// Arguments returns the arguments of process pid. The first is its program. If the process has ended, Arguments returns
// a single empty string.
func Arguments(pid int) []string {
	line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
}
