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

// These are the annotations that Kata's shim sends with CreateVM. They are copied from Kata's package annotations,
// because importing it would add much of Kata as dependencies.
const (
	annotationVCPUs  = "io.katacontainers.config.hypervisor.default_vcpus"
	annotationMemory = "io.katacontainers.config.hypervisor.default_memory" // MiB
)

// A hypervisor implements Kata's remote hypervisor API.
type hypervisor struct{ supervisor }

// CreateVM records a VM. StartVM starts QEMU.
func (h hypervisor) CreateVM(ctx context.Context, req *pb.CreateVMRequest) (*pb.CreateVMResponse, error) {
	m, shim, err := h.create(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("create VM %q: %w", req.GetId(), err)
	}
	h.watchShim(m, shim)
	return &pb.CreateVMResponse{AgentSocketPath: filepath.Join(m.dir, agentSocket)}, nil
}

// create records the VM that req describes, and returns it with the process of the calling shim. The caller must close
// the process. It returns errdefs.ErrInvalidArgument if req is not valid, errdefs.ErrFailedPrecondition if this server
// starts no VMs or the VM has no disks, and errdefs.ErrAlreadyExists if there is a VM with this id.
func (s *Service) create(ctx context.Context, req *pb.CreateVMRequest) (*machine, *process.Process, error) {
	if err := validateID(req.GetId()); err != nil {
		return nil, nil, err
	}
	if s.cfg.QEMU == "" {
		return nil, nil, fmt.Errorf("this server is not configured to run VMs for Kata's shims: %w", errdefs.ErrFailedPrecondition)
	}
	image, upper, ok := s.cfg.Disks(req.GetId())
	if !ok {
		return nil, nil, fmt.Errorf("it has no disks; only sandboxes of this server can be started: %w", errdefs.ErrFailedPrecondition)
	}
	st := state{ID: req.GetId(), Since: time.Now(), Disks: &Disks{Image: image, Upper: upper}}
	for key, value := range map[string]*int{annotationVCPUs: &st.VCPUs, annotationMemory: &st.MemoryMiB} {
		n, err := strconv.Atoi(req.GetAnnotations()[key])
		if err != nil || n < 1 || n > 1<<24 {
			return nil, nil, fmt.Errorf("annotation %s is %q, want a positive number: %w", key, req.GetAnnotations()[key], errdefs.ErrInvalidArgument)
		}
		*value = n
	}
	shim, err := callerProcess(ctx)
	if err != nil {
		return nil, nil, err
	}
	if st.Shim, err = shim.ID(); err != nil {
		shim.Close()
		return nil, nil, err
	}
	m, err := s.add(st)
	if err != nil {
		shim.Close()
		return nil, nil, err
	}
	err = os.Mkdir(m.dir, 0o700)
	if err == nil {
		err = durable.SyncDir(s.cfg.Dir)
	}
	if err == nil {
		err = writeState(m.dir, m.state)
	}
	if err != nil {
		shim.Close()
		return nil, nil, errors.Join(err, s.Remove(context.WithoutCancel(ctx), st.ID))
	}
	return m, shim, nil
}

// add adds a machine for st to the Service, with the first user that no other machine has. It returns
// errdefs.ErrAlreadyExists if there is a VM with this id, and errdefs.ErrResourceExhausted if all users are taken.
func (s *Service) add(st state) (*machine, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, exists := s.vms[st.ID]; exists {
		return nil, errdefs.ErrAlreadyExists
	}
	taken := map[uint32]bool{}
	for _, m := range s.vms {
		taken[m.UID] = true
	}
	for st.UID = s.cfg.UIDs.First; taken[st.UID]; st.UID++ {
	}
	if !s.cfg.UIDs.Contains(st.UID) {
		return nil, fmt.Errorf("all %d users for QEMU are taken: %w", s.cfg.UIDs.Count, errdefs.ErrResourceExhausted)
	}
	m := newMachine(s.dir(st.ID), st)
	s.vms[st.ID] = m
	return m, nil
}

// StartVM boots the VM and returns when the guest's agent is ready for the shim. On error it removes the VM, and keeps
// only its console log if that is not empty.
func (h hypervisor) StartVM(ctx context.Context, req *pb.StartVMRequest) (*pb.StartVMResponse, error) {
	m := h.lookup(req.GetId())
	if m == nil {
		return nil, fmt.Errorf("start VM %q: it was not created, or has been removed: %w", req.GetId(), errdefs.ErrNotFound)
	}
	bootCtx, cancelBoot := context.WithCancelCause(ctx)
	defer cancelBoot(nil)
	if err := m.claimStart(cancelBoot); err != nil {
		return nil, fmt.Errorf("start VM %q: %w", m.ID, err)
	}
	m.busy <- struct{}{} // only Remove can hold busy here, and it has already canceled this boot
	err := h.boot(bootCtx, m)
	<-m.busy
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
func (sup supervisor) serveCalls(ctx context.Context, listener *net.UnixListener) error {
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
	pb.RegisterHypervisorService(server, hypervisor{sup})
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
			sup.cfg.Log.Warn("could not accept a connection to the hypervisor socket; trying again", "err", err, "in", pause)
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
			sup.cfg.Log.Warn("rejecting a connection to the hypervisor socket", "err", err)
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
