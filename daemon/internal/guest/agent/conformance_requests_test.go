package agent

import (
	"testing"

	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

const (
	shmPoint    = "/run/kata-containers/sandbox/shm"
	volumePoint = "/run/kata-containers/sandbox/storage/volume"
	volumeSize  = 8 << 20
	testData    = "/run/kata-containers/conformance"
	// The execs in the container that goodRequests uses: one that has exited, one that reads its input, and one with a
	// terminal.
	endedExec, sinkExec, ttyExec = "ended", "sink", "tty"
)

func shmStorage() *pb.Storage {
	return &pb.Storage{
		Driver: "ephemeral", Source: "shm", Fstype: "tmpfs", MountPoint: shmPoint,
		Options: []string{"noexec", "nosuid", "nodev", "mode=1777", "size=67108864"},
	}
}

func goodInterface() *protocols.Interface {
	return &protocols.Interface{
		Device: "eth0", Name: "eth0", HwAddr: testMAC, Mtu: 1400, Type: "ethernet",
		IPAddresses: []*protocols.IPAddress{
			{Address: "10.9.0.2", Mask: "24"}, {Family: protocols.IPFamily_v6, Address: "fd00:9::2", Mask: "64"},
		},
	}
}

// goodRequests returns a valid request for each method, as a shim makes it. The requests are about the container and the
// execs that startFixture starts.
func goodRequests() map[string]proto.Message {
	return map[string]proto.Message{
		"Check":   &pb.CheckRequest{Service: "grpc.Health"},
		"Version": &pb.CheckRequest{},

		"CreateSandbox": &pb.CreateSandboxRequest{
			Hostname: "guest", Dns: []string{"192.0.2.53"}, SandboxId: watchID, Storages: []*pb.Storage{
				shmStorage(), {Driver: "blk", Source: "0b", Fstype: "ext4", MountPoint: volumePoint, Options: []string{"noatime"}},
			},
		},
		"DestroySandbox": &pb.DestroySandboxRequest{},
		"CreateContainer": &pb.CreateContainerRequest{
			ContainerId: "made", ExecId: "made", OCI: buildSpec(containerID),
			Storages: []*pb.Storage{
				{Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", MountPoint: testData + "/ephemeral", Options: []string{"size=1048576"}},
				{
					Driver: "overlayfs", Source: "overlay", Fstype: "overlay", MountPoint: testData + "/overlay",
					DriverOptions: []string{createDirectory + testData + "/upper", createDirectory + testData + "/work"},
					Options:       []string{"lowerdir=" + volumePoint + ",upperdir=" + testData + "/upper,workdir=" + testData + "/work"},
				},
			},
		},
		"StartContainer":  &pb.StartContainerRequest{ContainerId: containerID},
		"RemoveContainer": &pb.RemoveContainerRequest{ContainerId: "made"},
		"UpdateContainer": &pb.UpdateContainerRequest{ContainerId: "made", Resources: &pb.LinuxResources{
			Memory: &pb.LinuxMemory{Limit: 96 << 20}, CPU: &pb.LinuxCPU{Shares: 512, Quota: 100_000, Period: 100_000, Cpus: "0"},
			Pids: &pb.LinuxPids{Limit: 100},
		}},
		"StatsContainer":  &pb.StatsContainerRequest{ContainerId: containerID},
		"PauseContainer":  &pb.PauseContainerRequest{ContainerId: containerID},
		"ResumeContainer": &pb.ResumeContainerRequest{ContainerId: containerID},
		"ExecProcess":     &pb.ExecProcessRequest{ContainerId: containerID, ExecId: "new", Process: tool("streams", "out", "err", "0")},
		"SignalProcess":   &pb.SignalProcessRequest{ContainerId: containerID, ExecId: sinkExec, Signal: uint32(unix.SIGCONT)},
		"WaitProcess":     &pb.WaitProcessRequest{ContainerId: containerID, ExecId: endedExec},
		"WriteStdin":      &pb.WriteStreamRequest{ContainerId: containerID, ExecId: sinkExec, Data: []byte("input")},
		"CloseStdin":      &pb.CloseStdinRequest{ContainerId: containerID, ExecId: endedExec},
		"ReadStdout":      &pb.ReadStreamRequest{ContainerId: containerID, ExecId: endedExec, Len: 32 << 10},
		"ReadStderr":      &pb.ReadStreamRequest{ContainerId: containerID, ExecId: endedExec, Len: 32 << 10},
		"TtyWinResize":    &pb.TtyWinResizeRequest{ContainerId: containerID, ExecId: ttyExec, Row: 24, Column: 80},

		"UpdateInterface": &pb.UpdateInterfaceRequest{Interface: goodInterface()},
		"UpdateRoutes": &pb.UpdateRoutesRequest{Routes: &pb.Routes{Routes: []*protocols.Route{
			{Dest: "10.9.0.0/24", Device: "eth0", Source: "10.9.0.2", Scope: 253}, {Gateway: "10.9.0.1", Device: "eth0"},
		}}},
		"AddARPNeighbors": &pb.AddARPNeighborsRequest{Neighbors: &pb.ARPNeighbors{ARPNeighbors: []*protocols.ARPNeighbor{
			{ToIPAddress: &protocols.IPAddress{Address: "10.9.0.1"}, Device: "eth0", Lladdr: "02:00:00:00:00:01", State: 0x80},
		}}},
		"ListInterfaces": &pb.ListInterfacesRequest{},
		"ListRoutes":     &pb.ListRoutesRequest{},
		"GetIPTables":    &pb.GetIPTablesRequest{},
		"SetIPTables":    &pb.SetIPTablesRequest{Data: []byte("*filter\nCOMMIT\n")},

		"GetGuestDetails":   &pb.GuestDetailsRequest{MemBlockSize: true, MemHotplugProbe: true},
		"GetMetrics":        &pb.GetMetricsRequest{},
		"ReseedRandomDev":   &pb.ReseedRandomDevRequest{Data: make([]byte, 512)},
		"SetGuestDateTime":  &pb.SetGuestDateTimeRequest{Sec: 1_900_000_000, Usec: 1},
		"OnlineCPUMem":      &pb.OnlineCPUMemRequest{NbCpus: 2},
		"MemHotplugByProbe": &pb.MemHotplugByProbeRequest{MemHotplugProbeAddr: []uint64{1 << 32}},
		"CopyFile": &pb.CopyFileRequest{
			Path: testData + "/file", FileMode: unix.S_IFREG | 0o644, DirMode: 0o750, FileSize: 4, Data: []byte("data"),
		},
		"UpdateEphemeralMounts":          &pb.UpdateEphemeralMountsRequest{Storages: []*pb.Storage{shmStorage()}},
		"RemoveStaleVirtiofsShareMounts": &pb.RemoveStaleVirtiofsShareMountsRequest{},
		"GetOOMEvent":                    &pb.GetOOMEventRequest{},
		"AddSwap":                        &pb.AddSwapRequest{PCIPath: []uint32{0x0a}},
		"AddSwapPath":                    &pb.AddSwapPathRequest{Path: "/dev/vda"},
		"GetVolumeStats":                 &pb.VolumeStatsRequest{VolumeGuestPath: volumePoint},
		"ResizeVolume":                   &pb.ResizeVolumeRequest{VolumeGuestPath: volumePoint, Size: volumeSize},
		"SetPolicy":                      &pb.SetPolicyRequest{Policy: "package agent_policy\ndefault AllowRequestsFailingPolicy := true\n"},
		"MemAgentMemcgSet":               &pb.MemAgentMemcgConfig{Disabled: new(bool)},
		"MemAgentCompactSet":             &pb.MemAgentCompactConfig{Disabled: new(bool)},
	}
}

// startContainer creates and starts a container whose main process waits for a signal.
func (c *conformance) startContainer(t *testing.T, id string) {
	t.Helper()
	c.createContainer(t, id, buildSpec(containerID))
	ok(t)(c.StartContainer(t.Context(), &pb.StartContainerRequest{ContainerId: id}))
	resp, err := c.ReadStdout(t.Context(), &pb.ReadStreamRequest{ContainerId: id, ExecId: id, Len: 100})
	if string(resp.GetData()) != "waiting\n" {
		t.Fatalf("main process of %s printed %q, %v; want waiting", id, resp.GetData(), err)
	}
}

func (c *conformance) createContainer(t *testing.T, id string, spec *pb.Spec) {
	t.Helper()
	ok(t)(c.CreateContainer(t.Context(), &pb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: spec}))
}

// startFixture starts the container and the execs that goodRequests uses.
func (c *conformance) startFixture(t *testing.T) {
	t.Helper()
	c.startContainer(t, containerID)
	if r := c.run(t, containerID, endedExec, tool("streams", "out", "err", "3")); r != (result{"out", "err", 3}) {
		t.Fatal(r)
	}
	c.exec(t, containerID, sinkExec, conformanceTool("sink"))
	p := tool("tty")
	p.Terminal = true
	c.exec(t, containerID, ttyExec, p)
}

// remove removes a container in any state.
func (c *conformance) remove(t *testing.T, id string) {
	t.Helper()
	ok(t)(c.RemoveContainer(t.Context(), &pb.RemoveContainerRequest{ContainerId: id}))
}

// testWithoutSandbox makes each call that names a container, before there is one.
func testWithoutSandbox(t *testing.T, c *conformance) {
	for _, m := range rpcMethods() {
		req := goodRequests()[m.name]
		if req == nil {
			t.Fatalf("the method %s is new: add it to goodRequests and to the tests", m.name)
		}
		if req.ProtoReflect().Descriptor().Fields().ByName("container_id") == nil || m.name == "CreateContainer" {
			continue
		}
		if err := c.call(t, m, req); status.Code(err) != codes.NotFound {
			t.Errorf("%s: %v, want status code NotFound", m.name, err)
		}
	}
	_, err := c.GetVolumeStats(t.Context(), &pb.VolumeStatsRequest{VolumeGuestPath: volumePoint})
	wantCode(t, err, codes.NotFound)
}
