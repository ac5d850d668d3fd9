package kata

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/containers"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
	"github.com/msbd/msbd/daemon/internal/backend/containerd/containerdtest"
	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
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

// startRuntime makes a Runtime on a containerd of its own.
func startRuntime(t *testing.T) (*Runtime, service, *ctrd.Private) {
	t.Helper()
	private, client := containerdtest.Start(t)
	dir := filepath.Dir(private.Address)
	vms := service{map[string]bool{}}
	r, err := New(Config{
		Client: client, Containerd: private.Paths, Shim: filepath.Join(filepath.Dir(private.Binary), "containerd-shim-kata-v2"),
		Settings: Settings{HypervisorSocket: filepath.Join(dir, "hypervisor.sock")}, RunDir: filepath.Join(dir, "run"), VMs: vms,
		Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r, vms, private
}

// Whatever a crash leaves of a sandbox, alone or all together, is listed by a later daemon, and removed.
func TestRemoveAfterCrash(t *testing.T) {
	r, vms, _ := startRuntime(t)
	ctx := ctrd.InNamespace(t.Context())
	leave := map[string]func(t *testing.T, id string){
		"its directory": func(t *testing.T, id string) { writeFile(t, filepath.Join(r.dir(id), "console.log"), "x") },
		"its snapshot": func(t *testing.T, id string) {
			// Without a lease, which a start has, containerd may collect it at any moment.
			root := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "test"})
			if _, err := r.Client.SnapshotService(ctrd.Snapshotter).Prepare(ctx, id, "", root); err != nil {
				t.Fatal(err)
			}
		},
		"its container": func(t *testing.T, id string) {
			spec, err := typeurl.MarshalAny(&specs.Spec{})
			if err == nil {
				_, err = r.Client.ContainerService().Create(ctx, containers.Container{
					ID: id, Labels: map[string]string{sandboxLabel: id}, Spec: spec,
					Runtime: containers.RuntimeInfo{Name: r.Shim}, Snapshotter: ctrd.Snapshotter, SnapshotKey: id,
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
		for _, path := range append(r.Containerd.TaskDirs(id), r.dir(id),
			filepath.Join(hypervisor.SharedRoot, id), filepath.Join(vmRoot, id), shimSocket(r.Containerd.Address, id)) {
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
		for _, dir := range append(r.Containerd.TaskDirs(id), filepath.Join(vmRoot, id)) {
			writeFile(t, filepath.Join(dir, "file"), "x")
		}
		writeFile(t, shimSocket(r.Containerd.Address, id), "x")
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
	r, _, containerd := startRuntime(t)
	id := newID(t)
	if _, err := r.Client.SnapshotService(ctrd.Snapshotter).Prepare(ctrd.InNamespace(t.Context()), id, ""); err != nil {
		t.Fatal(err)
	}
	p, err := containerd.Process()
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
