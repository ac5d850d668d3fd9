// Package container runs containers in the guest. It sets up their root file system, cgroup and device filter, and
// starts their processes.
//
// Each process in a container starts as a child. The agent runs its binary again as this child. The child prepares its
// process (see child.go) and then execs the user's program.
package container

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/guest/agent/mount"
)

const (
	// maxExecs is the number of execs, running or ended, above which a container drops ended ones. It keeps ended execs
	// for a late WaitProcess.
	maxExecs = 256
	// removeTimeout bounds the wait for a container's processes to exit.
	removeTimeout = 20 * time.Second
)

// Container is a container that has been created and not yet removed. Its processes may have exited.
type Container struct {
	reaper *Reaper
	root   string
	main   *Process
	portal string // path of the portal's program in the container; empty if the main process is not the portal
	cgroup *cgroup

	// forking is read-locked while a process is forked. It is locked while the container is frozen or unfrozen, because
	// a fork into a frozen cgroup does not return.
	forking sync.RWMutex
	frozen  bool

	// portalSocket is the agent's end of the socket over which the portal gets its connections, or nil.
	portalSocket *net.UnixConn

	mu       sync.Mutex
	id       string
	hostname string
	started  bool
	adopted  bool                // it was started as the container of a template, and Start has not been called since Adopt
	execs    map[string]*Process // by id; nil once the container has been removed
	order    []string            // ids of execs, oldest first
}

// New creates a container and the child that becomes its main process. The child waits for Start. The caller must have
// checked id and spec with Validate. If the portal is the main process and gated is set, the portal gets its connections over
// PortalSocket.
func New(r *Reaper, id, root string, spec *pb.Spec, gated bool) (*Container, error) {
	portal := portalProgram(spec)
	group, err := createCgroup(id, portal != "")
	if err != nil {
		return nil, fmt.Errorf("create cgroup: %w", err)
	}
	linux := spec.Linux
	var portalSocket *net.UnixConn
	main, err := func() (*Process, error) {
		if err := group.limit(linux.GetResources()); err != nil {
			return nil, err
		}
		if err := group.filterDevices(deviceRules(linux)); err != nil {
			return nil, err
		}
		load, err := os.Open(group.load)
		if err != nil {
			return nil, err
		}
		defer load.Close()
		cfg := childConfig{
			Portal: portal != "",
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
		}
		if !cfg.Portal {
			return spawn(r, load, cfg)
		}
		if cfg.handOver, err = group.handOver(spec.Process.GetUser().GetUID()); err != nil {
			return nil, err
		}
		defer func() { closeAll(cfg.handOver) }()
		if gated {
			var end *os.File
			if portalSocket, end, err = socketPair("portal"); err != nil {
				return nil, err
			}
			cfg.handOver = append(cfg.handOver, end)
		}
		// The child creates the container's cgroup namespace, whose root is the child's cgroup at that time. So let the
		// portal begin in the load, whose processes then see their own cgroup as the root.
		main, err := spawn(r, load, cfg)
		if err != nil {
			return nil, err
		}
		if err := group.protect(main.pid); err != nil {
			main.discard()
			return nil, err
		}
		return main, nil
	}()
	if err != nil {
		if portalSocket != nil {
			portalSocket.Close()
		}
		return nil, errors.Join(err, group.remove(removeTimeout))
	}
	return &Container{
		reaper: r, id: id, hostname: spec.Hostname, root: root, main: main, portal: portal, portalSocket: portalSocket, cgroup: group,
		execs: make(map[string]*Process),
	}, nil
}

// portalProgram returns the path of the portal's program if it is the program of the container's main process.
// Otherwise it returns "".
func portalProgram(spec *pb.Spec) string {
	program := spec.Process.Args[0]
	for _, m := range spec.Mounts {
		if m.Type == guestMountType && m.Source == portalSource && m.Destination == program {
			return program
		}
	}
	return ""
}

// ID returns the container's id.
func (c *Container) ID() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.id
}

// PortalSocket returns the agent's end of the socket over which the portal gets its connections, or nil if it has none. The
// caller takes it over. Each message is a NUL byte and the id of a transfer, which may be empty, with the descriptor of the
// connection. The portal sends one byte when it takes connections.
func (c *Container) PortalSocket() *net.UnixConn { return c.portalSocket }

