// Package timerslack sets the timer slack of threads: how much later than requested the kernel may wake a thread that waits for
// a time, so that one interrupt serves several of them. An emulated processor takes long for an interrupt, and Go's runtime
// waits often and briefly. See PR_SET_TIMERSLACK in prctl(2).
//
// A thread has a slack of its own. Threads and processes inherit that of the thread that creates them, and exec keeps it.
package timerslack

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Service is the slack of the guest's agent and the portal.
	Service = time.Millisecond
	// Default is the kernel's slack. The programs in a sandbox have it.
	Default = 50 * time.Microsecond
)

// Set sets the slack of the calling thread, to which the goroutine must be locked.
func Set(slack time.Duration) error {
	return os.NewSyscallError("prctl", unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(slack.Nanoseconds()), 0, 0, 0))
}

// SetAll sets the slack of all threads of this process, and so of those that they create. It needs CAP_SYS_NICE and /proc.
func SetAll(slack time.Duration) error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, thread := range threads {
		err := os.WriteFile("/proc/"+thread.Name()+"/timerslack_ns", []byte(strconv.FormatInt(slack.Nanoseconds(), 10)), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH) { // the thread has ended
			return fmt.Errorf("set the timer slack: %w", err)
		}
	}
	return nil
}

// WithDefault calls fork, which starts a process, with the slack Default in the calling thread, so that the process has it.
// Afterwards the thread has its slack again.
func WithDefault(fork func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	slack, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil || time.Duration(slack) == Default {
		return fork()
	}
	if err := Set(Default); err != nil {
		return err
	}
	defer func() { _ = Set(time.Duration(slack)) }()
	return fork()
}
