// Package process holds on to processes of this host. A pid comes to name another process in time; a
// Process never does. Any adapter may enter here.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Process is one process for sure, whatever becomes of its pid. It is for one user at a time; Close it at the end.
type Process struct {
	PID  int
	file *os.File // a pidfd
}

// Open takes hold of the process that has the pid now; nil when there is none.
func Open(pid int) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return &Process{PID: pid, file: os.NewFile(uintptr(fd), "pidfd:"+strconv.Itoa(pid))}, nil
}

// Close lets go of the process.
func (p *Process) Close() { _ = p.file.Close() }

// Wait blocks until the process is dead, reaped or not. It returns ctx's cause if that ends first.
func (p *Process) Wait(ctx context.Context) error {
	conn, err := p.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("wait for process %d: %w", p.PID, err)
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = p.file.SetReadDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	defer func() {
		if !stop() { // the next Wait is not to be
			<-interrupted
			_ = p.file.SetReadDeadline(time.Time{})
		}
	}()
	if err := conn.Read(isDead); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("wait for process %d: %w", p.PID, err)
	}
	return nil
}

// isDead says whether a pidfd has become readable, as it does when its process ends.
func isDead(pidfd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, _ := unix.Poll(fds, 0)
	return n == 1
}

// Kill ends the process and waits until it is dead.
func (p *Process) Kill(ctx context.Context) error {
	var err error
	p.control(func(pidfd uintptr) { err = unix.PidfdSendSignal(int(pidfd), unix.SIGKILL, nil, 0) })
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	return p.Wait(ctx)
}

// Dead says whether the process has ended.
func (p *Process) Dead() (dead bool) {
	p.control(func(pidfd uintptr) { dead = isDead(pidfd) })
	return dead
}

// control runs f on the pidfd; not at all once the process was closed.
func (p *Process) control(f func(pidfd uintptr)) {
	if conn, err := p.file.SyscallConn(); err == nil {
		_ = conn.Control(f)
	}
}

// StartTime is when a process began, in clock ticks since boot. A pid and its start time name a
// process across restarts of msbd.
func StartTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read the start time of process %d: %w", pid, err)
	}
	// The second field, the program's name, may hold anything, even parentheses.
	_, rest, _ := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " ")
	fields := strings.Fields(rest)
	const startTimeField = 22 - 3 // of proc(5), counted from the third field
	if len(fields) <= startTimeField {
		return 0, fmt.Errorf("read the start time of process %d: unexpected /proc/%d/stat", pid, pid)
	}
	return strconv.ParseUint(fields[startTimeField], 10, 64)
}

// PIDs lists the processes of this host.
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
