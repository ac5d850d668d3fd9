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
	// shareTag is the tag of the virtiofs device with the containers' root file systems.
	shareTag = "kataShared"
	// shimShare is where the shim expects the share to be mounted. The shim also copies single files there.
	shimShare = "/run/kata-containers/shared/containers"
	// agentShare is where the agent mounts the share if the shim does not request the mount.
	agentShare = "/run/msb/share"
)

// Root returns the directory in the guest that has a container's root file system. path is the root's path in the
// request of the shim. A shim that uses a remote hypervisor gives a path below shimShare, but never requests that the
// agent mounts the share. Root then mounts the share at agentShare and returns the directory there. It returns
// errdefs.ErrNotFound if there is no such directory, and errdefs.ErrInvalidArgument if path is not below /run.
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
	if err := s.mountShare(ctx); err != nil {
		return "", err
	}
	root := filepath.Join(agentShare, rest)
	if st, err := os.Stat(root); err != nil || !st.IsDir() {
		return "", fmt.Errorf("root %s: %w", path, errdefs.ErrNotFound)
	}
	return root, nil
}

// mountShare mounts the share at agentShare, unless it is already mounted there.
func (s *Set) mountShare(ctx context.Context) error {
	if s.checkAdded(agentShare) == nil {
		return nil
	}
	_, err := s.Add(ctx, []*pb.Storage{{Driver: "virtio-fs", Source: shareTag, Fstype: "virtiofs", MountPoint: agentShare}})
	return err
}

// DetachStaleShares unmounts the virtiofs file systems that the host has removed.
func DetachStaleShares() error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	var errs []error
	for _, mountPoint := range virtiofsMounts(string(mounts)) {
		if _, err := os.Stat(mountPoint); errors.Is(err, os.ErrNotExist) {
			if err := unix.Unmount(mountPoint, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
				errs = append(errs, fmt.Errorf("unmount %s: %w", mountPoint, err))
			}
		}
	}
	return errors.Join(errs...)
}

// virtiofsMounts returns the mount points of type virtiofs in mounts, which is the content of /proc/mounts.
func virtiofsMounts(mounts string) []string {
	var mountPoints []string
	for line := range strings.Lines(mounts) {
		if f := strings.Fields(line); len(f) >= 3 && f[2] == "virtiofs" {
			mountPoints = append(mountPoints, unescapeMount(f[1]))
		}
	}
	return mountPoints
}

// unescapeMount decodes the octal escapes in /proc/mounts.
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
