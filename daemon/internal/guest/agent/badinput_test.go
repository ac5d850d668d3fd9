package agent

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/msbd/msbd/daemon/internal/guest/agent/container"
)

// badInput returns requests with one fault each, and the status code that each must get.
func badInput() []struct {
	method, fault string
	req           proto.Message
	want          codes.Code
} {
	type request = struct {
		method, fault string
		req           proto.Message
		want          codes.Code
	}
	iface := func(change func(*protocols.Interface)) *pb.UpdateInterfaceRequest {
		i := goodInterface()
		change(i)
		return &pb.UpdateInterfaceRequest{Interface: i}
	}
	route := func(r *protocols.Route) *pb.UpdateRoutesRequest {
		return &pb.UpdateRoutesRequest{Routes: &pb.Routes{Routes: []*protocols.Route{r}}}
	}
	storage := func(st *pb.Storage) *pb.CreateSandboxRequest {
		return &pb.CreateSandboxRequest{Storages: []*pb.Storage{st}}
	}
	file := func(change func(*pb.CopyFileRequest)) *pb.CopyFileRequest {
		r := &pb.CopyFileRequest{Path: testData + "/bad", FileMode: unix.S_IFREG | 0o644, FileSize: 1, Data: []byte("x")}
		change(r)
		return r
	}
	create := func(change func(*pb.CreateContainerRequest)) *pb.CreateContainerRequest {
		r := &pb.CreateContainerRequest{ContainerId: "other", OCI: buildSpec(containerID)}
		change(r)
		return r
	}
	exec := func(change func(*pb.Process)) *pb.ExecProcessRequest {
		p := tool("self")
		change(p)
		return &pb.ExecProcessRequest{ContainerId: containerID, ExecId: "bad", Process: p}
	}
	const invalid = codes.InvalidArgument
	list := []request{
		{"SignalProcess", "signal 0", &pb.SignalProcessRequest{ContainerId: containerID, ExecId: containerID}, invalid},
		{"SignalProcess", "signal 65", &pb.SignalProcessRequest{ContainerId: containerID, ExecId: containerID, Signal: 65}, invalid},
		{"ReadStdout", "0 bytes", &pb.ReadStreamRequest{ContainerId: containerID, ExecId: containerID}, invalid},
		{"TtyWinResize", "no terminal", &pb.TtyWinResizeRequest{ContainerId: containerID, ExecId: containerID, Row: 1, Column: 1}, codes.FailedPrecondition},
		{"WaitProcess", "a long id", &pb.WaitProcessRequest{ContainerId: strings.Repeat("x", 5000)}, invalid},

		{"ExecProcess", "no process", &pb.ExecProcessRequest{ContainerId: containerID, ExecId: "bad"}, invalid},
		{"ExecProcess", "no such program", exec(func(p *pb.Process) { p.Args[0] = "nosuch" }), codes.FailedPrecondition},
		{"ExecProcess", "a file that is not a program", exec(func(p *pb.Process) { p.Args[0] = "/etc/passwd" }), codes.FailedPrecondition},
		{"ExecProcess", "the user id that means unchanged", exec(func(p *pb.Process) { p.User.UID = 1<<32 - 1 }), invalid},
		{"ExecProcess", "the group id that means unchanged", exec(func(p *pb.Process) { p.User.GID = 1<<32 - 1 }), invalid},
		{"ExecProcess", "an additional group id that means unchanged", exec(func(p *pb.Process) { p.User.AdditionalGids = []uint32{1<<32 - 1} }), invalid},
		{"ExecProcess", "an OOM score out of range", exec(func(p *pb.Process) { p.OOMScoreAdj = 1001 }), invalid},
		{"ExecProcess", "a soft limit over the hard limit", exec(func(p *pb.Process) {
			p.Rlimits = []*pb.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 2, Hard: 1}}
		}), invalid},
		{"ExecProcess", "capabilities that are not permitted", exec(func(p *pb.Process) {
			p.Capabilities.Permitted = nil
		}), codes.FailedPrecondition},

		{"UpdateContainer", "a quota below the kernel's minimum", &pb.UpdateContainerRequest{ContainerId: containerID, Resources: &pb.LinuxResources{
			CPU: &pb.LinuxCPU{Quota: 1, Period: 1},
		}}, invalid},
		{"UpdateContainer", "processors that do not exist", &pb.UpdateContainerRequest{ContainerId: containerID, Resources: &pb.LinuxResources{
			CPU: &pb.LinuxCPU{Cpus: "4000"},
		}}, invalid},

		{"UpdateInterface", "no interface", &pb.UpdateInterfaceRequest{}, invalid},
		{"UpdateInterface", "a bad name", iface(func(i *protocols.Interface) { i.Name = "../x" }), invalid},
		{"UpdateInterface", "a bad MAC", iface(func(i *protocols.Interface) { i.HwAddr = "x" }), invalid},
		{"UpdateInterface", "bad addresses", iface(func(i *protocols.Interface) {
			i.IPAddresses = []*protocols.IPAddress{nil, {Address: "1.2.3.4", Mask: "99"}}
		}), invalid},
		{"UpdateRoutes", "a bad destination", route(&protocols.Route{Dest: "x", Device: "eth0"}), invalid},
		{"UpdateRoutes", "a bad gateway", route(&protocols.Route{Gateway: "x", Device: "eth0"}), invalid},
		{"UpdateRoutes", "a bad source", route(&protocols.Route{Source: "x", Device: "eth0"}), invalid},
		{"UpdateRoutes", "no such interface", route(&protocols.Route{Dest: "10.0.0.0/8", Device: "nosuch"}), codes.NotFound},
		{"AddARPNeighbors", "an empty neighbor", &pb.AddARPNeighborsRequest{Neighbors: &pb.ARPNeighbors{
			ARPNeighbors: []*protocols.ARPNeighbor{{}},
		}}, invalid},

		{"CreateSandbox", "a long hostname", &pb.CreateSandboxRequest{Hostname: strings.Repeat("x", 1000)}, invalid},
		{"CreateSandbox", "a bad driver", storage(&pb.Storage{Driver: "nosuch", MountPoint: testData + "/x"}), invalid},
		{"CreateSandbox", "a relative mount point", storage(&pb.Storage{Driver: "ephemeral", MountPoint: "x"}), invalid},
		{"CreateSandbox", "a mount over the guest", storage(&pb.Storage{Driver: "ephemeral", Fstype: "tmpfs", MountPoint: "/proc"}), invalid},
		{"CreateSandbox", "a bad PCI path", storage(&pb.Storage{Driver: "blk", Source: "../../*", Fstype: "ext4", MountPoint: testData + "/x"}), invalid},
		{"CreateSandbox", "an unknown file system", storage(&pb.Storage{
			Driver: "ephemeral", Fstype: "nosuchfs", MountPoint: testData + "/x",
		}), codes.FailedPrecondition},

		{"ReseedRandomDev", "no data", &pb.ReseedRandomDevRequest{}, invalid},
		{"ReseedRandomDev", "too much data", &pb.ReseedRandomDevRequest{Data: make([]byte, maxSeed+1)}, invalid},
		{"SetGuestDateTime", "a negative time", &pb.SetGuestDateTimeRequest{Sec: -1}, invalid},
		{"SetGuestDateTime", "a time that is too large", &pb.SetGuestDateTimeRequest{Sec: 1<<63 - 1}, invalid},
		{"CopyFile", "a path outside", file(func(r *pb.CopyFileRequest) { r.Path = "/init" }), invalid},
		{"CopyFile", "a path with dots", file(func(r *pb.CopyFileRequest) { r.Path = "/run/kata-containers/../x" }), invalid},
		{"CopyFile", "a bad mode", file(func(r *pb.CopyFileRequest) { r.FileMode = unix.S_IFIFO }), invalid},
		{"CopyFile", "a negative offset", file(func(r *pb.CopyFileRequest) { r.Offset = -1 }), invalid},
		{"CopyFile", "data beyond the size", file(func(r *pb.CopyFileRequest) { r.Data = []byte("xy") }), invalid},
		{"CopyFile", "a link target that is not UTF-8", file(func(r *pb.CopyFileRequest) {
			r.FileMode, r.Data = unix.S_IFLNK, []byte("\xff\x00\xfe")
		}), invalid},

		{"CreateContainer", "no root", create(func(r *pb.CreateContainerRequest) { r.OCI.Root.Path = shimShare + "/nosuch" }), codes.NotFound},
		{"CreateContainer", "a relative root", create(func(r *pb.CreateContainerRequest) { r.OCI.Root.Path = "x" }), invalid},
		{"CreateContainer", "an unknown file system", create(func(r *pb.CreateContainerRequest) {
			r.OCI.Mounts = []*pb.Mount{{Destination: "/x", Type: "nosuchfs", Source: "x"}}
		}), codes.FailedPrecondition},
	}
	for fault, change := range badCreates(containerID) {
		list = append(list, request{"CreateContainer", fault, create(change), invalid})
	}
	return list
}

