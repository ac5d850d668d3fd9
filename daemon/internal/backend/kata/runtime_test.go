package kata

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/containers"
	"github.com/containerd/containerd/errdefs"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// service plays msbd's hypervisor service.
type service struct{ vms map[string]bool }

func (s service) IDs() (ids []string) {
	for id := range s.vms {
		ids = append(ids, id)
	}
	return ids
}

func (s service) Remove(_ context.Context, id string) error {
	delete(s.vms, id)
	return nil
}

// testDir is a directory for a containerd, with a short name: t.TempDir is too long for sockets.
func testDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "microvm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// testContainerd is one that is not started yet.
func testContainerd(t *testing.T, dir string) *Containerd {
	t.Helper()
	binary, err := filepath.Abs("../../../../bin/containerd")
	if err != nil {
		t.Fatal(err)
	}
	return &Containerd{
		Binary: binary, Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state"),
		Address: filepath.Join(dir, "containerd.sock"), Log: slog.New(slog.DiscardHandler),
	}
}

// startRuntime makes a Runtime on a containerd of its own.
func startRuntime(t *testing.T) (*Runtime, service) {
	t.Helper()
	dir := testDir(t)
	private := testContainerd(t, dir)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	if err := private.Start(ctx); err != nil {
		t.Fatalf("%v: run make build", err)
	}
	t.Cleanup(func() {
		if err := private.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	client, err := Dial(private.Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	vms := service{map[string]bool{}}
	r, err := New(Config{
		Client: client, Containerd: private, Shim: filepath.Join(filepath.Dir(private.Binary), "containerd-shim-kata-v2"),
		Kata: Kata{HypervisorSocket: filepath.Join(dir, "hypervisor.sock")}, RunDir: filepath.Join(dir, "run"), VMs: vms,
		Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r, vms
}

// Whatever a crash leaves of a sandbox, alone or all together, is listed by a later daemon, and removed.
func TestRemoveAfterCrash(t *testing.T) {
	r, vms := startRuntime(t)
	ctx := scoped(t.Context())
	task := func(dir, id string) string {
		return filepath.Join(dir, "io.containerd.runtime.v2.task", Namespace, id)
	}
	leave := map[string]func(t *testing.T, id string){
		"its directory": func(t *testing.T, id string) { writeFile(t, filepath.Join(r.dir(id), "console.log"), "x") },
		"its snapshot": func(t *testing.T, id string) {
			// Without a lease, which a start has, containerd may collect it at any moment.
			root := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "test"})
			if _, err := r.Client.SnapshotService(Snapshotter).Prepare(ctx, id, "", root); err != nil {
				t.Fatal(err)
			}
		},
		"its container": func(t *testing.T, id string) {
			spec, err := typeurl.MarshalAny(&specs.Spec{})
			if err == nil {
				_, err = r.Client.ContainerService().Create(ctx, containers.Container{
					ID: id, Labels: map[string]string{sandboxLabel: id}, Spec: spec,
					Runtime: containers.RuntimeInfo{Name: r.Shim}, Snapshotter: Snapshotter, SnapshotKey: id,
				})
			}
			if err != nil {
				t.Fatal(err)
			}
		},
		"its VM": func(_ *testing.T, id string) { vms.vms[id] = true },
	}
	lists := func(t *testing.T, id string) bool {
		t.Helper()
		found, err := r.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(found, func(i sandbox.Instance) bool { return i.ID == id && !i.Alive })
	}
	check := func(t *testing.T, id string) {
		t.Helper()
		if !lists(t, id) {
			t.Error("List does not know of it")
		}
		for range 2 {
			if err := r.Remove(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		if lists(t, id) {
			t.Error("List knows of it after its removal")
		}
		for _, path := range []string{r.dir(id), task(r.Containerd.State, id), task(r.Containerd.Root, id),
			filepath.Join(hypervisor.SharedRoot, id), filepath.Join(vmRoot, id), shimSocket(r.Containerd.Address, id)} {
			if !missing(path) {
				t.Errorf("%s is left", path)
			}
		}
	}
	for what, leave := range leave {
		t.Run(what, func(t *testing.T) {
			id := newID(t)
			leave(t, id)
			check(t, id)
		})
	}
	t.Run("all of it", func(t *testing.T) {
		id := newID(t)
		for _, leave := range leave {
			leave(t, id)
		}
		for _, file := range []string{task(r.Containerd.State, id) + "/config.json", task(r.Containerd.Root, id) + "/x",
			filepath.Join(vmRoot, id, "pid"), shimSocket(r.Containerd.Address, id)} {
			writeFile(t, file, "x")
		}
		if err := os.MkdirAll(filepath.Join(hypervisor.SharedRoot, id, "mounts"), 0o700); err != nil {
			t.Fatal(err)
		}
		shim, qemu := play(t, "", "-id", id), play(t, "", "-name", "sandbox-"+id)
		check(t, id)
		if !dead(t, shim) || !dead(t, qemu) {
			t.Error("its processes live on")
		}
	})
}

// A containerd that died is started again, and removals wait for it.
func TestRemoveWhileContainerdIsAway(t *testing.T) {
	r, _ := startRuntime(t)
	id := newID(t)
	if _, err := r.Client.SnapshotService(Snapshotter).Prepare(scoped(t.Context()), id, ""); err != nil {
		t.Fatal(err)
	}
	p, err := process.Open(int(r.Containerd.pid.Load()))
	if err != nil || p == nil {
		t.Fatal(p, err)
	}
	defer p.Close()
	if err := p.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if found, err := r.List(t.Context()); err != nil || len(found) != 0 {
		t.Errorf("List = %v, %v", found, err)
	}
}

// A daemon adopts the containerd that runs, also if the one before was killed as soon as it had started it.
func TestContainerdIsAdopted(t *testing.T) {
	first := testContainerd(t, testDir(t))
	pid, err := first.launch()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(context.Background(), pid) })
	eventually(t, "it is found", func() bool { found, err := first.running(); return found == pid && err == nil })
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	second := testContainerd(t, filepath.Dir(first.Address))
	if err := second.Start(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is watched", func() bool { return second.pid.Load() != 0 })
	if adopted := int(second.pid.Load()); adopted != pid {
		t.Errorf("process %d is not %d", adopted, pid)
	}
	if err := second.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if found, err := first.running(); found != 0 || err != nil {
		t.Errorf("process %d is left, %v", found, err)
	}
}

// A containerd that does not get ready is ended: it would hold its root.
func TestContainerdThatIsNotReadyIsEnded(t *testing.T) {
	c := testContainerd(t, testDir(t))
	why := errors.New("no time")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if err := c.Start(ctx); !errors.Is(err, why) {
		t.Errorf("Start: %v", err)
	}
	if found, err := c.running(); found != 0 || err != nil {
		t.Errorf("process %d is left, %v", found, err)
	}
}

// Only what a shim, or containerd, says of a sandbox's end counts.
func TestAlive(t *testing.T) {
	type answer struct {
		status containerd.ProcessStatus
		err    error
	}
	gone, busy := answer{err: errdefs.ErrNotFound}, answer{status: containerd.Unknown}
	away, running, stopped := answer{err: errdefs.ErrUnavailable}, answer{status: containerd.Running}, answer{status: containerd.Stopped}
	for name, tt := range map[string]struct {
		answers []answer // the last one goes on
		want    bool
	}{
		"running":       {[]answer{running}, true},
		"stopped":       {[]answer{stopped}, false},
		"gone":          {[]answer{gone}, false},
		"busy":          {[]answer{busy, busy, running}, true},
		"busy ending":   {[]answer{busy, away, stopped}, false},
		"busy, gone":    {[]answer{busy, gone}, false},
		"busy for long": {[]answer{busy}, true},
		"away for long": {[]answer{away}, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			r, _ := testRuntime(t)
			lives, err := r.alive(t.Context(), "sb-1", stateLimit, func(context.Context) (containerd.ProcessStatus, error) {
				a := tt.answers[0]
				tt.answers = tt.answers[min(1, len(tt.answers)-1):]
				return a.status, a.err
			})
			if lives != tt.want || err != nil {
				t.Errorf("%s: %t, %v", name, lives, err)
			}
		})
	}
}

// What was mounted to look into an image when a server was killed is unmounted by the next one.
func TestTempMountsOfEarlierServer(t *testing.T) {
	r, _ := testRuntime(t)
	dir, link := r.RunDir, filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	r.RunDir = link
	if err := r.keepTempMounts(); err != nil {
		t.Fatal(err)
	}
	var left string
	err := mount.WithTempMount(t.Context(), []mount.Mount{{Type: "tmpfs", Source: "tmpfs"}}, func(root string) error {
		left = root
		return r.keepTempMounts()
	})
	if err != nil && left == "" {
		t.Fatal(err)
	}
	if filepath.Dir(left) != filepath.Join(dir, "mount") {
		t.Errorf("it was mounted at %s", left)
	}
	if !missing(left) {
		t.Errorf("%s is left", left)
	}
}
