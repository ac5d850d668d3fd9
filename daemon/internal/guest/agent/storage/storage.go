// Package storage attaches the storages that the host requests for containers, and the containers' root file systems. A
// storage is a file system on a disk, in the host's virtiofs share or in memory. The package also creates the files that
// the host copies into the guest.
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
	mu          sync.Mutex
	mountPoints map[string]*storage // by mount point
	order       []*storage          // oldest first
}

// storage is an attached storage.
type storage struct {
	mountPoint string // where it is mounted
	users      int
	// mounted is true if a file system is mounted at mountPoint.
	mounted bool
	// dirs are directories that were created for this storage and are removed with it.
	dirs []string
}

// detach unmounts the storage and removes its directories. If the file system is still in use, mount.Unmount detaches
// it.
func (s *storage) detach() error {
	var errs []error
	if s.mounted {
		if err := mount.Unmount(s.mountPoint); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", s.mountPoint, err))
		}
	}
	for _, dir := range s.dirs {
		errs = append(errs, os.RemoveAll(dir))
	}
	s.mounted, s.dirs = false, nil
	return errors.Join(errs...)
}

// NewSet returns an empty set.
func NewSet() *Set { return &Set{mountPoints: make(map[string]*storage)} }

// request asks for a storage at a mount point.
type request struct {
	mountPoint string
	attach     func(*storage) error // attaches the storage at its mount point
}

// Add attaches each storage in list that is not attached yet, in order. It adds a user to each storage in list and
// returns their mount points. On an error, it undoes its changes.
func (s *Set) Add(ctx context.Context, list []*pb.Storage) (mountPoints []string, err error) {
	requests := make([]request, len(list))
	for i, st := range list {
		if err := checkPath(st.GetMountPoint()); err != nil {
			return nil, fmt.Errorf("mount point of storage %s: %w", st.GetDriver(), err)
		}
		requests[i] = request{filepath.Clean(st.MountPoint), func(entry *storage) error {
			if err := attach(ctx, st, entry); err != nil {
				return fmt.Errorf("storage %s at %s: %w", st.Driver, st.MountPoint, err)
			}
			return nil
		}}
	}
	return s.add(requests)
}

// add is like Add, for storages of every kind.
func (s *Set) add(requests []request) (mountPoints []string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var added []*storage
	defer func() {
		if err == nil {
			return
		}
		for _, mountPoint := range mountPoints {
			s.mountPoints[mountPoint].users--
		}
		for _, entry := range slices.Backward(added) {
			err = errors.Join(err, s.drop(entry))
		}
		mountPoints = nil
	}()
	for _, r := range requests {
		entry := s.mountPoints[r.mountPoint]
		if entry == nil {
			entry = &storage{mountPoint: r.mountPoint}
			if err := r.attach(entry); err != nil {
				return mountPoints, errors.Join(err, entry.detach())
			}
			s.mountPoints[entry.mountPoint] = entry
			s.order = append(s.order, entry)
			added = append(added, entry)
		}
		entry.users++
		mountPoints = append(mountPoints, entry.mountPoint)
	}
	return mountPoints, nil
}

// attach attaches the storage st at the mount point of entry.
func attach(ctx context.Context, st *pb.Storage, entry *storage) error {
	driver := drivers[st.Driver]
	if driver == nil {
		return refusal.Invalid("unknown driver: this guest supports %q", Drivers())
	}
	if st.FsGroup != nil {
		return fmt.Errorf("fs_group %d: %w", st.FsGroup.GroupId, refusal.ErrUnsupported)
	}
	return driver(ctx, st, entry)
}

// Drivers returns the names of the storage drivers that this guest supports, sorted.
func Drivers() []string { return slices.Sorted(maps.Keys(drivers)) }

// Remove removes one user of each mount point, in reverse order. It detaches a storage that has no users left.
func (s *Set) Remove(mountPoints []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, mountPoint := range slices.Backward(mountPoints) {
		entry := s.mountPoints[mountPoint]
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

// drop removes entry from the set and detaches it.
func (s *Set) drop(entry *storage) error {
	delete(s.mountPoints, entry.mountPoint)
	s.order = slices.DeleteFunc(s.order, func(o *storage) bool { return o == entry })
	return entry.detach()
}

// RemoveAll detaches all storages, the newest first. It also detaches storages that have users.
func (s *Set) RemoveAll() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, entry := range slices.Backward(slices.Clone(s.order)) {
		errs = append(errs, s.drop(entry))
	}
	return errors.Join(errs...)
}

// checkAdded returns errdefs.ErrNotFound unless mountPoint is the mount point of an attached storage.
func (s *Set) checkAdded(mountPoint string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mountPoints[filepath.Clean(mountPoint)] == nil {
		return fmt.Errorf("storage at %q: %w", mountPoint, errdefs.ErrNotFound)
	}
	return nil
}

// checkPath returns errdefs.ErrInvalidArgument unless path is below /run. The host must not change other files of the
// guest.
func checkPath(path string) error {
	if !strings.HasPrefix(filepath.Clean(path), "/run/") || strings.ContainsRune(path, 0) {
		return refusal.Invalid("path %q is not below /run", path)
	}
	return nil
}
