package agent

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

func TestSpecDevicesGetTheGuestsNumbers(t *testing.T) {
	var st unix.Stat_t
	if err := unix.Stat("/dev/null", &st); err != nil {
		t.Fatal(err)
	}
	linux := &pb.Linux{
		Devices: []*pb.LinuxDevice{{Path: "/dev/data", Type: "b", Major: 8, Minor: 16}, {Path: "/dev/other", Type: "b", Major: 8, Minor: 0}},
		Resources: &pb.LinuxResources{Devices: []*pb.LinuxDeviceCgroup{
			{Allow: true, Type: "b", Major: 8, Minor: 16, Access: "r"}, {Allow: true, Type: "c", Major: 8, Minor: 16},
		}},
	}
	diskFinders["test"] = findTestDisk
	defer delete(diskFinders, "test")
	devices := []*pb.Device{{Type: "test", Id: "/dev/null", ContainerPath: "/dev/data"}, {Type: "test", Id: "/dev/null"}}
	if err := addDevices(t.Context(), devices, linux); err != nil {
		t.Fatal(err)
	}
	if d := linux.Devices[0]; d.Major != 1 || d.Minor != 3 || d.Type != "b" {
		t.Errorf("device %v", d)
	}
	if linux.Devices[1].Major != 8 {
		t.Errorf("another device changed: %v", linux.Devices[1])
	}
	var rules []int64
	for _, r := range linux.Resources.Devices {
		rules = append(rules, r.Major, r.Minor)
	}
	if diff := cmp.Diff([]int64{1, 3, 8, 16}, rules); diff != "" {
		t.Errorf("rules: %s", diff)
	}
	for _, bad := range []struct {
		device *pb.Device
		want   func(error) bool
	}{
		{&pb.Device{Type: "vfio-pci", ContainerPath: "/dev/data"}, errdefs.IsNotImplemented},
		{&pb.Device{Type: "test", Id: "/dev/null", ContainerPath: "/dev/nosuch"}, errdefs.IsInvalidArgument},
		{&pb.Device{Type: "test", Id: "/dev/absent"}, errdefs.IsNotFound},
	} {
		if err := addDevices(t.Context(), []*pb.Device{bad.device}, linux); !bad.want(err) {
			t.Errorf("%v: %v", bad.device, err)
		}
	}
}

func findTestDisk(_ context.Context, file string) (string, error) {
	if _, err := os.Stat(file); err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return file, nil
}

func TestDiskAddresses(t *testing.T) {
	for _, bad := range []string{"", "0", "0:", "0:0:0", "a:0", "0:-1", "00:1", "0:99999"} {
		if _, err := findSCSIDisk(t.Context(), bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("SCSI address %q: %v", bad, err)
		}
	}
	for _, bad := range []string{"", "/dev/vd", "/dev/sda", "/dev/vda/../x", "/dev/vd*", "vda", "/dev/vdA"} {
		if _, err := findNamedDisk(t.Context(), bad, "vd"); !errdefs.IsInvalidArgument(err) {
			t.Errorf("disk %q: %v", bad, err)
		}
	}
}
