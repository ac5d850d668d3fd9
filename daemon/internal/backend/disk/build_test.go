package disk_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/content"
	"github.com/containerd/containerd/images"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
	"github.com/msbd/msbd/daemon/internal/backend/containerd/containerdtest"
	"github.com/msbd/msbd/daemon/internal/backend/disk"
)

// An entry is a file of a layer, and its content.
type entry struct {
	tar.Header
	content string
}

func file(name, content string) entry {
	return entry{tar.Header{Name: name, Mode: 0o644}, content}
}

func dir(name string) entry {
	return entry{tar.Header{Name: name + "/", Mode: 0o755, Typeflag: tar.TypeDir}, ""}
}

func link(name, target string) entry {
	return entry{tar.Header{Name: name, Linkname: target, Typeflag: tar.TypeSymlink}, ""}
}

func layer(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		e.Size = int64(len(e.content))
		if e.ModTime.IsZero() {
			e.ModTime = time.Unix(1_600_000_000, 0)
		}
		if e.ModTime.Nanosecond() != 0 || e.PAXRecords != nil {
			e.Format = tar.FormatPAX
		}
		err := w.WriteHeader(&e.Header)
		if err == nil {
			_, err = io.WriteString(w, e.content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// startContainerd starts a containerd for this test. Its content is not collected until the test ends.
func startContainerd(t *testing.T) (context.Context, *containerd.Client) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root, for the owners of files")
	}
	_, client := containerdtest.Start(t)
	ctx, _, err := client.WithLease(ctrd.InNamespace(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	return ctx, client
}

// newImage stores an image with these layers in client's containerd. change, which may be nil, changes its config.
func newImage(t *testing.T, ctx context.Context, client *containerd.Client, change func(*ocispec.Image), layers ...[]byte) containerd.Image {
	t.Helper()
	put := func(kind string, data []byte) ocispec.Descriptor {
		desc := ocispec.Descriptor{MediaType: kind, Digest: digest.FromBytes(data), Size: int64(len(data))}
		if err := content.WriteBlob(ctx, client.ContentStore(), desc.Digest.String(), bytes.NewReader(data), desc); err != nil {
			t.Fatal(err)
		}
		return desc
	}
	putJSON := func(kind string, v any) ocispec.Descriptor {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return put(kind, data)
	}
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, RootFS: ocispec.RootFS{Type: "layers"}}
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for i, plain := range layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(plain))
		// Images in use have layers of each kind.
		kind := []string{ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd, ocispec.MediaTypeImageLayer}[i%3]
		manifest.Layers = append(manifest.Layers, put(kind, compress(t, kind, plain)))
	}
	if change != nil {
		change(&config)
	}
	manifest.Config = putJSON(ocispec.MediaTypeImageConfig, config)
	return containerd.NewImage(client, images.Image{Name: "docker.io/a/b:latest", Target: putJSON(ocispec.MediaTypeImageManifest, manifest)})
}

