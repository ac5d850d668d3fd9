package image_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/content"
	"github.com/containerd/containerd/leases"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
	"github.com/msbd/msbd/daemon/internal/backend/containerd/containerdtest"
	"github.com/msbd/msbd/daemon/internal/backend/image"
	"github.com/msbd/msbd/daemon/internal/backend/image/archive"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

func TestImportListResolve(t *testing.T) {
	client := startContainerd(t)
	store := image.NewStore(client, image.Unpack)
	ctx := t.Context()

	path := writeArchive(t, "docker.io/microsandbox/python:latest", map[string]string{"etc/motd": "one"})
	imported, err := store.Import(ctx, path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(imported) != 1 || imported[0].Name != "microsandbox/python" || imported[0].Size == 0 || imported[0].Created.IsZero() {
		t.Fatalf("imported %+v", imported)
	}
	other := writeArchive(t, "ghcr.io/acme/tool:2", map[string]string{"etc/motd": "tool"})
	if _, err := store.Import(ctx, other, nil); err != nil {
		t.Fatal(err)
	}

	list, err := store.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"ghcr.io/acme/tool:2", "microsandbox/python"}, names(list)); diff != "" {
		t.Error(diff)
	}
	for _, spelling := range []string{"microsandbox/python", "microsandbox/python:latest", "docker.io/microsandbox/python"} {
		img, err := store.Resolve(ctx, spelling)
		if err != nil {
			t.Fatalf("%s: %v", spelling, err)
		}
		if got := readFile(t, client, img, "etc/motd"); got != "one" {
			t.Errorf("%s has %q", spelling, got)
		}
	}

	content := contents(t, client)
	// An import replaces the image with the same name, and the content of the old one is removed.
	path = writeArchive(t, "docker.io/microsandbox/python:latest", map[string]string{"etc/motd": "two"})
	if _, err := store.Import(ctx, path, nil); err != nil {
		t.Fatal(err)
	}
	img, err := store.Resolve(ctx, "microsandbox/python")
	if err != nil {
		t.Fatal(err)
	}
	if got := readFile(t, client, img, "etc/motd"); got != "two" {
		t.Errorf("after the second import the image has %q", got)
	}
	if after := contents(t, client); len(after) != len(content) {
		t.Errorf("content before and after an image was replaced:\n%v\n%v", content, after)
	}
}

