package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

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

	mu         sync.Mutex
	pids       map[role]int            // of the started processes
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

func (m *machine) pid(r role) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.pids[r]
}

func (m *machine) setPID(r role, pid int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pids == nil {
		m.pids = map[role]int{}
	}
	m.pids[r] = pid
}

// open returns the VM's process with role r, or nil if there is none.
func (m *machine) open(r role) (*process.Process, error) {
	pid := m.pid(r)
	if pid == 0 {
		return nil, nil
	}
	p, err := process.Open(pid)
	if p == nil || err != nil {
		return nil, err
	}
	if found, dir := readMark(pid); found != r || dir != m.dir {
		p.Close()
		return nil, nil
	}
	return p, nil
}

// boot starts virtiofsd and QEMU and waits until the guest's agent has opened its port. On error, the caller must
// remove the machine.
func (s *Service) boot(ctx context.Context, m *machine) error {
	namespace, err := m.Shim.mountNamespace()
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
	m.children = append(m.children, child)
	m.setPID(roleVirtiofsd, child.Pid)
	share.Close() // without a copy in msbd, the socket closes when virtiofsd dies

	qmp, err := listen(filepath.Join(m.dir, monitorSocket))
	if err != nil {
		return fmt.Errorf("create QEMU's monitor socket: %w", err)
	}
	defer qmp.Close()
	if child, err = spawn(s.qemuCommand(m.dir, m.state, qmp), filepath.Join(m.dir, qemuLog), nil); err != nil {
		return err
	}
	m.children = append(m.children, child)
	m.setPID(roleQEMU, child.Pid)
	qmp.Close()

	monitor, err := dialMonitor(ctx, filepath.Join(m.dir, monitorSocket))
	if err == nil {
		defer monitor.close()
		err = monitor.waitOpen(agentPort)
	}
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("wait for the guest's agent: %w", context.Cause(ctx))
	}
	return err
}

// remove kills the VM's processes and removes its directory. It may be called more than once.
func (m *machine) remove(ctx context.Context) error {
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
	if err := killAll(ctx, m.dir); err != nil {
		return err
	}
	if err := m.reap(ctx); err != nil {
		return err
	}
	if err := removeVM(ctx, m.dir); err != nil {
		return err
	}
	m.removed = true
	return nil
}

// reap kills and reaps the machine's children. Most are already dead, but killAll cannot find a child during its
// execve, because its mark is not visible then.
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

// killAll kills all processes whose mark names the VM directory dir.
func killAll(ctx context.Context, dir string) error {
	found, err := markedProcesses()
	if err != nil {
		return err
	}
	// Kill virtiofsd's worker first, so that its parent reaps it. A child usually has a greater pid than its parent.
	slices.SortFunc(found[dir], func(a, b markedProcess) int { return b.pid - a.pid })
	return killMarked(ctx, dir, found[dir])
}

// removeVM kills all processes whose mark names the VM directory dir, and removes dir. It does not need a machine.
func removeVM(ctx context.Context, dir string) error {
	if err := killAll(ctx, dir); err != nil {
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

// maxLogSize bounds each log, in bytes, because a guest can write any amount to its console.
const maxLogSize = 1 << 20

// trimLogs truncates the logs that are longer than maxLogSize. Their writers append, so they continue at the beginning.
func (s *Service) trimLogs() {
	logs, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "[^.]*", "*.log"))
	for _, log := range logs {
		if info, err := os.Stat(log); err == nil && info.Size() > maxLogSize {
			_ = os.Truncate(log, 0)
		}
	}
}
