// Package storage attaches the storages that the host requests for containers: file systems on disks, in the host's
// virtiofs share and in memory. It also creates the files that the host copies into the guest.
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

// Set holds the storages that are attached, and counts the users of each.
type Set struct {
	mu     sync.Mutex
	points map[string]*storage // by mount point
	order  []*storage          // oldest first
}

// storage is an attached storage.
type storage struct {
	point string // where it is mounted
	users int
	// mounted is true if a file system is mounted at point.
	mounted bool
	// dirs are directories that were created for this storage and are removed with it.
	dirs []string
}

// detach unmounts the storage and removes its directories. A file system that is still in use is detached (see
// mount.Unmount).
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

// Add attaches each storage that is not attached yet, in order, adds a user to each, and returns the mount points. On an
// error it undoes its changes.
func (s *Set) Add(ctx context.Context, list []*pb.Storage) (points []string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var added []*storage
	defer func() {
		if err == nil {
			return
		}
		for _, point := range points {
			s.points[point].users--
		}
		for _, entry := range slices.Backward(added) {
			err = errors.Join(err, s.drop(entry))
		}
		points = nil
	}()
	for _, st := range list {
		if err := checkPath(st.GetMountPoint()); err != nil {
			return points, fmt.Errorf("mount point of storage %s: %w", st.GetDriver(), err)
		}
		entry := s.points[filepath.Clean(st.MountPoint)]
		if entry == nil {
			if entry, err = s.attach(ctx, st); err != nil {
				return points, fmt.Errorf("storage %s at %s: %w", st.Driver, st.MountPoint, err)
			}
			added = append(added, entry)
		}
		entry.users++
		points = append(points, entry.point)
	}
	return points, nil
}

// attach attaches a storage and adds it to the set.
func (s *Set) attach(ctx context.Context, st *pb.Storage) (*storage, error) {
	attach := drivers[st.Driver]
	if attach == nil {
		return nil, refusal.Invalid("unknown driver: this guest supports %q", Drivers())
	}
	if st.FsGroup != nil {
		return nil, fmt.Errorf("fs_group %d: %w", st.FsGroup.GroupId, refusal.ErrUnsupported)
	}
	entry := &storage{point: filepath.Clean(st.MountPoint)}
	if err := attach(ctx, st, entry); err != nil {
		return nil, errors.Join(err, entry.detach())
	}
	s.points[entry.point] = entry
	s.order = append(s.order, entry)
	return entry, nil
}

// Drivers returns the names of the storage drivers that this guest supports, sorted.
func Drivers() []string { return slices.Sorted(maps.Keys(drivers)) }

// Remove removes one user of each mount point, in reverse order. It detaches a storage that has no users left.
func (s *Set) Remove(points []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, point := range slices.Backward(points) {
		entry := s.points[point]
		if entry == nil {
			continue // RemoveAll has detached it
		}
		if entry.users--; entry.users > 0 {
			continue
		}
		errs = append(errs, s.drop(entry))
	}
	return errors.Join(errs...)
}

// drop removes a storage from the set and detaches it.
func (s *Set) drop(entry *storage) error {
	delete(s.points, entry.point)
	s.order = slices.DeleteFunc(s.order, func(o *storage) bool { return o == entry })
	return entry.detach()
}

// RemoveAll detaches all storages, even those with users, the newest first.
func (s *Set) RemoveAll() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, entry := range slices.Backward(slices.Clone(s.order)) {
		errs = append(errs, s.drop(entry))
	}
	return errors.Join(errs...)
}

// checkAdded returns an error of class errdefs.ErrNotFound unless point is the mount point of an attached storage.
func (s *Set) checkAdded(point string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.points[filepath.Clean(point)] == nil {
		return fmt.Errorf("storage at %q: %w", point, errdefs.ErrNotFound)
	}
	return nil
}

// checkPath returns an error unless path is below /run. The host must not change the rest of the guest's system.
func checkPath(path string) error {
	if !strings.HasPrefix(filepath.Clean(path), "/run/") || strings.ContainsRune(path, 0) {
		return refusal.Invalid("path %q is not below /run", path)
	}
	return nil
}