// TestValidateProcess checks that an invalid process is refused before it is started.
func TestValidateProcess(t *testing.T) {
	for _, bad := range badInput() {
		if req, ok := bad.req.(*pb.ExecProcessRequest); ok && bad.want == codes.InvalidArgument {
			spec := buildSpec(containerID)
			spec.Process = req.Process
			if err := container.Validate(containerID, spec); !errdefs.IsInvalidArgument(err) {
				t.Errorf("process with %s: %v, want errdefs.ErrInvalidArgument", bad.fault, err)
			}
		}
	}
}

func TestValidateCreate(t *testing.T) {
	if err := container.Validate("a", buildSpec("a")); err != nil {
		t.Error(err)
	}
	for name, change := range badCreates("a") {
		req := &pb.CreateContainerRequest{ContainerId: "a", OCI: buildSpec("a")}
		change(req)
		if len(req.Storages) > 0 {
			continue // a bad storage is refused when it is attached
		}
		if err := container.Validate(req.ContainerId, req.OCI); !errdefs.IsInvalidArgument(err) {
			t.Errorf("container with %s: %v, want errdefs.ErrInvalidArgument", name, err)
		}
	}
}

// testBadInput makes each request in badInput and checks the status code.
func testBadInput(t *testing.T, c *conformance) {
	c.startFixture(t)
	for _, bad := range badInput() {
		for _, m := range rpcMethods() {
			if m.name != bad.method {
				continue
			}
			if err := c.call(t, m, bad.req); status.Code(err) != bad.want {
				t.Errorf("%s with %s: got %.1000v, want %v", bad.method, bad.fault, err, bad.want)
			}
		}
	}
	c.remove(t, containerID)
}