// contents returns the digests of all content and the names of all snapshots.
func contents(t *testing.T, client *containerd.Client) (found []string) {
	t.Helper()
	ctx := ctrd.InNamespace(t.Context())
	err := client.ContentStore().Walk(ctx, func(info content.Info) error {
		found = append(found, info.Digest.String())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	err = client.SnapshotService(ctrd.Snapshotter).Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		found = append(found, info.Name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestResolveUnknown(t *testing.T) {
	client := startContainerd(t)
	store := image.NewStore(client, image.Unpack)
	ctx := t.Context()

	_, err := store.Resolve(ctx, "microsandbox/ruby")
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "an administrator can add one with 'msb image import") {
		t.Errorf("without images: %v", err)
	}
	if _, err := store.Import(ctx, writeArchive(t, "docker.io/microsandbox/node:latest", map[string]string{"x": ""}), nil); err != nil {
		t.Fatal(err)
	}
	_, err = store.Resolve(ctx, "microsandbox/ruby")
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "available images: microsandbox/node") {
		t.Errorf("with an image: %v", err)
	}
	for _, name := range []string{"", "a/B", "a b", "x@sha256:zz"} {
		if _, err := store.Resolve(ctx, name); !errdefs.IsInvalidArgument(err) {
			t.Errorf("name %q: %v", name, err)
		}
	}
}

func TestRemove(t *testing.T) {
	client := startContainerd(t)
	store := image.NewStore(client, image.Unpack)
	ctx := t.Context()
	for _, name := range []string{"docker.io/microsandbox/python:latest", "ghcr.io/acme/tool:2"} {
		if _, err := store.Import(ctx, writeArchive(t, name, map[string]string{"etc/motd": name}), nil); err != nil {
			t.Fatal(err)
		}
	}
	both := contents(t, client)
	var many []sandbox.Record
	sandboxOf := func(name, image string, state sandbox.State) {
		many = append(many, sandbox.Record{Name: sandbox.Name{Namespace: "team", Name: name}, Config: sandbox.Config{Template: sandbox.Template{Image: image}}, State: state})
	}
	sandboxOf("a", "microsandbox/python", sandbox.Starting)
	sandboxOf("b", "docker.io/microsandbox/python:latest", sandbox.Stopping)
	one, two := many[:1], many[:2]
	for i := range 9 {
		sandboxOf(strings.Repeat("c", i+1), "microsandbox/python:latest", sandbox.Running)
	}
	for name, test := range map[string]struct {
		image     string
		sandboxes []sandbox.Record
		class     func(error) bool
		want      string // part of the error
	}{
		"unknown":           {"microsandbox/ruby", nil, errdefs.IsNotFound, "no image microsandbox/ruby; available images: ghcr.io/acme/tool:2, microsandbox/python"},
		"other tag":         {"ghcr.io/acme/tool", nil, errdefs.IsNotFound, "no image ghcr.io/acme/tool;"},
		"not a name":        {"a b", nil, errdefs.IsInvalidArgument, `"a b"`},
		"one sandbox":       {"microsandbox/python", one, errdefs.IsFailedPrecondition, "image microsandbox/python is used by the sandbox team/a; stop"},
		"other spelling":    {"docker.io/microsandbox/python", two, errdefs.IsFailedPrecondition, "used by the sandboxes team/a, team/b; stop"},
		"too many to print": {"microsandbox/python", many, errdefs.IsFailedPrecondition, ", team/cccccccc and 1 more; stop"},
	} {
		if err := store.Remove(ctx, test.image, test.sandboxes); !test.class(err) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want %q in it", name, err, test.want)
		}
	}
	if after := contents(t, client); !slices.Equal(after, both) {
		t.Errorf("content before and after removals that were refused:\n%v\n%v", both, after)
	}

	// Neither a failed sandbox nor one with another image uses it.
	many = nil
	sandboxOf("a", "ghcr.io/acme/tool:2", sandbox.Failed)
	sandboxOf("b", "microsandbox/python", sandbox.Running)
	if err := store.Remove(ctx, "ghcr.io/acme/tool:2", many); err != nil {
		t.Fatal(err)
	}
	list, err := store.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"microsandbox/python"}, names(list)); diff != "" {
		t.Error(diff)
	}
	img, err := store.Resolve(ctx, "microsandbox/python")
	if err != nil {
		t.Fatal(err)
	}
	if got := readFile(t, client, img, "etc/motd"); got != "docker.io/microsandbox/python:latest" {
		t.Errorf("the other image has %q", got)
	}
	if err := store.Remove(ctx, "microsandbox/python", nil); err != nil {
		t.Fatal(err)
	}
	if left := contents(t, client); len(left) != 0 {
		t.Errorf("content that was not collected: %v", left)
	}
}

