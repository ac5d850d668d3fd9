// Package kata runs sandboxes as Kata's microVMs: it satisfies sandbox.Runtime with a client of containerd and one Kata
// shim per sandbox. It writes or checks the shims' configuration, describes the container, follows the guest's console,
// and removes what Kata leaves behind. Only package backend may import it.
package kata

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/cio"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/kataconf"
)

const (
	// sandboxLabel marks our containers, should the containerd be shared with others.
	sandboxLabel = "msb.sandbox"
	// killLimit bounds a kill through the shim; past it the microVM itself is ended.
	killLimit = 5 * time.Second
	// dropLimit bounds how long containerd may take to see that.
	dropLimit = 20 * time.Second
	// awayLimit bounds how long a removal waits for a containerd that has died, and is on its way back.
	awayLimit = 30 * time.Second
	// stateLimit bounds how long a shim may leave its sandbox's state unknown.
	stateLimit = 30 * time.Second
	// parallelism bounds how many shims are asked at once.
	parallelism = 8
)

// VMs is what the runtime needs of the hypervisor service, which runs QEMU where Kata's shim does not. It is asked in
// any case: VMs that it started may live on after the server was configured otherwise.
type VMs interface {
	// IDs lists the microVMs that have left anything on this host.
	IDs() []string
	// Remove ends a microVM and removes all that it left. An unknown id is no error.
	Remove(ctx context.Context, id string) error
}

// Config is what a Runtime is made from. Every field is needed.
type Config struct {
	Client *containerd.Client
	// Containerd says where the client's containerd is.
	Containerd ctrd.Paths
	// Shim is the absolute path of containerd-shim-kata-v2.
	Shim     string
	Settings Settings
	// RunDir holds a directory for each sandbox, and the shim's configuration; gone after a reboot.
	RunDir string
	VMs    VMs
	// Image finds an image by the name that a client gave (errdefs.ErrNotFound).
	Image func(ctx context.Context, name string) (containerd.Image, error)
	Log   *slog.Logger
}

// Runtime starts, finds and removes microVMs.
type Runtime struct {
	Config
	kataConfig string          // the path
	hostConfig kataconf.Config // the host's own, if there is one
	syslog     syslogSink

	mu       sync.Mutex
	removing map[string]bool
}

var _ sandbox.Runtime = (*Runtime)(nil)

