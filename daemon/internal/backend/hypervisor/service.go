package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// Config is what a Service is made of. Socket, Dir and Log are required.
type Config struct {
	// Socket is where the shims find the service.
	Socket string
	// Dir holds a directory per VM. It belongs on a file system that does not survive a reboot, and
	// must be short: a socket's path has at most 107 bytes.
	Dir string
	// QEMU is the program's path and Virtiofsd the command, as package host finds them. Without
	// them, and the fields below, the Service starts no VM: it adopts and ends those of an earlier one.
	QEMU      string
	Virtiofsd []string
	// Kernel is an uncompressed vmlinux with a PVH entry; Initrd's /init is the guest's agent.
	Kernel, Initrd string
	// Accelerator is "kvm" or "tcg".
	Accelerator string
	Log         *slog.Logger
}

// A Service runs VMs for Kata's shims.
type Service struct {
	cfg Config

	mu  sync.Mutex
	vms map[string]*machine
}

// A VM is what VMs tells of one that exists.
type VM struct {
	ID string
	// Shim and QEMU are pids; QEMU is 0 until the VM was started.
	Shim, QEMU int
	VCPUs      int
	// MemoryMiB is the sandbox's memory, without the headroom.
	MemoryMiB int
	Since     time.Time
}

// Recovery is what Recover found: ids of VMs that live on, and of those that were cleaned away.
type Recovery struct {
	Adopted, Removed []string
}

