package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	pb "github.com/kata-containers/kata-containers/src/runtime/protocols/hypervisor"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/peer"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// These are the annotations that Kata's shim sends with CreateVM. They are copied from Kata's package annotations,
// because importing it would add much of Kata as dependencies.
const (
	annotationVCPUs  = "io.katacontainers.config.hypervisor.default_vcpus"
	annotationMemory = "io.katacontainers.config.hypervisor.default_memory" // MiB
)

// A hypervisor implements Kata's remote hypervisor API.
type hypervisor struct{ *Service }

// CreateVM makes the caller the shim of a VM that Start has begun to start.
func (h hypervisor) CreateVM(ctx context.Context, req *pb.CreateVMRequest) (*pb.CreateVMResponse, error) {
	m, shim, err := h.join(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("create VM %q: %w", req.GetId(), err)
	}
	h.watchShim(m, shim)
	return &pb.CreateVMResponse{AgentSocketPath: filepath.Join(m.dir, agentSocket)}, nil
}

// join records the calling process as the shim of the VM that req names, and returns both. The caller must close the
// process. join returns errdefs.ErrNotFound if Start was not called for the VM, errdefs.ErrInvalidArgument if req describes
// another VM than Start, and errdefs.ErrAlreadyExists if the VM has a shim.
func (s *Service) join(ctx context.Context, req *pb.CreateVMRequest) (*machine, *process.Process, error) {
	m := s.lookup(req.GetId())
	if m == nil {
		return nil, nil, fmt.Errorf("only sandboxes of this server can be started: %w", errdefs.ErrNotFound)
	}
	for key, want := range map[string]int{annotationVCPUs: m.VCPUs, annotationMemory: m.MemoryMiB} {
		if n, err := strconv.Atoi(req.GetAnnotations()[key]); err != nil || n != want {
			return nil, nil, fmt.Errorf("annotation %s is %q, want %d: %w", key, req.GetAnnotations()[key], want, errdefs.ErrInvalidArgument)
		}
	}
	shim, err := callerProcess(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := m.join(shim); err != nil {
		shim.Close()
		return nil, nil, err
	}
	return m, shim, nil
}

// StartVM waits until the VM has started. On error it removes the VM, and keeps only its console log if that is not
// empty.
func (h hypervisor) StartVM(ctx context.Context, req *pb.StartVMRequest) (*pb.StartVMResponse, error) {
	m := h.lookup(req.GetId())
	if m == nil || !m.claimStart() {
		return nil, fmt.Errorf("start VM %q: it was not created, was already started, or has been removed: %w", req.GetId(), errdefs.ErrFailedPrecondition)
	}
	err := m.waitBooted(ctx)
	if err == nil {
		h.followClock(m)
		err = h.watchProcesses(m)
	}
	if err == nil {
		return &pb.StartVMResponse{}, nil
	}
	err = fmt.Errorf("start VM %q: %w%s", m.ID, err, m.lastWords())
	if console := h.keepConsole(m); console != "" {
		err = fmt.Errorf("%w\n(the complete console log is in %s)", err, console)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removalTimeout)
	defer cancel()
	return nil, errors.Join(err, h.Remove(ctx, m.ID))
}

// StopVM removes the VM. It succeeds if the VM does not exist.
func (h hypervisor) StopVM(ctx context.Context, req *pb.StopVMRequest) (*pb.StopVMResponse, error) {
	if err := h.Remove(ctx, req.GetId()); err != nil {
		return nil, err
	}
	return &pb.StopVMResponse{}, nil
}

// Version is part of the API, but Kata's shim does not call it.
func (h hypervisor) Version(context.Context, *pb.VersionRequest) (*pb.VersionResponse, error) {
	return &pb.VersionResponse{Version: "1"}, nil
}

// callerKey is the context key for the pid of the calling process.
type callerKey struct{}

// callerProcess returns the process that made the call. The caller must close it.
func callerProcess(ctx context.Context) (*process.Process, error) {
	pid, _ := ctx.Value(callerKey{}).(int)
	p, err := process.Open(pid)
	if err != nil {
		return nil, err
	}
	if p == nil {
		return nil, errors.New("the calling process has exited")
	}
	return p, nil
}

func (s *Service) listen() (*net.UnixListener, error) {
	// The daemon's lock guarantees that no other server uses this socket.
	if err := os.Remove(s.cfg.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen for shims: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.cfg.Socket, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for shims: %w", err)
	}
	if err := os.Chmod(s.cfg.Socket, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen for shims: %w", err)
	}
	return l, nil
}

// serveCalls serves the API until ctx ends. Then it waits for the calls in progress.
func (s *Service) serveCalls(ctx context.Context, listener *net.UnixListener) error {
	defer listener.Close()
	defer context.AfterFunc(ctx, func() { listener.Close() })()

	var active sync.WaitGroup // connections and calls
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(
		func(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
			active.Add(1)
			defer active.Done()
			return method(ctx, unmarshal)
		}))
	if err != nil {
		return fmt.Errorf("serve shims: %w", err)
	}
	pb.RegisterHypervisorService(server, hypervisor{s})
	defer func() {
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		if server.Shutdown(drain) != nil {
			server.Close()
		}
		active.Wait()
	}()
	const maxPause = time.Second
	for pause := time.Duration(0); ; {
		conn, err := listener.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && isTemporary(err) {
			pause = min(max(2*pause, 5*time.Millisecond), maxPause)
			s.cfg.Log.Warn("could not accept a connection to the hypervisor socket; trying again", "err", err, "in", pause)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("serve shims: %w", err)
		}
		pause = 0
		pid, err := callerPID(conn)
		if err != nil {
			s.cfg.Log.Warn("rejecting a connection to the hypervisor socket", "err", err)
			conn.Close()
			continue
		}
		// ttrpc does not give handlers the connection. Serving each connection with its own listener and context passes
		// them the pid of the caller.
		active.Go(func() {
			ctx := context.WithValue(context.WithoutCancel(ctx), callerKey{}, pid)
			_ = server.Serve(ctx, newSingleListener(conn))
		})
	}
}

// isTemporary reports whether Accept may succeed if it is tried again.
func isTemporary(err error) bool {
	return slices.ContainsFunc([]error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED, unix.EINTR},
		func(e error) bool { return errors.Is(err, e) })
}

// callerPID returns the pid of the process at the other end of conn. It returns errdefs.ErrPermissionDenied unless that
// process runs as this server's user.
func callerPID(conn *net.UnixConn) (int, error) {
	p, err := peer.Of(conn)
	if err != nil {
		return 0, err
	}
	if int(p.UID) != os.Geteuid() {
		return 0, fmt.Errorf("the caller has uid %d: %w", p.UID, errdefs.ErrPermissionDenied)
	}
	return int(p.PID), nil
}

// A singleListener accepts one connection. It closes when that connection closes.
type singleListener struct {
	accept chan net.Conn
	closed chan struct{}
	once   sync.Once
	addr   net.Addr
}

func newSingleListener(conn net.Conn) *singleListener {
	l := &singleListener{accept: make(chan net.Conn, 1), closed: make(chan struct{}), addr: conn.LocalAddr()}
	l.accept <- closingConn{conn, l}
	return l
}

func (l *singleListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.accept:
		return conn, nil
	default:
	}
	<-l.closed
	return nil, net.ErrClosed
}

func (l *singleListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *singleListener) Addr() net.Addr { return l.addr }

// A closingConn closes the listener that accepted it when it is closed.
type closingConn struct {
	net.Conn
	listener *singleListener
}

func (c closingConn) Close() error {
	defer c.listener.Close()
	return c.Conn.Close()
}
