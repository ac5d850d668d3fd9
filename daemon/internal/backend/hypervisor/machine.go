package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/sys/control"
	"github.com/msbd/msbd/daemon/internal/sys/process"
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

	// gone ends when the machine's removal begins.
	gone    context.Context
	setGone context.CancelFunc
	logs    sync.WaitGroup // the copies of its logs that are in progress

	mu         sync.Mutex              // also guards state.Processes
	cancelBoot context.CancelCauseFunc // nil before StartVM
	removing   bool                    // a removal has begun or is complete
}

func newMachine(dir string, st state) *machine {
	m := &machine{state: st, dir: dir, busy: make(chan struct{}, 1)}
	m.gone, m.setGone = context.WithCancel(context.Background())
	return m
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
	m.setGone()
	if m.cancelBoot != nil {
		m.cancelBoot(errRemoved)
	}
	return first
}

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

// boot starts QEMU in its jail, waits until the guest's agent has opened its port, and sets the guest's clock. On error,
// the caller must remove the machine.
func (sup supervisor) boot(ctx context.Context, m *machine) error {
	if err := sup.launch(m); err != nil {
		return err
	}
	monitor, err := dialMonitor(ctx, filepath.Join(m.dir, monitorSocket))
	if err == nil {
		defer monitor.close()
		err = m.emptyJail() // QEMU is complete, because it answers on its monitor
	}
	if err == nil {
		err = monitor.waitOpen(agentPort)
	}
	if err == nil {
		err = setClock(ctx, filepath.Join(m.dir, controlSocket))
	}
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("wait for the guest's agent: %w", context.Cause(ctx))
	}
	return err
}

// launch starts QEMU in a jail and in a cgroup of its own, and records it.
func (sup supervisor) launch(m *machine) error {
	inherited, err := sup.prepareLaunch(m)
	if err != nil {
		return err
	}
	defer inherited.close()
	addToCgroup, err := newCgroup(m.state, sup.cfg.Accelerator)
	if err != nil {
		return err
	}
	disk, err := os.Stat(m.Disks.Upper)
	if err != nil {
		return err
	}
	j := jail{UID: m.UID, Dir: filepath.Join(m.dir, jailDir), KVM: sup.cfg.Accelerator == "kvm", MaxFile: uint64(disk.Size())}
	if err := os.Mkdir(j.Dir, 0o700); err != nil {
		return err
	}
	child, gate, err := j.start(sup.qemuCommand(m.state), markEnv(roleQEMU, m.dir), inherited.output, inherited.files)
	if err != nil {
		return err
	}
	defer gate.Close()
	// Before QEMU executes anything, its limits apply, and a later Service can find it.
	if err := errors.Join(m.adoptChild(roleQEMU, child), addToCgroup(child.Pid)); err != nil {
		return err
	}
	_, err = gate.Write([]byte{1})
	return err
}

// emptyJail removes all files from the jail of the VM's QEMU. It does nothing if the VM is one of an earlier version.
func (m *machine) emptyJail() error {
	if m.UID == 0 {
		return nil
	}
	qemu, err := m.process(roleQEMU).Open()
	if err != nil || qemu == nil {
		return err // it has exited, which others notice
	}
	defer qemu.Close()
	return emptyJail(qemu)
}

// setClock sets the clock of a guest that has just booted. socket is the host's end of its control port.
func setClock(ctx context.Context, socket string) error {
	agent, err := control.Dial(ctx, socket)
	if err != nil {
		return err
	}
	defer agent.Close()
	for { // the guest may be slow while many boot
		if err = agent.SyncClock(ctx); err == nil || ctx.Err() != nil {
			return err
		}
	}
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

// removeVM kills the processes of the VM directory dir, and removes dir and the cgroup of QEMU. It does not need a machine.
func (s *Service) removeVM(ctx context.Context, dir string) error {
	if err := s.killAll(ctx, dir); err != nil {
		return err
	}
	if err := removeCgroup(ctx, filepath.Base(dir)); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove the VM's directory: %w", err)
	}
	return nil
}