func compress(t *testing.T, kind string, plain []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	var w io.WriteCloser
	switch kind {
	case ocispec.MediaTypeImageLayerGzip:
		w = gzip.NewWriter(&buf)
	case ocispec.MediaTypeImageLayerZstd:
		encoder, err := zstd.NewWriter(&buf)
		if err != nil {
			t.Fatal(err)
		}
		w = encoder
	default:
		return plain
	}
	_, err := w.Write(plain)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// build builds the disk of an image and mounts it.
func build(t *testing.T, ctx context.Context, store *disk.Store, dir string, img containerd.Image) (root string) {
	t.Helper()
	chain, err := store.BuildImage(ctx, img, nil)
	if err != nil {
		t.Fatal(err)
	}
	if want, err := disk.ChainID(ctx, img); err != nil || chain != want {
		t.Errorf("the disk is called %s, want %s: %v", chain, want, err)
	}
	path := filepath.Join(dir, "images", chain.Encoded(), "image.erofs")
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if info, err := os.Stat(filepath.Dir(path)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	return mount(t, "erofs", path, "ro")
}

// A disk has the files of the layers, with all that an image can say about them.
func TestBuildImage(t *testing.T) {
	ctx, client := startContainerd(t)
	store, state := newStore(t)
	old, precise, future := time.Unix(0, 0), time.Unix(1_500_000_000, 123_456_789), time.Unix(4_000_000_000, 0)
	const capability = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	root := build(t, ctx, store, state, newImage(t, ctx, client, nil,
		layer(t,
			entry{tar.Header{Name: "old", Mode: 0o751, Typeflag: tar.TypeDir, ModTime: old}, ""},
			dir("etc"), file("etc/passwd", "root:x:0:0::/:/bin/sh\n"), file("etc/group", "root:x:0:\n"), file("etc/removed", "x"),
			dir("opaque"), file("opaque/lower", "x"), dir("opaque/dir"), file("opaque/dir/lower", "x"),
			dir("tree"), file("tree/lower", "x"),
			file("replaced", "lower"),
			file("large", strings.Repeat("0123456789", 1<<20)),
		),
		layer(t,
			dir("etc"), entry{tar.Header{Name: "etc/.wh.removed"}, ""},
			file("opaque/upper", "x"), entry{tar.Header{Name: "opaque/.wh..wh..opq"}, ""},
			entry{tar.Header{Name: ".wh.tree"}, ""},
			entry{tar.Header{Name: "replaced", Mode: 0o4755, Uid: 1000, Gid: 70_000, ModTime: precise}, "upper"},
			entry{tar.Header{Name: "hard", Linkname: "replaced", Typeflag: tar.TypeLink, Mode: 0o4755, Uid: 1000, Gid: 70_000, ModTime: precise}, ""},
		),
		layer(t,
			entry{tar.Header{Name: "attributes", Mode: 0o755, ModTime: future, PAXRecords: map[string]string{
				"SCHILY.xattr.user.note": "hello", "SCHILY.xattr.security.capability": capability,
			}}, "x"},
			entry{tar.Header{Name: "null", Mode: 0o666, Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, ""},
			entry{tar.Header{Name: "block", Mode: 0o600, Typeflag: tar.TypeBlock, Devmajor: 259, Devminor: 300}, ""},
			entry{tar.Header{Name: "fifo", Mode: 0o600, Typeflag: tar.TypeFifo}, ""},
			link("absolute", "/etc/passwd"), link("dangling", strings.Repeat("x", 300)),
		)))

	for name, want := range map[string]string{
		"": "absolute attributes block dangling etc fifo hard large null old opaque replaced", "etc": "group passwd", "opaque": "upper",
	} {
		entries, err := os.ReadDir(filepath.Join(root, name))
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		if got := strings.Join(names, " "); err != nil || got != want {
			t.Errorf("/%s has %q, want %q: %v", name, got, want, err)
		}
	}
	for name, want := range map[string]struct {
		mode     uint32
		uid, gid uint32
		rdev     uint64
		mtime    time.Time
	}{
		"old":        {mode: syscall.S_IFDIR | 0o751, mtime: old},
		"replaced":   {mode: syscall.S_IFREG | 0o4755, uid: 1000, gid: 70_000, mtime: precise},
		"hard":       {mode: syscall.S_IFREG | 0o4755, uid: 1000, gid: 70_000, mtime: precise},
		"attributes": {mode: syscall.S_IFREG | 0o755, mtime: future},
		"etc":        {mode: syscall.S_IFDIR | 0o755, mtime: time.Unix(1_600_000_000, 0)},
		"null":       {mode: syscall.S_IFCHR | 0o666, rdev: unix.Mkdev(1, 3), mtime: time.Unix(1_600_000_000, 0)},
		"block":      {mode: syscall.S_IFBLK | 0o600, rdev: unix.Mkdev(259, 300), mtime: time.Unix(1_600_000_000, 0)},
		"fifo":       {mode: syscall.S_IFIFO | 0o600, mtime: time.Unix(1_600_000_000, 0)},
	} {
		var got unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, name), &got); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if mtime := time.Unix(got.Mtim.Unix()); got.Mode != want.mode || got.Uid != want.uid || got.Gid != want.gid || got.Rdev != want.rdev || !mtime.Equal(want.mtime) {
			t.Errorf("%s: mode %o, owner %d:%d, device %#x, time %v; want %+v", name, got.Mode, got.Uid, got.Gid, got.Rdev, mtime, want)
		}
	}
	a, errA := os.Stat(filepath.Join(root, "replaced"))
	b, errB := os.Stat(filepath.Join(root, "hard"))
	if errA != nil || errB != nil || !os.SameFile(a, b) {
		t.Errorf("hard link: %v, %v", errA, errB)
	}
	for name, want := range map[string]string{"user.note": "hello", "security.capability": capability} {
		buf := make([]byte, 100)
		n, err := unix.Getxattr(filepath.Join(root, "attributes"), name, buf)
		if err != nil || string(buf[:n]) != want {
			t.Errorf("%s: %q, %v", name, buf[:max(n, 0)], err)
		}
	}
	for name, want := range map[string]string{"replaced": "upper", "hard": "upper", "large": strings.Repeat("0123456789", 1<<20)} {
		if got, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	if got, err := os.Readlink(filepath.Join(root, "absolute")); err != nil || got != "/etc/passwd" {
		t.Errorf("link to %q, %v", got, err)
	}
}

// Without an entry for its root, an image has the usual mode there, whatever the umask is.
func TestModeOfRoot(t *testing.T) {
	ctx, client := startContainerd(t)
	store, state := newStore(t)
	defer syscall.Umask(syscall.Umask(0o077))
	root := build(t, ctx, store, state, newImage(t, ctx, client, nil, layer(t, file("a", ""))))
	if info, err := os.Stat(root); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", info, err)
	}
}

func TestAccounts(t *testing.T) {
	ctx, client := startContainerd(t)
	store, state := newStore(t)
	type accounts struct{ passwd, group string }
	for name, test := range map[string]struct {
		layer []byte
		want  accounts
	}{
		"both":          {layer(t, dir("etc"), file("etc/passwd", "p"), file("etc/group", "g")), accounts{"p", "g"}},
		"none":          {layer(t, file("a", "")), accounts{}},
		"link inside":   {layer(t, dir("etc"), dir("usr"), file("usr/p", "p"), link("etc/passwd", "../usr/p")), accounts{"p", ""}},
		"link outside":  {layer(t, dir("etc"), link("etc/passwd", "/etc/passwd"), link("etc/group", "../../../../../../../../../../etc/group")), accounts{}},
		"etc outside":   {layer(t, link("etc", "/etc")), accounts{}},
		"not a file":    {layer(t, dir("etc"), dir("etc/passwd"), entry{tar.Header{Name: "etc/group", Typeflag: tar.TypeFifo}, ""}), accounts{}},
		"a device":      {layer(t, dir("etc"), entry{tar.Header{Name: "etc/passwd", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 5}, ""}), accounts{}},
		"too large":     {layer(t, dir("etc"), file("etc/passwd", strings.Repeat("p", 1<<20+1)), file("etc/group", "g")), accounts{"", "g"}},
		"just too long": {layer(t, dir("etc"), file("etc/passwd", strings.Repeat("p", 1<<20))), accounts{strings.Repeat("p", 1<<20), ""}},
	} {
		chain, err := store.BuildImage(ctx, newImage(t, ctx, client, nil, test.layer), nil)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		id := strings.ReplaceAll(name, " ", "-")
		if err := store.Create(id, chain, 64); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		root := store.Accounts(id)
		read := func(file string) string {
			path := filepath.Join(root, file)
			info, err := os.Lstat(path)
			if errors.Is(err, os.ErrNotExist) {
				return ""
			}
			if err != nil || info.Mode() != 0o600 {
				t.Errorf("%s: %v, %v", name, info, err)
			}
			data, err := os.ReadFile(path)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			return string(data)
		}
		if got := (accounts{read("etc/passwd"), read("etc/group")}); got != test.want {
			t.Errorf("%s: %.40q", name, got)
		}
		if _, err := os.Stat(filepath.Join(state, "images", chain.Encoded(), "root")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the tree was not removed: %v", name, err)
		}
	}
}

// A build that fails leaves nothing.
func TestBuildFails(t *testing.T) {
	ctx, client := startContainerd(t)
	store, state := newStore(t)
	good := layer(t, file("a", "x"), file("b", strings.Repeat("random", 1000)))
	rename := func(diffID digest.Digest) func(*ocispec.Image) {
		return func(config *ocispec.Image) { config.RootFS.DiffIDs[0] = diffID }
	}
	missing := newImage(t, ctx, client, nil, layer(t, file("missing", "x")))
	manifest, err := images.Manifest(ctx, client.ContentStore(), missing.Target(), missing.Platform())
	if err != nil {
		t.Fatal(err)
	}
	if err := client.ContentStore().Delete(ctx, manifest.Layers[0].Digest); err != nil {
		t.Fatal(err)
	}
	lost := pause(t, ctx, newImage(t, ctx, client, nil, layer(t, file("random", rand.Text()+strings.Repeat("x", 1<<20)))))
	lost.store.lost = true
	close(lost.store.resume)
	for name, test := range map[string]struct {
		img   containerd.Image
		class func(error) bool
		want  string
	}{
		"other digest":   {newImage(t, ctx, client, rename(digest.FromString("other")), good), errdefs.IsInvalidArgument, "its digest is " + digest.FromBytes(good).String()},
		"after its end":  {newImage(t, ctx, client, rename(digest.FromBytes(good)), append(slices.Clone(good), "more"...)), errdefs.IsInvalidArgument, "its digest is"},
		"too few layers": {newImage(t, ctx, client, func(c *ocispec.Image) { c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest.FromString("x")) }, good), errdefs.IsInvalidArgument, "number of layers is 1"},
		"not an archive": {newImage(t, ctx, client, nil, bytes.Repeat([]byte("garbage"), 1000)), func(err error) bool { return err != nil }, "layer 1 of 1"},
		"no content":     {missing, errdefs.IsNotFound, "layer 1 of 1"},
		"no containerd":  {lost, errdefs.IsUnavailable, "read it from containerd"},
	} {
		if _, err := store.BuildImage(ctx, test.img, nil); !test.class(err) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", name, err)
		}
		if left := tree(t, state); !slices.Equal(left, []string{"images", "sandboxes"}) {
			t.Errorf("%s: left: %v", name, left)
		}
	}
	// A file system that is full, while the layers are unpacked and while the disk is written.
	for size, want := range map[string]string{"size=1m": "no space left", "size=5m": "No space left"} {
		small := t.TempDir()
		command(t, "mount", "-t", "tmpfs", "-o", size, "tmpfs", small)
		t.Cleanup(func() { command(t, "umount", small) })
		store := openStore(t, small)
		img := newImage(t, ctx, client, nil, layer(t, file("large", strings.Repeat("x", 3<<20))))
		if _, err := store.BuildImage(ctx, img, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", size, err)
		}
		if left := tree(t, small); !slices.Equal(left, []string{"images", "sandboxes"}) {
			t.Errorf("%s: left: %v", size, left)
		}
	}
}

