// Package image stores the images that sandboxes start from in containerd. It never pulls images from a registry: the
// administrator imports them as OCI archives. Only package backend may import it. Package backend gives the Store to
// the admin server, which imports, lists and removes images, and to the runtime, which resolves names.
package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/content"
	"github.com/containerd/containerd/images"
	"github.com/containerd/containerd/images/archive"
	"github.com/containerd/containerd/leases"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// leaseDuration is how long containerd's garbage collector keeps the content of an import that was interrupted. It also
// limits how long an import may take.
const leaseDuration = time.Hour

// Store holds the images of this server in a containerd. Its methods are safe for concurrent use.
type Store struct {
	// OnChange is called after each import and removal with all images of the server, and with those that other imports
	// are preparing. What was prepared for any other image is no longer needed. It may be nil. It must be set before the
	// Store is used, and must not call the Store.
	OnChange func(ctx context.Context, images []containerd.Image)

	client  *containerd.Client
	prepare Prepare

	mu        sync.Mutex
	importing map[string][]containerd.Image // those that imports are preparing, by lease
}

// Prepare makes what sandboxes need to start from img, and reports its progress in bytes. What it made for an image that
// was not imported after all is no longer needed at the next Store.OnChange.
type Prepare func(ctx context.Context, img containerd.Image, progress func(done, total int64)) error

// Unpack is a Prepare that unpacks img into snapshots of containerd. It reports no progress.
func Unpack(ctx context.Context, img containerd.Image, _ func(done, total int64)) error {
	return img.Unpack(ctx, ctrd.Snapshotter)
}

// NewStore returns a Store for the images in this server's namespace of client's containerd. An import calls prepare for
// each image.
func NewStore(client *containerd.Client, prepare Prepare) *Store {
	return &Store{client: client, prepare: prepare, importing: map[string][]containerd.Image{}}
}

// Import reads the OCI or docker save archive at path, which must be absolute. It prepares the images and stores them
// under the names in the archive, replacing existing images with these names. It returns the imported images. It calls
// progress, which may be nil and must not block, as it proceeds.
//
// Import returns errdefs.ErrInvalidArgument if the file is not a valid archive for this machine, errdefs.ErrNotFound if
// there is no file, or an error of containerd. If the archive cannot be read or an image cannot be prepared, no image
// changes. Import records the names one by one after that, so if recording a name fails, the earlier names are already
// replaced.
func (s *Store) Import(ctx context.Context, path string, progress func(sandbox.ImportProgress)) ([]sandbox.Image, error) {
	if progress == nil {
		progress = func(sandbox.ImportProgress) {}
	}
	imported, err := s.importArchive(ctrd.InNamespace(ctx), path, progress)
	if err != nil {
		return nil, fmt.Errorf("import %s: %w", path, err)
	}
	return imported, nil
}

