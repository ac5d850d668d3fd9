package agent

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"

	"github.com/msbd/msbd/daemon/internal/guest/agent/mount"
)

const (
	// keptExecs is how many ended execs a container remembers for a late WaitProcess.
	keptExecs = 256
	// removeLimit bounds the wait for a container's processes to be gone.
	removeLimit = 20 * time.Second
)

// container is a running container, and what is remembered of an ended one until it is removed.
type container struct {
	id       string
	root     string
	main     *process
	cgroup   *cgroup
	storages []string // mount points that it uses

	// forking is held by whatever starts a program, and alone by what freezes them: a fork into a
	// frozen group does not return.
	forking sync.RWMutex
	frozen  bool

	mu      sync.Mutex
	started bool
	execs   map[string]*process // nil once the container was removed
	order   []string            // of execs, oldest first
}

// newContainer builds the container up to the point where only its start is missing.
func newContainer(r *reaper, id, root string, spec *pb.Spec) (*container, error) {
	group, err := createCgroup(id)
	if err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	linux := spec.Linux
	main, err := func() (*process, error) {
		if err := group.limit(linux.GetResources()); err != nil {
			return nil, err
		}
		if err := group.filterDevices(deviceRules(linux)); err != nil {
			return nil, err
		}
		return spawn(r, group.dir, childConfig{
			Container: &containerConfig{
				Root:          root,
				ReadonlyRoot:  spec.Root.Readonly,
				Hostname:      spec.Hostname,
				Mounts:        spec.Mounts,
				Devices:       linux.GetDevices(),
				MaskedPaths:   linux.GetMaskedPaths(),
				ReadonlyPaths: linux.GetReadonlyPaths(),
				Sysctl:        linux.GetSysctl(),
			},
			Process: spec.Process,
		})
	}()
	if err != nil {
		return nil, errors.Join(err, group.remove(removeLimit))
	}
	return &container{id: id, root: root, main: main, cgroup: group, execs: make(map[string]*process)}, nil
}

func (c *container) start() error {
	c.forking.RLock()
	defer c.forking.RUnlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.started:
		return fmt.Errorf("container %s was started before: %w", c.id, errdefs.ErrFailedPrecondition)
	case c.frozen:
		return fmt.Errorf("container %s is paused: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	c.started = true
	return c.main.start()
}

// exec starts another program in the container.
func (c *container) exec(r *reaper, id string, p *pb.Process) error {
	c.forking.RLock()
	defer c.forking.RUnlock()
	c.mu.Lock()
	if !c.started || c.frozen || c.execs == nil || c.main.ended() {
		c.mu.Unlock()
		return fmt.Errorf("container %s does not run: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if _, ok := c.execs[id]; ok || id == c.id {
		c.mu.Unlock()
		return fmt.Errorf("process %s: %w", id, errdefs.ErrAlreadyExists)
	}
	c.execs[id] = nil // reserved
	c.mu.Unlock()

	child, err := c.spawnExec(r, p)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		delete(c.execs, id)
		return err
	}
	if c.execs == nil {
		child.discard(r)
		return fmt.Errorf("container %s: %w", c.id, errdefs.ErrNotFound)
	}
	c.execs[id] = child
	c.order = append(c.order, id)
	c.forget()
	return nil
}

func (c *container) spawnExec(r *reaper, p *pb.Process) (*process, error) {
	group, err := c.cgroup.forkInto(c.main.pid)
	if err != nil {
		return nil, fmt.Errorf("find its cgroup: %w", err)
	}
	defer group.Close()
	child, err := spawn(r, group, childConfig{Join: c.main.pid, Process: p})
	if err != nil {
		return nil, err
	}
	if err := child.start(); err != nil {
		child.discard(r)
		return nil, err
	}
	return child, nil
}

// forget drops the oldest ended execs that are too many to keep.
func (c *container) forget() {
	c.order = slices.DeleteFunc(c.order, func(id string) bool {
		p := c.execs[id]
		if len(c.execs) <= keptExecs || !p.ended() {
			return false
		}
		p.release()
		delete(c.execs, id)
		return true
	})
}

// process returns the process that an exec id names; the container's own id is its main one.
func (c *container) process(id string) (*process, error) {
	if id == c.id || id == "" {
		return c.main, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.execs[id]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("process %s of container %s: %w", id, c.id, errdefs.ErrNotFound)
}

// freeze stops every process in the container, or lets them go on.
func (c *container) freeze(frozen bool) error {
	c.forking.Lock()
	defer c.forking.Unlock()
	if err := c.cgroup.freeze(frozen); err != nil {
		return err
	}
	c.frozen = frozen
	return nil
}

// remove ends what still runs and frees everything but the storages.
func (c *container) remove() error {
	if err := c.cgroup.remove(removeLimit); err != nil {
		return fmt.Errorf("remove cgroup: %w", err)
	}
	// Where the root is a file system of its own in the share, the host wants it back.
	if err := mount.Unmount(c.root); err != nil {
		return fmt.Errorf("unmount root: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	<-c.main.exited
	c.main.control.Close()
	c.main.release()
	for _, p := range c.execs {
		if p != nil {
			p.release()
		}
	}
	c.execs = nil
	return nil
}
