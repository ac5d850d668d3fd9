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

// A machine is a VM that has a directory: created, started, or on its way out.
type machine struct {
	state
	dir string

	// work is held while the machine boots and while it is taken down. A channel, because who waits gives
	// up with their context.
	work     chan struct{}
	children []*os.Process // not reaped yet
	down     bool

	mu    sync.Mutex
	pids  map[role]int            // of what was spawned
	abort context.CancelCauseFunc // ends the boot; nil before StartVM
	gone  bool                    // to be taken down, or down already
}

func newMachine(dir string, st state) *machine {
	return &machine{state: st, dir: dir, work: make(chan struct{}, 1)}
}

var errRemoved = errors.New("the VM was removed meanwhile")

// begin claims the machine's only start.
func (m *machine) begin(abort context.CancelCauseFunc) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.gone {
		return fmt.Errorf("%w: %w", errRemoved, errdefs.ErrNotFound)
	}
	if m.abort != nil {
		return fmt.Errorf("it was started before: %w", errdefs.ErrFailedPrecondition)
	}
	m.abort = abort
	return nil
}

// leave marks the machine as going, ends a boot under way, and says whether it was first to do so.
func (m *machine) leave() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	first := !m.gone
	m.gone = true
	if m.abort != nil {
		m.abort(errRemoved)
	}
	return first
}

// parts are the processes without which a VM is dead.
var parts = []role{roleQEMU, roleVirtiofsd}

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

// open takes hold of a part of the VM; nil when it is dead.
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

// boot starts virtiofsd and QEMU and waits until the guest's agent has opened its port. After an
// error the caller takes the machine down.
func (s *Service) boot(ctx context.Context, m *machine) error {
	namespace, err := m.Shim.mountNamespace()
	if err != nil {
		return err
	}
	defer namespace.Close()
	share, err := listen(filepath.Join(m.dir, virtiofsdSocket))
	if err != nil {
		return fmt.Errorf("make virtiofsd's socket: %w", err)
	}
	defer share.Close()
	child, err := spawn(s.virtiofsdCommand(m.dir, m.state, share), filepath.Join(m.dir, virtiofsdLog), namespace)
	if err != nil {
		return err
	}
	m.children = append(m.children, child)
	m.setPID(roleVirtiofsd, child.Pid)
	share.Close() // virtiofsd's death must close the socket

	qmp, err := listen(filepath.Join(m.dir, monitorSocket))
	if err != nil {
		return fmt.Errorf("make QEMU's monitor socket: %w", err)
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

// takeDown ends the VM's processes and removes its directory. It may be called again.
func (m *machine) takeDown(ctx context.Context) error {
	m.leave()
	select {
	case m.work <- struct{}{}:
		defer func() { <-m.work }()
	case <-ctx.Done():
		return fmt.Errorf("wait for the end of its boot or removal: %w", context.Cause(ctx))
	}
	if m.down {
		return nil
	}
	if err := killAll(ctx, m.dir); err != nil {
		return err
	}
	if err := m.reap(ctx); err != nil {
		return err
	}
	if err := discard(ctx, m.dir); err != nil {
		return err
	}
	m.down = true
	return nil
}

// reap ends the machine's own children. Most are dead by now, but the mark of one amid its execve is not to be seen.
func (m *machine) reap(ctx context.Context) error {
	for len(m.children) > 0 {
		child := m.children[0]
		p, err := process.Open(child.Pid) // which is no other's until the child is reaped
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
		_, _ = child.Wait() // it is dead
		m.children = m.children[1:]
	}
	return nil
}

// killAll ends all processes marked with a VM's directory.
func killAll(ctx context.Context, dir string) error {
	found, err := markedProcesses()
	if err != nil {
		return err
	}
	// virtiofsd's worker first, then its parent reaps it: children have the greater pids.
	slices.SortFunc(found[dir], func(a, b markedProcess) int { return b.pid - a.pid })
	return killMarked(ctx, dir, found[dir])
}

// discard ends all processes marked with a VM's directory and removes it. It needs no record.
func discard(ctx context.Context, dir string) error {
	if err := killAll(ctx, dir); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove the VM's directory: %w", err)
	}
	return nil
}

// lastWords quotes the ends of a VM's logs for an error message. It returns "" if all of them are empty.
func lastWords(dir string) string {
	var b strings.Builder
	for _, name := range []string{virtiofsdLog, qemuLog, consoleLog} {
		b.WriteString(tail.Quote(name, tail.Read(filepath.Join(dir, name), 1<<10)))
	}
	return b.String()
}

// logLimit bounds each log: a guest can write to its console as much as it likes.
const logLimit = 1 << 20

// trimLogs empties the logs that have grown too long; their writers append.
func (s *Service) trimLogs() {
	logs, _ := filepath.Glob(filepath.Join(s.cfg.Dir, "[^.]*", "*.log"))
	for _, log := range logs {
		if info, err := os.Stat(log); err == nil && info.Size() > logLimit {
			_ = os.Truncate(log, 0)
		}
	}
}
