// Package microvm makes sandboxes real: it is the one room that knows containerd and Kata. It
// satisfies sandbox.Runtime with containerd's client, one Kata shim a sandbox, and keeps the
// server's private containerd. Only the daemon's wiring enters here.
package microvm

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/cio"
	"github.com/containerd/containerd/errdefs"
	"github.com/containerd/containerd/namespaces"
	"github.com/containerd/containerd/oci"
	"github.com/containerd/containerd/snapshots"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/msbd/msbd/daemon/internal/sandbox"
)

const (
	// Namespace is the containerd namespace that holds all that this server keeps there.
	Namespace = "msb"
	// Snapshotter is containerd's, for images and for what sandboxes write over them.
	Snapshotter = "overlayfs"
	// sandboxLabel marks our containers, should the containerd be shared with others.
	sandboxLabel = "msb.sandbox"
	// portalPath is where the guest finds the portal's program.
	portalPath = "/.msb/portal"
	// killLimit bounds a kill through the shim; past it the microVM itself is ended.
	killLimit = 5 * time.Second
)

// VMs is what the runtime needs of the room that runs QEMU.
type VMs interface {
	// IDs lists the microVMs that have left anything on this host.
	IDs() []string
	// Remove ends a microVM and removes all that it left. An unknown id is no error.
	Remove(ctx context.Context, id string) error
}

// Config is what a Runtime is made from. Every field is needed.
type Config struct {
	Client *containerd.Client
	// Address is containerd's socket.
	Address string
	// Shim is the absolute path of containerd-shim-kata-v2.
	Shim string
	// RunDir holds the connections' FIFOs and the shim's configuration; gone after a reboot.
	RunDir string
	// HypervisorSocket is where Kata's shim finds the hypervisor service.
	HypervisorSocket string
	VMs              VMs
	// Image finds an image by the name that a client gave (errdefs.ErrNotFound).
	Image func(ctx context.Context, name string) (containerd.Image, error)
	Log   *slog.Logger
}

// Runtime starts, finds and removes microVMs.
type Runtime struct {
	Config
	kataConfig string
	syslog     syslogSink
}

var _ sandbox.Runtime = (*Runtime)(nil)

// New writes the shim's configuration and returns a Runtime. Close it at the end.
func New(cfg Config) (*Runtime, error) {
	if _, err := os.Stat(cfg.Shim); err != nil {
		return nil, fmt.Errorf("find Kata's shim: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(cfg.RunDir, "fifo"), 0o700); err != nil {
		return nil, fmt.Errorf("make the FIFOs' directory: %w", err)
	}
	path, err := writeKataConfig(cfg.RunDir, cfg.HypervisorSocket)
	if err != nil {
		return nil, err
	}
	return &Runtime{Config: cfg, kataConfig: path, syslog: syslogSink{log: cfg.Log}}, nil
}

// Close releases what the Runtime itself holds. Sandboxes run on.
func (r *Runtime) Close() { r.syslog.close() }

// ResolveImage satisfies sandbox.Runtime.
func (r *Runtime) ResolveImage(ctx context.Context, name string) error {
	_, err := r.Image(ctx, name)
	return err
}

// Start satisfies sandbox.Runtime.
func (r *Runtime) Start(ctx context.Context, id string, cfg sandbox.Config) error {
	image, err := r.Image(ctx, cfg.Image)
	if err != nil {
		return err
	}
	if err := r.syslog.ensure(); err != nil {
		return err
	}
	ctx = scoped(ctx)
	container, err := r.Client.NewContainer(ctx, id,
		containerd.WithSnapshotter(Snapshotter),
		containerd.WithImage(image),
		containerd.WithNewSnapshot(id, image),
		containerd.WithRuntime(r.Shim, &runtimeoptions.Options{TypeUrl: kataOptions, ConfigPath: r.kataConfig}),
		containerd.WithContainerLabels(map[string]string{sandboxLabel: id}),
		containerd.WithNewSpec(spec(id, cfg, image)...),
	)
	if err != nil {
		return fmt.Errorf("make the container: %w", err)
	}
	task, err := container.NewTask(ctx, cio.NullIO)
	if err != nil {
		return fmt.Errorf("boot the microVM: %w", err)
	}
	if err := task.Start(ctx); err != nil {
		return fmt.Errorf("start the sandbox's main process: %w", err)
	}
	return nil
}

// spec describes the sandbox's container: the image, with the portal as its idle main process.
// Whatever the user runs comes later, through the portal.
func spec(id string, cfg sandbox.Config, image containerd.Image) []oci.SpecOpts {
	const period = 100_000
	return []oci.SpecOpts{
		oci.WithDefaultPathEnv,
		oci.WithImageConfig(image),
		oci.WithProcessArgs(portalPath, "serve"),
		oci.WithHostname("sandbox"),
		oci.WithMounts([]specs.Mount{{
			// A type of our own passes through the shim; a bind would be copied into the guest at each start.
			Type: "msb-guest", Source: "/msb-portal", Destination: portalPath, Options: []string{"ro"},
		}}),
		oci.WithMemoryLimit(uint64(cfg.MemoryMiB) << 20),
		oci.WithCPUCFS(int64(cfg.CPUs)*period, period),
		oci.WithCgroup("/msb/" + id),
	}
}

// Remove satisfies sandbox.Runtime: whatever state a start or a crash left, nothing of id remains.
func (r *Runtime) Remove(ctx context.Context, id string) error {
	ctx = scoped(ctx)
	var errs []error
	container, err := r.Client.LoadContainer(ctx, id)
	switch {
	case err == nil:
		if err := r.removeTask(ctx, container); err != nil {
			errs = append(errs, err)
		}
		if err := container.Delete(ctx, containerd.WithSnapshotCleanup); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("delete the container: %w", err))
		}
	case !errdefs.IsNotFound(err):
		errs = append(errs, fmt.Errorf("find the container: %w", err))
	}
	// NewContainer may have been cut off between the snapshot and the container.
	if err := r.Client.SnapshotService(Snapshotter).Remove(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		errs = append(errs, fmt.Errorf("remove the snapshot: %w", err))
	}
	if err := r.VMs.Remove(ctx, id); err != nil {
		errs = append(errs, err)
	}
	if err := os.Remove(shimSocket(r.Address, id)); err != nil && !os.IsNotExist(err) {
		errs = append(errs, fmt.Errorf("remove the shim's socket: %w", err))
	}
	errs = append(errs, os.RemoveAll(r.fifoDir(id)))
	return errors.Join(errs...)
}