func (s *Store) importArchive(ctx context.Context, path string, progress func(sandbox.ImportProgress)) ([]sandbox.Image, error) {
	file, size, err := openArchive(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()

	// The lease protects all content until an image refers to it. Content that a crash leaves behind has neither, so
	// containerd collects it when the lease has expired.
	manager := s.client.LeasesService()
	lease, err := manager.Create(ctx, leases.WithRandomID(), leases.WithExpiration(leaseDuration))
	if err != nil {
		return nil, fmt.Errorf("create a lease: %w", err)
	}
	ctx = leases.WithLease(ctx, lease.ID)
	// A synchronous delete runs the garbage collector. It removes the content of images that were replaced, unless a
	// sandbox uses it, and that of a failed import.
	defer manager.Delete(context.WithoutCancel(ctx), lease, leases.SynchronousDelete)

	defer s.imported(ctx, lease.ID)

	content := s.client.ContentStore()
	index, err := archive.ImportIndex(ctx, content, &meter{file, 0, size, progress}, archive.WithImportCompression())
	if err != nil {
		return nil, notAnArchive(ctx, err)
	}
	found, err := s.namedImages(ctx, index)
	if err != nil {
		return nil, err
	}
	children := images.SetChildrenLabels(content, images.FilterPlatforms(images.ChildrenHandler(content), platforms.Default()))
	for _, img := range found {
		if err := images.WalkNotEmpty(ctx, children, img.Target); err != nil {
			return nil, notAnArchive(ctx, err)
		}
		if err := s.check(ctx, img.Target); err != nil {
			return nil, fmt.Errorf("image %s: %w", img.Name, err)
		}
		whole := containerd.NewImage(s.client, img)
		s.mu.Lock()
		s.importing[lease.ID] = append(s.importing[lease.ID], whole)
		s.mu.Unlock()
		report := func(done, total int64) {
			progress(sandbox.ImportProgress{Phase: sandbox.ImportUnpacking, Image: sandbox.ShortImage(img.Name), Done: done, Total: total})
		}
		report(0, 0) // prepare may report nothing
		if err := s.prepare(ctx, whole, report); err != nil {
			return nil, fmt.Errorf("prepare image %s: %w", img.Name, err)
		}
	}
	// Change names only after all images are prepared, so that a name always refers to a complete image.
	imported := make([]sandbox.Image, 0, len(found))
	for _, img := range found {
		record, err := s.record(ctx, img)
		if err != nil {
			return nil, fmt.Errorf("record image %s: %w", img.Name, err)
		}
		described, err := s.describe(ctx, record)
		if err != nil {
			return nil, err
		}
		imported = append(imported, described)
	}
	return imported, nil
}

// imported ends an import, whether or not it has failed.
func (s *Store) imported(ctx context.Context, lease string) {
	s.mu.Lock()
	delete(s.importing, lease)
	s.mu.Unlock()
	_ = s.Changed(context.WithoutCancel(ctx)) // what it did not remove is removed at the next change
}

// Changed calls OnChange. The Store calls it after each change. Call it once at the start of the server as well, because
// an import or a removal may have been interrupted.
func (s *Store) Changed(ctx context.Context) error {
	if s.OnChange == nil {
		return nil
	}
	// With the lock, no import can begin to prepare an image between the list and the end of OnChange.
	s.mu.Lock()
	defer s.mu.Unlock()
	list, err := s.client.ListImages(ctrd.InNamespace(ctx))
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	for _, images := range s.importing {
		list = append(list, images...)
	}
	s.OnChange(ctx, list)
	return nil
}

// PrepareAll prepares all images of the server, for example those that an earlier version imported. It removes the
// snapshots into which an earlier version unpacked them, unless a sandbox uses them.
func (s *Store) PrepareAll(ctx context.Context) error {
	ctx = ctrd.InNamespace(ctx)
	images, err := s.client.ListImages(ctx)
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	var errs []error
	for _, img := range images {
		err := s.prepare(ctx, img, func(int64, int64) {})
		if err == nil {
			err = s.releaseSnapshots(ctx, img)
		}
		if err != nil && !errdefs.IsNotFound(err) { // somebody may have removed it meanwhile
			errs = append(errs, fmt.Errorf("prepare image %s: %w", img.Name(), err))
		}
	}
	return errors.Join(errs...)
}

// releaseSnapshots lets containerd's garbage collector remove the snapshots of img. The label by which it keeps them is
// the one that containerd's client sets when it unpacks an image.
func (s *Store) releaseSnapshots(ctx context.Context, img containerd.Image) error {
	config, err := img.Config(ctx)
	if err != nil {
		return err
	}
	const label = "containerd.io/gc.ref.snapshot." + ctrd.Snapshotter
	info, err := s.client.ContentStore().Info(ctx, config.Digest)
	if err != nil || info.Labels[label] == "" {
		return err
	}
	_, err = s.client.ContentStore().Update(ctx, content.Info{Digest: config.Digest, Labels: map[string]string{label: ""}}, "labels."+label)
	return err
}

// meter is a reader of an archive that reports progress.
type meter struct {
	io.Reader
	done, total int64
	progress    func(sandbox.ImportProgress)
}

func (m *meter) Read(p []byte) (int, error) {
	n, err := m.Reader.Read(p)
	m.done += int64(n)
	m.progress(sandbox.ImportProgress{Phase: sandbox.ImportReading, Done: m.done, Total: m.total})
	return n, err
}

// openArchive opens the archive at path, and returns its size. It returns errdefs.ErrInvalidArgument if path is not absolute or not a regular
// file, and errdefs.ErrNotFound if there is no file.
func openArchive(path string) (*os.File, int64, error) {
	if !filepath.IsAbs(path) {
		return nil, 0, fmt.Errorf("use an absolute path, because the server's working directory differs from yours: %w", errdefs.ErrInvalidArgument)
	}
	// Check the type first, because opening a FIFO would block.
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, 0, fmt.Errorf("no such file on the server's host: %w", errdefs.ErrNotFound)
	case err != nil:
		return nil, 0, unreadable(err)
	case !info.Mode().IsRegular():
		return nil, 0, fmt.Errorf("not a regular file; use an OCI archive: %w", errdefs.ErrInvalidArgument)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, 0, unreadable(err)
	}
	return file, info.Size(), nil
}

