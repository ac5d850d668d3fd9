// Package image keeps the images that sandboxes start from, in containerd. Nothing is pulled: an image comes in as an
// OCI archive, from the administrator. Only package backend may import it; it gives the Store to the admin server,
// which imports and lists, and to the runtime, which resolves names.
package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
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

// leaseLife is how long the parts of an import that was cut off are kept from containerd's garbage
// collector. It is also the longest import.
const leaseLife = time.Hour

// Store is the images of this server in a containerd. Its methods may be called concurrently.
type Store struct {
	client *containerd.Client
}

// NewStore returns the images that a client's containerd has in this server's namespace.
func NewStore(client *containerd.Client) *Store { return &Store{client} }

// Import reads the OCI (or docker save) archive at an absolute path, unpacks its images and makes them
// known under the names in the archive, over earlier images of these names. It returns them.
// Its errors are errdefs.ErrInvalidArgument (what the file is), errdefs.ErrNotFound (no file) and
// containerd's. A failed import changes no image.
func (s *Store) Import(ctx context.Context, path string) ([]sandbox.Image, error) {
	imported, err := s.importArchive(ctrd.InNamespace(ctx), path)
	if err != nil {
		return nil, fmt.Errorf("import %s: %w", path, err)
	}
	return imported, nil
}

func (s *Store) importArchive(ctx context.Context, path string) ([]sandbox.Image, error) {
	file, err := open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()

	// Everything below belongs to the lease until an image refers to it: what a crash leaves behind is
	// garbage that containerd collects.
	ctx, release, err := s.client.WithLease(ctx, leases.WithRandomID(), leases.WithExpiration(leaseLife))
	if err != nil {
		return nil, fmt.Errorf("lease content: %w", err)
	}
	defer release(context.WithoutCancel(ctx))

	content := s.client.ContentStore()
	index, err := archive.ImportIndex(ctx, content, file, archive.WithImportCompression())
	if err != nil {
		return nil, notAnArchive(ctx, err)
	}
	found, err := s.named(ctx, index)
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
		if err := containerd.NewImage(s.client, img).Unpack(ctx, ctrd.Snapshotter); err != nil {
			return nil, fmt.Errorf("unpack image %s: %w", img.Name, err)
		}
	}
	// Only now do names change, so that each always leads to an image that is whole.
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

func open(path string) (*os.File, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("the path must be absolute, since the server's directory is not yours: %w", errdefs.ErrInvalidArgument)
	}
	// Looked at before it is opened: opening a FIFO would block.
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("no such file on the server's host: %w", errdefs.ErrNotFound)
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("not a regular file: an OCI archive is needed: %w", errdefs.ErrInvalidArgument)
	}
	return os.Open(path)
}

// notAnArchive lays an error of reading at the file's door, unless containerd or the caller is to blame.
func notAnArchive(ctx context.Context, err error) error {
	if ctx.Err() != nil || errdefs.IsUnavailable(err) || errdefs.IsCanceled(err) || errdefs.IsDeadlineExceeded(err) || errdefs.IsUnknown(err) {
		return err
	}
	return fmt.Errorf("not a whole OCI or docker save archive with an image for %s: %w: %w",
		platforms.DefaultString(), err, errdefs.ErrInvalidArgument)
}

// named lists the images of an archive under their normalised names.
func (s *Store) named(ctx context.Context, desc ocispec.Descriptor) ([]images.Image, error) {
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
		given := m.Annotations[images.AnnotationImageName]
		if given == "" {
			given = m.Annotations[ocispec.AnnotationRefName]
			// A tag alone, as some tools write it, is no name.
			if !strings.ContainsAny(given, "/:") {
				continue
			}
		}
		name, err := normalize(given)
		if err != nil {
			return nil, err
		}
		found = append(found, images.Image{Name: name.String(), Target: m})
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("the archive names no image: write it again with a full name, such as docker.io/me/app:1: %w", errdefs.ErrInvalidArgument)
	}
	return found, nil
}

// check refuses what no sandbox could start from. An image without layers is also the bait of known
// attacks on containerd's unpacking.
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
		return fmt.Errorf("it is for %s, this machine is %s: %w", platforms.Format(config.Platform), platforms.DefaultString(), errdefs.ErrInvalidArgument)
	case layers == 0:
		return fmt.Errorf("it has no layers, so nothing could run in it: %w", errdefs.ErrInvalidArgument)
	case layers != len(config.RootFS.DiffIDs):
		return fmt.Errorf("its manifest has %d layers, its config %d: %w", layers, len(config.RootFS.DiffIDs), errdefs.ErrInvalidArgument)
	}
	return nil
}

func (s *Store) record(ctx context.Context, img images.Image) (images.Image, error) {
	record, err := s.client.ImageService().Update(ctx, img, "target")
	if errdefs.IsNotFound(err) {
		return s.client.ImageService().Create(ctx, img)
	}
	return record, err
}

// List returns all images, ordered by name.
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

func (s *Store) describe(ctx context.Context, record images.Image) (sandbox.Image, error) {
	size, err := record.Size(ctx, s.client.ContentStore(), platforms.Default())
	if err != nil {
		return sandbox.Image{}, fmt.Errorf("measure image %s: %w", record.Name, err)
	}
	return sandbox.Image{Name: familiar(record.Name), Digest: record.Target.Digest.String(), Size: size, Created: record.CreatedAt}, nil
}

// Resolve finds an image by any spelling of its name. Its errors are errdefs.ErrInvalidArgument (not a
// name) and errdefs.ErrNotFound, which tells what there is.
func (s *Store) Resolve(ctx context.Context, name string) (containerd.Image, error) {
	ctx = ctrd.InNamespace(ctx)
	ref, err := normalize(name)
	if err != nil {
		return nil, err
	}
	img, err := s.client.GetImage(ctx, ref.String())
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("no image %s; %s: %w", familiar(ref.String()), s.offer(ctx), errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("find image %s: %w", name, err)
	}
	return img, nil
}

// offer says what can be had instead of an image that is not there.
func (s *Store) offer(ctx context.Context) string {
	const how = "msb image import FILE adds one"
	list, err := s.List(ctx)
	if err != nil || len(list) == 0 {
		return "there are none: " + how
	}
	names := make([]string, len(list))
	for i, img := range list {
		names[i] = img.Name
	}
	return "there are " + strings.Join(names, ", ") + "; " + how
}

// normalize completes a name: docker.io where no registry is named, latest where no tag is.
func normalize(name string) (reference.Named, error) {
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil, fmt.Errorf("image name %q: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	return reference.TagNameOnly(ref), nil
}

// familiar is a name without what normalize adds.
func familiar(name string) string {
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return strings.TrimSuffix(reference.FamiliarString(ref), ":latest")
}
