// Package disk makes the disks of sandboxes: a read-only one (erofs) for each image, which all its sandboxes share, and
// a writable one (ext4) for each sandbox. It is a base package: every package of backend may import it.
//
// The disks are files in one directory:
//
//	images/CHAIN/image.erofs    the files of an image; CHAIN is the chain id of its layers, in hexadecimal
//	images/CHAIN/checksum.json  the size and the digest of that file
//	images/CHAIN/etc/passwd     the users of the image, for the host; likewise etc/group
//	sandboxes/ID/image.erofs    a hard link to the disk of the image; likewise etc/passwd and etc/group
//	sandboxes/ID/upper.ext4     what the sandbox writes
//
// The disk of an image is a hard link in the directory of each sandbox that uses it. So the file system of the host
// counts the references: an image can be removed or replaced while sandboxes use it, its space becomes free with the
// last of them, and there is no counter that a crash could make wrong.
//
// What is incomplete has the suffix .new, and what is being removed has the suffix .old. New removes both.
package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/msbd/msbd/daemon/internal/sys/bounded"
	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

const (
	imageFile = "image.erofs"
	upperFile = "upper.ext4"

	incomplete = ".new"
	obsolete   = ".old"

	// minSizeMiB and maxSizeMiB limit the size of a sandbox's writable disk.
	minSizeMiB = 64
	maxSizeMiB = 1 << 24
)

// A Store makes, finds and removes the disks in one directory. Create it with New. Its methods are safe for concurrent
// use, but those for one sandbox must not be called concurrently.
type Store struct {
	images, sandboxes string // directories
	log               *slog.Logger

	mu     sync.Mutex
	builds map[digest.Digest]*build // those in progress, by chain id
	blanks map[int64]Extents        // by size in bytes
}

// New returns a Store for the disks in dir, which it creates if necessary. It removes what an interrupted build,
// creation or removal left there. Only one Store may use dir at a time.
func New(dir string, log *slog.Logger) (*Store, error) {
	s := &Store{
		images: filepath.Join(dir, "images"), sandboxes: filepath.Join(dir, "sandboxes"), log: log,
		builds: map[digest.Digest]*build{}, blanks: map[int64]Extents{},
	}
	for _, dir := range []string{s.images, s.sandboxes} {
		if err := durable.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("create the directory for disks: %w", err)
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, fmt.Errorf("list disks: %w", err)
		}
		for _, entry := range entries {
			if !strings.HasSuffix(entry.Name(), incomplete) && !strings.HasSuffix(entry.Name(), obsolete) {
				continue
			}
			path := filepath.Join(dir, entry.Name())
			if err := DeleteTree(context.Background(), path); err != nil {
				return nil, fmt.Errorf("remove an incomplete disk: %w", err)
			}
			log.Info("an incomplete disk was removed", "path", path)
		}
	}
	return s, nil
}

// A Program makes file systems. Debian installs it with Package.
type Program struct{ Name, Package string }

// The programs that a Store runs.
var (
	MkfsErofs = Program{"mkfs.erofs", "erofs-utils"}
	MkfsExt4  = Program{"mkfs.ext4", "e2fsprogs"}
)

// Find returns the absolute path of p. It searches PATH and the directories for administrators' programs. If there is no
// such program, it returns errdefs.ErrFailedPrecondition.
func (p Program) Find() (string, error) {
	for _, candidate := range []string{p.Name, filepath.Join("/usr/sbin", p.Name), filepath.Join("/sbin", p.Name)} {
		if path, err := exec.LookPath(candidate); err == nil {
			return filepath.Abs(path)
		}
	}
	return "", fmt.Errorf("find %s: not installed; install Debian's package %s: %w", p.Name, p.Package, errdefs.ErrFailedPrecondition)
}

// run runs p with args.
func (p Program) run(ctx context.Context, args ...string) error {
	path, err := p.Find()
	if err != nil {
		return err
	}
	return run(ctx, path, args...)
}

// run runs a program. Its error has the output of the program. If ctx ends, run ends the program, and returns the cause.
func run(ctx context.Context, program string, args ...string) error {
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(program), err, bounded.Text(strings.TrimSpace(string(out)), 1<<10))
	}
	return nil
}

// DeleteTree deletes path and everything in it. os.RemoveAll does not suit, because an image or a sandbox may have
// directories nested a million deep: os.RemoveAll holds a descriptor for each level. rm needs few, and ends with ctx.
func DeleteTree(ctx context.Context, path string) error {
	return run(ctx, "rm", "-rf", "--", path)
}

// imageDir returns the directory of the disk of an image.
func (s *Store) imageDir(chain digest.Digest) (string, error) {
	if err := chain.Validate(); err != nil {
		return "", fmt.Errorf("chain id %q: %w: %w", bounded.Short(chain.String()), err, errdefs.ErrInvalidArgument)
	}
	return filepath.Join(s.images, chain.Encoded()), nil
}

// absent adds errdefs.ErrNotFound to err if a file does not exist.
func absent(err error, what string) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("find the %s: %w: %w", what, err, errdefs.ErrNotFound)
	}
	return fmt.Errorf("find the %s: %w", what, err)
}

