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

	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

// intercept is the edge: it turns error classes into status codes, and a panic into an error, for
// the death of PID 1 is the death of the guest.
func (a *agent) intercept(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (resp any, err error) {
	name := filepath.Base(info.FullMethod)
	defer func() {
		if p := recover(); p != nil {
			a.log.Error("panic", "method", name, "panic", p, "stack", string(debug.Stack()))
			resp, err = nil, status.Error(codes.Internal, refusal.Text(fmt.Errorf("%s: panic: %v", name, p)))
		}
	}()
	started := time.Now()
	resp, err = method(ctx, func(req any) error {
		if ctx.Err() != nil {
			return ctx.Err() // the caller is gone before its turn came
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

// done is the answer of a request that only has to succeed.
func done(err error) (*emptypb.Empty, error) {
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// health answers Kata's Health service.
type health struct{}

func (health) Check(context.Context, *pb.CheckRequest) (*pb.HealthCheckResponse, error) {
	return &pb.HealthCheckResponse{Status: pb.HealthCheckResponse_SERVING}, nil
}

func (health) Version(context.Context, *pb.CheckRequest) (*pb.VersionCheckResponse, error) {
	return &pb.VersionCheckResponse{GrpcVersion: pb.APIVersion, AgentVersion: agentVersion}, nil
}

// CreateContainer builds a container; its main process waits for StartContainer.
func (a *agent) CreateContainer(ctx context.Context, req *pb.CreateContainerRequest) (*emptypb.Empty, error) {
	if err := validateCreate(req); err != nil {
		return nil, err
	}
	a.changing.Lock()
	defer a.changing.Unlock()
	if _, err := a.container(req.ContainerId); err == nil {
		return nil, fmt.Errorf("container %s: %w", req.ContainerId, errdefs.ErrAlreadyExists)
	}
	points, err := a.storages.Add(ctx, req.Storages)
	if err != nil {
		return nil, err
	}
	c, err := a.build(ctx, req, points)
	if err != nil {
		return nil, errors.Join(err, a.storages.Remove(points))
	}
	a.mu.Lock()
	a.containers[c.id] = c
	a.mu.Unlock()
	go c.cgroup.oom.listen(func() { a.reportOOM(c.id) })
	return &emptypb.Empty{}, nil
}

// build makes a container that uses the storages at some mount points.
func (a *agent) build(ctx context.Context, req *pb.CreateContainerRequest, points []string) (*container, error) {
	root, err := a.storages.Root(ctx, req.OCI.Root.Path)
	if err != nil {
		return nil, err
	}
	c, err := newContainer(a.reaper, req.ContainerId, root, req.OCI)
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", req.ContainerId, err)
	}
	c.storages = points
	return c, nil
}

// container returns a container that was created and not removed.
func (a *agent) container(id string) (*container, error) {
	if err := validateID("container", id); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
}

// process returns a process of a container; an empty exec id means the main one.
func (a *agent) process(containerID, execID string) (*process, error) {
	c, err := a.container(containerID)
	if err != nil {
		return nil, err
	}
	if execID != "" {
		if err := validateID("process", execID); err != nil {
			return nil, err
		}
	}
	return c.process(execID)
}

// StartContainer lets the main process run.
func (a *agent) StartContainer(_ context.Context, req *pb.StartContainerRequest) (*emptypb.Empty, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return done(c.start())
}

// RemoveContainer ends what still runs of a container and forgets it.
func (a *agent) RemoveContainer(_ context.Context, req *pb.RemoveContainerRequest) (*emptypb.Empty, error) {
	a.changing.Lock()
	defer a.changing.Unlock()
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	if err := c.remove(); err != nil {
		return nil, fmt.Errorf("remove container %s: %w", c.id, err)
	}
	a.mu.Lock()
	delete(a.containers, c.id)
	a.mu.Unlock()
	return done(a.storages.Remove(c.storages))
}

// ExecProcess starts another program in a container.
func (a *agent) ExecProcess(_ context.Context, req *pb.ExecProcessRequest) (*emptypb.Empty, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	if err := validateID("process", req.ExecId); err != nil {
		return nil, err
	}
	if err := validateProcess(req.Process); err != nil {
		return nil, err
	}
	return done(c.exec(a.reaper, req.ExecId, req.Process))
}

// SignalProcess signals one process. Without an exec id that is the main one, and for SIGKILL all of
// the container: the shim leaves the id out for each signal to a container.
func (a *agent) SignalProcess(_ context.Context, req *pb.SignalProcessRequest) (*emptypb.Empty, error) {
	if req.Signal < 1 || req.Signal > 64 {
		return nil, refusal.Invalid("signal %d", req.Signal)
	}
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	sig := unix.Signal(req.Signal)
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	if req.ExecId == "" && sig == unix.SIGKILL {
		return done(c.cgroup.kill())
	}
	if p == c.main && sig == unix.SIGTERM && !p.handles(sig) {
		sig = unix.SIGKILL // the first process of a pid namespace would not notice the other
	}
	return done(a.reaper.signal(p.pid, sig))
}

// WaitProcess waits for the end of a process and returns its status as a shell reports it.
func (a *agent) WaitProcess(ctx context.Context, req *pb.WaitProcessRequest) (*pb.WaitProcessResponse, error) {
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.exited:
		return &pb.WaitProcessResponse{Status: int32(p.status)}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// UpdateContainer changes a container's limits.
func (a *agent) UpdateContainer(_ context.Context, req *pb.UpdateContainerRequest) (*emptypb.Empty, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return done(c.cgroup.limit(req.Resources))
}

// PauseContainer stops a container's processes until ResumeContainer.
func (a *agent) PauseContainer(_ context.Context, req *pb.PauseContainerRequest) (*emptypb.Empty, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return done(c.freeze(true))
}

// ResumeContainer continues a paused container.
func (a *agent) ResumeContainer(_ context.Context, req *pb.ResumeContainerRequest) (*emptypb.Empty, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return done(c.freeze(false))
}
