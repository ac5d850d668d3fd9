package main

import (
	"errors"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a pidfd: it refers to the same process even after the pid is reused.
type process int

func openProcess(pid int) (process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	return process(fd), err
}

func (p process) close() { _ = unix.Close(int(p)) }

// wait waits at most for timeout and reports whether the process has exited.
func (p process) wait(timeout time.Duration) (exited bool, err error) {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(p), Events: unix.POLLIN}}, int(timeout.Milliseconds()))
	if errors.Is(err, unix.EINTR) {
		err = nil
	}
	return n > 0, err
}

// newSession makes a process the leader of a new session, so that it survives the end of this one.
var newSession = &syscall.SysProcAttr{Setsid: true}

// noFollow makes opening a symbolic link fail.
const noFollow = unix.O_NOFOLLOW
