package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/process"
	"github.com/msbd/msbd/daemon/internal/sys/tail"
)

// A machine is a VM that the Service manages, from CreateVM or Recover until it is removed. It may not be started yet,
// and its directory may not exist yet.
type machine struct {
	state
	dir string

	// busy is held while the machine boots and while it is removed. It guards children and removed. It is a channel
	// instead of a mutex so that waiting for it can end with a context.
	busy     chan struct{}
	children []*os.Process // processes that were started and not reaped yet
	removed  bool

	mu         sync.Mutex              // also guards state.Processes
	cancelBoot context.CancelCauseFunc // nil before StartVM
	removing   bool                    // a removal has begun or is complete
}

func newMachine(dir string, st state) *machine {
	return &machine{state: st, dir: dir, busy: make(chan struct{}, 1)}
}

var errRemoved = errors.New("the VM was removed while it started")

// claimStart marks the machine as started, and records cancelBoot, which a removal calls to end the boot. It returns
// errdefs.ErrFailedPrecondition if the machine was already started, and errdefs.ErrNotFound if it is being removed.
func (m *machine) claimStart(cancelBoot context.CancelCauseFunc) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.removing {
		return fmt.Errorf("%w: %w", errRemoved, errdefs.ErrNotFound)
	}
	if m.cancelBoot != nil {
		return fmt.Errorf("it was already started: %w", errdefs.ErrFailedPrecondition)
	}
	m.cancelBoot = cancelBoot
	return nil
}

// startRemoval marks the machine as being removed and cancels its boot. It reports whether it is the first call.
func (m *machine) startRemoval() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	first := !m.removing
	m.removing = true
	if m.cancelBoot != nil {
		m.cancelBoot(errRemoved)
	}
	return first
}

// requiredRoles are the roles of the processes that every running VM needs.
var requiredRoles = []role{roleQEMU, roleVirtiofsd}

// process returns the ID of the VM's process with role r. It is zero if the process was not started.
func (m *machine) process(r role) process.ID {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.Processes[r]
}

// record sets the ID of the VM's process with role r to that of p, and returns the state with it.
func (m *machine) record(r role, p *process.Process) (state, error) {
	id, err := p.ID()
	if err != nil {
		return state{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	processes := maps.Clone(m.Processes) // the state that was returned before must not change
	if processes == nil {
		processes = map[role]process.ID{}
	}
	processes[r] = id
	m.Processes = processes
	return m.state, nil
}

// adoptChild adds child, a process that was just started with role r, to the machine and to its state file.
func (m *machine) adoptChild(r role, child *os.Process) error {
	m.children = append(m.children, child)
	p, err := process.Open(child.Pid) // the pid cannot be reused until the child is reaped
	if err != nil {
		return err
	}
	defer p.Close()
	st, err := m.record(r, p)
	if err != nil {
		return err
	}
	return writeState(m.dir, st)
}

// boot starts virtiofsd and QEMU and waits until the guest's agent has opened its port. On error, the caller must
// remove the machine.
func (s *Service) boot(ctx context.Context, m *machine) error {
	namespace, err := mountNamespace(m.Shim)
	if err != nil {
		return err
	}
	defer namespace.Close()
	share, err := listen(filepath.Join(m.dir, virtiofsdSocket))
	if err != nil {
		return fmt.Errorf("create virtiofsd's socket: %w", err)
	}
	defer share.Close()
	child, err := spawn(s.virtiofsdCommand(m.dir, m.state, share), filepath.Join(m.dir, virtiofsdLog), namespace)
	if err != nil {
		return err
	}
	if err := m.adoptChild(roleVirtiofsd, child); err != nil {
		return err
	}
	share.Close() // without a copy in msbd, the socket closes when virtiofsd dies

	qmp, err := listen(filepath.Join(m.dir, monitorSocket))
	if err != nil {
		return fmt.Errorf("create QEMU's monitor socket: %w", err)
	}
	defer qmp.Close()
	if child, err = spawn(s.qemuCommand(m.dir, m.state, qmp), filepath.Join(m.dir, qemuLog), nil); err != nil {
		return err
	}
	if err := m.adoptChild(roleQEMU, child); err != nil {
		return err
	}
	qmp.Close()

	monitor, err := dialMonitor(ctx, filepath.Join(m.dir, monitorSocket))
	if err == nil {
		defer monitor.close()
		err = limitFiles(child.Pid) // QEMU is complete, because it answers on its monitor
	}
	if err == nil {
		err = monitor.waitOpen(agentPort)
	}
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("wait for the guest's agent: %w", context.Cause(ctx))
	}
	return err
}

// remove kills the processes of the VM m and removes its directory. It may be called more than once.
func (s *Service) remove(ctx context.Context, m *machine) error {
	m.startRemoval()
	select {
	case m.busy <- struct{}{}:
		defer func() { <-m.busy }()
	case <-ctx.Done():
		return fmt.Errorf("wait for the end of its boot or removal: %w", context.Cause(ctx))
	}
	if m.removed {
		return nil
	}
	if err := m.reap(ctx); err != nil {
		return err
	}
	if err := s.removeVM(ctx, m.dir); err != nil {
		return err
	}
	m.removed = true
	return nil
}

// reap kills and reaps the machine's children. killAll is not enough, because it cannot find a child during its execve,
// when its mark is not visible.
func (m *machine) reap(ctx context.Context) error {
	for len(m.children) > 0 {
		child := m.children[0]
		p, err := process.Open(child.Pid) // the pid cannot be reused until the child is reaped
		if err != nil {
			return err
		}
		if p != nil {
			err = p.Kill(ctx)
			p.Close()
		}
		if err != nil {
			return err
		}
		_, _ = child.Wait() // does not block, because the child is dead
		m.children = m.children[1:]
	}
	return nil
}

// removeVM kills the processes of the VM directory dir, and removes dir. It does not need a machine.
func (s *Service) removeVM(ctx context.Context, dir string) error {
	if err := s.killAll(ctx, dir); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove the VM's directory: %w", err)
	}
	return nil
}

// logTails quotes the ends of the logs in the VM directory dir for an error message. It returns "" if all of them are
// empty.
func logTails(dir string) string {
	var b strings.Builder
	for _, name := range []string{virtiofsdLog, qemuLog, consoleLog} {
		b.WriteString(tail.Quote(name, tail.Read(filepath.Join(dir, name), 1<<10)))
	}
	return b.String()
}

// maxLogSize bounds each log, in bytes, because a guest can write any amount to its console. The Service trims a log
// that is longer. maxFileSize bounds what QEMU itself writes, so that the bound also holds while msbd does not run.
const maxLogSize = 1 << 20

var maxFileSize uint64 = 2 * maxLogSize // changed by tests

// limitFiles limits the size of the files to which QEMU, process pid, writes. QEMU discards the output beyond. Call it
// only when QEMU has allocated the guest's memory, which is a file of a sort. QEMU must ignore SIGXFSZ, which would end
// it. New makes child processes ignore the signal.
func limitFiles(pid int) error {
	limit := unix.Rlimit{Cur: maxFileSize, Max: maxFileSize}
	if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, &limit, nil); err != nil {
		return fmt.Errorf("limit the size of QEMU's logs: %w", err)
	}
	return nil
}

// trimLogs truncates the logs that are longer than maxLogSize. Their writers append, so they continue at the beginning.
func (s *Service) trimLogs() {
	logs, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "[^.]*", "*.log"))
	for _, log := range logs {
		if info, err := os.Stat(log); err == nil && info.Size() > maxLogSize {
			_ = os.Truncate(log, 0)
		}
	}
}
