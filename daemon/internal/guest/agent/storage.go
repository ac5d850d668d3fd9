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
	"google.golang.org/protobuf/types/known/emptypb"
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
	// kept says that it outlives its users: a pod's container that starts anew finds its data again.
	kept bool
	// mounts are what was mounted for it, innermost last.
	mounts []string
	// dirs are the directories that were made for it alone.
	dirs []string
	// disk is the file of the disk that is there as itself, not as a file system.
	disk string
}

// mount mounts and remembers it.
func (s *storage) mount(source, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return err
	}
	s.mounts = append(s.mounts, target)
	return nil
}

// detach undoes everything. A file system that will not go now goes with its last user.
func (s *storage) detach() error {
	var errs []error
	for _, target := range slices.Backward(s.mounts) {
		if err := unmount(target); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", target, err))
		}
	}
	for _, dir := range s.dirs {
		errs = append(errs, os.RemoveAll(dir))
	}
	s.mounts, s.dirs = nil, nil
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
		return nil, invalid("unknown driver: this guest has %q", storageDriverNames())
	}
	one := &storage{point: filepath.Clean(st.MountPoint)}
	if st.Driver == "watchable-bind" {
		if err := s.makeWritable(filepath.Dir(one.point)); err != nil {
			return nil, err
		}
	}
	err := attach(ctx, st, one)
	if err == nil {
		err = setGroup(ctx, one.point, st)
	}
	if err != nil {
		return nil, errors.Join(err, one.detach())
	}
	s.keep(one)
	return one, nil
}

func (s *storages) keep(one *storage) {
	s.points[one.point] = one
	s.order = append(s.order, one)
}

// makeWritable gives the guest a place for mount points of its own in a directory of the share, which
// is read-only.
func (s *storages) makeWritable(dir string) error {
	if !errors.Is(unix.Access(dir, unix.W_OK), unix.EROFS) {
		return nil
	}
	one := &storage{point: dir, kept: true}
	if err := one.mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mount tmpfs at %s: %w", dir, err)
	}
	s.keep(one)
	return nil
}

func storageDriverNames() []string { return slices.Sorted(maps.Keys(storageDrivers)) }

// remove ends one use of each mount point.
func (s *storages) remove(points []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.drop(points)
}

func (s *storages) drop(points []string) error {
	var errs []error
	for _, point := range slices.Backward(points) {
		one := s.points[point]
		if one == nil {
			continue // the sandbox ended meanwhile
		}
		if one.users--; one.users > 0 || one.kept {
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

// disks returns the disks that are at some of the mount points as themselves.
func (s *storages) disks(points []string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var disks []string
	for _, point := range points {
		if one := s.points[point]; one != nil && one.disk != "" {
			disks = append(disks, one.disk)
		}
	}
	return disks
}

// resize gives mounted memory-backed storages new options, such as a size. The shim lists those of
// all containers that it knows of, ended ones included: what is not mounted needs nothing.
func (s *storages) resize(list []*pb.Storage) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, st := range list {
		if st.GetDriver() != "ephemeral" {
			return invalid("storage %q of driver %q: only ephemeral ones change", st.GetMountPoint(), st.GetDriver())
		}
	}
	for _, st := range list {
		point := filepath.Clean(st.MountPoint)
		if s.points[point] == nil {
			continue
		}
		if err := remount(point, st.Options); err != nil {
			return fmt.Errorf("remount %s: %w", point, err)
		}
	}
	return nil
}

// remount changes what the options name of a file system, and nothing else.
func remount(point string, options []string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(point, &st); err != nil {
		return err
	}
	options, _ = splitStorageOptions(options)
	o := parseMountOptions(slices.DeleteFunc(options, func(o string) bool { return o == "remount" }))
	const lasting = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC // the same bits as ST_*
	return unix.Mount("", point, "", o.flags()|unix.MS_REMOUNT|uintptr(st.Flags)&lasting, o.data)
}

// share mounts the containers' file systems for a shim that does not ask for it.
func (s *storages) share(ctx context.Context) error {
	if s.inUse(ownShare) == nil {
		return nil
	}
	_, err := s.add(ctx, []*pb.Storage{{Driver: "virtio-fs", Source: shareTag, Fstype: "virtiofs", MountPoint: ownShare}})
	return err
}

// UpdateEphemeralMounts resizes memory-backed storages.
func (a *agent) UpdateEphemeralMounts(_ context.Context, req *pb.UpdateEphemeralMountsRequest) (*emptypb.Empty, error) {
	return done(a.storages.resize(req.Storages))
}