// removeTask ends the sandbox through its shim. A shim or guest that does not answer is no
// obstacle: its microVM is ended, which ends the task.
func (r *Runtime) removeTask(ctx context.Context, container containerd.Container) error {
	task, err := container.Task(ctx, nil)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find the task: %w", err)
	}
	limited, cancel := context.WithTimeout(ctx, killLimit)
	_, err = task.Delete(limited, containerd.WithProcessKill)
	cancel()
	if err == nil || errdefs.IsNotFound(err) {
		return nil
	}
	r.Log.Warn("the shim did not end its sandbox; ending the microVM", "id", container.ID(), "err", err)
	if pid := int(task.Pid()); pid > 1 {
		if args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); strings.Contains(string(args), container.ID()) {
			syscall.Kill(pid, syscall.SIGKILL) // the shim: containerd then drops the task
		}
	}
	if err := r.VMs.Remove(ctx, container.ID()); err != nil {
		return err
	}
	limited, cancel = context.WithTimeout(ctx, killLimit)
	defer cancel()
	return poll(limited, 50*time.Millisecond, func() bool {
		_, err := task.Delete(limited, containerd.WithProcessKill)
		return err == nil || errdefs.IsNotFound(err)
	})
}

// List satisfies sandbox.Runtime. It looks in every place where a start or a crash may leave
// something.
func (r *Runtime) List(ctx context.Context) ([]sandbox.Instance, error) {
	ctx = scoped(ctx)
	alive := map[string]bool{}
	containers, err := r.Client.Containers(ctx, fmt.Sprintf("labels.%q", sandboxLabel))
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	for _, c := range containers {
		alive[c.ID()] = false
		task, err := c.Task(ctx, nil)
		if err != nil {
			continue
		}
		status, err := task.Status(ctx)
		alive[c.ID()] = err == nil && status.Status == containerd.Running
	}
	note := func(id string) {
		if _, known := alive[id]; !known {
			alive[id] = false
		}
	}
	err = r.Client.SnapshotService(Snapshotter).Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if strings.HasPrefix(info.Name, "sb-") {
			note(info.Name)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	for _, id := range r.VMs.IDs() {
		note(id)
	}
	var found []sandbox.Instance
	for id, ok := range alive {
		found = append(found, sandbox.Instance{ID: id, Alive: ok})
	}
	return found, nil
}

// Wait satisfies sandbox.Runtime. It outlasts restarts of containerd.
func (r *Runtime) Wait(ctx context.Context, id string) (string, error) {
	ctx = scoped(ctx)
	for {
		status, err := r.wait(ctx, id)
		switch {
		case err == nil:
			return fmt.Sprintf("its microVM ended by itself (exit status %d)", status), nil
		case errdefs.IsNotFound(err):
			return "its microVM is gone: its shim or its containerd task ended", nil
		case ctx.Err() != nil:
			return "", context.Cause(ctx)
		}
		// The shim died, or containerd is being restarted: the next look at the task tells.
		r.Log.Debug("watch the microVM", "id", id, "err", err)
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
}

func (r *Runtime) wait(ctx context.Context, id string) (uint32, error) {
	container, err := r.Client.LoadContainer(ctx, id)
	if err != nil {
		return 0, err
	}
	task, err := container.Task(ctx, nil)
	if err != nil {
		return 0, err
	}
	exits, err := task.Wait(ctx)
	if err != nil {
		return 0, err
	}
	exit := <-exits
	return exit.ExitCode(), exit.Error()
}

func (r *Runtime) fifoDir(id string) string { return filepath.Join(r.RunDir, "fifo", id) }

// shimSocket is where a shim listens: named as containerd's shim package does, which leaves it
// behind after every stop.
func shimSocket(containerdAddress, id string) string {
	sum := sha256.Sum256([]byte(filepath.Join(containerdAddress, Namespace, id)))
	return fmt.Sprintf("/run/containerd/s/%x", sum)
}

func scoped(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, Namespace)
}