// pausedImage is an image whose last layer can be read only after the channel resume was closed.
type pausedImage struct {
	containerd.Image
	store *pausedStore
}

func (i pausedImage) ContentStore() content.Store { return i.store }

type pausedStore struct {
	content.Store
	layer   digest.Digest
	started chan struct{} // gets a value when the layer is opened
	resume  chan struct{}
	opened  atomic.Int32
	lost    bool // whether containerd ends after the first bytes
}

func (s *pausedStore) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if desc.Digest == s.layer {
		s.opened.Add(1)
		s.started <- struct{}{}
		select {
		case <-s.resume:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	blob, err := s.Store.ReaderAt(ctx, desc)
	if s.lost && desc.Digest == s.layer {
		blob = lostBlob{blob}
	}
	return blob, err
}

// lostBlob is a blob whose containerd ends after the first bytes.
type lostBlob struct{ content.ReaderAt }

func (b lostBlob) ReadAt(p []byte, offset int64) (int, error) {
	if offset > 0 {
		return 0, status.Error(codes.Unavailable, "connection lost") // the client of containerd does not convert it
	}
	return b.ReaderAt.ReadAt(p[:min(len(p), 100)], offset)
}

func pause(t *testing.T, ctx context.Context, img containerd.Image) pausedImage {
	t.Helper()
	manifest, err := images.Manifest(ctx, img.ContentStore(), img.Target(), img.Platform())
	if err != nil {
		t.Fatal(err)
	}
	return pausedImage{img, &pausedStore{
		Store: img.ContentStore(), layer: manifest.Layers[len(manifest.Layers)-1].Digest, started: make(chan struct{}, 10), resume: make(chan struct{}),
	}}
}

// Concurrent calls share one build. It goes on when the call that began it is canceled, as long as another one waits.
func TestConcurrentBuilds(t *testing.T) {
	ctx, client := startContainerd(t)
	store, _ := newStore(t)
	img := pause(t, ctx, newImage(t, ctx, client, nil, layer(t, file("a", "x"))))
	first, cancel := context.WithCancelCause(ctx)
	failed := make(chan error, 1)
	go func() {
		_, err := store.BuildImage(first, img, func(int64, int64) {})
		failed <- err
	}()
	<-img.store.started
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			var last, of int64
			_, err := store.BuildImage(ctx, img, func(done, total int64) { last, of = done, total })
			if err != nil || last == 0 || last != of {
				t.Errorf("progress %d of %d, %v", last, of, err)
			}
		})
	}
	for store.Waiting() != 4 {
		runtime.Gosched()
	}
	reason := errors.New("the caller has left")
	cancel(reason)
	if err := <-failed; !errors.Is(err, reason) {
		t.Errorf("the canceled call: %v", err)
	}
	close(img.store.resume)
	wg.Wait()
	if n := img.store.opened.Load(); n != 1 {
		t.Errorf("the layer was read %d times", n)
	}
	if _, err := store.BuildImage(ctx, img, nil); err != nil || img.store.opened.Load() != 1 {
		t.Errorf("the disk was built again: %v", err)
	}
}

