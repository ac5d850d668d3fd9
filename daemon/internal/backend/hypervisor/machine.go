package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// A machine is a VM that the Service manages, from Start or Recover until it is removed. Its directory may not exist yet.
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

	// booted receives the result of the start once. It has room for one, so that nobody must receive it.
	booted     chan error
	cancelBoot context.CancelCauseFunc // nil if an earlier Service started the VM

	mu       sync.Mutex // also guards state.Shim and state.Processes
	started  bool       // StartVM was called
	removing bool       // a removal has begun or is complete
	cold     string     // why the VM is no clone; empty if it is one
}

func newMachine(dir string, st state) *machine {
	m := &machine{state: st, dir: dir, busy: make(chan struct{}, 1), booted: make(chan error, 1)}
	m.gone, m.setGone = context.WithCancel(context.Background())
	return m
}

var errRemoved = errors.New("the VM was removed while it started")

// claimBoot takes busy for the start of the VM, and records cancel, which a removal calls to end it. It returns false if a
// removal has begun.
func (m *machine) claimBoot(cancel context.CancelCauseFunc) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.removing {
		return false
	}
	m.cancelBoot = cancel
	m.busy <- struct{}{} // only a removal could have it
	return true
}

// join records shim as the shim of the VM. It returns errdefs.ErrAlreadyExists if the VM has a shim, and errdefs.ErrNotFound if
// it is being removed.
func (m *machine) join(shim *process.Process) error {
	id, err := shim.ID()
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.removing:
		return fmt.Errorf("%w: %w", errRemoved, errdefs.ErrNotFound)
	case m.Shim.PID != 0:
		return errdefs.ErrAlreadyExists
	}
	m.Shim = id
	return writeState(m.dir, m.state)
}

// claimStart marks the VM as started. It returns false if it was started before, has no shim, or is being removed.
func (m *machine) claimStart() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.started || m.removing || m.Shim.PID == 0 {
		return false
	}
	m.started = true
	return true
}

// waitBooted waits until the VM has started, and returns the error of the start. If ctx ends first, it cancels the start.
func (m *machine) waitBooted(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { m.cancelBoot(context.Cause(ctx)) })()
	return <-m.booted
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

// shim returns the ID of the VM's shim. It is zero if none has joined it.
func (m *machine) shim() process.ID {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.Shim
}

// record sets the ID of the VM's process with role r to that of p.
func (m *machine) record(r role, p *process.Process) error {
	id, err := p.ID()
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.Processes == nil {
		m.Processes = map[role]process.ID{}
	}
	m.Processes[r] = id
	return nil
}

// save writes the state file.
func (m *machine) save() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return writeState(m.dir, m.state)
}

// adoptChild adds child, a process that was just started with role r, to the machine and to its state file.
func (m *machine) adoptChild(r role, child *os.Process) error {
	m.children = append(m.children, child)
	p, err := process.Open(child.Pid) // the pid cannot be reused until the child is reaped
	if err != nil {
		return err
	}
	defer p.Close()
	if err := m.record(r, p); err != nil {
		return err
	}
	return m.save()
}

// setCold records why the VM is no clone.
func (m *machine) setCold(why string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cold = why
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
