// Package kata runs sandboxes as Kata's microVMs. It implements sandbox.Runtime with a containerd client and one Kata
// shim per sandbox. It writes or checks the shims' configuration, builds the container's spec, logs the guest's
// console, and removes what Kata leaves on the host. Only package backend may import it.
package kata

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/cio"
	"github.com/containerd/containerd/containers"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/oci"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
	"github.com/msbd/msbd/daemon/internal/backend/disk"
	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/kataconf"
)

const (
	// sandboxLabel is the label of this server's containers, which distinguishes them in a shared containerd.
	sandboxLabel = "msb.sandbox"
	// killTimeout bounds a kill through the shim. After that the microVM's processes are killed directly.
	killTimeout = 5 * time.Second
	// taskDeleteTimeout bounds how long containerd may take to notice that the processes have been killed. Only then
	// does it let the task be deleted.
	taskDeleteTimeout = 20 * time.Second
	// deleteTimeout bounds how long a removal waits until the files of a sandbox are deleted.
	deleteTimeout = 20 * time.Second
	// containerdTimeout bounds how long a removal waits for a containerd that has died and is being restarted.
	containerdTimeout = 30 * time.Second
	// stateTimeout bounds how long List asks a shim for the state of its task.
	stateTimeout = 30 * time.Second
	// maxStatusCalls is how many shims List asks for the status of their task at the same time.
	maxStatusCalls = 8
)

// VMs is the part of the hypervisor service that the runtime needs. The service runs QEMU where Kata's shim does not.
// The runtime always calls it, because VMs that the service started may still run after the server's configuration
// changed.
type VMs interface {
	// Start begins to start a microVM. Kata's shim then joins it.
	Start(ctx context.Context, vm hypervisor.Spec) error
	// Cold returns why the microVM id, which has started, is not a clone of a template. It is empty if it is one.
	Cold(id string) (why string)
	// DialPortal connects to the portal in the microVM id. It returns errdefs.ErrNotFound or errdefs.ErrNotImplemented if that
	// is not possible over a network.
	DialPortal(ctx context.Context, id, transfer string) (net.Conn, error)
	// SetHostname changes the hostname of the sandbox in the microVM id.
	SetHostname(ctx context.Context, id, hostname string) error
	// TemplateBuilt returns when the template was built of which the microVM can be a clone. It is the zero time if there is
	// none.
	TemplateBuilt(vm hypervisor.Spec) (time.Time, error)
	// BuildTemplate builds the template of which the microVM can be a clone. The caller must call Remove, also after an error.
	BuildTemplate(ctx context.Context, vm hypervisor.Spec, rehearse hypervisor.Rehearse) error
	// RemoveOldTemplates removes the templates that are too old to be used.
	RemoveOldTemplates()
	// IDs returns the ids of the microVMs that the service runs or has not removed completely.
	IDs() []string
	// Remove ends the microVM id, and removes its processes and files that belong to the service. It returns nil if id
	// is unknown.
	Remove(ctx context.Context, id string) error
}

// Disks makes the disks of sandboxes that run on msbd's hypervisor service. The runtime always calls it, because such
// sandboxes may still run after the server's configuration changed.
type Disks interface {
	// BuildImage makes the disk of img, unless it exists, and returns its name. progress may be nil.
	BuildImage(ctx context.Context, img containerd.Image, progress func(done, total int64)) (digest.Digest, error)
	// Create makes the disks of sandbox id. Its own disk has sizeMiB MiB. It returns errdefs.ErrNotFound if there is no
	// disk of the image.
	Create(id string, image digest.Digest, sizeMiB int) error
	// Accounts returns a directory with the files etc/passwd and etc/group of the image of sandbox id.
	Accounts(id string) string
	// Find returns the paths of the disks of sandbox id. ok is false if it has none.
	Find(id string) (image, upper string, ok bool)
	// Usage returns the space that the own disk of sandbox id takes on the host, in bytes.
	Usage(id string) (uint64, error)
	// Remove removes the disks of sandbox id. It returns nil if there are none.
	Remove(id string) error
	// IDs returns the ids of the sandboxes that have disks.
	IDs() ([]string, error)
}