// New checks or writes the shim's configuration and returns a Runtime. Close it at the end.
func New(cfg Config) (*Runtime, error) {
	r := &Runtime{Config: cfg, kataConfig: cfg.Settings.Config, syslog: syslogSink{log: cfg.Log}, removing: map[string]bool{}}
	if _, err := os.Stat(cfg.Shim); err != nil {
		return nil, fmt.Errorf("find Kata's shim: %w", err)
	}
	if err := os.MkdirAll(r.dir(""), 0o700); err != nil {
		return nil, fmt.Errorf("make the sandboxes' directory: %w", err)
	}
	if err := r.keepTempMounts(); err != nil {
		return nil, err
	}
	var err error
	if r.kataConfig != "" {
		if _, err = os.Stat(cfg.Settings.Portal); err == nil {
			r.hostConfig, err = kataconf.Read(r.kataConfig)
		}
	} else {
		r.kataConfig, err = cfg.Settings.writeConfig(cfg.RunDir)
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

// keepTempMounts has containerd's client mount images, to look into them, where a later daemon finds what was mounted
// when it was killed, and ends what an earlier one left.
func (r *Runtime) keepTempMounts() error {
	run, err := filepath.EvalSymlinks(r.RunDir) // as mounts are listed
	if err != nil {
		return fmt.Errorf("find the run directory: %w", err)
	}
	dir := filepath.Join(run, "mount")
	if err := removeTree(dir); err != nil { // it keeps no sandbox from running
		r.Log.Warn("remove what an earlier server mounted", "err", err)
	}
	if err := mount.SetTempMountLocation(dir); err != nil {
		return fmt.Errorf("make the directory for mounts: %w", err)
	}
	return nil
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
	// Before anything else: by this directory a later daemon knows of the sandbox.
	if err := os.MkdirAll(r.dir(id), 0o700); err != nil {
		return fmt.Errorf("make the sandbox's directory: %w", err)
	}
	ctx = ctrd.InNamespace(ctx)
	container, err := r.Client.NewContainer(ctx, id,
		containerd.WithSnapshotter(ctrd.Snapshotter),
		containerd.WithImage(image),
		containerd.WithNewSnapshot(id, image),
		containerd.WithRuntime(r.Shim, &runtimeoptions.Options{TypeUrl: kataOptions, ConfigPath: r.kataConfig}),
		containerd.WithContainerLabels(map[string]string{sandboxLabel: id}),
		containerd.WithNewSpec(r.spec(id, cfg, image)...),
	)
	if err != nil {
		return fmt.Errorf("make the container: %w", err)
	}
	return r.watchBoot(ctx, id, func(ctx context.Context) error {
		task, err := container.NewTask(ctx, cio.NullIO)
		if err != nil {
			return fmt.Errorf("boot the microVM: %w", err)
		}
		if err := task.Start(ctx); err != nil {
			return fmt.Errorf("start the sandbox's main process: %w", err)
		}
		return nil
	})
}

// Remove satisfies sandbox.Runtime: whatever state a start or a crash left, nothing of id remains.
func (r *Runtime) Remove(ctx context.Context, id string) error {
	defer r.markRemoving(id)()
	ctx = ctrd.InNamespace(ctx)
	var errs []error
	failed := func(what string, err error) {
		if err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	limited, cancel := context.WithTimeout(ctx, awayLimit)
	failed("reach containerd", ctrd.WaitServing(limited, r.Client))
	cancel()
	container, err := r.Client.LoadContainer(ctx, id)
	failed("find the container", err)
	if err == nil {
		failed("end the task", r.removeTask(ctx, container))
	}
	ended := r.endVM(ctx, id)
	failed("end the microVM", ended)
	if err == nil {
		failed("delete the container", container.Delete(ctx, containerd.WithSnapshotCleanup))
	}
	// NewContainer may have been cut off between the snapshot and the container.
	failed("remove the snapshot", r.Client.SnapshotService(ctrd.Snapshotter).Remove(ctx, id))
	if ended == nil {
		failed("remove what Kata left", removeLeftovers(ctx, id))
	}
	failed("remove the shim's socket", removeIfThere(shimSocket(r.Containerd.Address, id)))
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	// containerd keeps its record of a task whose shim could not clean up.
	for _, dir := range r.Containerd.TaskDirs(id) {
		failed("remove the task's directory", removeTree(dir))
	}
	if len(errs) == 0 { // last: as long as there is anything, a later daemon must know
		failed("remove the sandbox's directory", os.RemoveAll(r.dir(id)))
	}
	return errors.Join(errs...)
}

// endVM ends all processes of a sandbox, whoever started them.
func (r *Runtime) endVM(ctx context.Context, id string) error {
	return errors.Join(r.VMs.Remove(ctx, id), killProcesses(ctx, id))
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
	if err := r.endVM(ctx, container.ID()); err != nil { // containerd then drops the task
		return err
	}
	limited, cancel = context.WithTimeout(ctx, dropLimit)
	defer cancel()
	return poll(limited, 50*time.Millisecond, func() bool {
		_, err := task.Delete(limited, containerd.WithProcessKill)
		return err == nil || errdefs.IsNotFound(err)
	})
}

// List satisfies sandbox.Runtime. It looks in every place where a start or a crash may leave
// something.
func (r *Runtime) List(ctx context.Context) ([]sandbox.Instance, error) {
	ctx = ctrd.InNamespace(ctx)
	alive := map[string]bool{}
	containers, err := r.Client.Containers(ctx, fmt.Sprintf("labels.%q", sandboxLabel))
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(parallelism)
	for _, c := range containers {
		g.Go(func() error {
			lives, err := r.alive(ctx, c.ID(), stateLimit, func(ctx context.Context) (containerd.ProcessStatus, error) {
				return taskStatus(ctx, c)
			})
			mu.Lock()
			defer mu.Unlock()
			alive[c.ID()] = lives
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	note := func(id string) {
		if _, known := alive[id]; !known {
			alive[id] = false
		}
	}
	err = r.Client.SnapshotService(ctrd.Snapshotter).Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if strings.HasPrefix(info.Name, "sb-") {
			note(info.Name)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	dirs, err := os.ReadDir(r.dir(""))
	if err != nil {
		return nil, fmt.Errorf("list the sandboxes' directories: %w", err)
	}
	for _, d := range dirs {
		if d.Name() != hypervisor.FailedDir {
			note(d.Name())
		}
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

// taskStatus is what a container's shim says of its task, and Unknown when it does not say so in time.
func taskStatus(ctx context.Context, c containerd.Container) (containerd.ProcessStatus, error) {
	task, err := c.Task(ctx, nil)
	if err != nil {
		return "", err
	}
	status, err := task.Status(ctx)
	return status.Status, err
}

// alive reports whether a sandbox lives. A shim that does not answer may be busy: it is asked until limit, and its
// sandbox lives as long as nobody says that it has ended. An error is ctx's.
func (r *Runtime) alive(ctx context.Context, id string, limit time.Duration, ask func(context.Context) (containerd.ProcessStatus, error)) (lives bool, err error) {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var status containerd.ProcessStatus
	doubt := poll(limited, 100*time.Millisecond, func() bool {
		status, err = ask(limited)
		return errdefs.IsNotFound(err) || err == nil && status != containerd.Unknown
	})
	switch {
	case ctx.Err() != nil:
		return false, context.Cause(ctx)
	case doubt != nil:
		r.Log.Warn("a sandbox's shim does not say whether it lives; keeping it", "id", id, "err", err)
		return true, nil
	}
	return err == nil && status != containerd.Stopped, nil
}

// Wait satisfies sandbox.Runtime. It outlasts restarts of containerd.
func (r *Runtime) Wait(ctx context.Context, id string) (string, error) {
	ctx = ctrd.InNamespace(ctx)
	defer r.watchConsole(ctx, id)()
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

// dir is where msbd keeps what is of a sandbox's microVM, such as the FIFOs of its connections.
func (r *Runtime) dir(id string) string { return filepath.Join(r.RunDir, "sandbox", id) }

// shimSocket is where a shim listens: named as containerd's shim package does, which leaves it
// behind after every stop.
func shimSocket(containerdAddress, id string) string {
	sum := sha256.Sum256([]byte(filepath.Join(containerdAddress, ctrd.Namespace, id)))
	return fmt.Sprintf("/run/containerd/s/%x", sum)
}

// markRemoving says that whatever ends of a sandbox is meant to, until the answer is called.
func (r *Runtime) markRemoving(id string) (done func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.removing[id] = true
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.removing, id)
	}
}

var versionRE = regexp.MustCompile(`version: ([^,\s]+)`)

// Version asks the shim for its version, as built.
func (r *Runtime) Version(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, r.Shim, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", r.Shim, err)
	}
	m := versionRE.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("ask %s for its version: it says %q", r.Shim, out)
	}
	return string(m[1]), nil
}

// poll calls f every so often until it returns true, or ctx ends.
func poll(ctx context.Context, every time.Duration, f func() bool) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if f() {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