var (
	idRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]*$`)
	// pathRE leaves out what QEMU, virtiofsd or the shim would not take literally, such as , and :
	pathRE = regexp.MustCompile(`^/[A-Za-z0-9/_.+-]+$`)
)

const (
	maxIDLen      = 40  // room for a UUID
	maxSocketPath = 107 // sun_path, less the final zero
)

// New checks the configuration and the host. What is missing is errdefs.ErrFailedPrecondition; what is misconfigured,
// errdefs.ErrInvalidArgument.
func New(cfg Config) (*Service, error) {
	for what, path := range map[string]string{"socket": cfg.Socket, "run directory": cfg.Dir} {
		if !pathRE.MatchString(path) || filepath.Clean(path) != path {
			return nil, fmt.Errorf("use %q as the VMs' %s: need an absolute path of letters, digits and /_.+-: %w",
				path, what, errdefs.ErrInvalidArgument)
		}
	}
	if len(cfg.Socket) > maxSocketPath {
		return nil, fmt.Errorf("use %s as the VMs' socket: it is longer than %d bytes: %w",
			cfg.Socket, maxSocketPath, errdefs.ErrInvalidArgument)
	}
	if limit := maxSocketPath - len("/") - maxIDLen - len("/"+agentSocket); len(cfg.Dir) > limit {
		return nil, fmt.Errorf("use %s as the VMs' run directory: it is longer than %d bytes, and sockets below it would "+
			"not fit the system's limit: %w", cfg.Dir, limit, errdefs.ErrInvalidArgument)
	}
	if cfg.QEMU != "" {
		if err := errors.Join(requireFile("kernel", cfg.Kernel), requireFile("initramfs", cfg.Initrd)); err != nil {
			return nil, err
		}
		if cfg.Accelerator != "kvm" && cfg.Accelerator != "tcg" {
			return nil, fmt.Errorf("use accelerator %q: need kvm or tcg: %w", cfg.Accelerator, errdefs.ErrInvalidArgument)
		}
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the VMs' run directory: %w", err)
	}
	return &Service{cfg: cfg, vms: make(map[string]*machine)}, nil
}

// VMs lists the VMs that exist, by id.
func (s *Service) VMs() []VM {
	s.mu.Lock()
	machines := make([]*machine, 0, len(s.vms))
	for _, m := range s.vms {
		machines = append(machines, m)
	}
	s.mu.Unlock()
	vms := make([]VM, 0, len(machines))
	for _, m := range machines {
		vms = append(vms, VM{ID: m.ID, Shim: m.Shim.PID, QEMU: m.pid(roleQEMU),
			VCPUs: m.VCPUs, MemoryMiB: m.MemoryMiB, Since: m.Since})
	}
	slices.SortFunc(vms, func(a, b VM) int { return strings.Compare(a.ID, b.ID) })
	return vms
}

// IDs lists the VMs that exist.
func (s *Service) IDs() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.vms))
}

// Recover adopts the VMs of an earlier Service on the same Dir, and removes what is left of those
// that lost their shim. One that lost another part is adopted with its shim, which reports its end;
// Serve takes it down. Call it once, before Serve. An error names what could not be removed; the
// rest was done.
func (s *Service) Recover(ctx context.Context) (Recovery, error) {
	found, err := markedProcesses()
	if err != nil {
		return Recovery{}, err
	}
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		return Recovery{}, fmt.Errorf("recover VMs: %w", err)
	}
	ids := make(map[string]bool)
	for _, e := range entries {
		if e.IsDir() && validateID(e.Name()) == nil { // no other name is ours
			ids[e.Name()] = true
		}
	}
	for dir := range found { // processes may outlive their directory
		if filepath.Dir(dir) == s.cfg.Dir {
			ids[filepath.Base(dir)] = true
		}
	}

	var recovery Recovery
	var errs []error
	for id := range ids {
		m, err := s.adopt(id, found[s.dir(id)])
		if err == nil {
			s.mu.Lock()
			s.vms[id] = m
			s.mu.Unlock()
			recovery.Adopted = append(recovery.Adopted, id)
			continue
		}
		s.cfg.Log.Warn("removing a VM that cannot be adopted", "sandbox", id, "err", err)
		if err := s.Remove(ctx, id); err != nil {
			errs = append(errs, err)
			continue
		}
		recovery.Removed = append(recovery.Removed, id)
	}
	slices.Sort(recovery.Adopted)
	slices.Sort(recovery.Removed)
	return recovery, errors.Join(errs...)
}

// adopt takes hold of a VM whose shim is alive.
func (s *Service) adopt(id string, found []markedProcess) (*machine, error) {
	st, err := readState(s.dir(id))
	if err != nil {
		return nil, err
	}
	shim, err := st.Shim.open()
	if err != nil {
		return nil, err
	}
	if shim == nil {
		return nil, errors.New("its shim has ended")
	}
	shim.Close()
	m := newMachine(s.dir(id), st)
	m.abort = func(error) {} // its boot is over
	for _, p := range found {
		// virtiofsd is two processes, and ends with either: the first is as good.
		if m.pid(p.role) == 0 {
			m.setPID(p.role, p.pid)
		}
	}
	return m, nil
}

// Remove ends a VM and removes all that the Service holds of it. Its shim sees the end, and is left
// alone. An unknown id is no error: what can be found by the id is removed.
func (s *Service) Remove(ctx context.Context, id string) error {
	err := validateID(id)
	m := s.lookup(id)
	switch {
	case err != nil:
	case m == nil:
		err = discard(ctx, s.dir(id))
	default:
		err = m.takeDown(ctx)
	}
	if err != nil {
		return fmt.Errorf("remove VM %q: %w", id, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if m != nil && s.vms[id] == m {
		delete(s.vms, id)
	}
	return nil
}

func (s *Service) lookup(id string) *machine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.vms[id]
}

func (s *Service) dir(id string) string { return filepath.Join(s.cfg.Dir, id) }

func validateID(id string) error {
	if len(id) > maxIDLen || !idRE.MatchString(id) {
		return fmt.Errorf("use %.80q as the id of a VM: need at most %d of A-Z, a-z, 0-9, _, . and -: %w",
			id, maxIDLen, errdefs.ErrInvalidArgument)
	}
	return nil
}

const (
	// removalLimit bounds a removal that nobody waits for.
	removalLimit = 30 * time.Second
	// drainLimit bounds how long Serve waits for calls under way when it ends.
	drainLimit = 10 * time.Second
	trimEvery  = 10 * time.Second
	// watchPause is how long Serve leaves a process alone that it cannot watch, such as when it has no descriptor left.
	watchPause = time.Second
)

// Serve answers shims, and watches over the VMs, until ctx ends. VMs stay as they are.
func (s *Service) Serve(ctx context.Context) error {
	listener, err := s.listen()
	if err != nil {
		return err
	}
	watchers, ctx := errgroup.WithContext(ctx)
	watch := func(p *process.Process, died func(context.Context)) {
		watchers.Go(func() error {
			if p != nil {
				defer p.Close()
				for err := p.Wait(ctx); err != nil; err = p.Wait(ctx) {
					if ctx.Err() != nil {
						return nil
					}
					s.cfg.Log.Warn("watch over a VM's process; trying again", "pid", p.PID, "err", err)
					select {
					case <-time.After(watchPause):
					case <-ctx.Done():
						return nil
					}
				}
			}
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removalLimit)
			defer cancel()
			died(ctx)
			return nil
		})
	}
	watchers.Go(func() error {
		for tick := time.Tick(trimEvery); ; {
			select {
			case <-tick:
				s.trimLogs()
			case <-ctx.Done():
				return nil
			}
		}
	})
	watchers.Go(func() error {
		if err := s.watchAdopted(watch); err != nil {
			listener.Close()
			return err
		}
		return s.serveCalls(ctx, listener, watch)
	})
	return watchers.Wait()
}

// A watchFunc has someone wait for a process to end, close it, and then call died. A nil process
// has ended already.
type watchFunc func(p *process.Process, died func(context.Context))

func (s *Service) watchAdopted(watch watchFunc) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.vms {
		shim, err := m.Shim.open()
		if err != nil {
			return fmt.Errorf("watch over VM %q: %w", m.ID, err)
		}
		s.watchShim(watch, m, shim)
		if err := s.watchParts(watch, m); err != nil {
			return fmt.Errorf("watch over VM %q: %w", m.ID, err)
		}
	}
	return nil
}

func (s *Service) watchShim(watch watchFunc, m *machine, shim *process.Process) {
	watch(shim, func(ctx context.Context) {
		if m.leave() {
			s.cfg.Log.Warn("removing a VM whose shim has ended", "sandbox", m.ID)
		}
		if err := s.Remove(ctx, m.ID); err != nil {
			s.cfg.Log.Error("a VM whose shim has ended is not quite removed", "sandbox", m.ID, "err", err)
		}
	})
}

// watchParts takes the VM down when any of its processes ends. A guest without its share would hang;
// the shim sees a guest that is gone, and reports it.
func (s *Service) watchParts(watch watchFunc, m *machine) error {
	for _, part := range parts {
		p, err := m.open(part)
		if err != nil {
			return err
		}
		watch(p, func(ctx context.Context) {
			if !m.leave() {
				return // someone ends it
			}
			words := lastWords(m.dir)
			s.cfg.Log.Error("removing a VM that lost a process", "sandbox", m.ID, "process", part,
				"console", s.keepConsole(m), "last_words", words)
			if err := s.Remove(ctx, m.ID); err != nil {
				s.cfg.Log.Error("a VM that lost a process is not quite removed", "sandbox", m.ID, "err", err)
			}
		})
	}
	return nil
}
