package microvm

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/containerd/containers"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/msbd/msbd/daemon/internal/process"
	"github.com/msbd/msbd/daemon/internal/sandbox"
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
func startRuntime(t *testing.T) (*Runtime, service) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "microvm") // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	bin, err := filepath.Abs("../../../bin")
	if err != nil {
		t.Fatal(err)
	}
	private := &Containerd{
		Binary: filepath.Join(bin, "containerd"), Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state"),
		Address: filepath.Join(dir, "containerd.sock"), Log: slog.New(slog.DiscardHandler),
	}
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
		Client: client, Containerd: private, Shim: filepath.Join(bin, "containerd-shim-kata-v2"),
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
			if _, err := r.Client.SnapshotService(Snapshotter).Prepare(ctx, id, ""); err != nil {
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
			filepath.Join(sharedRoot, id), filepath.Join(vmRoot, id), shimSocket(r.Containerd.Address, id)} {
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
		if err := os.MkdirAll(filepath.Join(sharedRoot, id, "mounts"), 0o700); err != nil {
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
