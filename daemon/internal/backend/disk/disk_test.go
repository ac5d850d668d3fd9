package disk_test

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/msbd/msbd/daemon/internal/backend/disk"
)

func newStore(t *testing.T) (store *disk.Store, dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "disks")
	return openStore(t, dir), dir
}

func openStore(t *testing.T, dir string) *disk.Store {
	t.Helper()
	store, err := disk.New(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return store
}

// writeImage makes a disk of an image that has the given content instead of a file system, and returns its chain id.
func writeImage(t testing.TB, dir, content string) digest.Digest {
	t.Helper()
	chain := digest.FromString(content)
	image := filepath.Join(dir, "images", chain.Encoded())
	if err := errors.Join(os.Mkdir(image, 0o700), os.WriteFile(filepath.Join(image, "image.erofs"), []byte(content), 0o600)); err != nil {
		t.Fatal(err)
	}
	return chain
}

// tree returns the paths below dir.
func tree(t *testing.T, dir string) (paths []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if path != dir {
			paths = append(paths, strings.TrimPrefix(path, dir+"/"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

// mount mounts a disk on a loop device, and returns the mount point.
func mount(t *testing.T, kind, path, options string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount a disk")
	}
	dir := t.TempDir()
	command(t, "mount", "-t", kind, "-o", "loop,"+options, path, dir)
	t.Cleanup(func() {
		if err := exec.Command("umount", dir).Run(); err != nil {
			t.Errorf("umount %s: %v", dir, err)
		}
	})
	return dir
}

func TestSandboxDisks(t *testing.T) {
	store, dir := newStore(t)
	chain := writeImage(t, dir, "image")
	if _, _, ok := store.Find("sb-1"); ok {
		t.Error("found the disks of an unknown sandbox")
	}
	if _, err := store.Usage("sb-1"); !errdefs.IsNotFound(err) {
		t.Errorf("usage of an unknown sandbox: %v", err)
	}
	for _, id := range []string{"sb-1", "sb-2"} {
		if err := store.Create(id, chain, 4096); err != nil {
			t.Fatal(err)
		}
	}
	image, upper, ok := store.Find("sb-1")
	if want := filepath.Join(dir, "sandboxes/sb-1"); !ok || image != want+"/image.erofs" || upper != want+"/upper.ext4" {
		t.Errorf("found %q, %q, %t", image, upper, ok)
	}
	if info, err := os.Stat(upper); err != nil || info.Size() != 4096<<20 || info.Mode() != 0o600 {
		t.Errorf("upper disk: %v, %v", info, err)
	}
	if info, err := os.Stat(filepath.Dir(upper)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v, %v", info, err)
	}
	if info, err := os.Stat(image); err != nil || info.Sys().(*syscall.Stat_t).Nlink != 3 {
		t.Errorf("the disk of the image is not shared: %v, %v", info, err)
	}
	usage, err := store.Usage("sb-1")
	if err != nil || usage == 0 || usage > 1<<20 {
		t.Errorf("an empty disk uses %d bytes: %v", usage, err)
	}
	if ids, err := store.IDs(); err != nil || !slices.Equal(ids, []string{"sb-1", "sb-2"}) {
		t.Errorf("ids: %v, %v", ids, err)
	}
	if err := store.Create("sb-1", chain, 64); !errdefs.IsAlreadyExists(err) {
		t.Errorf("create again: %v", err)
	}
	if _, upper, _ := store.Find("sb-1"); fileSize(t, upper) != 4096<<20 {
		t.Error("the second creation has replaced the disk")
	}
	for range 2 { // the second call finds nothing
		if err := store.Remove("sb-1"); err != nil {
			t.Fatal(err)
		}
	}
	if ids, err := store.IDs(); err != nil || !slices.Equal(ids, []string{"sb-2"}) {
		t.Errorf("ids: %v, %v", ids, err)
	}
}

func fileSize(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

func TestCreateRefuses(t *testing.T) {
	store, dir := newStore(t)
	chain := writeImage(t, dir, "image")
	before := tree(t, dir)
	for name, test := range map[string]struct {
		id    string
		chain digest.Digest
		size  int
		class func(error) bool
	}{
		"no id":          {"", chain, 64, errdefs.IsInvalidArgument},
		"other tree":     {"../x", chain, 64, errdefs.IsInvalidArgument},
		"parent":         {"..", chain, 64, errdefs.IsInvalidArgument},
		"line":           {"a\n", chain, 64, errdefs.IsInvalidArgument},
		"incomplete":     {"a.new", chain, 64, errdefs.IsInvalidArgument},
		"obsolete":       {"a.old", chain, 64, errdefs.IsInvalidArgument},
		"long":           {strings.Repeat("a", 41), chain, 64, errdefs.IsInvalidArgument},
		"small":          {"a", chain, 63, errdefs.IsInvalidArgument},
		"large":          {"a", chain, 1<<24 + 1, errdefs.IsInvalidArgument},
		"not a chain id": {"a", "sha256:../x", 64, errdefs.IsInvalidArgument},
		"unknown image":  {"a", digest.FromString("other"), 64, errdefs.IsNotFound},
	} {
		if err := store.Create(test.id, test.chain, test.size); !test.class(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := store.Remove("../images"); err != nil {
		t.Error(err)
	}
	if after := tree(t, dir); !slices.Equal(after, before) {
		t.Errorf("before and after:\n%v\n%v", before, after)
	}
	if err := store.Create(strings.Repeat("a", 40), chain, 64); err != nil {
		t.Error(err)
	}
}

// Without a program, the error says which Debian package has it, and nothing is left.
func TestCreateWithoutProgram(t *testing.T) {
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if _, err := exec.LookPath(filepath.Join(dir, "mkfs.erofs")); err == nil {
			t.Skipf("mkfs.erofs is in %s", dir)
		}
	}
	t.Setenv("PATH", t.TempDir())
	if path, err := disk.MkfsErofs.Find(); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "erofs-utils") {
		t.Errorf("found %q: %v", path, err)
	}
	if path, err := disk.MkfsExt4.Find(); err != nil || !filepath.IsAbs(path) { // in /usr/sbin or /sbin, which many users do not have in PATH
		t.Errorf("found %q: %v", path, err)
	}
}

// What a guest writes is counted, and the disk can hold it.
func TestUsage(t *testing.T) {
	store, dir := newStore(t)
	if err := store.Create("sb-1", writeImage(t, dir, "image"), 64); err != nil {
		t.Fatal(err)
	}
	before, err := store.Usage("sb-1")
	if err != nil {
		t.Fatal(err)
	}
	_, upper, _ := store.Find("sb-1")
	command(t, "e2fsck", "-fn", upper)
	guest := mount(t, "ext4", upper, "noinit_itable")
	if info, err := os.Stat(guest); err != nil || info.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("root directory: %v, %v", info, err)
	}
	const written = 10 << 20
	file, err := os.Create(filepath.Join(guest, "file"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = file.Write([]byte(strings.Repeat("x", written)))
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		t.Fatal(err)
	}
	if after, err := store.Usage("sb-1"); err != nil || after < before+written || after > before+2*written {
		t.Errorf("usage: %d before, %d after writing %d bytes: %v", before, after, written, err)
	}
}

// Each disk of one size is a complete file system, and independent of the others.
func TestEqualDisks(t *testing.T) {
	store, dir := newStore(t)
	chain := writeImage(t, dir, "image")
	var sum string
	for i, size := range []int{64, 65, 64, 4096, 64} {
		id := fmt.Sprint("sb-", i)
		if err := store.Create(id, chain, size); err != nil {
			t.Fatal(err)
		}
		_, upper, _ := store.Find(id)
		if fileSize(t, upper) != int64(size)<<20 {
			t.Errorf("disk %d has the wrong size", i)
		}
		command(t, "e2fsck", "-fn", upper)
		if size != 64 {
			continue
		}
		if again := strings.Fields(command(t, "sha256sum", upper))[0]; sum == "" {
			sum = again
		} else if again != sum {
			t.Errorf("disk %d differs from the first of its size", i)
		}
	}
	// A guest that writes changes only its own disk.
	_, first, _ := store.Find("sb-0")
	if err := os.WriteFile(filepath.Join(mount(t, "ext4", first, "sync"), "file"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, last, _ := store.Find("sb-4")
	if again := strings.Fields(command(t, "sha256sum", last))[0]; again != sum {
		t.Error("a write to one disk has changed another one")
	}
}

// A disk of an image that is removed stays until the last sandbox that uses it is removed.
func TestPruneKeepsDisksInUse(t *testing.T) {
	store, dir := newStore(t)
	used, unused, kept := writeImage(t, dir, "used"), writeImage(t, dir, "unused"), writeImage(t, dir, "kept")
	if err := store.Create("sb-1", used, 64); err != nil {
		t.Fatal(err)
	}
	if err := store.PruneImages([]digest.Digest{kept, digest.FromString("no disk")}); err != nil {
		t.Fatal(err)
	}
	for chain, want := range map[digest.Digest]bool{used: false, unused: false, kept: true} {
		_, err := os.Stat(filepath.Join(dir, "images", chain.Encoded(), "image.erofs"))
		if want != (err == nil) || !want && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("image %s: %v", chain, err)
		}
	}
	if left := tree(t, filepath.Join(dir, "images")); len(left) != 2 {
		t.Errorf("left in images: %v", left)
	}
	image, _, ok := store.Find("sb-1")
	if data, err := os.ReadFile(image); !ok || err != nil || string(data) != "used" {
		t.Errorf("the sandbox has %q: %v", data, err)
	}
	// The image may come back while a sandbox has its old disk.
	if again := writeImage(t, dir, "used"); again != used {
		t.Fatal(again)
	}
	if err := store.Create("sb-2", used, 64); err != nil {
		t.Fatal(err)
	}
}

// New removes what a crash has left, and nothing else.
func TestNewRemovesIncomplete(t *testing.T) {
	store, dir := newStore(t)
	chain := writeImage(t, dir, "image")
	if err := store.Create("sb-1", chain, 64); err != nil {
		t.Fatal(err)
	}
	before := tree(t, dir)
	for _, path := range []string{
		"images/" + digest.FromString("a").Encoded() + ".new/root/etc", "images/" + digest.FromString("b").Encoded() + ".old/etc", "sandboxes/sb-2.new/x",
	} {
		if err := os.MkdirAll(filepath.Join(dir, path), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if ids, err := store.IDs(); err != nil || !slices.Equal(ids, []string{"sb-1"}) {
		t.Errorf("ids: %v, %v", ids, err)
	}
	openStore(t, dir)
	if after := tree(t, dir); !slices.Equal(after, before) {
		t.Errorf("before and after:\n%v\n%v", before, after)
	}
}

func BenchmarkCreate(b *testing.B) {
	dir := b.TempDir()
	store, err := disk.New(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	chain := writeImage(b, dir, "image")
	for b.Loop() {
		if err := errors.Join(store.Create("sb-1", chain, 4096), store.Remove("sb-1")); err != nil {
			b.Fatal(err)
		}
	}
}
