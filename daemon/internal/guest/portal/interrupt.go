package portal

import (
	"encoding/binary"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	processes "github.com/msbd/msbd/daemon/internal/sys/process"
)

// settle is longer than an interpreter takes from messageBegun to the code of the run. Before that, an interrupt kills Node, and a
// shell may ignore it.
const settle = 200 * time.Millisecond

// forwardInterrupts interrupts a run whenever a value comes from interrupts. The run continues until its code has handled that. The
// returned function ends this, and must be called before another run begins.
func (s *session) forwardInterrupts(interrupts <-chan struct{}, run *execution) (end func()) {
	if interrupts == nil {
		return func() {}
	}
	ended, finished := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(finished)
		select {
		case <-run.begun:
		case <-ended:
			return
		}
		var settled <-chan time.Time
		if s.language.interrupts || s.language.isShell {
			timer := time.NewTimer(settle)
			defer timer.Stop()
			settled = timer.C
		}
		for {
			select {
			case <-interrupts:
			case <-ended:
				return
			}
			if settled != nil {
				select {
				case <-settled:
				case <-ended:
					return
				}
				settled = nil
			}
			s.interruptLikeTerminal(run)
		}
	}()
	return func() {
		close(ended)
		<-finished
	}
}

// interruptLikeTerminal interrupts the interpreter and the programs that the run has started. Programs of earlier runs continue.
func (s *session) interruptLikeTerminal(run *execution) {
	s.sendNumber()
	pids, earlier := s.groupSince(run.since)
	if !earlier {
		_ = s.signalGroup(syscall.SIGINT) // all at once, so that none of them starts another program meanwhile
		return
	}
	for _, pid := range pids {
		_ = unix.Kill(pid, syscall.SIGINT)
	}
	_ = s.signal(syscall.SIGINT)
}

// sendNumber sends the number of the run in progress to a driver that reads interrupts from a descriptor.
func (s *session) sendNumber() {
	if s.interrupts == nil {
		return
	}
	s.mu.Lock()
	number := binary.LittleEndian.AppendUint32(nil, s.count)
	s.mu.Unlock()
	if raw, err := s.interrupts.SyscallConn(); err == nil {
		_ = raw.Write(func(fd uintptr) bool {
			_, _ = unix.Write(int(fd), number) // if it is full, the interpreter reads no interrupts
			return true
		})
	}
}

// now returns the present time in the unit of processes.StartTime.
func now() uint64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) // fails for no valid clock
	return uint64(ts.Nano() / int64(10*time.Millisecond))
}

// groupSince returns the pids of those in the process group that were started since a time, and whether there are earlier ones. The
// leader of the group is neither.
func (p *process) groupSince(since uint64) (pids []int, earlier bool) {
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == p.pid {
			continue
		}
		if group, err := unix.Getpgid(pid); err != nil || group != p.pid {
			continue
		}
		if start, err := processes.StartTime(pid); err != nil || start < since {
			earlier = true
		} else {
			pids = append(pids, pid)
		}
	}
	return pids, earlier
}