// A build for which nobody waits any more ends and leaves nothing. Then it can begin again. If msbd is killed during the
// build, the next New removes what was made.
func TestCanceledBuild(t *testing.T) {
	ctx, client := startContainerd(t)
	store, state := newStore(t)
	img := pause(t, ctx, newImage(t, ctx, client, nil, layer(t, dir("etc"), file("etc/passwd", "x")), layer(t, file("a", "x"))))
	canceled, cancel := context.WithCancelCause(ctx)
	reason := errors.New("the caller has left")
	killed := filepath.Join(t.TempDir(), "disks")
	copied := make(chan error, 1)
	go func() {
		<-img.store.started
		copied <- exec.Command("cp", "-a", state, killed).Run()
		cancel(reason)
	}()
	if _, err := store.BuildImage(canceled, img, nil); !errors.Is(err, reason) {
		t.Errorf("the canceled call: %v", err)
	}
	if err := <-copied; err != nil {
		t.Fatal(err)
	}
	empty := []string{"images", "sandboxes"}
	if left := tree(t, state); !slices.Equal(left, empty) {
		t.Errorf("left: %v", left)
	}
	if left := tree(t, killed); !strings.HasSuffix(strings.Join(left, " "), ".new/root/etc/passwd sandboxes") {
		t.Errorf("after the first layer, there are %v", left)
	}
	openStore(t, killed)
	if left := tree(t, killed); !slices.Equal(left, empty) {
		t.Errorf("left after a crash: %v", left)
	}
	close(img.store.resume)
	if _, err := store.BuildImage(ctx, img, nil); err != nil {
		t.Error(err)
	}
}

