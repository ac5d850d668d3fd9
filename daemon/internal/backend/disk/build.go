package disk

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/archive"
	"github.com/containerd/containerd/archive/compression"
	"github.com/containerd/containerd/content"
	ctrderrdefs "github.com/containerd/containerd/errdefs"
	"github.com/containerd/containerd/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

const (
	// imageUUID is the UUID of the file system of every image. Nobody identifies the disks by it.
	imageUUID = "6d736264-696d-4167-a500-000000000000"
	// maxAccounts is the largest size of etc/passwd and etc/group.
	maxAccounts = 1 << 20
	// readSize is how many bytes of a layer are read from containerd at once.
	readSize = 1 << 20
)

// A build makes the disk of an image for all callers of BuildImage that wait for it.
type build struct {
	cancel context.CancelCauseFunc
	done   chan struct{} // closed at its end
	err    error         // set before done is closed

	mu      sync.Mutex
	waiters map[*waiter]bool // none: the build was canceled
}

// A waiter is a caller of BuildImage.
type waiter struct {
	progress func(done, total int64) // may be nil
}

// join adds w to those who wait for the build. It returns false if the build was canceled.
func (b *build) join(w *waiter) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.waiters) == 0 {
		return false
	}
	b.waiters[w] = true
	return true
}

// leave removes w, and cancels the build if nobody waits for it any more. It reports whether it did.
func (b *build) leave(w *waiter, cause error) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.waiters, w)
	if len(b.waiters) > 0 {
		return false
	}
	b.cancel(cause)
	return true
}

// report calls the progress functions of those who wait.
func (b *build) report(done, total int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for w := range b.waiters {
		if w.progress != nil {
			w.progress(done, total)
		}
	}
}

// ChainID returns the chain id of the layers of img, which is the name of its disk.
func ChainID(ctx context.Context, img containerd.Image) (digest.Digest, error) {
	diffIDs, err := img.RootFS(ctrd.InNamespace(ctx))
	if err != nil {
		return "", fmt.Errorf("read the layers of image %s: %w", img.Name(), err)
	}
	return identity.ChainID(diffIDs), nil
}

// BuildImage makes the disk of img, unless it exists, and returns the chain id of img, which is the disk's name. It
// calls progress, which may be nil, with the number of bytes of the compressed layers that were unpacked. progress must
// not block.
//
// Concurrent calls for one image share one build. It ends early only if all of their contexts have ended. After an
// error, nothing is left of the disk. BuildImage returns errdefs.ErrFailedPrecondition if this host has no mkfs.erofs,
// and errdefs.ErrInvalidArgument if the layers are not those that the image's configuration names.
func (s *Store) BuildImage(ctx context.Context, img containerd.Image, progress func(done, total int64)) (digest.Digest, error) {
	ctx = ctrd.InNamespace(ctx)
	chain, err := ChainID(ctx, img)
	if err != nil {
		return "", err
	}
	dir, err := s.imageDir(chain)
	if err != nil {
		return "", err
	}
	w := &waiter{progress}
	b, err := s.joinBuild(ctx, img, chain, dir, w)
	if err != nil || b == nil {
		return chain, err
	}
	select {
	case <-b.done:
	case <-ctx.Done():
		if !b.leave(w, context.Cause(ctx)) {
			return "", context.Cause(ctx)
		}
		<-b.done // so that the caller keeps the content of the image until nothing reads it any more
	}
	if b.err != nil {
		return "", fmt.Errorf("make the disk of the image: %w", b.err)
	}
	return chain, nil
}

