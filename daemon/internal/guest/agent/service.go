package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/msbd/msbd/daemon/internal/guest/agent/container"
	"github.com/msbd/msbd/daemon/internal/guest/agent/network"
	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

// intercept wraps every request. It translates errors to status codes and recovers from a panic, which would otherwise
// end PID 1 and with it the guest. It also logs the request.
func (a *agent) intercept(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (resp any, err error) {
	name := filepath.Base(info.FullMethod)
	defer func() {
		if p := recover(); p != nil {
			a.log.Error("panic in request", "method", name, "panic", p, "stack", string(debug.Stack()))
			resp, err = nil, status.Error(codes.Internal, refusal.Text(fmt.Errorf("%s: panic: %v", name, p)))
		}
	}()
	started := time.Now()
	resp, err = method(ctx, func(req any) error {
		if ctx.Err() != nil {
			return ctx.Err() // the caller has already given up
		}
		if err := unmarshal(req); err != nil {
			return refusal.Invalid("decode request: %v", err)
		}
		return nil
	})
	if err == nil {
		a.log.Debug("request", "method", name, "took", time.Since(started))
		return resp, nil
	}
	code, text := refusal.Code(err), refusal.Text(err)
	if code != codes.OutOfRange && code != codes.Canceled {
		a.log.Warn("request failed", "method", name, "err", text)
	}
	return nil, status.Error(code, text)
}

// emptyResponse returns the results of a method that has no data to return.
func emptyResponse(err error) (*emptypb.Empty, error) {
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// health implements Kata's Health service.
type health struct{}

func (health) Check(context.Context, *pb.CheckRequest) (*pb.HealthCheckResponse, error) {
	return &pb.HealthCheckResponse{Status: pb.HealthCheckResponse_SERVING}, nil
}

func (health) Version(context.Context, *pb.CheckRequest) (*pb.VersionCheckResponse, error) {
	return &pb.VersionCheckResponse{GrpcVersion: pb.APIVersion, AgentVersion: agentVersion}, nil
}

// containerEntry is a container of the sandbox and the storages that it uses.
type containerEntry struct {
	*container.Container
	spec     *pb.Spec
	storages []string // their mount points
}

// CreateContainer creates a container whose main process waits for StartContainer. If the guest was restored from a template,
// the container adopts the template's.
func (a *agent) CreateContainer(ctx context.Context, req *pb.CreateContainerRequest) (*emptypb.Empty, error) {
	if err := container.Validate(req.ContainerId, req.OCI); err != nil {
		return nil, err
	}
	switch {
	case len(req.SharedMounts) > 0:
		return nil, fmt.Errorf("shared mounts: %w", refusal.ErrUnsupported)
	case req.SandboxPidns:
		return nil, fmt.Errorf("shared pid namespace: %w", refusal.ErrUnsupported)
	case len(req.Devices) > 0:
		return nil, fmt.Errorf("device %s of type %q: %w", req.Devices[0].GetContainerPath(), req.Devices[0].GetType(), refusal.ErrUnsupported)
	}
	a.lifecycleMu.Lock()
	defer a.lifecycleMu.Unlock()
	if _, err := a.container(req.ContainerId); err == nil {
		return nil, fmt.Errorf("container %s: %w", req.ContainerId, errdefs.ErrAlreadyExists)
	}
	if adopted, err := a.adopt(req); adopted || err != nil {
		return emptyResponse(err)
	}
	mountPoints, err := a.storages.Add(ctx, req.Storages)
	if err != nil {
		return nil, err
	}
	root, rootMounts, err := a.root(ctx, req.OCI)
	mountPoints = append(mountPoints, rootMounts...)
	if err != nil {
		return nil, errors.Join(err, a.storages.Remove(mountPoints))
	}
	c, err := container.New(a.reaper, req.ContainerId, root, req.OCI, a.gate != nil)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create container %s: %w", req.ContainerId, err), a.storages.Remove(mountPoints))
	}
	a.mu.Lock()
	a.containers[c.ID()] = &containerEntry{c, req.OCI, mountPoints}
	a.mu.Unlock()
	if socket := c.PortalSocket(); socket != nil {
		a.gate.SetPortal(socket)
	}
	go c.ListenOOM(func() { a.reportOOM(c.ID()) })
	return &emptypb.Empty{}, nil
}

// The annotation with which msbd requests another kind of root file system than Kata's shim, and its only value.
const (
	rootAnnotation = "msb.root"
	rootOnDisks    = "disks"
)

// root returns the directory with the root file system of the container that spec describes. The container's storages
// must have been added to a.storages. mountPoints are those that must be removed from a.storages with the container.
func (a *agent) root(ctx context.Context, spec *pb.Spec) (root string, mountPoints []string, err error) {
	switch kind, ok := spec.Annotations[rootAnnotation]; {
	case !ok:
		root, err = a.storages.Root(ctx, spec.Root.Path)
		return root, nil, err
	case kind == rootOnDisks:
		return a.storages.DiskRoot(ctx)
	default:
		return "", nil, refusal.Invalid("annotation %s is %q: this guest supports only %q", rootAnnotation, kind, rootOnDisks)
	}
}

// container returns the container id. It returns errdefs.ErrNotFound if there is none, and errdefs.ErrInvalidArgument
// if id is not valid.
func (a *agent) container(id string) (*containerEntry, error) {
	if err := container.ValidateID("container", id); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
}

// process returns the process execID of the container containerID. An empty execID means the main process. It returns
// errdefs.ErrNotFound if there is none.
func (a *agent) process(containerID, execID string) (*container.Process, error) {
	c, err := a.container(containerID)
	if err != nil {
		return nil, err
	}
	return c.Process(execID)
}

// StartContainer starts the program of a container's main process.
func (a *agent) StartContainer(_ context.Context, req *pb.StartContainerRequest) (*emptypb.Empty, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return emptyResponse(c.Start())
}

// RemoveContainer kills the processes of a container and removes it.
func (a *agent) RemoveContainer(_ context.Context, req *pb.RemoveContainerRequest) (*emptypb.Empty, error) {
	a.lifecycleMu.Lock()
	defer a.lifecycleMu.Unlock()
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	if err := c.Remove(); err != nil {
		return nil, fmt.Errorf("remove container %s: %w", c.ID(), err)
	}
	a.mu.Lock()
	delete(a.containers, c.ID())
	a.mu.Unlock()
	return emptyResponse(a.storages.Remove(c.storages))
}

// ExecProcess starts an additional process in a container.
func (a *agent) ExecProcess(_ context.Context, req *pb.ExecProcessRequest) (*emptypb.Empty, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return emptyResponse(c.Exec(req.ExecId, req.Process))
}

// SignalProcess sends a signal to a process. SIGKILL without an exec id kills all processes of the container.
func (a *agent) SignalProcess(_ context.Context, req *pb.SignalProcessRequest) (*emptypb.Empty, error) {
	if req.Signal < 1 || req.Signal > 64 {
		return nil, refusal.Invalid("signal %d is not in the range 1 to 64", req.Signal)
	}
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return emptyResponse(c.Signal(req.ExecId, unix.Signal(req.Signal)))
}

// WaitProcess waits until a process has exited. It returns the process's status as a shell reports it, which is 128+N
// after signal N.
func (a *agent) WaitProcess(ctx context.Context, req *pb.WaitProcessRequest) (*pb.WaitProcessResponse, error) {
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	status, err := p.Wait(ctx)
	if err != nil {
		return nil, err
	}
	return &pb.WaitProcessResponse{Status: int32(status)}, nil
}

// UpdateContainer changes a container's resource limits. Limits that the request leaves out stay as they are.
func (a *agent) UpdateContainer(_ context.Context, req *pb.UpdateContainerRequest) (*emptypb.Empty, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return emptyResponse(c.Limit(req.Resources))
}

// StatsContainer returns the resource usage of a container and the traffic of all network interfaces.
func (a *agent) StatsContainer(_ context.Context, req *pb.StatsContainerRequest) (*pb.StatsContainerResponse, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	group, err := c.Stats()
	if err != nil {
		return nil, fmt.Errorf("read statistics of container %s: %w", c.ID(), err)
	}
	interfaces, err := network.Stats()
	if err != nil {
		return nil, err
	}
	return &pb.StatsContainerResponse{CgroupStats: group, NetworkStats: interfaces}, nil
}

// PauseContainer freezes a container's processes until ResumeContainer is called.
func (a *agent) PauseContainer(_ context.Context, req *pb.PauseContainerRequest) (*emptypb.Empty, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return emptyResponse(c.Freeze(true))
}

// ResumeContainer unfreezes a container's processes.
func (a *agent) ResumeContainer(_ context.Context, req *pb.ResumeContainerRequest) (*emptypb.Empty, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return emptyResponse(c.Freeze(false))
}