// unreadable leaves out the path in an error, which the caller adds.
func unreadable(err error) error {
	if e, ok := errors.AsType[*os.PathError](err); ok {
		err = e.Err
	}
	return fmt.Errorf("could not read it: %w", err)
}

// notAnArchive returns an errdefs.ErrInvalidArgument that wraps err, the error from reading an archive. If err came
// from containerd or from ctx instead of the archive's content, it returns err unchanged.
func notAnArchive(ctx context.Context, err error) error {
	if ctx.Err() != nil || errdefs.IsUnavailable(err) || errdefs.IsCanceled(err) || errdefs.IsDeadlineExceeded(err) || errdefs.IsUnknown(err) {
		return err
	}
	return fmt.Errorf("not a complete OCI or docker save archive with an image for %s: %w: %w",
		platforms.DefaultString(), err, errdefs.ErrInvalidArgument)
}

// namedImages returns the images of an archive with their normalized names.
func (s *Store) namedImages(ctx context.Context, desc ocispec.Descriptor) ([]images.Image, error) {
	var index ocispec.Index
	blob, err := content.ReadBlob(ctx, s.client.ContentStore(), desc)
	if err == nil {
		err = json.Unmarshal(blob, &index)
	}
	if err != nil {
		return nil, notAnArchive(ctx, fmt.Errorf("read index: %w", err))
	}
	var found []images.Image
	for _, m := range index.Manifests {
		annotation := m.Annotations[images.AnnotationImageName]
		if annotation == "" {
			annotation = m.Annotations[ocispec.AnnotationRefName]
			// Some tools write only the tag here, which is not a name.
			if !strings.ContainsAny(annotation, "/:") {
				continue
			}
		}
		name, err := normalize(annotation)
		if err != nil {
			return nil, err
		}
		found = append(found, images.Image{Name: name.String(), Target: m})
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("the archive has no image name; create it again with a full name, such as docker.io/me/app:1: %w", errdefs.ErrInvalidArgument)
	}
	return found, nil
}

// check returns an error if no sandbox could start from the image target. It also rejects images without layers because
// known attacks on containerd's unpacking use them.
func (s *Store) check(ctx context.Context, target ocispec.Descriptor) error {
	store := s.client.ContentStore()
	manifest, err := images.Manifest(ctx, store, target, platforms.Default())
	if err != nil {
		return notAnArchive(ctx, err)
	}
	var config ocispec.Image
	blob, err := content.ReadBlob(ctx, store, manifest.Config)
	if err == nil {
		err = json.Unmarshal(blob, &config)
	}
	if err != nil {
		return notAnArchive(ctx, fmt.Errorf("read config: %w", err))
	}
	switch layers := len(manifest.Layers); {
	case !platforms.Default().Match(config.Platform):
		return fmt.Errorf("it is for %s, but this machine is %s: %w", platforms.Format(config.Platform), platforms.DefaultString(), errdefs.ErrInvalidArgument)
	case layers == 0:
		return fmt.Errorf("it has no layers, so nothing could run in it: %w", errdefs.ErrInvalidArgument)
	case layers != len(config.RootFS.DiffIDs):
		return fmt.Errorf("the number of layers is %d in its manifest, but %d in its config: %w", layers, len(config.RootFS.DiffIDs), errdefs.ErrInvalidArgument)
	}
	return nil
}

// record creates or updates containerd's record of an image.
func (s *Store) record(ctx context.Context, img images.Image) (images.Image, error) {
	record, err := s.client.ImageService().Update(ctx, img, "target")
	if errdefs.IsNotFound(err) {
		return s.client.ImageService().Create(ctx, img)
	}
	return record, err
}

