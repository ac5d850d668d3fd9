// Package storage makes the storages that the host asks for available to containers: file systems of
// disks, of the host's share and in memory, and single files that the host copies.
package storage

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"

	"github.com/msbd/msbd/daemon/internal/guest/agent/mount"
	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

// Set holds the mount points that are in use, and counts their users.
type Set struct {
	mu     sync.Mutex
	points map[string]*storage
	order  []*storage // oldest first
}

// storage is a mount point that the host asked for.
type storage struct {
	point string
	users int
	// mounted is whether a file system is mounted at point.
	mounted bool
	// dirs are the directories that were made for it alone.
	dirs []string
}

// detach undoes everything. A file system that is still in use goes with its last user.
func (s *storage) detach() error {
	var errs []error
	if s.mounted {
		if err := mount.Unmount(s.point); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", s.point, err))
		}
	}
	for _, dir := range s.dirs {
		errs = append(errs, os.RemoveAll(dir))
	}
	s.mounted, s.dirs = false, nil
	return errors.Join(errs...)
}

// NewSet returns an empty set.
func NewSet() *Set { return &Set{points: make(map[string]*storage)} }

// Add makes each storage available, in order, and returns the mount points. On an error it takes back
// what it did.
func (s *Set) Add(ctx context.Context, list []*pb.Storage) (points []string, err error) {
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
		if err := checkPath(st.GetMountPoint()); err != nil {
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
func (s *Set) attach(ctx context.Context, st *pb.Storage) (*storage, error) {
	attach := drivers[st.Driver]
	if attach == nil {
		return nil, refusal.Invalid("unknown driver: this guest has %q", Drivers())
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

// Drivers returns the names of the kinds of storage that this guest has.
func Drivers() []string { return slices.Sorted(maps.Keys(drivers)) }

// Remove ends one use of each mount point.
func (s *Set) Remove(points []string) error {
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

func (s *Set) forget(one *storage) error {
	delete(s.points, one.point)
	s.order = slices.DeleteFunc(s.order, func(o *storage) bool { return o == one })
	return one.detach()
}

// RemoveAll removes all storages, even those in use, the newest first.
func (s *Set) RemoveAll() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, one := range slices.Backward(slices.Clone(s.order)) {
		errs = append(errs, s.forget(one))
	}
	return errors.Join(errs...)
}

// inUse returns an error unless point is a storage's mount point.
func (s *Set) inUse(point string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.points[filepath.Clean(point)] == nil {
		return fmt.Errorf("storage at %q: %w", point, errdefs.ErrNotFound)
	}
	return nil
}

// checkPath returns an error unless the host may put things at path. The guest's own system is not for it.
func checkPath(path string) error {
	if !strings.HasPrefix(filepath.Clean(path), "/run/") || strings.ContainsRune(path, 0) {
		return refusal.Invalid("path %q is not below /run", path)
	}
	return nil
}
