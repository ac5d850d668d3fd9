package agent

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"
)

// testDisks runs a container whose root is a disk, and gives it disks as devices, of each kind.
func (s *stock) testDisks(t *testing.T) {
	ctx := t.Context()
	const id = "disks"
	req := s.container(t, id)
	root := makeDisk(t, filepath.Join(s.share, id, "rootfs"), 32)
	virtio, scsi, named := makeRaw(t, "a virtio disk"), makeRaw(t, "a SCSI disk"), makeRaw(t, "a named disk")
	req.OCI.Root.Path = shimShare + "/" + id // a disk's root has no directory of its own
	rootPath := s.machine.plugDisk(t, root)
	rootNumber := s.machine.disks
	req.Storages = []*pb.Storage{{Driver: "blk", Source: rootPath, Fstype: "ext4", MountPoint: req.OCI.Root.Path}}
	req.Devices = []*pb.Device{
		{Type: "blk", Id: s.machine.plugDisk(t, virtio), ContainerPath: "/dev/xvda"},
		{Type: "scsi", Id: s.machine.plugSCSI(t, scsi), ContainerPath: "/dev/xsda"},
	}
	s.machine.plugDisk(t, named)
	req.Devices = append(req.Devices, &pb.Device{Type: "mmioblk", VmPath: "/dev/vdc", ContainerPath: "/dev/xvdc"})
	for i, d := range req.Devices {
		req.OCI.Linux.Devices = append(req.OCI.Linux.Devices, &pb.LinuxDevice{
			Path: d.ContainerPath, Type: "b", Major: 8, Minor: int64(16 * i), FileMode: 0o660, GID: 6,
		})
	}
	s.start(t, req)
	s.says(t, id, "/dev/xvda: \"a virtio disk\"\n/dev/xsda: \"a SCSI disk\"\n/dev/xvdc: \"a named disk\"\n",
		"head", "/dev/xvda", "/dev/xsda", "/dev/xvdc")
	s.says(t, id, "/dev/xvda: 60660 0:6 false\n", "stat", "/dev/xvda")
	s.says(t, id, "", "put", "/srv/file", "written")
	// The numbers of another's disk are not the key to it.
	s.says(t, id, "open /srv/root: operation not permitted\n", "mknod", "/srv/root", "254", "0")

	stats, err := s.StatsContainer(ctx, &pb.StatsContainerRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(stats.CgroupStats.BlkioStats.IoServiceBytesRecursive, func(e *pb.BlkioStatsEntry) bool {
		return e.Op == "read" && e.Major == 254 && e.Value > 0
	}) {
		t.Errorf("block I/O: %v", stats.CgroupStats.BlkioStats)
	}
	s.stop(t, id)
	s.machine.unplug(t, rootNumber)
	if got := diskFile(t, root, "/srv/file"); got != "written" {
		t.Errorf("the root holds %q", got)
	}

	// A disk that never comes ends the wait, not the guest.
	req = s.container(t, "nodisk")
	req.Storages = []*pb.Storage{{Driver: "scsi", Source: "7:7", Fstype: "ext4", MountPoint: "/run/kata-containers/x"}}
	_, err = s.CreateContainer(ctx, req)
	wantCode(t, err, codes.NotFound)
}

// testVolumes mounts a disk into two containers, lets it grow, and swaps to another.
func (s *stock) testVolumes(t *testing.T) {
	ctx := t.Context()
	content := t.TempDir()
	if err := os.MkdirAll(filepath.Join(content, "dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(content, "dir/file"), []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(content, "link")); err != nil {
		t.Fatal(err)
	}
	disk := makeDisk(t, content, 8)
	if err := os.Truncate(disk, 16<<20); err != nil { // the disk is larger than its file system
		t.Fatal(err)
	}
	path := s.machine.plugDisk(t, disk)
	const point = "/run/kata-containers/sandbox/storage/MDIvMDU="
	storage := &pb.Storage{
		Driver: "blk", Source: path, Fstype: "ext4", MountPoint: point,
		Options: []string{"noatime", "io.katacontainers.fs-opt.block_device=file"},
		FsGroup: &pb.FSGroup{GroupId: 77, GroupChangePolicy: protocols.FSGroupChangePolicy_Always},
	}
	raw := &pb.Storage{Driver: "blk", Source: s.machine.plugDisk(t, makeRaw(t, "raw")), Fstype: "bind", MountPoint: "/run/kata-containers/sandbox/storage/raw"}
	for _, id := range []string{"one", "two"} {
		req := s.container(t, id)
		req.Storages = []*pb.Storage{storage, raw}
		mounted(req, point, "/data")
		mounted(req, raw.MountPoint, "/data2")
		if err := os.Remove(filepath.Join(s.share, id, "rootfs/data2")); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(s.share, id, "rootfs/data2"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		s.start(t, req)
	}
	s.says(t, "one", "/data: 42775 0:77 false\n/data/dir: 42770 0:77 false\n/data/dir/file: 100660 0:77 false\n/data/link: 120777 0:77 false\n",
		"stat", "/data", "/data/dir", "/data/dir/file", "/data/link")
	s.says(t, "one", "/data2: \"raw\"\n", "head", "/data2")
	s.stop(t, "one")
	s.says(t, "two", "/data/dir/file: \"content\" false\n", "files", "/data/dir/file")

	before, err := s.GetVolumeStats(ctx, &pb.VolumeStatsRequest{VolumeGuestPath: point})
	if err != nil {
		t.Fatal(err)
	}
	if u := before.Usage[0]; u.Unit != pb.VolumeUsage_BYTES || u.Total < 2<<20 || u.Total > 8<<20 || u.Used == 0 || u.Available > u.Total {
		t.Errorf("volume %v", before)
	}
	ok(t)(s.ResizeVolume(ctx, &pb.ResizeVolumeRequest{VolumeGuestPath: point, Size: 16 << 20}))
	after, err := s.GetVolumeStats(ctx, &pb.VolumeStatsRequest{VolumeGuestPath: point})
	if err != nil || after.Usage[0].Total < before.Usage[0].Total+6<<20 {
		t.Errorf("grown volume %v, %v", after, err)
	}
	_, err = s.ResizeVolume(ctx, &pb.ResizeVolumeRequest{VolumeGuestPath: point, Size: 1 << 20})
	wantCode(t, err, codes.InvalidArgument)
	_, err = s.GetVolumeStats(ctx, &pb.VolumeStatsRequest{VolumeGuestPath: "/proc"})
	wantCode(t, err, codes.NotFound)
	s.stop(t, "two")
	_, err = s.GetVolumeStats(ctx, &pb.VolumeStatsRequest{VolumeGuestPath: point})
	wantCode(t, err, codes.NotFound)

	swap := makeRaw(t, "")
	if out, err := exec.Command("/sbin/mkswap", swap).CombinedOutput(); err != nil {
		t.Fatalf("mkswap: %v\n%s", err, out)
	}
	s.machine.plugDisk(t, swap)
	for range 2 {
		ok(t)(s.AddSwap(ctx, &pb.AddSwapRequest{PCIPath: []uint32{0x1e, uint32(s.machine.disks)}}))
	}
	metrics, err := s.GetMetrics(ctx, &pb.GetMetricsRequest{})
	if err != nil || !strings.Contains(metrics.Metrics, `kata_guest_meminfo{item="swap_total"} 1044480`) {
		t.Errorf("swap: %v, %v", metrics, err)
	}
	_, err = s.AddSwapPath(ctx, &pb.AddSwapPathRequest{Path: "/dev/nosuch"})
	wantCode(t, err, codes.NotFound)
	_, err = s.AddSwapPath(ctx, &pb.AddSwapPathRequest{Path: "/lib/modules/load"})
	wantCode(t, err, codes.InvalidArgument)
}

// testOverlay makes roots of layers: as the shim asks for those of erofs, and with an upper layer of the
// guest's.
func (s *stock) testOverlay(t *testing.T) {
	lower := s.container(t, "lower")
	disk := makeDisk(t, filepath.Join(s.share, "lower/rootfs"), 32)
	layer := &pb.Storage{
		Driver: "blk", Source: s.machine.plugDisk(t, disk), Fstype: "ext4", Options: []string{"ro"},
		MountPoint: "/run/kata-containers/virtual-volumes/layer",
	}
	for id, storage := range map[string]*pb.Storage{
		"layers": {
			Driver: "overlayfs", Source: "overlay", Fstype: "overlay",
			DriverOptions: []string{createDirectory + "/run/kata-containers/layers/fs", createDirectory + "/run/kata-containers/layers/work"},
			Options:       []string{"lowerdir=" + layer.MountPoint, "upperdir=/run/kata-containers/layers/fs", "workdir=/run/kata-containers/layers/work"},
		},
		"writable": {
			Driver: "overlayfs", Source: "none", Fstype: "overlay",
			Options: []string{"io.katacontainers.fs-opt.layer=bGF5ZXI=", writableOverlay, "lowerdir=" + layer.MountPoint},
		},
	} {
		storage.MountPoint = "/run/kata-containers/" + id + "/rootfs"
		req := &pb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: lower.OCI, Storages: []*pb.Storage{layer, storage}}
		req.OCI.Root.Path = storage.MountPoint
		s.start(t, req)
		s.says(t, id, "", "put", "/srv/file", "in memory")
		s.says(t, id, "/srv/file: \"in memory\" false\n", "files", "/srv/file")
		s.stop(t, id)
	}
	// Nothing of it is left: neither in the guest nor on the disk.
	req := s.container(t, "after")
	mounted(req, "/run", "/data", "ro")
	s.start(t, req)
	s.says(t, "after", "/data/kata-containers/layers/rootfs\n\n\n", "list", "/data/kata-containers/layers", "/data/msb/overlay", "/data/kata-containers/virtual-volumes/layer")
	s.stop(t, "after")
}