// testContradictions creates containers with specs whose parts are valid but do not fit together. The agent may accept or
// refuse them, and must be able to remove those that it accepts.
func testContradictions(t *testing.T, c *conformance) {
	same := func(n int, m *pb.Mount) []*pb.Mount {
		var mounts []*pb.Mount
		for range n {
			mounts = append(mounts, proto.Clone(m).(*pb.Mount))
		}
		return mounts
	}
	for what, change := range map[string]func(*pb.Spec){
		"no Linux part": func(s *pb.Spec) { s.Linux = nil },
		"no mounts":     func(s *pb.Spec) { s.Mounts = nil },
		"a terminal without devpts": func(s *pb.Spec) {
			s.Process.Terminal, s.Mounts = true, nil
		},
		"a file for a root":         func(s *pb.Spec) { s.Root.Path += "/tool" },
		"the guest's own root":      func(s *pb.Spec) { s.Root.Path = "/" },
		"a directory for a program": func(s *pb.Spec) { s.Process.Args[0] = "/etc" },
		"a mount over the root": func(s *pb.Spec) {
			s.Mounts = append(s.Mounts, &pb.Mount{Destination: "/", Type: "tmpfs", Source: "tmpfs"})
		},
		"a mount below a file": func(s *pb.Spec) {
			s.Mounts = append(s.Mounts, &pb.Mount{Destination: "/etc/passwd/x", Type: "tmpfs", Source: "tmpfs"})
		},
		"a mount outside the root": func(s *pb.Spec) {
			s.Mounts = append(s.Mounts, &pb.Mount{Destination: "/../../../x", Type: "tmpfs", Source: "tmpfs"})
		},
		"a mount of a missing file": func(s *pb.Spec) {
			s.Mounts = append(s.Mounts, &pb.Mount{Destination: "/x", Type: "bind", Source: "/nosuch"})
		},
		"the same mount many times": func(s *pb.Spec) {
			s.Mounts = append(s.Mounts, same(200, &pb.Mount{Destination: "/x", Type: "tmpfs", Source: "tmpfs"})...)
		},
		"options for another file system": func(s *pb.Spec) { s.Mounts[0].Options = []string{"subvol=x", "ro", "rw", "shared", "private"} },
		"a masked program":                func(s *pb.Spec) { s.Linux.MaskedPaths = []string{"/tool"} },
		"everything read-only and masked": func(s *pb.Spec) {
			s.Root.Readonly, s.Linux.ReadonlyPaths, s.Linux.MaskedPaths = true, []string{"/", "/proc"}, []string{"/"}
		},
		"a device over another": func(s *pb.Spec) {
			s.Linux.Devices = []*pb.LinuxDevice{{Path: "/dev/null", Type: "b", Major: -1, Minor: 1 << 40}, {Path: "/dev/null/x", Type: "c"}}
		},
		"no memory":         func(s *pb.Spec) { s.Linux.Resources.Memory.Limit = 1 },
		"no processes":      func(s *pb.Spec) { s.Linux.Resources.Pids = &pb.LinuxPids{Limit: 1} },
		"no processor":      func(s *pb.Spec) { s.Linux.Resources.CPU = &pb.LinuxCPU{Cpus: "9-8", Mems: "7"} },
		"limits of 0":       func(s *pb.Spec) { s.Process.Rlimits = []*pb.POSIXRlimit{{Type: "RLIMIT_AS"}, {Type: "RLIMIT_NOFILE"}} },
		"an unknown sysctl": func(s *pb.Spec) { s.Linux.Sysctl = map[string]string{"kernel.nosuch": "1"} },
		"the guest's namespace": func(s *pb.Spec) {
			s.Linux.Namespaces = []*pb.LinuxNamespace{{Type: "pid", Path: "/proc/1/ns/pid"}, {Type: "x"}}
		},
		"hooks": func(s *pb.Spec) { s.Hooks = &pb.Hooks{Prestart: []*pb.Hook{{Path: "/nosuch"}}} },
	} {
		spec := buildSpec(containerID)
		change(spec)
		_, err := c.CreateContainer(t.Context(), &pb.CreateContainerRequest{ContainerId: "odd", ExecId: "odd", OCI: spec})
		if err == nil {
			_, startErr := c.StartContainer(t.Context(), &pb.StartContainerRequest{ContainerId: "odd"})
			if code := status.Code(startErr); startErr != nil && code != codes.FailedPrecondition {
				t.Errorf("start a container with %s: %v", what, startErr)
			}
			c.remove(t, "odd")
			continue
		}
		if code := status.Code(err); code != codes.InvalidArgument && code != codes.FailedPrecondition && code != codes.NotFound {
			t.Errorf("create a container with %s: %v", what, err)
		}
	}
}

