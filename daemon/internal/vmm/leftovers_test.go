package vmm

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Whatever is still mounted below a sandbox's directory, its files must survive.
func TestRemoveSparesWhatIsMounted(t *testing.T) {
	cfg := newConfig(t)
	id := newVM(t, cfg)
	s := &Service{cfg: cfg}
	volume := t.TempDir()
	precious := filepath.Join(volume, "precious")
	writeFile(t, precious, "data")

	point := filepath.Join(sharedRoot, id, "mounts", "c", "rootfs")
	deeper := filepath.Join(point, "tmp")
	for _, dir := range []string{point, filepath.Join(volume, "tmp")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		unix.Mount(volume, point, "", unix.MS_BIND, ""),
		unix.Mount("tmpfs", deeper, "tmpfs", 0, ""),
		unix.Mount(volume, point, "", unix.MS_BIND, ""), // stacked
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join("/run/vc/sbs", id, "persist.json"), "{}")
	cgroup := makeCgroup(t, id)

	if err := s.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(precious); err != nil || string(text) != "data" {
		t.Errorf("the volume's file holds %q, %v", text, err)
	}
	if h := (&host{Service: s}); !h.gone(t, id) || !missing(filepath.Join("/run/vc/sbs", id)) || !missing(cgroup) {
		t.Error("Remove left something")
	}
}

func TestRemoveRefusesFiles(t *testing.T) {
	cfg := newConfig(t)
	id := newVM(t, cfg)
	file := filepath.Join(sharedRoot, id, "shared", "file")
	writeFile(t, file, "data")
	err := (&Service{cfg: cfg}).Remove(t.Context(), id)
	wantError(t, err, file)
	if err := os.Remove(file); err != nil {
		t.Error(err)
	}
}

// makeCgroup makes what a killed shim leaves.
func makeCgroup(t *testing.T, id string) string {
	t.Helper()
	root := "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
		root = filepath.Join(root, "pids") // cgroup v1
	}
	cgroup := filepath.Join(root, "msb-test", "kata_"+id)
	if err := os.MkdirAll(cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(cgroup); _ = os.Remove(filepath.Dir(cgroup)) })
	return cgroup
}
