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

	"github.com/msbd/msbd/daemon/internal/sys/durable"
	"github.com/msbd/msbd/daemon/internal/sys/peer"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// What Kata's shim says of a VM: kata's pkg annotations, which would bring half of Kata along.
const (
	annotationVCPUs  = "io.katacontainers.config.hypervisor.default_vcpus"
	annotationMemory = "io.katacontainers.config.hypervisor.default_memory" // MiB
)

// A hypervisor answers the calls of Kata's remote hypervisor API.
type hypervisor struct {
	*Service
	watch watchFunc
}

// CreateVM records a VM. Its processes start with StartVM: only then does the directory that the
// shim shares exist.
func (h hypervisor) CreateVM(ctx context.Context, req *pb.CreateVMRequest) (*pb.CreateVMResponse, error) {
	m, shim, err := h.create(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("create VM %q: %w", req.GetId(), err)
	}
	h.watchShim(h.watch, m, shim)
	return &pb.CreateVMResponse{AgentSocketPath: filepath.Join(m.dir, agentSocket)}, nil
}

func (s *Service) create(ctx context.Context, req *pb.CreateVMRequest) (*machine, *process.Process, error) {
	if err := validateID(req.GetId()); err != nil {
		return nil, nil, err
	}
	if s.cfg.QEMU == "" {
		return nil, nil, fmt.Errorf("this server has another hypervisor: %w", errdefs.ErrFailedPrecondition)
	}
	st := state{ID: req.GetId(), Since: time.Now()}
	for key, value := range map[string]*int{annotationVCPUs: &st.VCPUs, annotationMemory: &st.MemoryMiB} {
		n, err := strconv.Atoi(req.GetAnnotations()[key])
		if err != nil || n < 1 || n > 1<<24 {
			return nil, nil, fmt.Errorf("annotation %s is %q: %w", key, req.GetAnnotations()[key], errdefs.ErrInvalidArgument)
		}
		*value = n
	}
	shim, start, err := caller(ctx)
	if err != nil {
		return nil, nil, err
	}
	st.Shim = shimState{PID: shim.PID, Start: start}
	m := newMachine(s.dir(st.ID), st)

	s.mu.Lock()
	_, exists := s.vms[st.ID]
	if !exists {
		s.vms[st.ID] = m
	}
	s.mu.Unlock()
	if exists {
		shim.Close()
		return nil, nil, errdefs.ErrAlreadyExists
	}
	err = os.Mkdir(m.dir, 0o700)
	if err == nil {
		err = durable.SyncDir(s.cfg.Dir)
	}
	if err == nil {
		err = writeState(m.dir, st)
	}
	if err != nil {
		shim.Close()
		return nil, nil, errors.Join(err, s.Remove(context.WithoutCancel(ctx), st.ID))
	}
	return m, shim, nil
}

// StartVM boots the VM and returns when the guest's agent is ready for the shim. After an error
// nothing of the VM is left but its console, if that said anything.
func (h hypervisor) StartVM(ctx context.Context, req *pb.StartVMRequest) (*pb.StartVMResponse, error) {
	m := h.lookup(req.GetId())
	if m == nil {
		return nil, fmt.Errorf("start VM %q: it was never created: %w", req.GetId(), errdefs.ErrNotFound)
	}
	bootCtx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	if err := m.begin(abort); err != nil {
		return nil, fmt.Errorf("start VM %q: %w", m.ID, err)
	}
	m.work <- struct{}{} // only Remove can hold work here, and it has already cancelled this boot
	err := h.boot(bootCtx, m)
	<-m.work
	if err == nil {
		err = h.watchParts(h.watch, m)
	}
	if err == nil {
		return &pb.StartVMResponse{}, nil
	}
	err = fmt.Errorf("start VM %q: %w%s", m.ID, err, lastWords(m.dir))
	if console := h.keepConsole(m); console != "" {
		err = fmt.Errorf("%w\n(the whole console is in %s)", err, console)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removalLimit)
	defer cancel()
	return nil, errors.Join(err, h.Remove(ctx, m.ID))
}

// StopVM ends the VM. It succeeds for one that does not exist.
func (h hypervisor) StopVM(ctx context.Context, req *pb.StopVMRequest) (*pb.StopVMResponse, error) {
	if err := h.Remove(ctx, req.GetId()); err != nil {
		return nil, err
	}
	return &pb.StopVMResponse{}, nil
}

// Version is part of the API; Kata's shim does not ask.
func (h hypervisor) Version(context.Context, *pb.VersionRequest) (*pb.VersionResponse, error) {
	return &pb.VersionResponse{Version: "1"}, nil
}

type callerKey struct{}

// caller takes hold of the process at the other end of the call, and reads its start time.
func caller(ctx context.Context) (*process.Process, uint64, error) {
	pid, _ := ctx.Value(callerKey{}).(int)
	p, err := process.Open(pid)
	if err != nil {
		return nil, 0, err
	}
	if p == nil {
		return nil, 0, errors.New("the caller has ended")
	}
	start, err := process.StartTime(pid)
	if err != nil || p.Dead() { // alive after the look: it was this process's start time
		p.Close()
		return nil, 0, errors.Join(errors.New("the caller has ended"), err)
	}
	return p, start, nil
}

func (s *Service) listen() (*net.UnixListener, error) {
	// The daemon's own lock says that no other server has this socket.
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

// serveCalls answers until ctx ends, and then lets the calls under way finish.
func (s *Service) serveCalls(ctx context.Context, listener *net.UnixListener, watch watchFunc) error {
	defer listener.Close()
	defer context.AfterFunc(ctx, func() { listener.Close() })()

	var work sync.WaitGroup // connections and calls
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(
		func(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
			work.Add(1)
			defer work.Done()
			return method(ctx, unmarshal)
		}))
	if err != nil {
		return fmt.Errorf("serve shims: %w", err)
	}
	pb.RegisterHypervisorService(server, hypervisor{s, watch})
	defer func() {
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainLimit)
		defer cancel()
		if server.Shutdown(drain) != nil {
			server.Close()
		}
		work.Wait()
	}()
	const maxPause = time.Second
	for pause := time.Duration(0); ; {
		conn, err := listener.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && isTemporary(err) {
			pause = min(max(2*pause, 5*time.Millisecond), maxPause)
			s.cfg.Log.Warn("accept a call to the hypervisor socket; trying again", "err", err, "in", pause)
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
			s.cfg.Log.Warn("refusing a call to the hypervisor socket", "err", err)
			conn.Close()
			continue
		}
		// ttrpc hides the connection from its handlers: the context of a listener that accepts just
		// this one tells them who calls.
		work.Go(func() {
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

// callerPID returns the pid of the process at the other end, which must run as this server's user.
func callerPID(conn *net.UnixConn) (int, error) {
	p, err := peer.Of(conn)
	if err != nil {
		return 0, err
	}
	if int(p.UID) != os.Geteuid() {
		return 0, fmt.Errorf("it comes from uid %d: %w", p.UID, errdefs.ErrPermissionDenied)
	}
	return int(p.PID), nil
}

// A singleListener accepts one connection, and ends with it.
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

type closingConn struct {
	net.Conn
	listener *singleListener
}

func (c closingConn) Close() error {
	defer c.listener.Close()
	return c.Conn.Close()
}