// Adopt gives the container, which is running, another id and hostname. After that, Start has to be called once again, which
// does nothing. The container's cgroup keeps its name. It returns errdefs.ErrFailedPrecondition if the container is not
// running.
func (c *Container) Adopt(id, hostname string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.started || c.execs == nil || c.main.ended() {
		return fmt.Errorf("container %s is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if err := c.setHostname(hostname); err != nil {
		return err
	}
	c.id, c.adopted = id, true
	return nil
}

// SetHostname sets the container's hostname, and changes it in the files to which writeEtc has added it.
func (c *Container) SetHostname(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.setHostname(name)
}

// setHostname is SetHostname for a caller that holds mu. It does nothing if name is empty, as New does. The container has the
// guest's UTS namespace, whose hostname may also have been changed since.
func (c *Container) setHostname(name string) error {
	if name == "" {
		return nil
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("set hostname: %w", err)
	}
	if name != c.hostname {
		renameInEtc(c.root, c.hostname, name)
		c.hostname = name
	}
	return nil
}

// Start starts the program of the main process.
func (c *Container) Start() error {
	c.forking.RLock()
	defer c.forking.RUnlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.adopted:
		c.adopted = false
		return nil
	case c.started:
		return fmt.Errorf("container %s has already been started: %w", c.id, errdefs.ErrFailedPrecondition)
	case c.frozen:
		return fmt.Errorf("container %s is paused: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	c.started = true
	return c.main.start()
}

// Exec starts an additional process in the container. It returns errdefs.ErrFailedPrecondition if the container is not
// running, and errdefs.ErrAlreadyExists if the container has a process with
// this id.
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
		return fmt.Errorf("container %s is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if _, ok := c.execs[id]; ok || id == c.id {
		c.mu.Unlock()
		return fmt.Errorf("process %s: %w", id, errdefs.ErrAlreadyExists)
	}
	c.execs[id] = nil // reserve the id
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
	c.pruneExecs()
	return nil
}

func (c *Container) spawnExec(p *pb.Process) (*Process, error) {
	cfg := childConfig{Join: c.main.pid, Portal: c.portal != "" && p.Args[0] == c.portal, Process: p}
	var group *os.File
	var err error
	if cfg.Portal {
		group, err = os.Open(c.cgroup.portal)
	} else {
		group, err = c.cgroup.forkInto(c.main.pid)
	}
	if err != nil {
		return nil, fmt.Errorf("find the container's cgroup: %w", err)
	}
	defer group.Close()
	child, err := spawn(c.reaper, group, cfg)
	if err != nil {
		return nil, err
	}
	if err := child.start(); err != nil {
		child.discard()
		return nil, err
	}
	return child, nil
}

// pruneExecs drops the oldest ended execs until at most maxExecs execs are left. The caller holds mu.
func (c *Container) pruneExecs() {
	c.order = slices.DeleteFunc(c.order, func(id string) bool {
		p := c.execs[id]
		if len(c.execs) <= maxExecs || !p.ended() {
			return false
		}
		p.release()
		delete(c.execs, id)
		return true
	})
}

// Process returns the process with the exec id. An empty id and the id of the container mean the main process. It
// returns errdefs.ErrNotFound if there is no such process.
func (c *Container) Process(id string) (*Process, error) {
	if id == "" {
		return c.main, nil
	}
	if err := ValidateID("process", id); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if id == c.id {
		return c.main, nil
	}
	if p := c.execs[id]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("process %s of container %s: %w", id, c.id, errdefs.ErrNotFound)
}

// Signal sends sig to the process execID, or to the main process if execID is empty. SIGKILL with an empty execID kills
// all processes of the container, because the shim uses an empty id when it signals a container instead of a process.
func (c *Container) Signal(execID string, sig unix.Signal) error {
	p, err := c.Process(execID)
	if err != nil {
		return err
	}
	if execID == "" && sig == unix.SIGKILL {
		return c.Kill()
	}
	if p == c.main && sig == unix.SIGTERM && !p.handles(sig) {
		sig = unix.SIGKILL // the kernel does not deliver an unhandled SIGTERM to the first process of a pid namespace
	}
	return p.Signal(sig)
}

// Kill kills every process in the container.
func (c *Container) Kill() error { return c.cgroup.kill() }

// Empty reports whether the container has no running processes.
func (c *Container) Empty() bool { return c.cgroup.empty() }

// Limit applies the resource limits in r. Limits that r leaves out stay as they are.
func (c *Container) Limit(r *pb.LinuxResources) error { return c.cgroup.limit(r) }

// Stats returns the container's resource usage. Times are in nanoseconds, sizes in bytes.
func (c *Container) Stats() (*pb.CgroupStats, error) { return c.cgroup.stats() }

// ListenOOM calls killed for each process of the container that the kernel kills because it ran out of memory, and makes
// the kernel kill one if the programs thrash. It returns when the container is removed.
func (c *Container) ListenOOM(killed func()) { c.cgroup.oom.listen(killed) }

// Freeze freezes or unfreezes every process in the container.
func (c *Container) Freeze(frozen bool) error {
	c.forking.Lock()
	defer c.forking.Unlock()
	if err := c.cgroup.freeze(frozen); err != nil {
		return err
	}
	c.frozen = frozen
	return nil
}

// Remove kills the container's processes and releases its resources, except for its storages.
func (c *Container) Remove() error {
	if err := c.cgroup.remove(removeTimeout); err != nil {
		return fmt.Errorf("remove cgroup: %w", err)
	}
	// If the root is a separate file system in the share, unmount it so that the host can remove it.
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
