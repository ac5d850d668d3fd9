// Package container runs containers in the guest: their root, control group, device filter and processes.
//
// The first program of each process in a container is this binary again: a re-executed child prepares
// itself (child.go) and then becomes the user's program.
package container

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/guest/agent/mount"
)

const (
	// keptExecs is how many ended execs a container remembers for a late WaitProcess.
	keptExecs = 256
	// removeLimit bounds the wait for a container's processes to be gone.
	removeLimit = 20 * time.Second
)

// Container is a running container, or what is remembered of an ended one until it is removed.
type Container struct {
	reaper *Reaper
	id     string
	root   string
	main   *Process
	cgroup *cgroup

	// forking is held by whatever starts a program, and alone by what freezes them: a fork into a
	// frozen group does not return.
	forking sync.RWMutex
	frozen  bool

	mu      sync.Mutex
	started bool
	execs   map[string]*Process // nil once the container was removed
	order   []string            // of execs, oldest first
}

// New builds the container up to the point where only its start is missing. Validate must have accepted
// id and spec.
func New(r *Reaper, id, root string, spec *pb.Spec) (*Container, error) {
	group, err := createCgroup(id)
	if err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	linux := spec.Linux
	main, err := func() (*Process, error) {
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
	return &Container{reaper: r, id: id, root: root, main: main, cgroup: group, execs: make(map[string]*Process)}, nil
}

// ID returns the container's id.
func (c *Container) ID() string { return c.id }

// Start lets the main process become the user's program.
func (c *Container) Start() error {
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

// Exec starts another program in the container.
func (c *Container) Exec(id string, p *pb.Process) error {
	if err := ValidateID("process", id); err != nil {
		return err
	}
	if err := validateProcess(p); err != nil {
		return err
	}
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

	child, err := c.spawnExec(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		delete(c.execs, id)
		return err
	}
	if c.execs == nil {
		child.discard()
		return fmt.Errorf("container %s: %w", c.id, errdefs.ErrNotFound)
	}
	c.execs[id] = child
	c.order = append(c.order, id)
	c.forget()
	return nil
}

func (c *Container) spawnExec(p *pb.Process) (*Process, error) {
	group, err := c.cgroup.forkInto(c.main.pid)
	if err != nil {
		return nil, fmt.Errorf("find its cgroup: %w", err)
	}
	defer group.Close()
	child, err := spawn(c.reaper, group, childConfig{Join: c.main.pid, Process: p})
	if err != nil {
		return nil, err
	}
	if err := child.start(); err != nil {
		child.discard()
		return nil, err
	}
	return child, nil
}

// forget drops the oldest ended execs that are too many to keep.
func (c *Container) forget() {
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

// Process returns the process with an exec id. The main one's is empty or the container's own id.
func (c *Container) Process(id string) (*Process, error) {
	if id == c.id || id == "" {
		return c.main, nil
	}
	if err := ValidateID("process", id); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.execs[id]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("process %s of container %s: %w", id, c.id, errdefs.ErrNotFound)
}

// Signal signals one process. Without an exec id that is the main one, and for SIGKILL all of the
// container: the shim leaves the id out for each signal to a container.
func (c *Container) Signal(execID string, sig unix.Signal) error {
	p, err := c.Process(execID)
	if err != nil {
		return err
	}
	if execID == "" && sig == unix.SIGKILL {
		return c.Kill()
	}
	if p == c.main && sig == unix.SIGTERM && !p.handles(sig) {
		sig = unix.SIGKILL // the first process of a pid namespace would not notice the other
	}
	return p.Signal(sig)
}

// Kill ends every process in the container.
func (c *Container) Kill() error { return c.cgroup.kill() }

// Empty reports whether no process is left in the container.
func (c *Container) Empty() bool { return c.cgroup.empty() }

// Limit applies the limits in r. What r leaves out stays as it is.
func (c *Container) Limit(r *pb.LinuxResources) error { return c.cgroup.limit(r) }

// Stats returns what the container uses. Times are in nanoseconds, sizes in bytes.
func (c *Container) Stats() (*pb.CgroupStats, error) { return c.cgroup.stats() }

// ListenOOM calls killed for each process that the kernel kills because memory ran out. It returns when
// the container is removed.
func (c *Container) ListenOOM(killed func()) { c.cgroup.oom.listen(killed) }

// Freeze stops every process in the container, or continues them.
func (c *Container) Freeze(frozen bool) error {
	c.forking.Lock()
	defer c.forking.Unlock()
	if err := c.cgroup.freeze(frozen); err != nil {
		return err
	}
	c.frozen = frozen
	return nil
}

// Remove ends what still runs and frees everything but the storages.
func (c *Container) Remove() error {
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