// joinBuild adds w to those who wait for the build of an image, and starts it if there is none. It returns nil if the
// disk exists.
func (s *Store) joinBuild(ctx context.Context, img containerd.Image, chain digest.Digest, dir string, w *waiter) (*build, error) {
	for {
		s.mu.Lock()
		if isComplete(dir) {
			s.mu.Unlock()
			return nil, nil
		}
		b := s.builds[chain]
		if b == nil {
			b = s.startBuild(ctx, img, chain, dir, w)
			s.mu.Unlock()
			return b, nil
		}
		s.mu.Unlock()
		if b.join(w) {
			return b, nil
		}
		select { // until the canceled build has removed what it made
		case <-b.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// startBuild starts a build for w. s.mu must be held.
func (s *Store) startBuild(ctx context.Context, img containerd.Image, chain digest.Digest, dir string, w *waiter) *build {
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	b := &build{cancel: cancel, done: make(chan struct{}), waiters: map[*waiter]bool{w: true}}
	s.builds[chain] = b
	go func() {
		defer cancel(nil)
		b.err = s.build(ctx, img, dir, b.report)
		s.mu.Lock()
		delete(s.builds, chain)
		s.mu.Unlock()
		close(b.done)
	}()
	return b
}

// build makes the disk of img in dir.
func (s *Store) build(ctx context.Context, img containerd.Image, dir string, progress func(done, total int64)) (err error) {
	if _, err := MkfsErofs.Find(); err != nil {
		return err
	}
	work := dir + incomplete
	if err := DeleteTree(ctx, work); err != nil { // an earlier build may have failed to remove it
		return err
	}
	if err := os.Mkdir(work, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, DeleteTree(context.WithoutCancel(ctx), work))
		}
	}()
	root, file := filepath.Join(work, "root"), filepath.Join(work, imageFile)
	if err := os.Mkdir(root, 0o755); err != nil { // the mode of / in the image, unless a layer changes it
		return err
	}
	if err := os.Chmod(root, 0o755); err != nil { // whatever the umask is
		return err
	}
	if err := unpack(ctx, img, root, progress); err != nil {
		return err
	}
	// By default, mkfs.erofs keeps all that an image says about its files, and compresses nothing.
	if err := MkfsErofs.run(ctx, "--quiet", "-U", imageUUID, file, root); err != nil {
		return err
	}
	if err := copyAccounts(root, work); err != nil {
		return err
	}
	if err := DeleteTree(ctx, root); err != nil {
		return err
	}
	if err := errors.Join(os.Chmod(file, 0o600), syncFile(file)); err != nil {
		return err
	}
	sum, err := checksumOf(ctx, file)
	if err != nil {
		return err
	}
	if err := sum.write(work); err != nil { // also syncs the directory
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := discardImage(dir); err != nil { // a damaged one
		return err
	}
	if err := os.Rename(work, dir); err != nil {
		return err
	}
	return durable.SyncDir(s.images)
}

// syncFile makes the content of a file durable.
func syncFile(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(file.Sync(), file.Close())
}

// unpack applies the layers of img to the directory root, and checks that they are those of the image's configuration.
func unpack(ctx context.Context, img containerd.Image, root string, progress func(done, total int64)) error {
	store := img.ContentStore()
	diffIDs, err := img.RootFS(ctx)
	if err != nil {
		return err
	}
	manifest, err := images.Manifest(ctx, store, img.Target(), img.Platform())
	if err != nil {
		return err
	}
	if len(manifest.Layers) != len(diffIDs) {
		return fmt.Errorf("the number of layers is %d in its manifest, but %d in its config: %w", len(manifest.Layers), len(diffIDs), errdefs.ErrInvalidArgument)
	}
	var done, total int64
	for _, layer := range manifest.Layers {
		total += layer.Size
	}
	progress(done, total)
	for i, layer := range manifest.Layers {
		err := apply(ctx, store, layer, diffIDs[i], root, func(n int) {
			done += int64(n)
			progress(done, total)
		})
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("unpack layer %d of %d: %w", i+1, len(diffIDs), err)
		}
	}
	return nil
}

// apply applies one layer to the directory root. It calls read with the numbers of bytes that it has read.
func apply(ctx context.Context, store content.Provider, layer ocispec.Descriptor, diffID digest.Digest, root string, read func(n int)) error {
	blob, err := store.ReaderAt(ctx, layer)
	if err != nil {
		return err
	}
	defer blob.Close()
	plain, err := compression.DecompressStream(bufio.NewReaderSize(&layerReader{content.NewReader(blob), read}, readSize))
	if err != nil {
		return err
	}
	defer plain.Close()
	digester := diffID.Algorithm().Digester()
	stream := io.TeeReader(plain, digester.Hash())
	if _, err := archive.Apply(ctx, root, stream); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, stream); err != nil { // what follows the end of the archive counts for the digest
		return err
	}
	if got := digester.Digest(); got != diffID {
		return fmt.Errorf("its digest is %s, but %s in the image's config: %w", got, diffID, errdefs.ErrInvalidArgument)
	}
	return nil
}

// layerReader reads a layer from containerd, and gives its errors their class.
type layerReader struct {
	r    io.Reader
	read func(n int)
}

func (l *layerReader) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	l.read(n)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("read it from containerd: %w", ctrderrdefs.FromGRPC(err))
	}
	return n, err
}

// accountFiles have the users and the groups of an image.
var accountFiles = []string{"etc/passwd", "etc/group"}

// copyAccounts copies etc/passwd and etc/group from the directory root to dir. It leaves out what is not a regular file of
// at most maxAccounts bytes, or is outside of root. Such a file is no error, because only the names of users depend on it.
func copyAccounts(root, dir string) error {
	tree, err := os.OpenRoot(root)
	if err != nil {
		return err
	}
	defer tree.Close()
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o700); err != nil {
		return err
	}
	for _, name := range accountFiles {
		// Check the type first, because opening a FIFO would block.
		info, err := tree.Stat(name)
		if err != nil || !info.Mode().IsRegular() || info.Size() > maxAccounts {
			continue
		}
		data, err := tree.ReadFile(name)
		if err == nil {
			err = durable.WriteFile(filepath.Join(dir, name), data, fs.FileMode(0o600))
		}
		if err != nil {
			return fmt.Errorf("copy %s: %w", name, err)
		}
	}
	return nil
}
