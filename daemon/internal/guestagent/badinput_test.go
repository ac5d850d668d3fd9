package guestagent

import (
	"strings"
	"testing"

	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// testBadInput gives every request that takes something the wrong thing. The guest must name the
// fault and live.
func testBadInput(t *testing.T, g *guest, id string) {
	ctx := t.Context()
	try := func(name string, want codes.Code, err error) {
		t.Helper()
		if got := status.Code(err); got != want {
			t.Errorf("%s: got %v (%v), want %v", name, got, err, want)
		}
	}
	for _, bad := range []struct {
		cid, exec string
		want      codes.Code
	}{
		{"nosuch", "nosuch", codes.NotFound},
		{id, "nosuch", codes.NotFound},
		{"", id, codes.InvalidArgument},
		{"../../etc", "x", codes.InvalidArgument},
		{id, "a/b", codes.InvalidArgument},
		{strings.Repeat("x", 5000), "x", codes.InvalidArgument},
	} {
		name := func(method string) string { return method + " " + bad.cid[:min(len(bad.cid), 10)] + "," + bad.exec }
		_, err := g.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: bad.cid, ExecId: bad.exec, Signal: 9})
		try(name("SignalProcess"), bad.want, err)
		_, err = g.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: bad.cid, ExecId: bad.exec})
		try(name("WaitProcess"), bad.want, err)
		_, err = g.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: bad.cid, ExecId: bad.exec, Data: []byte("x")})
		try(name("WriteStdin"), bad.want, err)
		_, err = g.CloseStdin(ctx, &pb.CloseStdinRequest{ContainerId: bad.cid, ExecId: bad.exec})
		try(name("CloseStdin"), bad.want, err)
		_, err = g.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: bad.cid, ExecId: bad.exec, Len: 1})
		try(name("ReadStdout"), bad.want, err)
		_, err = g.ReadStderr(ctx, &pb.ReadStreamRequest{ContainerId: bad.cid, ExecId: bad.exec, Len: 1})
		try(name("ReadStderr"), bad.want, err)
		_, err = g.TtyWinResize(ctx, &pb.TtyWinResizeRequest{ContainerId: bad.cid, ExecId: bad.exec})
		try(name("TtyWinResize"), bad.want, err)
	}
	for cid, want := range map[string]codes.Code{"nosuch": codes.NotFound, "": codes.InvalidArgument, ".": codes.InvalidArgument} {
		_, err := g.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: cid})
		try("StartContainer", want, err)
		_, err = g.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: cid})
		try("RemoveContainer", want, err)
		_, err = g.UpdateContainer(ctx, &pb.UpdateContainerRequest{ContainerId: cid})
		try("UpdateContainer", want, err)
		_, err = g.StatsContainer(ctx, &pb.StatsContainerRequest{ContainerId: cid})
		try("StatsContainer", want, err)
		_, err = g.PauseContainer(ctx, &pb.PauseContainerRequest{ContainerId: cid})
		try("PauseContainer", want, err)
		_, err = g.ResumeContainer(ctx, &pb.ResumeContainerRequest{ContainerId: cid})
		try("ResumeContainer", want, err)
		_, err = g.ExecProcess(ctx, &pb.ExecProcessRequest{ContainerId: cid, ExecId: "e", Process: tool("self")})
		try("ExecProcess", want, err)
	}

	_, err := g.ExecProcess(ctx, &pb.ExecProcessRequest{ContainerId: id, ExecId: "e"})
	try("ExecProcess without a process", codes.InvalidArgument, err)
	_, err = g.ExecProcess(ctx, &pb.ExecProcessRequest{ContainerId: id, ExecId: id, Process: tool("self")})
	try("ExecProcess with the container's id", codes.AlreadyExists, err)
	for name, change := range badCreates(id) {
		req := &pb.CreateContainerRequest{ContainerId: "other", OCI: buildSpec(id)}
		change(req)
		_, err = g.CreateContainer(ctx, req)
		try("CreateContainer with "+name, codes.InvalidArgument, err)
	}
	req := &pb.CreateContainerRequest{ContainerId: "other", OCI: buildSpec("nosuch")}
	_, err = g.CreateContainer(ctx, req)
	try("CreateContainer without its root", codes.NotFound, err)
	req = &pb.CreateContainerRequest{ContainerId: "other", OCI: buildSpec(id)}
	req.OCI.Mounts = []*pb.Mount{{Destination: "/x", Type: "nosuchfs", Source: "x"}}
	_, err = g.CreateContainer(ctx, req)
	try("CreateContainer with an unknown file system", codes.FailedPrecondition, err)

	_, err = g.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: id, ExecId: id, Signal: 0})
	try("SignalProcess 0", codes.InvalidArgument, err)
	_, err = g.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: id, ExecId: id, Signal: 1 << 20})
	try("SignalProcess 1<<20", codes.InvalidArgument, err)
	_, err = g.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: id, ExecId: id})
	try("ReadStdout of 0 bytes", codes.InvalidArgument, err)
	_, err = g.TtyWinResize(ctx, &pb.TtyWinResizeRequest{ContainerId: id, ExecId: id, Row: 1, Column: 1})
	try("TtyWinResize without terminal", codes.FailedPrecondition, err)

	_, err = g.UpdateInterface(ctx, &pb.UpdateInterfaceRequest{})
	try("UpdateInterface of nothing", codes.InvalidArgument, err)
	_, err = g.UpdateInterface(ctx, &pb.UpdateInterfaceRequest{Interface: &protocols.Interface{Name: "../x", HwAddr: testMAC}})
	try("UpdateInterface with a bad name", codes.InvalidArgument, err)
	_, err = g.UpdateInterface(ctx, &pb.UpdateInterfaceRequest{Interface: &protocols.Interface{Name: "eth0", HwAddr: "x"}})
	try("UpdateInterface with a bad MAC", codes.InvalidArgument, err)
	_, err = g.UpdateInterface(ctx, &pb.UpdateInterfaceRequest{Interface: &protocols.Interface{
		Name: "eth0", HwAddr: testMAC, IPAddresses: []*protocols.IPAddress{nil, {Address: "1.2.3.4", Mask: "99"}},
	}})
	try("UpdateInterface with a bad address", codes.InvalidArgument, err)
	for name, r := range map[string]*protocols.Route{
		"destination": {Dest: "x", Device: "eth0"}, "gateway": {Gateway: "x", Device: "eth0"}, "source": {Source: "x", Device: "eth0"},
	} {
		_, err = g.UpdateRoutes(ctx, &pb.UpdateRoutesRequest{Routes: &pb.Routes{Routes: []*protocols.Route{r}}})
		try("UpdateRoutes with a bad "+name, codes.InvalidArgument, err)
	}
	_, err = g.UpdateRoutes(ctx, &pb.UpdateRoutesRequest{Routes: &pb.Routes{Routes: []*protocols.Route{{Dest: "10.0.0.0/8", Device: "nosuch"}}}})
	try("UpdateRoutes on no card", codes.NotFound, err)
	_, err = g.AddARPNeighbors(ctx, &pb.AddARPNeighborsRequest{Neighbors: &pb.ARPNeighbors{ARPNeighbors: []*protocols.ARPNeighbor{{}}}})
	try("AddARPNeighbors", codes.InvalidArgument, err)

	_, err = g.CreateSandbox(ctx, &pb.CreateSandboxRequest{Hostname: strings.Repeat("x", 1000)})
	try("CreateSandbox with a long hostname", codes.InvalidArgument, err)
	for name, st := range map[string]*pb.Storage{
		"driver": {Driver: "nosuch", MountPoint: "/run/x"}, "mount point": {Driver: "local", MountPoint: "x"},
		"PCI path": {Driver: "blk", Source: "../../*", MountPoint: "/run/x"},
	} {
		_, err = g.CreateSandbox(ctx, &pb.CreateSandboxRequest{Storages: []*pb.Storage{st}})
		try("CreateSandbox with a bad "+name, codes.InvalidArgument, err)
	}
	_, err = g.UpdateEphemeralMounts(ctx, &pb.UpdateEphemeralMountsRequest{Storages: []*pb.Storage{{}}})
	try("UpdateEphemeralMounts", codes.NotFound, err)
	_, err = g.ReseedRandomDev(ctx, &pb.ReseedRandomDevRequest{})
	try("ReseedRandomDev without data", codes.InvalidArgument, err)
	_, err = g.ReseedRandomDev(ctx, &pb.ReseedRandomDevRequest{Data: make([]byte, maxSeed+1)})
	try("ReseedRandomDev with too much", codes.InvalidArgument, err)
	_, err = g.SetGuestDateTime(ctx, &pb.SetGuestDateTimeRequest{Sec: -1})
	try("SetGuestDateTime", codes.InvalidArgument, err)
	for name, r := range map[string]*pb.CopyFileRequest{
		"path outside": {Path: "/init", FileMode: unix.S_IFREG}, "path with dots": {Path: "/run/kata-containers/../x", FileMode: unix.S_IFREG},
		"mode": {Path: "/run/kata-containers/x", FileMode: unix.S_IFIFO}, "offset": {Path: "/run/kata-containers/x", FileMode: unix.S_IFREG, Offset: -1},
		"size": {Path: "/run/kata-containers/x", FileMode: unix.S_IFREG, FileSize: 1, Data: []byte("xy")},
	} {
		_, err = g.CopyFile(ctx, r)
		try("CopyFile with a bad "+name, codes.InvalidArgument, err)
	}

	for name, unsupported := range map[string]func() (any, error){
		"GetIPTables":        func() (any, error) { return g.GetIPTables(ctx, &pb.GetIPTablesRequest{}) },
		"SetIPTables":        func() (any, error) { return g.SetIPTables(ctx, &pb.SetIPTablesRequest{}) },
		"MemAgentMemcgSet":   func() (any, error) { return g.MemAgentMemcgSet(ctx, &pb.MemAgentMemcgConfig{}) },
		"MemAgentCompactSet": func() (any, error) { return g.MemAgentCompactSet(ctx, &pb.MemAgentCompactConfig{}) },
		"MemHotplugByProbe":  func() (any, error) { return g.MemHotplugByProbe(ctx, &pb.MemHotplugByProbeRequest{}) },
		"AddSwap":            func() (any, error) { return g.AddSwap(ctx, &pb.AddSwapRequest{}) },
		"AddSwapPath":        func() (any, error) { return g.AddSwapPath(ctx, &pb.AddSwapPathRequest{}) },
		"GetVolumeStats":     func() (any, error) { return g.GetVolumeStats(ctx, &pb.VolumeStatsRequest{}) },
		"ResizeVolume":       func() (any, error) { return g.ResizeVolume(ctx, &pb.ResizeVolumeRequest{}) },
		"SetPolicy":          func() (any, error) { return g.SetPolicy(ctx, &pb.SetPolicyRequest{}) },
	} {
		_, err := unsupported()
		try(name, codes.Unimplemented, err)
	}
	if _, err := g.health.Check(ctx, &pb.CheckRequest{}); err != nil {
		t.Fatalf("after bad input: %v", err)
	}
	if r := g.run(t, id, "afterbad", tool("streams", "alive", "", "0")); r.stdout != "alive" {
		t.Errorf("after bad input: %v", r)
	}
}

