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
	"github.com/msbd/msbd/daemon/internal/backend/disk"
	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// fakeVMs is a fake hypervisor service.
type fakeVMs struct {
	VMs // for the methods that these tests do not need
	vms map[string]bool
}

func (s fakeVMs) IDs() (ids []string) {
	for id := range s.vms {
		ids = append(ids, id)
	}
	return ids
}

func (s fakeVMs) Remove(_ context.Context, id string) error {
	delete(s.vms, id)
	return nil
}

// startRuntime returns a Runtime with its own containerd.
func startRuntime(t *testing.T) (*Runtime, fakeVMs, *ctrd.Private) {
	t.Helper()
	private, client := containerdtest.Start(t)
	dir := filepath.Dir(private.Address)
	vms := fakeVMs{vms: map[string]bool{}}
	disks, err := disk.New(filepath.Join(dir, "disks"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	r, err := New(Config{
		Client: client, Containerd: private.Paths, Shim: filepath.Join(filepath.Dir(private.Binary), "containerd-shim-kata-v2"),
		Settings: Settings{HypervisorSocket: filepath.Join(dir, "hypervisor.sock"), Programs: testPrograms}, RunDir: filepath.Join(dir, "run"), VMs: vms,
		Disks: disks,
		Log:   slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r, vms, private
}

// List finds and Remove removes everything that a crash can leave of a sandbox, each thing alone and all together.
func TestRemoveAfterCrash(t *testing.T) {
	r, vms, _ := startRuntime(t)
	ctx := ctrd.InNamespace(t.Context())
	disks := func(id string) string { return filepath.Join(filepath.Dir(r.RunDir), "disks", "sandboxes", id) }
	leftovers := map[string]func(t *testing.T, id string){
		"directory": func(t *testing.T, id string) { writeFile(t, filepath.Join(r.dir(id), "console.log"), "x") },
		"snapshot": func(t *testing.T, id string) {
			// A start has a lease. Without one, containerd's garbage collector could remove the snapshot at any moment.
			root := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "test"})
			if _, err := r.Client.SnapshotService(ctrd.Snapshotter).Prepare(ctx, id, "", root); err != nil {
				t.Fatal(err)
			}
		},
		"container": func(t *testing.T, id string) {
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
		"VM":    func(_ *testing.T, id string) { vms.vms[id] = true },
		"disks": func(t *testing.T, id string) { writeFile(t, filepath.Join(disks(id), "upper.ext4"), "x") },
	}
	listsDead := func(t *testing.T, id string) bool {
		t.Helper()
		found, err := r.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(found, func(i sandbox.Instance) bool { return i.ID == id && !i.Alive })
	}
	check := func(t *testing.T, id string) {
		t.Helper()
		if !listsDead(t, id) {
			t.Error("List does not return the sandbox as dead")
		}
		for range 2 {
			if err := r.Remove(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		if listsDead(t, id) {
			t.Error("List still returns the sandbox after Remove")
		}
		for _, path := range append(r.Containerd.TaskDirs(id), r.dir(id), disks(id),
			filepath.Join(hypervisor.SharedRoot, id), filepath.Join(vmRoot, id), shimSocket(r.Containerd.Address, id)) {
			if !missing(path) {
				t.Errorf("%s was not removed", path)
			}
		}
	}
	for name, create := range leftovers {
		t.Run(name, func(t *testing.T) {
			id := newID(t)
			create(t, id)
			check(t, id)
		})
	}
	t.Run("everything", func(t *testing.T) {
		id := newID(t)
		for _, create := range leftovers {
			create(t, id)
		}
		for _, dir := range append(r.Containerd.TaskDirs(id), filepath.Join(vmRoot, id)) {
			writeFile(t, filepath.Join(dir, "file"), "x")
		}
		writeFile(t, shimSocket(r.Containerd.Address, id), "x")
		if err := os.MkdirAll(filepath.Join(hypervisor.SharedRoot, id, "mounts"), 0o700); err != nil {
			t.Fatal(err)
		}
		shim, qemu := startFake(t, "", "-id", id), startFake(t, "", "-name", "sandbox-"+id)
		check(t, id)
		if !isDead(t, shim) || !isDead(t, qemu) {
			t.Error("processes of the sandbox still run")
		}
	})
}

// Remove waits for a containerd that has died and is being restarted.
func TestRemoveWhileContainerdRestarts(t *testing.T) {
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

// A sandbox counts as alive unless its shim or containerd reports that it has ended.
func TestIsAlive(t *testing.T) {
	type result struct {
		status containerd.ProcessStatus
		err    error
	}
	notFound, unknown := result{err: errdefs.ErrNotFound}, result{status: containerd.Unknown}
	unavailable, running, stopped := result{err: errdefs.ErrUnavailable}, result{status: containerd.Running}, result{status: containerd.Stopped}
	for name, tt := range map[string]struct {
		results []result // of successive calls; the last one is repeated
		want    bool
	}{
		"running":               {[]result{running}, true},
		"stopped":               {[]result{stopped}, false},
		"not found":             {[]result{notFound}, false},
		"unknown, then running": {[]result{unknown, unknown, running}, true},
		"unknown, then stopped": {[]result{unknown, unavailable, stopped}, false},
		"unknown, then gone":    {[]result{unknown, notFound}, false},
		"always unknown":        {[]result{unknown}, true},
		"always unavailable":    {[]result{unavailable}, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			r, _ := newTestRuntime(t)
			alive, err := r.isAlive(t.Context(), "sb-1", stateTimeout, func(context.Context) (containerd.ProcessStatus, error) {
				a := tt.results[0]
				tt.results = tt.results[min(1, len(tt.results)-1):]
				return a.status, a.err
			})
			if alive != tt.want || err != nil {
				t.Errorf("%s: %t, %v", name, alive, err)
			}
		})
	}
}

// A server unmounts the temporary mounts of images that an earlier server left when it was killed.
func TestTempMountsOfEarlierServer(t *testing.T) {
	r, _ := newTestRuntime(t)
	dir, link := r.RunDir, filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	r.RunDir = link
	if err := r.useTempMountDir(); err != nil {
		t.Fatal(err)
	}
	var mounted string
	err := mount.WithTempMount(t.Context(), []mount.Mount{{Type: "tmpfs", Source: "tmpfs"}}, func(root string) error {
		mounted = root
		return r.useTempMountDir()
	})
	if err != nil && mounted == "" {
		t.Fatal(err)
	}
	if filepath.Dir(mounted) != filepath.Join(dir, "mount") {
		t.Errorf("mounted at %s, want a directory in %s", mounted, filepath.Join(dir, "mount"))
	}
	if !missing(mounted) {
		t.Errorf("%s was not removed", mounted)
	}
}
