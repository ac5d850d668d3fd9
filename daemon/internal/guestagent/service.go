package guestagent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// maxRead bounds the answer to one ReadStdout or ReadStderr.
const maxRead = 1 << 20

// intercept is the edge: it turns error classes into status codes, and a panic into an error, for
// the death of PID 1 is the death of the guest.
func (a *agent) intercept(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (resp any, err error) {
	name := filepath.Base(info.FullMethod)
	defer func() {
		if p := recover(); p != nil {
			a.log.Error("panic", "method", name, "panic", p, "stack", string(debug.Stack()))
			resp, err = nil, status.Errorf(codes.Internal, "%s: panic: %v", name, p)
		}
	}()
	resp, err = method(ctx, unmarshal)
	if err == nil {
		return resp, nil
	}
	code := statusCode(err)
	if code != codes.OutOfRange && code != codes.Canceled {
		a.log.Warn("request failed", "method", name, "err", err)
	}
	return nil, status.Error(code, err.Error())
}

func statusCode(err error) codes.Code {
	switch {
	case errdefs.IsNotFound(err):
		return codes.NotFound
	case errdefs.IsInvalidArgument(err):
		return codes.InvalidArgument
	case errdefs.IsAlreadyExists(err):
		return codes.AlreadyExists
	case errdefs.IsFailedPrecondition(err):
		return codes.FailedPrecondition
	case errdefs.IsNotImplemented(err):
		return codes.Unimplemented
	case errdefs.IsOutOfRange(err):
		return codes.OutOfRange
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	default:
		return codes.Internal
	}
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

// CreateSandbox prepares what all containers share.
func (a *agent) CreateSandbox(ctx context.Context, req *pb.CreateSandboxRequest) (*emptypb.Empty, error) {
	if h := req.Hostname; h != "" {
		if err := unix.Sethostname([]byte(h)); err != nil {
			return nil, invalid("hostname %q: %v", h, err)
		}
	}
	_, err := a.storages.add(ctx, req.Storages)
	return done(err)
}

// DestroySandbox ends all containers. The host stops the machine next; if it does not, the machine
// stops itself.
func (a *agent) DestroySandbox(context.Context, *pb.DestroySandboxRequest) (*emptypb.Empty, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	for _, c := range a.containers {
		errs = append(errs, c.cgroup.kill())
	}
	unix.Sync()
	powerOffSoon()
	return done(errors.Join(errs...))
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
	points, err := a.storages.add(ctx, req.Storages)
	if err != nil {
		return nil, err
	}
	c, err := a.build(ctx, req)
	if err != nil {
		return nil, errors.Join(err, a.storages.remove(points))
	}
	c.storages = points
	a.mu.Lock()
	a.containers[c.id] = c
	a.mu.Unlock()
	go c.cgroup.watchOOM(func() { a.reportOOM(c.id) })
	return &emptypb.Empty{}, nil
}

func (a *agent) build(ctx context.Context, req *pb.CreateContainerRequest) (*container, error) {
	root, err := a.resolveRoot(ctx, req.OCI.Root.Path)
	if err != nil {
		return nil, err
	}
	c, err := newContainer(a.reaper, req.ContainerId, root, req.OCI)
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", req.ContainerId, err)
	}
	return c, nil
}

// resolveRoot returns where a container's root is in the guest. A shim that drives the hypervisor
// from afar names a path in the share but never asks to mount it.
func (a *agent) resolveRoot(ctx context.Context, path string) (string, error) {
	if st, err := os.Stat(path); err == nil && st.IsDir() {
		return path, nil
	}
	rest, ok := strings.CutPrefix(filepath.Clean(path), shimShare+"/")
	if !ok {
		return "", fmt.Errorf("root %s: %w", path, errdefs.ErrNotFound)
	}
	if err := a.storages.share(ctx); err != nil {
		return "", err
	}
	root := filepath.Join(ownShare, rest)
	if st, err := os.Stat(root); err != nil || !st.IsDir() {
		return "", fmt.Errorf("root %s: %w", path, errdefs.ErrNotFound)
	}
	return root, nil
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
	return done(a.storages.remove(c.storages))
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

// SignalProcess signals one process, or with an empty exec id all of the container's.
func (a *agent) SignalProcess(_ context.Context, req *pb.SignalProcessRequest) (*emptypb.Empty, error) {
	if req.Signal < 1 || req.Signal > 64 {
		return nil, invalid("signal %d", req.Signal)
	}
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	sig := unix.Signal(req.Signal)
	if req.ExecId != "" {
		return done(a.reaper.signal(p.pid, sig))
	}
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return done(c.signalAll(sig))
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

// WriteStdin writes to a process, and waits while it does not read.
func (a *agent) WriteStdin(ctx context.Context, req *pb.WriteStreamRequest) (*pb.WriteStreamResponse, error) {
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	n, err := p.stdin.write(ctx, req.Data)
	if err != nil {
		return nil, err
	}
	return &pb.WriteStreamResponse{Len: uint32(n)}, nil
}

// CloseStdin ends a process's input.
func (a *agent) CloseStdin(_ context.Context, req *pb.CloseStdinRequest) (*emptypb.Empty, error) {
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	p.stdin.close()
	return &emptypb.Empty{}, nil
}

// ReadStdout waits for output. The end is an error, of code OutOfRange.
func (a *agent) ReadStdout(ctx context.Context, req *pb.ReadStreamRequest) (*pb.ReadStreamResponse, error) {
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	return readOutput(ctx, p.stdout, req.Len)
}

// ReadStderr is ReadStdout for the other stream. A process with a terminal has none.
func (a *agent) ReadStderr(ctx context.Context, req *pb.ReadStreamRequest) (*pb.ReadStreamResponse, error) {
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	if p.stderr == nil {
		return nil, errEndOfStream
	}
	return readOutput(ctx, p.stderr, req.Len)
}

// TtyWinResize sets the size of a process's terminal.
func (a *agent) TtyWinResize(_ context.Context, req *pb.TtyWinResizeRequest) (*emptypb.Empty, error) {
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	if p.terminal == nil {
		return nil, fmt.Errorf("process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	raw, err := p.terminal.SyscallConn()
	if err != nil {
		return nil, err
	}
	var resizeErr error
	err = raw.Control(func(fd uintptr) { resizeErr = resizeTerminal(int(fd), req.Row, req.Column) })
	if err != nil {
		return nil, fmt.Errorf("terminal is closed: %w", errdefs.ErrFailedPrecondition)
	}
	return done(resizeErr)
}

// errEndOfStream is how the shim's reader learns of the end.
var errEndOfStream = fmt.Errorf("end of stream: %w", errdefs.ErrOutOfRange)

func readOutput(ctx context.Context, o *output, limit uint32) (*pb.ReadStreamResponse, error) {
	if limit == 0 {
		return nil, invalid("read of 0 bytes")
	}
	data, err := o.read(ctx, int(min(limit, maxRead)))
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, errEndOfStream
	}
	return &pb.ReadStreamResponse{Data: data}, nil
}

// UpdateContainer changes a container's limits.
func (a *agent) UpdateContainer(_ context.Context, req *pb.UpdateContainerRequest) (*emptypb.Empty, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return done(c.cgroup.limit(req.Resources))
}

// StatsContainer returns what a container uses.
func (a *agent) StatsContainer(_ context.Context, req *pb.StatsContainerRequest) (*pb.StatsContainerResponse, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	group, err := c.cgroup.stats()
	if err != nil {
		return nil, fmt.Errorf("read statistics of container %s: %w", c.id, err)
	}
	network, err := networkStats()
	if err != nil {
		return nil, err
	}
	return &pb.StatsContainerResponse{CgroupStats: group, NetworkStats: network}, nil
}

// PauseContainer stops a container's processes until ResumeContainer.
func (a *agent) PauseContainer(_ context.Context, req *pb.PauseContainerRequest) (*emptypb.Empty, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return done(c.cgroup.freeze(true))
}

// ResumeContainer continues a paused container.
func (a *agent) ResumeContainer(_ context.Context, req *pb.ResumeContainerRequest) (*emptypb.Empty, error) {
	c, err := a.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return done(c.cgroup.freeze(false))
}

// GetOOMEvent waits until the kernel kills something for want of memory.
func (a *agent) GetOOMEvent(ctx context.Context, _ *pb.GetOOMEventRequest) (*pb.OOMEvent, error) {
	select {
	case id := <-a.oom:
		return &pb.OOMEvent{ContainerId: id}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// reportOOM queues an event. When nobody listens, the oldest say enough.
func (a *agent) reportOOM(id string) {
	select {
	case a.oom <- id:
	default:
	}
}

// UpdateEphemeralMounts resizes memory-backed storages.
func (a *agent) UpdateEphemeralMounts(_ context.Context, req *pb.UpdateEphemeralMountsRequest) (*emptypb.Empty, error) {
	return done(a.storages.resize(req.Storages))
}

// RemoveStaleVirtiofsShareMounts lets go of shared file systems that the host took away.
func (a *agent) RemoveStaleVirtiofsShareMounts(context.Context, *pb.RemoveStaleVirtiofsShareMountsRequest) (*emptypb.Empty, error) {
	return done(detachStaleShares())
}
