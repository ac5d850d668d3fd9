package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

const (
	// shareTag is the virtiofs device that holds the containers' root file systems.
	shareTag = "kataShared"
	// shimShare is where the shim assumes it to be mounted. The shim also copies single files there.
	shimShare = "/run/kata-containers/shared/containers"
	// ownShare is where the agent mounts it when the shim does not ask for it.
	ownShare = "/run/msb/share"
)

// Root returns where a container's root is in the guest. A shim that uses a remote hypervisor names a
// path in the share but never asks to mount the share.
func (s *Set) Root(ctx context.Context, path string) (string, error) {
	if err := checkPath(path); err != nil {
		return "", fmt.Errorf("root: %w", err)
	}
	if st, err := os.Stat(path); err == nil && st.IsDir() {
		return path, nil
	}
	rest, ok := strings.CutPrefix(filepath.Clean(path), shimShare+"/")
	if !ok {
		return "", fmt.Errorf("root %s: %w", path, errdefs.ErrNotFound)
	}
	if err := s.share(ctx); err != nil {
		return "", err
	}
	root := filepath.Join(ownShare, rest)
	if st, err := os.Stat(root); err != nil || !st.IsDir() {
		return "", fmt.Errorf("root %s: %w", path, errdefs.ErrNotFound)
	}
	return root, nil
}

// share mounts the share for a shim that does not ask for it.
func (s *Set) share(ctx context.Context) error {
	if s.inUse(ownShare) == nil {
		return nil
	}
	_, err := s.Add(ctx, []*pb.Storage{{Driver: "virtio-fs", Source: shareTag, Fstype: "virtiofs", MountPoint: ownShare}})
	return err
}

// DetachStaleShares unmounts the file systems below the share that the host has taken away.
func DetachStaleShares() error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	var errs []error
	for _, point := range virtiofsMounts(string(mounts)) {
		if _, err := os.Stat(point); errors.Is(err, os.ErrNotExist) {
			if err := unix.Unmount(point, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
				errs = append(errs, fmt.Errorf("unmount %s: %w", point, err))
			}
		}
	}
	return errors.Join(errs...)
}

// virtiofsMounts returns the mount points of type virtiofs in a file like /proc/mounts.
func virtiofsMounts(mounts string) []string {
	var points []string
	for line := range strings.Lines(mounts) {
		if f := strings.Fields(line); len(f) >= 3 && f[2] == "virtiofs" {
			points = append(points, unescapeMount(f[1]))
		}
	}
	return points
}

// unescapeMount undoes the octal escapes of /proc/mounts.
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
