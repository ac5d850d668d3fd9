package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

const (
	// shareTag is the virtiofs device that holds the containers' root file systems.
	shareTag = "kataShared"
	// shimShare is where the shim believes that it is mounted; it also copies single files there.
	shimShare = "/run/kata-containers/shared/containers"
	// ownShare is where the agent mounts it when the shim does not ask for it.
	ownShare = "/run/msb/share"
	// unmountLimit bounds the wait for a file system that is still in use.
	unmountLimit = time.Second
)

// storages knows which mount points are in use, and by how many.
type storages struct {
	mu     sync.Mutex
	points map[string]*storage
	order  []*storage // oldest first
}

// storage is a mount point that the host asked for.
type storage struct {
	point string
	users int
	// mounted reports whether a file system is mounted at point.
	mounted bool
	// dirs are the directories that were made for it alone.
	dirs []string
}

// detach undoes everything. A file system that is still in use goes with its last user.
func (s *storage) detach() error {
	var errs []error
	if s.mounted {
		if err := unmount(s.point); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", s.point, err))
		}
	}
	for _, dir := range s.dirs {
		errs = append(errs, os.RemoveAll(dir))
	}
	s.mounted, s.dirs = false, nil
	return errors.Join(errs...)
}

// unmount writes a file system's data and unmounts it: the host may take its disk away next. What is
// no mount point needs nothing.
func unmount(target string) error {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, target, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, 0, &st)
	if err != nil || st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return nil
	}
	if f, err := unix.Open(target, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0); err == nil {
		_ = unix.Syncfs(f)
		unix.Close(f)
	}
	for end := time.Now().Add(unmountLimit); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		if time.Now().After(end) {
			return unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
	}
}

// add makes each storage available, in order, and returns the mount points. On an error it takes
// back what it did.
func (s *storages) add(ctx context.Context, list []*pb.Storage) (points []string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var made []*storage
	defer func() {
		if err == nil {
			return
		}
		for _, point := range points {
			s.points[point].users--
		}
		for _, one := range slices.Backward(made) {
			err = errors.Join(err, s.forget(one))
		}
		points = nil
	}()
	for _, st := range list {
		if err := validateHostPath(st.GetMountPoint()); err != nil {
			return points, fmt.Errorf("mount point of storage %s: %w", st.GetDriver(), err)
		}
		one := s.points[filepath.Clean(st.MountPoint)]
		if one == nil {
			if one, err = s.attach(ctx, st); err != nil {
				return points, fmt.Errorf("storage %s at %s: %w", st.Driver, st.MountPoint, err)
			}
			made = append(made, one)
		}
		one.users++
		points = append(points, one.point)
	}
	return points, nil
}

// attach makes a storage available that is not.
func (s *storages) attach(ctx context.Context, st *pb.Storage) (*storage, error) {
	attach := storageDrivers[st.Driver]
	if attach == nil {
		return nil, refusal.Invalid("unknown driver: this guest has %q", storageDriverNames())
	}
	if st.FsGroup != nil {
		return nil, fmt.Errorf("group %d for its files: %w", st.FsGroup.GroupId, refusal.ErrUnsupported)
	}
	one := &storage{point: filepath.Clean(st.MountPoint)}
	if err := attach(ctx, st, one); err != nil {
		return nil, errors.Join(err, one.detach())
	}
	s.points[one.point] = one
	s.order = append(s.order, one)
	return one, nil
}

func storageDriverNames() []string { return slices.Sorted(maps.Keys(storageDrivers)) }

// remove ends one use of each mount point.
func (s *storages) remove(points []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, point := range slices.Backward(points) {
		one := s.points[point]
		if one == nil {
			continue // the sandbox ended meanwhile
		}
		if one.users--; one.users > 0 {
			continue
		}
		errs = append(errs, s.forget(one))
	}
	return errors.Join(errs...)
}

func (s *storages) forget(one *storage) error {
	delete(s.points, one.point)
	s.order = slices.DeleteFunc(s.order, func(o *storage) bool { return o == one })
	return one.detach()
}

// removeAll lets go of everything, whoever uses it, the newest first.
func (s *storages) removeAll() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, one := range slices.Backward(slices.Clone(s.order)) {
		errs = append(errs, s.forget(one))
	}
	return errors.Join(errs...)
}

// inUse returns an error unless point is a storage's mount point.
func (s *storages) inUse(point string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.points[filepath.Clean(point)] == nil {
		return fmt.Errorf("storage at %q: %w", point, errdefs.ErrNotFound)
	}
	return nil
}

// share mounts the containers' file systems for a shim that does not ask for it.
func (s *storages) share(ctx context.Context) error {
	if s.inUse(ownShare) == nil {
		return nil
	}
	_, err := s.add(ctx, []*pb.Storage{{Driver: "virtio-fs", Source: shareTag, Fstype: "virtiofs", MountPoint: ownShare}})
	return err
}