func TestImportRejects(t *testing.T) {
	client := startContainerd(t)
	store := image.NewStore(client, image.Unpack)

	dir := t.TempDir()
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	// Each archive has different content, so that content that one leaves behind cannot complete the next.
	complete := func() []byte {
		files := map[string]string{"f": strings.Repeat(rand.Text(), 1000)}
		return readAll(t, writeArchive(t, "docker.io/a/b:latest", files))
	}
	edited := func(edit func(map[string][]byte)) string {
		return file(rand.Text(), editArchive(t, complete(), edit))
	}
	index := func(change func(*ocispec.Descriptor)) string { return edited(rewriteIndex(t, change)) }
	rebuilt := func(change func(*ocispec.Manifest, *ocispec.Image)) string { return edited(rewriteImage(t, change)) }
	half := func(data []byte) []byte { return data[:len(data)/2] }

	for name, test := range map[string]struct {
		path  string
		class func(error) bool
		want  string // part of the error
	}{
		"relative":   {"images/python.tar", errdefs.IsInvalidArgument, "absolute"},
		"missing":    {filepath.Join(dir, "no"), errdefs.IsNotFound, "no such file"},
		"in a file":  {filepath.Join(fifo, "x"), func(err error) bool { return errors.Is(err, syscall.ENOTDIR) }, "could not read it: not a directory"},
		"directory":  {dir, errdefs.IsInvalidArgument, "regular file"},
		"fifo":       {fifo, errdefs.IsInvalidArgument, "regular file"},
		"device":     {"/dev/zero", errdefs.IsInvalidArgument, "regular file"},
		"empty":      {file("empty", nil), errdefs.IsInvalidArgument, "OCI"},
		"garbage":    {file("garbage", bytes.Repeat([]byte("garbage "), 1000)), errdefs.IsInvalidArgument, "OCI"},
		"truncated":  {file("truncated", half(complete())), errdefs.IsInvalidArgument, "OCI"},
		"other tar":  {edited(func(f map[string][]byte) { clear(f); f["hello"] = []byte("x") }), errdefs.IsInvalidArgument, "OCI"},
		"no blob":    {edited(removeLargestBlob), errdefs.IsInvalidArgument, "OCI"},
		"no name":    {index(func(d *ocispec.Descriptor) { d.Annotations = nil }), errdefs.IsInvalidArgument, "no image name"},
		"tag alone":  {index(func(d *ocispec.Descriptor) { delete(d.Annotations, "io.containerd.image.name") }), errdefs.IsInvalidArgument, "no image name"},
		"bad name":   {index(func(d *ocispec.Descriptor) { d.Annotations["io.containerd.image.name"] = "A B" }), errdefs.IsInvalidArgument, "A B"},
		"other arch": {rebuilt(func(_ *ocispec.Manifest, c *ocispec.Image) { c.Architecture = "s390x" }), errdefs.IsInvalidArgument, "s390x"},
		"no layers": {rebuilt(func(m *ocispec.Manifest, c *ocispec.Image) {
			m.Layers, c.RootFS.DiffIDs = m.Layers[:0], c.RootFS.DiffIDs[:0]
		}), errdefs.IsInvalidArgument, "no layers"},
		"layers differ": {rebuilt(func(_ *ocispec.Manifest, c *ocispec.Image) { c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, "sha256:00") }), errdefs.IsInvalidArgument, "number of layers is 1"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := store.Import(t.Context(), test.path, nil)
			if !test.class(err) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q in it", err, test.want)
			}
		})
	}
	if list, err := store.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("images after rejected imports: %v, %v", list, err)
	}
	checkNoContent(t, client)
}

// If the second image of an archive is invalid, the first is not imported either, and no content remains.
func TestFailedImportLeavesNothing(t *testing.T) {
	client := startContainerd(t)
	store := image.NewStore(client, image.Unpack)

	first := readAll(t, writeArchive(t, "docker.io/a/first:latest", map[string]string{"f": "1"}))
	both := editArchive(t, first, func(files map[string][]byte) {
		var index ocispec.Index
		decode(t, files["index.json"], &index)
		missing := index.Manifests[0]
		missing.Digest = digest.FromString("not there")
		missing.Annotations = map[string]string{"io.containerd.image.name": "docker.io/a/second:latest"}
		index.Manifests = append(index.Manifests, missing)
		files["index.json"] = encode(t, index)
	})
	path := filepath.Join(t.TempDir(), "both.tar")
	if err := os.WriteFile(path, both, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Import(t.Context(), path, nil); !errdefs.IsInvalidArgument(err) {
		t.Fatal(err)
	}
	if list, err := store.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("images: %v, %v", list, err)
	}
	checkNoContent(t, client)
}

// An import reports how far it has come: while it reads the archive, and while each image is prepared.
func TestImportProgress(t *testing.T) {
	client := startContainerd(t)
	store := image.NewStore(client, func(ctx context.Context, img containerd.Image, progress func(done, total int64)) error {
		progress(1, 2)
		return image.Unpack(ctx, img, progress)
	})
	path := writeArchive(t, "docker.io/a/first:latest", map[string]string{"f": strings.Repeat(rand.Text(), 100_000)})
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	var done int64
	var last sandbox.ImportProgress
	_, err = store.Import(t.Context(), path, func(p sandbox.ImportProgress) {
		if p.Phase == sandbox.ImportReading {
			if p.Image != "" || p.Done < done || p.Done > p.Total || p.Total != info.Size() {
				t.Errorf("%+v after %d of %d", p, done, info.Size())
			}
			done = p.Done
		}
		last = p
	})
	if err != nil {
		t.Fatal(err)
	}
	if done < info.Size()/2 {
		t.Errorf("only %d bytes of %d were reported", done, info.Size())
	}
	if want := (sandbox.ImportProgress{Phase: sandbox.ImportUnpacking, Image: "a/first", Done: 1, Total: 2}); last != want {
		t.Errorf("%+v, want %+v", last, want)
	}
}