// List returns all images, sorted by name.
func (s *Store) List(ctx context.Context) ([]sandbox.Image, error) {
	ctx = ctrd.InNamespace(ctx)
	records, err := s.client.ImageService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	list := make([]sandbox.Image, 0, len(records))
	for _, record := range records {
		img, err := s.describe(ctx, record)
		if err != nil {
			return nil, err
		}
		list = append(list, img)
	}
	slices.SortFunc(list, func(a, b sandbox.Image) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

// Remove removes the image called name, and its content from the disk. name is as in Resolve, with the same errors.
//
// If one of the sandboxes uses the image, Remove returns errdefs.ErrFailedPrecondition and names these sandboxes. A failed
// sandbox uses no image. A sandbox that starts at the same time either keeps the content of the image, or fails.
func (s *Store) Remove(ctx context.Context, name string, sandboxes []sandbox.Record) error {
	img, err := s.Resolve(ctx, name)
	if err != nil {
		return err
	}
	var users []string
	for _, r := range sandboxes {
		if ref, err := normalize(r.Config.Image); err == nil && ref.String() == img.Name() && r.State != sandbox.Failed {
			users = append(users, r.Name.String())
		}
	}
	if len(users) > 0 {
		return fmt.Errorf("image %s is used by %s; stop the sandboxes first: %w", sandbox.ShortImage(img.Name()), list(users), errdefs.ErrFailedPrecondition)
	}
	// A synchronous delete runs the garbage collector.
	if err := s.client.ImageService().Delete(ctrd.InNamespace(ctx), img.Name(), images.SynchronousDelete()); err != nil {
		return fmt.Errorf("remove image %s: %w", sandbox.ShortImage(img.Name()), err)
	}
	_ = s.Changed(context.WithoutCancel(ctx)) // what it did not remove is removed at the next change
	return nil
}

// list returns the sandboxes called names for an error: all, or the first and the number of the others.
func list(names []string) string {
	const most = 10
	switch n := len(names); {
	case n == 1:
		return "the sandbox " + names[0]
	case n > most:
		return fmt.Sprintf("the sandboxes %s and %d more", strings.Join(names[:most], ", "), n-most)
	default:
		return "the sandboxes " + strings.Join(names, ", ")
	}
}

// describe converts record, containerd's record of an image, and adds the image's size.
func (s *Store) describe(ctx context.Context, record images.Image) (sandbox.Image, error) {
	size, err := record.Size(ctx, s.client.ContentStore(), platforms.Default())
	if err != nil {
		return sandbox.Image{}, fmt.Errorf("get the size of image %s: %w", record.Name, err)
	}
	return sandbox.Image{Name: sandbox.ShortImage(record.Name), Digest: record.Target.Digest.String(), Size: size, Created: record.CreatedAt}, nil
}

// Resolve returns the image called name, which may be short, such as python, or complete, such as
// docker.io/microsandbox/python:latest. It returns errdefs.ErrInvalidArgument if name is not valid. If there is no such
// image, it returns errdefs.ErrNotFound with a message that lists the available images.
func (s *Store) Resolve(ctx context.Context, name string) (containerd.Image, error) {
	ctx = ctrd.InNamespace(ctx)
	ref, err := normalize(name)
	if err != nil {
		return nil, err
	}
	img, err := s.client.GetImage(ctx, ref.String())
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("no image %s; %s: %w", sandbox.ShortImage(ref.String()), s.available(ctx), errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("find image %s: %w", name, err)
	}
	return img, nil
}

// available lists the available images and says how to add one, for the error about a missing image.
func (s *Store) available(ctx context.Context) string {
	const how = "an administrator can add one with 'msb image import FILE'"
	list, err := s.List(ctx)
	if err != nil || len(list) == 0 {
		return "no images have been imported; " + how
	}
	names := make([]string, len(list))
	for i, img := range list {
		names[i] = img.Name
	}
	return "available images: " + strings.Join(names, ", ") + "; " + how
}

// normalize parses name and completes it. It adds docker.io if there is no registry, and latest if there is no tag.
func normalize(name string) (reference.Named, error) {
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil, fmt.Errorf("parse image name %q: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	return reference.TagNameOnly(ref), nil
}