// A damaged disk is made again. A sandbox that uses it keeps it.
func TestDamagedImage(t *testing.T) {
	for name, tt := range map[string]struct {
		damage   func(t *testing.T, file string)
		verified bool // only VerifyImages finds it
	}{
		"truncated": {damage: func(t *testing.T, file string) {
			if err := os.Truncate(file, 4096); err != nil {
				t.Fatal(err)
			}
		}},
		"garbled": {verified: true, damage: func(t *testing.T, file string) {
			f, err := os.OpenFile(file, os.O_RDWR, 0)
			if err == nil {
				_, err = f.WriteAt([]byte("garbage"), 2000)
			}
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
		}},
		"no checksum": {damage: func(t *testing.T, file string) {
			if err := os.Remove(filepath.Join(filepath.Dir(file), "checksum.json")); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, client := startContainerd(t)
			store, dir := newStore(t)
			img := newImage(t, ctx, client, nil, layer(t, file("file", "content")))
			chain, err := store.BuildImage(ctx, img, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := store.Create("used", chain, 64); err != nil {
				t.Fatal(err)
			}
			image := filepath.Join(dir, "images", chain.Encoded(), "image.erofs")
			want, err := os.ReadFile(image)
			if err != nil {
				t.Fatal(err)
			}
			if err := store.VerifyImages(ctx); err != nil {
				t.Fatal(err)
			}
			tt.damage(t, image)
			damaged, err := os.ReadFile(image)
			if err != nil {
				t.Fatal(err)
			}
			if tt.verified {
				if err := store.VerifyImages(ctx); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := store.BuildImage(ctx, img, nil); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(image); err != nil || len(got) != len(want) || tt.verified && bytes.Equal(got, damaged) {
				t.Errorf("the disk was not made again: %d bytes, want %d: %v", len(got), len(want), err)
			}
			used, _, _ := store.Find("used")
			if got, err := os.ReadFile(used); err != nil || !bytes.Equal(got, damaged) {
				t.Errorf("the sandbox has another disk: %v", err)
			}
			if left := tree(t, filepath.Join(dir, "images")); len(left) != 4 {
				t.Errorf("left in images: %v", left)
			}
		})
	}
}
