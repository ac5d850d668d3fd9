package agent

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"
)

// testRootDisk runs a container whose root file system is on a disk.
func (s *stock) testRootDisk(t *testing.T) {
	ctx := t.Context()
	const id = "disk"
	req := s.container(t, id)
	root := makeDisk(t, filepath.Join(s.share, id, "rootfs"), 32)
	req.OCI.Root.Path = shimShare + "/" + id // unlike a shared root, it is not in a directory rootfs
	rootPath := s.qmp.plugDisk(t, root)
	rootNumber := s.qmp.disks
	req.Storages = []*pb.Storage{{Driver: "blk", Source: rootPath, Fstype: "ext4", MountPoint: req.OCI.Root.Path}}
	s.start(t, req)
	s.checkOutput(t, id, "", "put", "/srv/file", "written")
	// The container must not be able to read the disk's device.
	s.checkOutput(t, id, "open /srv/root: operation not permitted\n", "mknod", "/srv/root", "254", "0")

	stats, err := s.StatsContainer(ctx, &pb.StatsContainerRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(stats.CgroupStats.BlkioStats.IoServiceBytesRecursive, func(e *pb.BlkioStatsEntry) bool {
		return e.Op == "read" && e.Major == 254 && e.Value > 0
	}) {
		t.Errorf("block I/O statistics lack reads from the disk: %v", stats.CgroupStats.BlkioStats)
	}
	s.stop(t, id)
	s.qmp.unplug(t, rootNumber)
	if got := diskFile(t, root, "/srv/file"); got != "written" {
		t.Errorf("the file on the root disk has %q, want written", got)
	}

	// If a disk does not appear, the request fails after a while.
	req = s.container(t, "nodisk")
	req.Storages = []*pb.Storage{{Driver: "blk", Source: bridgeSlot + "/1d", Fstype: "ext4", MountPoint: "/run/kata-containers/x"}}
	_, err = s.CreateContainer(ctx, req)
	wantCode(t, err, codes.NotFound)
}

// testVolume mounts a disk in two containers and requests its usage.
func (s *stock) testVolume(t *testing.T) {
	ctx := t.Context()
	content := t.TempDir()
	if err := os.WriteFile(filepath.Join(content, "file"), []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	const mountPoint = "/run/kata-containers/sandbox/storage/MDIvMDU="
	storage := &pb.Storage{
		Driver: "blk", Source: s.qmp.plugDisk(t, makeDisk(t, content, 8)), Fstype: "ext4", MountPoint: mountPoint,
		Options: []string{"noatime", "io.katacontainers.fs-opt.block_device=file"},
	}
	for _, id := range []string{"one", "two"} {
		req := s.container(t, id)
		req.Storages = []*pb.Storage{storage}
		addMount(req, mountPoint, "/data")
		s.start(t, req)
	}
	s.stop(t, "one")
	s.checkOutput(t, "two", "/data/file: \"content\" false\n", "files", "/data/file")

	stats, err := s.GetVolumeStats(ctx, &pb.VolumeStatsRequest{VolumeGuestPath: mountPoint})
	if err != nil {
		t.Fatal(err)
	}
	if u := stats.Usage[0]; u.Unit != pb.VolumeUsage_BYTES || u.Total < 2<<20 || u.Total > 8<<20 || u.Used == 0 || u.Available > u.Total {
		t.Errorf("usage of the volume: %v", stats)
	}
	_, err = s.GetVolumeStats(ctx, &pb.VolumeStatsRequest{VolumeGuestPath: "/proc"})
	wantCode(t, err, codes.NotFound)
	s.stop(t, "two")
	_, err = s.GetVolumeStats(ctx, &pb.VolumeStatsRequest{VolumeGuestPath: mountPoint})
	wantCode(t, err, codes.NotFound)
}

// testOverlay runs a container whose root is an overlay of layers, as the shim requests for erofs layers.
func (s *stock) testOverlay(t *testing.T) {
	req := s.container(t, "layers")
	layer := &pb.Storage{
		Driver: "blk", Source: s.qmp.plugDisk(t, makeDisk(t, filepath.Join(s.share, "layers/rootfs"), 32)), Fstype: "ext4", Options: []string{"ro"},
		MountPoint: "/run/kata-containers/virtual-volumes/layer",
	}
	const dir = "/run/kata-containers/layers"
	overlay := &pb.Storage{
		Driver: "overlayfs", Source: "overlay", Fstype: "overlay", MountPoint: dir + "/rootfs",
		DriverOptions: []string{createDirectory + dir + "/fs", createDirectory + dir + "/work"},
		Options:       []string{"lowerdir=" + layer.MountPoint, "upperdir=" + dir + "/fs", "workdir=" + dir + "/work"},
	}
	req.Storages, req.OCI.Root.Path = []*pb.Storage{layer, overlay}, overlay.MountPoint
	s.start(t, req)
	s.checkOutput(t, "layers", "", "put", "/srv/file", "in memory")
	s.checkOutput(t, "layers", "/srv/file: \"in memory\" false\n", "files", "/srv/file")
	s.stop(t, "layers")

	// The removal of the container left nothing in the guest but the empty mount point.
	req = s.container(t, "after")
	addMount(req, "/run", "/data", "ro")
	s.start(t, req)
	s.checkOutput(t, "after", "/data/kata-containers/layers/rootfs\n\n", "list", "/data/kata-containers/layers", "/data/kata-containers/virtual-volumes/layer")
	s.stop(t, "after")
}