// PruneImages removes the disks of all images but those with the chain ids in keep. The sandboxes that use such a disk
// keep it.
func (s *Store) PruneImages(keep []digest.Digest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	entries, err := os.ReadDir(s.images)
	if err != nil {
		return fmt.Errorf("list the disks of images: %w", err)
	}
	var errs []error
	for _, entry := range entries {
		name := entry.Name()
		if strings.HasSuffix(name, incomplete) || slices.ContainsFunc(keep, func(chain digest.Digest) bool { return chain.Encoded() == name }) {
			continue
		}
		// An earlier removal may have left a name with the suffix.
		errs = append(errs, discardImage(filepath.Join(s.images, strings.TrimSuffix(name, obsolete))))
	}
	return errors.Join(errs...)
}

var idRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$`)

// validID reports whether a sandbox may have this id.
func validID(id string) bool {
	return idRE.MatchString(id) && !strings.HasSuffix(id, incomplete) && !strings.HasSuffix(id, obsolete)
}

// sandboxDir returns the directory of the disks of sandbox id, which must be valid.
func (s *Store) sandboxDir(id string) string { return filepath.Join(s.sandboxes, id) }

// Create makes the disks of sandbox id: a link to the disk of an image, and an empty writable disk. It returns
// errdefs.ErrNotFound if the image has no disk, errdefs.ErrAlreadyExists if the sandbox has disks, and
// errdefs.ErrInvalidArgument if an argument is not valid.
//
// Create syncs nothing, because the disks are of no use once the host has crashed.
func (s *Store) Create(id string, chain digest.Digest, sizeMiB int) (err error) {
	if !validID(id) {
		return fmt.Errorf("%q cannot be the id of a sandbox: %w", bounded.Short(id), errdefs.ErrInvalidArgument)
	}
	if sizeMiB < minSizeMiB || sizeMiB > maxSizeMiB {
		return fmt.Errorf("the size of the disk is %d MiB, but must be from %d to %d: %w", sizeMiB, minSizeMiB, maxSizeMiB, errdefs.ErrInvalidArgument)
	}
	image, err := s.imageDir(chain)
	if err != nil {
		return err
	}
	dir := s.sandboxDir(id)
	if _, err := os.Lstat(dir); err == nil {
		return fmt.Errorf("sandbox %s has disks: %w", id, errdefs.ErrAlreadyExists)
	}
	work := dir + incomplete
	if err := os.Mkdir(work, 0o700); err != nil {
		return fmt.Errorf("create the disks of sandbox %s: %w", id, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(work))
		}
	}()
	if err := os.Link(filepath.Join(image, imageFile), filepath.Join(work, imageFile)); err != nil {
		return absent(err, "disk of the image")
	}
	// The host looks up the sandbox's user in these files, also once the image is removed.
	if err := os.Mkdir(filepath.Join(work, "etc"), 0o700); err != nil {
		return fmt.Errorf("create the disks of sandbox %s: %w", id, err)
	}
	for _, name := range accountFiles {
		if err := os.Link(filepath.Join(image, name), filepath.Join(work, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("create the disks of sandbox %s: %w", id, err)
		}
	}
	if err := s.makeUpper(filepath.Join(work, upperFile), int64(sizeMiB)<<20); err != nil {
		return fmt.Errorf("create the disk of sandbox %s: %w", id, err)
	}
	if err := os.Rename(work, dir); err != nil {
		return fmt.Errorf("create the disks of sandbox %s: %w", id, err)
	}
	return nil
}

// Find returns the paths of the disks of sandbox id. ok is false if the sandbox does not have both.
func (s *Store) Find(id string) (image, upper string, ok bool) {
	if !validID(id) {
		return "", "", false
	}
	image, upper = filepath.Join(s.sandboxDir(id), imageFile), filepath.Join(s.sandboxDir(id), upperFile)
	for _, path := range []string{image, upper} {
		if _, err := os.Stat(path); err != nil {
			return "", "", false
		}
	}
	return image, upper, true
}

// Accounts returns a directory with the files etc/passwd and etc/group of the image of sandbox id, as they are on its
// disk. A file is absent if the image does not have it, or has something else than a regular file of at most 1 MiB there.
func (s *Store) Accounts(id string) string { return s.sandboxDir(id) }

// Usage returns how many bytes the writable disk of sandbox id occupies on the host. If the sandbox has no disks, it
// returns errdefs.ErrNotFound.
func (s *Store) Usage(id string) (uint64, error) {
	if !validID(id) {
		return 0, absent(fs.ErrNotExist, "disk of the sandbox")
	}
	info, err := os.Stat(filepath.Join(s.sandboxDir(id), upperFile))
	if err != nil {
		return 0, absent(err, "disk of the sandbox")
	}
	return uint64(info.Sys().(*syscall.Stat_t).Blocks) * 512, nil
}

// Remove removes the disks of sandbox id. It returns nil if there are none.
func (s *Store) Remove(id string) error {
	if !validID(id) {
		return nil
	}
	if err := os.RemoveAll(s.sandboxDir(id)); err != nil {
		return fmt.Errorf("remove the disks of sandbox %s: %w", id, err)
	}
	return nil
}

// IDs returns the ids of the sandboxes that have disks. A removal that failed may have left only one of the two.
func (s *Store) IDs() ([]string, error) {
	entries, err := os.ReadDir(s.sandboxes)
	if err != nil {
		return nil, fmt.Errorf("list the disks of sandboxes: %w", err)
	}
	var ids []string
	for _, entry := range entries {
		if validID(entry.Name()) {
			ids = append(ids, entry.Name())
		}
	}
	return ids, nil
}
