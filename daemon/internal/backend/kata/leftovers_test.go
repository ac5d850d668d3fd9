package kata

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
)

func TestRemoveLeftovers(t *testing.T) {
	id, other := newID(t), newID(t)
	files := []string{
		"/run/vc/sbs/" + id + "/persist.json",
		"/run/vc/sbs/" + id + "/" + id + "/persist.json",
		"/run/vc/vm/" + id + "/pid",
		"/run/kata/" + id + "/shim-monitor.sock", // of the Rust runtime
	}
	for _, file := range files {
		writeFile(t, file, "x")
	}
	kept := "/run/vc/sbs/" + other + "/persist.json"
	writeFile(t, kept, "x")
	t.Cleanup(func() { os.RemoveAll(filepath.Dir(kept)) })
	point := filepath.Join(hypervisor.SharedRoot, id, "mounts", "file")
	writeFile(t, point, "") // the mount point of a file
	shared := filepath.Join(hypervisor.SharedRoot, id)
	cgroups := []string{newCgroup(t, "msb-test/kata_"+id+"/below/it"), newCgroup(t, "kata_overhead/"+id)}

	for range 2 {
		if err := removeLeftovers(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range append(cgroups, shared, filepath.Dir(cgroups[0]), filepath.Dir(filepath.Dir(cgroups[0])),
		"/run/vc/sbs/"+id, "/run/vc/vm/"+id, "/run/kata/"+id) {
		if !missing(path) {
			t.Errorf("%s was not removed", path)
		}
	}
	if missing(kept) {
		t.Error("a file of another sandbox was removed")
	}
}

// Removing the directories of a sandbox does not remove files in file systems that are still mounted below them.
func TestRemoveSparesWhatIsMounted(t *testing.T) {
	id := newID(t)
	volume := t.TempDir()
	precious := filepath.Join(volume, "precious")
	writeFile(t, precious, "data")
	writeFile(t, filepath.Join(volume, "tmp", "x"), "")

	point := filepath.Join(hypervisor.SharedRoot, id, "mounts", "c", "rootfs")
	mounted := filepath.Join("/run/vc/vm", id, "root")
	deeper := filepath.Join(point, "tmp")
	for _, dir := range []string{point, mounted} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		unix.Mount(volume, point, "", unix.MS_BIND, ""),
		unix.Mount("tmpfs", deeper, "tmpfs", 0, ""),
		unix.Mount(volume, point, "", unix.MS_BIND, ""), // stacked
		unix.Mount(volume, mounted, "", unix.MS_BIND, ""),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := removeLeftovers(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(precious); err != nil || string(text) != "data" {
		t.Errorf("the volume's file has %q, %v", text, err)
	}
	if !missing(filepath.Join(hypervisor.SharedRoot, id)) || !missing(filepath.Dir(mounted)) {
		t.Error("the directories were not removed")
	}
}

// removeLeftovers does not remove a file with content, which may be somebody's data.
func TestRemoveRefusesFiles(t *testing.T) {
	id := newID(t)
	file := filepath.Join(hypervisor.SharedRoot, id, "shared", "file")
	writeFile(t, file, "data")
	wantError(t, removeLeftovers(t.Context(), id), file)
	if err := os.RemoveAll(filepath.Join(hypervisor.SharedRoot, id)); err != nil {
		t.Error(err)
	}
}