// badCreates are changes that make a good CreateContainer request invalid.
func badCreates(id string) map[string]func(*pb.CreateContainerRequest) {
	return map[string]func(*pb.CreateContainerRequest){
		"no spec":          func(r *pb.CreateContainerRequest) { r.OCI = nil },
		"no root":          func(r *pb.CreateContainerRequest) { r.OCI.Root = nil },
		"a relative root":  func(r *pb.CreateContainerRequest) { r.OCI.Root.Path = "x" },
		"no process":       func(r *pb.CreateContainerRequest) { r.OCI.Process = nil },
		"no program":       func(r *pb.CreateContainerRequest) { r.OCI.Process.Args = nil },
		"a NUL in a name":  func(r *pb.CreateContainerRequest) { r.OCI.Process.Args[0] = "a\x00b" },
		"a relative cwd":   func(r *pb.CreateContainerRequest) { r.OCI.Process.Cwd = "x" },
		"a bad id":         func(r *pb.CreateContainerRequest) { r.ContainerId = "../" + id },
		"a bad limit":      func(r *pb.CreateContainerRequest) { r.OCI.Process.Rlimits = []*pb.POSIXRlimit{{Type: "RLIMIT_X"}} },
		"a bad capability": func(r *pb.CreateContainerRequest) { r.OCI.Process.Capabilities.Effective = []string{"CAP_X"} },
		"a relative mount": func(r *pb.CreateContainerRequest) { r.OCI.Mounts = []*pb.Mount{{Destination: "x"}} },
		"no mount":         func(r *pb.CreateContainerRequest) { r.OCI.Mounts = []*pb.Mount{{}} },
		"the guest's init": func(r *pb.CreateContainerRequest) {
			r.OCI.Mounts = []*pb.Mount{{Destination: "/x", Type: guestMountType, Source: "/init"}}
		},
		"seccomp":       func(r *pb.CreateContainerRequest) { r.OCI.Linux.Seccomp = &pb.LinuxSeccomp{} },
		"user mappings": func(r *pb.CreateContainerRequest) { r.OCI.Linux.UIDMappings = []*pb.LinuxIDMapping{{}} },
		"a bad device": func(r *pb.CreateContainerRequest) {
			r.OCI.Linux.Devices = []*pb.LinuxDevice{{Path: "/dev/x", Type: "q"}}
		},
		"a relative mask":   func(r *pb.CreateContainerRequest) { r.OCI.Linux.MaskedPaths = []string{"x"} },
		"a bad sysctl":      func(r *pb.CreateContainerRequest) { r.OCI.Linux.Sysctl = map[string]string{"../x": "1"} },
		"a long hostname":   func(r *pb.CreateContainerRequest) { r.OCI.Hostname = strings.Repeat("x", 65) },
		"a bad storage":     func(r *pb.CreateContainerRequest) { r.Storages = []*pb.Storage{{Driver: "x", MountPoint: "/run/x"}} },
		"a storage nowhere": func(r *pb.CreateContainerRequest) { r.Storages = []*pb.Storage{{Driver: "local"}} },
	}
}