// badCreates returns functions that make a valid CreateContainer request invalid, by the name of the fault.
func badCreates(id string) map[string]func(*pb.CreateContainerRequest) {
	return map[string]func(*pb.CreateContainerRequest){
		"no spec":          func(r *pb.CreateContainerRequest) { r.OCI = nil },
		"no root":          func(r *pb.CreateContainerRequest) { r.OCI.Root = nil },
		"no process":       func(r *pb.CreateContainerRequest) { r.OCI.Process = nil },
		"no program":       func(r *pb.CreateContainerRequest) { r.OCI.Process.Args = nil },
		"a NUL byte":       func(r *pb.CreateContainerRequest) { r.OCI.Process.Args[0] = "a\x00b" },
		"a relative cwd":   func(r *pb.CreateContainerRequest) { r.OCI.Process.Cwd = "x" },
		"a bad id":         func(r *pb.CreateContainerRequest) { r.ContainerId = "../" + id },
		"a bad limit":      func(r *pb.CreateContainerRequest) { r.OCI.Process.Rlimits = []*pb.POSIXRlimit{{Type: "RLIMIT_X"}} },
		"a bad capability": func(r *pb.CreateContainerRequest) { r.OCI.Process.Capabilities.Effective = []string{"CAP_X"} },
		"a relative mount": func(r *pb.CreateContainerRequest) { r.OCI.Mounts = []*pb.Mount{{Destination: "x"}} },
		"an empty mount":   func(r *pb.CreateContainerRequest) { r.OCI.Mounts = []*pb.Mount{{}} },
		"the guest's init": func(r *pb.CreateContainerRequest) {
			r.OCI.Mounts = []*pb.Mount{{Destination: "/x", Type: "msb-guest", Source: "/init"}}
		},
		"seccomp":       func(r *pb.CreateContainerRequest) { r.OCI.Linux.Seccomp = &pb.LinuxSeccomp{} },
		"user mappings": func(r *pb.CreateContainerRequest) { r.OCI.Linux.UIDMappings = []*pb.LinuxIDMapping{{}} },
		"a bad device": func(r *pb.CreateContainerRequest) {
			r.OCI.Linux.Devices = []*pb.LinuxDevice{{Path: "/dev/x", Type: "q"}}
		},
		"a relative mask": func(r *pb.CreateContainerRequest) { r.OCI.Linux.MaskedPaths = []string{"x"} },
		"a bad sysctl":    func(r *pb.CreateContainerRequest) { r.OCI.Linux.Sysctl = map[string]string{"../x": "1"} },
		"a long hostname": func(r *pb.CreateContainerRequest) { r.OCI.Hostname = strings.Repeat("x", 65) },
		"a bad storage": func(r *pb.CreateContainerRequest) {
			r.Storages = []*pb.Storage{{Driver: "x", MountPoint: testData + "/x"}}
		},
		"a storage without a mount point": func(r *pb.CreateContainerRequest) { r.Storages = []*pb.Storage{{Driver: "ephemeral"}} },
	}
}