// Config is the configuration of a Runtime. All fields are required.
type Config struct {
	Client *containerd.Client
	// Containerd holds the paths of the client's containerd.
	Containerd ctrd.Paths
	// Shim is the absolute path of containerd-shim-kata-v2.
	Shim     string
	Settings Settings
	// RunDir holds a directory for each sandbox, and the shims' configuration. Its content is lost at a reboot.
	RunDir string
	VMs    VMs
	Disks  Disks
	// MaxTemplates is how many templates the runtime keeps.
	MaxTemplates int
	// Image returns the image that a client calls name, or errdefs.ErrNotFound.
	Image func(ctx context.Context, name string) (containerd.Image, error)
	Log   *slog.Logger
}

// Runtime starts, finds and removes microVMs. It implements sandbox.Runtime.
type Runtime struct {
	Config
	kataConfig string          // path of the shims' configuration
	hostConfig kataconf.Config // the content of Settings.Config, if that is set
	syslog     syslogSink
	disk       *diskMeter
	templates  wantedTemplates

	mu       sync.Mutex
	removing map[string]bool // ids of sandboxes that Remove is removing
}

var _ sandbox.Runtime = (*Runtime)(nil)

// New checks or writes the shims' configuration and returns a Runtime. Call Close when it is no longer needed.
func New(cfg Config) (*Runtime, error) {
	r := &Runtime{Config: cfg, kataConfig: cfg.Settings.Config, syslog: syslogSink{log: cfg.Log}, removing: map[string]bool{},
		templates: wantedTemplates{wake: make(chan struct{}, 1)}}
	if _, err := os.Stat(cfg.Shim); err != nil {
		return nil, fmt.Errorf("find Kata's shim: %w", err)
	}
	if err := os.MkdirAll(r.dir(""), 0o700); err != nil {
		return nil, fmt.Errorf("create the sandboxes' directory: %w", err)
	}
	if err := r.useTempMountDir(); err != nil {
		return nil, err
	}
	r.disk = newDiskMeter(r.measureDisk)
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

// useTempMountDir sets the directory where containerd's client mounts images temporarily, to read files in them. The
// directory is in RunDir so that a later daemon finds mounts that were left when this one was killed. It first removes
// the mounts that an earlier daemon left.
func (r *Runtime) useTempMountDir() error {
	run, err := filepath.EvalSymlinks(r.RunDir) // the kernel lists mounts without symbolic links
	if err != nil {
		return fmt.Errorf("find the run directory: %w", err)
	}
	dir := filepath.Join(run, "mount")
	if err := removeTree(dir); err != nil { // not fatal, because sandboxes can run regardless
		r.Log.Warn("could not remove the temporary mounts of an earlier server", "err", err)
	}
	if err := mount.SetTempMountLocation(dir); err != nil {
		return fmt.Errorf("create the directory for temporary mounts: %w", err)
	}
	return nil
}

// Close releases the Runtime's resources in this process. Sandboxes keep running.
func (r *Runtime) Close() { r.syslog.close() }

// ResolveImage implements sandbox.Runtime. It makes the image's disk if there is none, which may take a while: an earlier
// version may have imported the image, or the disk was damaged.
func (r *Runtime) ResolveImage(ctx context.Context, name string) (digest string, err error) {
	image, err := r.Image(ctx, name)
	if err == nil && r.Settings.UsesDisks() {
		_, err = r.Disks.BuildImage(ctx, image, nil)
	}
	if err != nil {
		return "", err
	}
	return image.Target().Digest.String(), nil
}

// SetHostname implements sandbox.Runtime. Kata's own driver cannot do it.
func (r *Runtime) SetHostname(ctx context.Context, id, hostname string) error {
	return r.VMs.SetHostname(ctx, id, hostname)
}

// Start implements sandbox.Runtime.
func (r *Runtime) Start(ctx context.Context, id string, t sandbox.Template, hostname string) (sandbox.Origin, error) {
	image, err := r.Image(ctx, t.Image)
	if err == nil {
		err = r.start(ctx, id, t, hostname, image)
	}
	switch {
	case err != nil:
		return sandbox.Origin{}, err
	case !r.Settings.UsesDisks():
		return sandbox.Origin{From: sandbox.Cold, Why: "Kata's own driver has no templates"}, nil
	}
	why := r.VMs.Cold(id)
	t.Image = image.Name() // the full name; clients may use a shorter one
	r.templates.started(t, why != "")
	if why != "" {
		return sandbox.Origin{From: sandbox.Cold, Why: why}, nil
	}
	return sandbox.Origin{From: sandbox.FromTemplate}, nil
}

func (r *Runtime) start(ctx context.Context, id string, t sandbox.Template, hostname string, image containerd.Image) error {
	if err := r.syslog.ensure(); err != nil {
		return err
	}
	// Create the directory before anything else, so that a later daemon can find the sandbox by it.
	if err := os.MkdirAll(r.dir(id), 0o700); err != nil {
		return fmt.Errorf("create the sandbox's directory: %w", err)
	}
	ctx = ctrd.InNamespace(ctx)
	root := r.snapshotRoot
	if r.Settings.UsesDisks() {
		root = r.diskRoot
	}
	opts, err := root(ctx, id, t, hostname, image)
	if err != nil {
		return err
	}
	container, err := r.Client.NewContainer(ctx, id, append(opts,
		containerd.WithImage(image),
		containerd.WithRuntime(r.Shim, &runtimeoptions.Options{TypeUrl: kataOptions, ConfigPath: r.kataConfig}),
		containerd.WithContainerLabels(map[string]string{sandboxLabel: id}),
	)...)
	if err != nil {
		return fmt.Errorf("create the container: %w", err)
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

// diskRoot makes the disks of a sandbox and begins to start its microVM. The hypervisor service connects the disks, and the
// guest's agent makes the root of the container of them. containerd sees a container without a root file system.
func (r *Runtime) diskRoot(ctx context.Context, id string, t sandbox.Template, hostname string, image containerd.Image) ([]containerd.NewContainerOpts, error) {
	vm, err := r.prepareVM(ctx, id, t, hostname, image)
	if err == nil {
		err = r.VMs.Start(ctx, vm)
	}
	if err != nil {
		return nil, err
	}
	return []containerd.NewContainerOpts{containerd.WithSpec(vm.Container)}, nil
}

// prepareVM makes the disks of a microVM, and returns its description.
func (r *Runtime) prepareVM(ctx context.Context, id string, t sandbox.Template, hostname string, image containerd.Image) (hypervisor.Spec, error) {
	var chain digest.Digest
	create := func() (err error) {
		chain, err = r.Disks.BuildImage(ctx, image, nil) // ResolveImage has made it
		if err == nil {
			err = r.Disks.Create(id, chain, t.DiskMiB)
		}
		return err
	}
	err := create()
	if errdefs.IsNotFound(err) { // an import has just replaced the image
		err = create()
	}
	if err != nil {
		return hypervisor.Spec{}, fmt.Errorf("create the sandbox's disks: %w", err)
	}
	spec, err := oci.GenerateSpec(ctx, r.Client, &containers.Container{ID: id, Image: image.Name()}, slices.Concat(
		[]oci.SpecOpts{oci.WithRootFSPath(r.Disks.Accounts(id))}, // where containerd looks for the image's users
		r.spec(id, t, hostname, image),
		[]oci.SpecOpts{oci.WithRootFSPath("rootfs"), oci.WithAnnotations(map[string]string{rootAnnotation: rootFromDisks})})...)
	if err != nil {
		return hypervisor.Spec{}, fmt.Errorf("create the container's spec: %w", err)
	}
	imageDisk, upper, ok := r.Disks.Find(id)
	if !ok {
		return hypervisor.Spec{}, errors.New("the sandbox's disks were removed")
	}
	return hypervisor.Spec{
		ID: id, VCPUs: t.CPUs, MemoryMiB: t.MemoryMiB, Image: chain.Encoded(), Container: spec,
		Disks: hypervisor.Disks{Image: imageDisk, Upper: upper},
	}, nil
}

// snapshotRoot makes a snapshot of the image, which Kata's own driver shares with the guest.
func (r *Runtime) snapshotRoot(ctx context.Context, id string, t sandbox.Template, hostname string, image containerd.Image) ([]containerd.NewContainerOpts, error) {
	// Usually unpacked by its import; but not if the server used disks then.
	if err := image.Unpack(ctx, ctrd.Snapshotter); err != nil {
		return nil, fmt.Errorf("unpack the image: %w", err)
	}
	return []containerd.NewContainerOpts{
		containerd.WithSnapshotter(ctrd.Snapshotter),
		containerd.WithNewSnapshot(id, image),
		containerd.WithNewSpec(r.spec(id, t, hostname, image)...),
	}, nil
}

// Remove implements sandbox.Runtime. It works for every state that a failed start or a crash can leave.
func (r *Runtime) Remove(ctx context.Context, id string) error {
	defer r.markRemoving(id)()
	ctx = ctrd.InNamespace(ctx)
	var errs []error
	check := func(action string, err error) {
		if err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("%s: %w", action, err))
		}
	}
	limited, cancel := context.WithTimeout(ctx, containerdTimeout)
	check("connect to containerd", ctrd.WaitServing(limited, r.Client))
	cancel()
	container, err := r.Client.LoadContainer(ctx, id)
	check("find the container", err)
	if err == nil {
		check("delete the task", r.removeTask(ctx, container))
	}
	killErr := r.killVM(ctx, id)
	check("kill the microVM", killErr)
	if killErr == nil {
		check("remove the sandbox's disks", r.Disks.Remove(id))
		check("delete what the sandbox has written", r.deleteLayer(ctx, id))
	}
	if err == nil {
		check("delete the container", container.Delete(ctx, containerd.WithSnapshotCleanup))
	}
	// There may be a snapshot without a container, if NewContainer was interrupted.
	check("remove the snapshot", r.Client.SnapshotService(ctrd.Snapshotter).Remove(ctx, id))
	if killErr == nil {
		check("remove Kata's files, mounts and cgroups", removeLeftovers(ctx, id))
	}
	check("remove the shim's socket", removeIfExists(shimSocket(r.Containerd.Address, id)))
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	// containerd leaves the directories of a task whose shim could not clean up.
	for _, dir := range r.Containerd.TaskDirs(id) {
		check("remove the task's directory", removeTree(dir))
	}
	if len(errs) == 0 { // remove this last, because a later daemon finds the sandbox by it
		check("remove the sandbox's directory", os.RemoveAll(r.dir(id)))
	}
	return errors.Join(errs...)
}

// deleteLayer deletes what a sandbox has written, directly in its writable layer. containerd needs free disk space to remove
// a snapshot, and deletes its files only later. If there are so many files that their deletion takes longer than
// deleteTimeout, deleteLayer leaves the rest to containerd.
func (r *Runtime) deleteLayer(ctx context.Context, id string) error {
	limited, cancel := context.WithTimeout(ctx, deleteTimeout)
	defer cancel()
	mounts, err := r.Client.SnapshotService(ctrd.Snapshotter).Mounts(ctx, id)
	if err != nil {
		return err
	}
	for _, mount := range mounts {
		for _, option := range mount.Options {
			if layer, ok := strings.CutPrefix(option, "upperdir="); ok {
				err := disk.DeleteTree(limited, layer)
				if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
					r.Log.Info("deleting the files of a sandbox takes long; containerd deletes the rest", "sandbox", id)
				} else if err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// killVM kills all processes of sandbox id, whether the hypervisor service or Kata's shim started them.
func (r *Runtime) killVM(ctx context.Context, id string) error {
	return errors.Join(r.VMs.Remove(ctx, id), killProcesses(ctx, id, append([]string{r.Shim}, r.Settings.Programs...)))
}

// removeTask deletes the sandbox's task through its shim. If the shim or the guest does not respond in time, it kills
// the microVM, which ends the task.
func (r *Runtime) removeTask(ctx context.Context, container containerd.Container) error {
	task, err := container.Task(ctx, nil)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find the task: %w", err)
	}
	limited, cancel := context.WithTimeout(ctx, killTimeout)
	_, err = task.Delete(limited, containerd.WithProcessKill)
	cancel()
	if err == nil || errdefs.IsNotFound(err) {
		return nil
	}
	r.Log.Warn("the shim did not end its task; killing the microVM", "sandbox", container.ID(), "err", err)
	if err := r.killVM(ctx, container.ID()); err != nil {
		return err
	}
	// When the shim is dead, containerd allows the task to be deleted.
	limited, cancel = context.WithTimeout(ctx, taskDeleteTimeout)
	defer cancel()
	return poll(limited, 50*time.Millisecond, func() bool {
		_, err := task.Delete(limited, containerd.WithProcessKill)
		return err == nil || errdefs.IsNotFound(err)
	})
}

// List implements sandbox.Runtime. It finds sandboxes by their containers, snapshots, disks, directories and VMs, because
// a start or a crash may leave any of these.
func (r *Runtime) List(ctx context.Context) ([]sandbox.Instance, error) {
	ctx = ctrd.InNamespace(ctx)
	alive := map[string]bool{}
	containers, err := r.Client.Containers(ctx, fmt.Sprintf("labels.%q", sandboxLabel))
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(maxStatusCalls)
	for _, c := range containers {
		g.Go(func() error {
			isAlive, err := r.isAlive(ctx, c.ID(), stateTimeout, func(ctx context.Context) (containerd.ProcessStatus, error) {
				return taskStatus(ctx, c)
			})
			mu.Lock()
			defer mu.Unlock()
			alive[c.ID()] = isAlive
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	addDead := func(id string) {
		if _, known := alive[id]; !known {
			alive[id] = false
		}
	}
	err = r.Client.SnapshotService(ctrd.Snapshotter).Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if sandbox.IsID(info.Name) {
			addDead(info.Name)
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
			addDead(d.Name())
		}
	}
	disks, err := r.Disks.IDs()
	if err != nil {
		return nil, err
	}
	for _, id := range slices.Concat(r.VMs.IDs(), disks) {
		addDead(id)
	}
	var found []sandbox.Instance
	for id, ok := range alive {
		found = append(found, sandbox.Instance{ID: id, Alive: ok})
	}
	return found, nil
}

// taskStatus returns the status of the task of container c as the shim reports it. It returns Unknown if the shim does
// not respond in time.
func taskStatus(ctx context.Context, c containerd.Container) (containerd.ProcessStatus, error) {
	task, err := c.Task(ctx, nil)
	if err != nil {
		return "", err
	}
	status, err := task.Status(ctx)
	return status.Status, err
}

// isAlive reports whether sandbox id is alive. A shim that does not respond may be busy, so isAlive calls getStatus
// until timeout. It treats the sandbox as alive unless containerd or the shim reports that it has ended. If ctx ends
// first, isAlive returns the cause of ctx.
func (r *Runtime) isAlive(ctx context.Context, id string, timeout time.Duration, getStatus func(context.Context) (containerd.ProcessStatus, error)) (alive bool, err error) {
	limited, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var status containerd.ProcessStatus
	pollErr := poll(limited, 100*time.Millisecond, func() bool {
		status, err = getStatus(limited)
		return errdefs.IsNotFound(err) || err == nil && status != containerd.Unknown
	})
	switch {
	case ctx.Err() != nil:
		return false, context.Cause(ctx)
	case pollErr != nil:
		r.Log.Warn("the state of a sandbox is unknown, because its shim does not respond; treating it as alive", "sandbox", id, "err", err)
		return true, nil
	}
	return err == nil && status != containerd.Stopped, nil
}

// Wait implements sandbox.Runtime. It keeps waiting when containerd is restarted.
func (r *Runtime) Wait(ctx context.Context, id string) (string, error) {
	ctx = ctrd.InNamespace(ctx)
	defer r.watchConsole(ctx, id)()
	for {
		status, err := r.wait(ctx, id)
		switch {
		case err == nil:
			return r.endReason(id, fmt.Sprintf("its microVM ended unexpectedly (exit status %d)", status)), nil
		case errdefs.IsNotFound(err):
			return r.endReason(id, "its microVM ended unexpectedly"), nil
		case ctx.Err() != nil:
			return "", context.Cause(ctx)
		}
		// The shim died, or containerd is being restarted. The next call of wait shows which.
		r.Log.Debug("could not watch the microVM; trying again", "sandbox", id, "err", err)
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

// dir returns msbd's directory for sandbox id. It holds the FIFOs of portal connections and the console log.
func (r *Runtime) dir(id string) string { return filepath.Join(r.RunDir, "sandbox", id) }

// shimSocket returns the path of the socket of sandbox id's shim. It computes the path as containerd's shim package
// does. That package does not remove the socket when the shim stops.
func shimSocket(containerdAddress, id string) string {
	sum := sha256.Sum256([]byte(filepath.Join(containerdAddress, ctrd.Namespace, id)))
	return fmt.Sprintf("/run/containerd/s/%x", sum)
}

// markRemoving records that sandbox id is being removed, until done is called. Meanwhile, the end of its microVM is
// expected.
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

// Version returns the version that the shim reports.
func (r *Runtime) Version(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, r.Shim, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", r.Shim, err)
	}
	m := versionRE.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("ask %s for its version: unexpected output %q", r.Shim, out)
	}
	return string(m[1]), nil
}

// poll calls f at once and then at every interval until it returns true. If ctx ends first, poll returns the cause of
// ctx.
func poll(ctx context.Context, interval time.Duration, f func() bool) error {
	tick := time.NewTicker(interval)
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
