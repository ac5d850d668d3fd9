package kata

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/backend/disk"
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

// A sandbox may have nested its directories deeper than msbd has descriptors. The deletion does not need one for each.
func TestDeleteDeepTree(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layer")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	const few = 500
	parent, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	for range 2 * few {
		if err == nil {
			err = unix.Mkdirat(parent, "d", 0o755)
		}
		if err == nil {
			var child int
			child, err = unix.Openat(parent, "d", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			unix.Close(parent)
			parent = child
		}
	}
	unix.Close(parent)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: few, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	for range 2 { // a removal may be repeated
		if err := disk.DeleteTree(t.Context(), dir); err != nil || !missing(dir) {
			t.Errorf("DeleteTree: %v, gone: %t", err, missing(dir))
		}
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := disk.DeleteTree(canceled, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("DeleteTree with a canceled context: %v, want Canceled", err)
	}
}