// If the second image of an archive cannot be prepared, the first gets no name either, and its content is removed.
func TestFailedPrepare(t *testing.T) {
	client := startContainerd(t)
	var prepared []string
	broken := errors.New("broken")
	store := image.NewStore(client, func(_ context.Context, img containerd.Image, _ func(done, total int64)) error {
		if prepared = append(prepared, img.Name()); len(prepared) == 2 {
			return broken
		}
		return nil
	})
	kept := []string{"not called"}
	store.OnChange = func(_ context.Context, images []containerd.Image) { kept = imageNames(images) }
	both := editArchive(t, readAll(t, writeArchive(t, "docker.io/a/first:latest", map[string]string{"f": "1"})), func(files map[string][]byte) {
		var index ocispec.Index
		decode(t, files["index.json"], &index)
		second := index.Manifests[0]
		second.Annotations = map[string]string{"io.containerd.image.name": "docker.io/a/second:latest"}
		index.Manifests = append(index.Manifests, second)
		files["index.json"] = encode(t, index)
	})
	path := filepath.Join(t.TempDir(), "both.tar")
	if err := os.WriteFile(path, both, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Import(t.Context(), path, nil); !errors.Is(err, broken) || !strings.Contains(err.Error(), "prepare image docker.io/a/second:latest") {
		t.Errorf("error %v", err)
	}
	if len(prepared) != 2 || len(kept) != 0 {
		t.Errorf("prepared %v, kept %v", prepared, kept)
	}
	if list, err := store.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("images: %v, %v", list, err)
	}
	checkNoContent(t, client)
}

// After each change, OnChange gets all images, and those that other imports are preparing.
func TestOnChange(t *testing.T) {
	client := startContainerd(t)
	ctx := t.Context()
	preparing, resume := make(chan struct{}), make(chan struct{})
	store := image.NewStore(client, func(_ context.Context, img containerd.Image, _ func(done, total int64)) error {
		if img.Name() == "docker.io/a/slow:latest" {
			close(preparing)
			<-resume
		}
		return nil
	})
	var mu sync.Mutex
	var kept []string
	store.OnChange = func(ctx context.Context, images []containerd.Image) {
		mu.Lock()
		defer mu.Unlock()
		kept = imageNames(images)
		for _, img := range images {
			if _, err := img.RootFS(ctrd.InNamespace(ctx)); err != nil {
				t.Errorf("layers of %s: %v", img.Name(), err)
			}
		}
	}
	check := func(after string, want ...string) {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		if !slices.Equal(kept, want) {
			t.Errorf("after %s: images %v, want %v", after, kept, want)
		}
	}
	slow := make(chan error, 1)
	slowPath := writeArchive(t, "docker.io/a/slow:latest", map[string]string{"f": "slow"})
	go func() {
		_, err := store.Import(ctx, slowPath, nil)
		slow <- err
	}()
	<-preparing
	if _, err := store.Import(ctx, writeArchive(t, "docker.io/a/fast:latest", map[string]string{"f": "fast"}), nil); err != nil {
		t.Fatal(err)
	}
	check("an import during another one", "docker.io/a/fast:latest", "docker.io/a/slow:latest")
	close(resume)
	if err := <-slow; err != nil {
		t.Fatal(err)
	}
	check("both imports", "docker.io/a/fast:latest", "docker.io/a/slow:latest")
	if err := store.Remove(ctx, "a/fast", nil); err != nil {
		t.Fatal(err)
	}
	check("a removal", "docker.io/a/slow:latest")
	kept = nil
	if err := store.Changed(ctx); err != nil {
		t.Fatal(err)
	}
	check("Changed", "docker.io/a/slow:latest")
}

// imageNames returns the names of images, sorted.
func imageNames(images []containerd.Image) []string {
	names := []string{}
	for _, img := range images {
		names = append(names, img.Name())
	}
	slices.Sort(names)
	return names
}

func readAll(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// checkNoContent runs containerd's garbage collector and checks that it leaves neither content nor snapshots.
func checkNoContent(t *testing.T, client *containerd.Client) {
	t.Helper()
	ctx := ctrd.InNamespace(t.Context())
	manager := client.LeasesService()
	list, err := manager.List(ctx)
	if err != nil || len(list) != 0 {
		t.Errorf("leases: %v, %v", list, err)
	}
	lease, err := manager.Create(ctx, leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	// A synchronous delete runs the garbage collector.
	if err := manager.Delete(ctx, lease, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
	err = client.ContentStore().Walk(ctx, func(info content.Info) error {
		t.Errorf("content %s was not collected", info.Digest)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	err = client.SnapshotService(ctrd.Snapshotter).Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		t.Errorf("snapshot %s was not collected", info.Name)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// startContainerd starts a containerd for this test and stops it when the test ends.
func startContainerd(t *testing.T) *containerd.Client {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, because containerd mounts overlays")
	}
	_, client := containerdtest.Start(t)
	return client
}

func names(list []sandbox.Image) []string {
	var names []string
	for _, img := range list {
		names = append(names, img.Name)
	}
	return names
}

// readFile returns the content of a file of an image as a sandbox would see it.
func readFile(t *testing.T, client *containerd.Client, img containerd.Image, name string) string {
	t.Helper()
	// Without a lease, the garbage collection after an import would remove the snapshot.
	ctx, release, err := client.WithLease(ctrd.InNamespace(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	defer release(context.WithoutCancel(ctx))
	diffIDs, err := img.RootFS(ctx)
	if err != nil {
		t.Fatal(err)
	}
	key := "read-" + digest.FromString(name).Encoded()
	mounts, err := client.SnapshotService(ctrd.Snapshotter).View(ctx, key, identity.ChainID(diffIDs).String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.SnapshotService(ctrd.Snapshotter).Remove(ctx, key)
	var text []byte
	err = mount.WithTempMount(ctx, mounts, func(root string) (err error) {
		text, err = os.ReadFile(filepath.Join(root, name))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// writeArchive writes an archive of an image with these files, and returns the archive's path.
func writeArchive(t *testing.T, name string, files map[string]string) string {
	t.Helper()
	content := make(map[string][]byte, len(files))
	for path, text := range files {
		content[path] = []byte(text)
	}
	path := filepath.Join(t.TempDir(), "image.tar")
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	_, err = archive.Write(out, bytes.NewReader(writeTar(t, content)), archive.Image{Name: name, Architecture: runtime.GOARCH, Created: time.Unix(1, 0)})
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func writeTar(t *testing.T, files map[string][]byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(files[name]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// editArchive returns an archive after calling edit with its files, by name.
func editArchive(t *testing.T, data []byte, edit func(map[string][]byte)) []byte {
	t.Helper()
	files := map[string][]byte{}
	r := tar.NewReader(bytes.NewReader(data))
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	edit(files)
	return writeTar(t, files)
}

// rewriteIndex returns an edit that changes the descriptor of the archive's image.
func rewriteIndex(t *testing.T, change func(*ocispec.Descriptor)) func(map[string][]byte) {
	return func(files map[string][]byte) {
		var index ocispec.Index
		decode(t, files["index.json"], &index)
		change(&index.Manifests[0])
		files["index.json"] = encode(t, index)
	}
}

// rewriteImage returns an edit that changes the manifest and the config, and updates all digests.
func rewriteImage(t *testing.T, change func(*ocispec.Manifest, *ocispec.Image)) func(map[string][]byte) {
	return func(files map[string][]byte) {
		var index ocispec.Index
		var manifest ocispec.Manifest
		var config ocispec.Image
		decode(t, files["index.json"], &index)
		decode(t, files["blobs/sha256/"+index.Manifests[0].Digest.Encoded()], &manifest)
		decode(t, files["blobs/sha256/"+manifest.Config.Digest.Encoded()], &config)
		put := func(content any, d *ocispec.Descriptor) {
			blob := encode(t, content)
			d.Digest, d.Size = digest.FromBytes(blob), int64(len(blob))
			files["blobs/sha256/"+d.Digest.Encoded()] = blob
		}
		change(&manifest, &config)
		put(config, &manifest.Config)
		put(manifest, &index.Manifests[0])
		files["index.json"] = encode(t, index)
	}
}

// removeLargestBlob is an edit that removes the layer.
func removeLargestBlob(files map[string][]byte) {
	largest := ""
	for name := range files {
		if strings.HasPrefix(name, "blobs/") && len(files[name]) > len(files[largest]) {
			largest = name
		}
	}
	delete(files, largest)
}

func decode(t *testing.T, data []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatal(err)
	}
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
