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
	"github.com/msbd/msbd/daemon/internal/sys/control"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// Config is the configuration of a Service. Socket, Dir and Log are required.
type Config struct {
	// Socket is the path of the Unix socket that the shims call.
	Socket string
	// Dir holds a directory per VM. It must be on a file system that is empty after a reboot. Its path must be short,
	// because the path of a socket below it has at most 107 bytes.
	Dir string
	// QEMU is the program's path, as package host finds it. If it is empty, the Service starts no VMs and needs none of
	// the fields below except Programs and Log. It then only adopts and removes VMs of an earlier Service.
	QEMU string
	// Programs are the paths of the executables of QEMU and virtiofsd. A Service recognizes by them the processes that
	// an earlier Service did not record.
	Programs []string
	// UIDs are the users of QEMU: each VM has one of its own. No other program of this host may use them.
	UIDs process.UIDs
	// Kernel is an uncompressed vmlinux with a PVH entry point. The /init of Initrd is the guest agent.
	Kernel, Initrd string
	// Accelerator is "kvm" or "tcg".
	Accelerator string
	// DiskMiBPerSecond and DiskOpsPerSecond limit what all disks of a VM together read and write; 0 means unlimited.
	DiskMiBPerSecond, DiskOpsPerSecond int
	// TemplateDir holds the templates, and MaxTemplates is how many of them the Service keeps, each of which takes 100 to 200
	// MiB of memory and of disk. If it is 0, there are none.
	TemplateDir  string
	MaxTemplates int
	Log          *slog.Logger
}

// A Service runs VMs for Kata's shims.
type Service struct {
	cfg Config

	// tasks are what runs in the background. Their context ends when Serve ends.
	tasks    sync.WaitGroup
	lifetime context.Context
	end      context.CancelFunc

	templates templates

	mu  sync.Mutex
	vms map[string]*machine
}

// Disks are the paths of a VM's disks.
type Disks struct {
	// Image has the files of the sandbox's image (erofs). The VM only reads it.
	Image string `json:"image"`
	// Upper has what the sandbox has written on top of its image (ext4).
	Upper string `json:"upper"`
}

// A VM describes an existing VM.
type VM struct {
	ID string
	// Shim and QEMU are pids. Shim is 0 until the shim has joined the VM. QEMU is 0 until it has been started.
	Shim, QEMU int
	VCPUs      int
	// MemoryMiB is the sandbox's memory, without the headroom for the guest's kernel and agent.
	MemoryMiB int
	// Since is when the VM was created.
	Since time.Time
}

// Recovery is the result of Recover: the ids of the VMs that were adopted, and of those that were removed.
type Recovery struct {
	Adopted, Removed []string
}

var (
	idRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]*$`)
	// pathRE excludes characters that have a meaning for QEMU, virtiofsd or the shim, such as , and :
	pathRE = regexp.MustCompile(`^/[A-Za-z0-9/_.+-]+$`)
)

const (
	maxIDLen      = 40  // enough for a UUID
	maxSocketPath = 107 // size of sun_path, without the terminating zero
)

// New returns a Service that does not run yet. It returns errdefs.ErrFailedPrecondition if a file is missing on the
// host, and errdefs.ErrInvalidArgument if cfg is invalid. Call Recover and then Serve.
func New(cfg Config) (*Service, error) {
	for use, path := range map[string]string{"socket": cfg.Socket, "run directory": cfg.Dir} {
		if !pathRE.MatchString(path) || filepath.Clean(path) != path {
			return nil, fmt.Errorf("invalid VM %s %q: it must be an absolute path of letters, digits and /_.+-: %w",
				use, path, errdefs.ErrInvalidArgument)
		}
	}
	if len(cfg.Socket) > maxSocketPath {
		return nil, fmt.Errorf("invalid VM socket %q: it is longer than %d bytes: %w",
			cfg.Socket, maxSocketPath, errdefs.ErrInvalidArgument)
	}
	if limit := maxSocketPath - len("/") - maxIDLen - len("/"+agentSocket); len(cfg.Dir) > limit {
		return nil, fmt.Errorf("invalid VM run directory %q: it is longer than %d bytes, so the paths of sockets below it "+
			"would be too long: %w", cfg.Dir, limit, errdefs.ErrInvalidArgument)
	}
	if cfg.QEMU != "" {
		if err := errors.Join(requireFile("kernel", cfg.Kernel), requireFile("initramfs", cfg.Initrd)); err != nil {
			return nil, err
		}
		if cfg.UIDs.First == 0 || cfg.UIDs.Count == 0 {
			return nil, fmt.Errorf("invalid users %+v for QEMU: there must be at least one, and not root: %w", cfg.UIDs, errdefs.ErrInvalidArgument)
		}
		if cfg.Accelerator != "kvm" && cfg.Accelerator != "tcg" {
			return nil, fmt.Errorf("invalid accelerator %q: it must be kvm or tcg: %w", cfg.Accelerator, errdefs.ErrInvalidArgument)
		}
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("create the VMs' run directory: %w", err)
	}
	s := &Service{cfg: cfg, vms: make(map[string]*machine)}
	if cfg.QEMU != "" && cfg.MaxTemplates > 0 {
		host, err := hostKey(cfg)
		if err == nil {
			err = os.MkdirAll(cfg.TemplateDir, 0o700)
		}
		if err != nil {
			return nil, fmt.Errorf("prepare templates: %w", err)
		}
		s.templates.dir, s.templates.max, s.templates.log = cfg.TemplateDir, cfg.MaxTemplates, cfg.Log
		if err := s.templates.load(host); err != nil {
			return nil, err
		}
	}
	s.lifetime, s.end = context.WithCancel(context.Background())
	return s, nil
}

// VMs returns all VMs, sorted by id.
func (s *Service) VMs() []VM {
	s.mu.Lock()
	machines := make([]*machine, 0, len(s.vms))
	for _, m := range s.vms {
		machines = append(machines, m)
	}
	s.mu.Unlock()
	vms := make([]VM, 0, len(machines))
	for _, m := range machines {
		vms = append(vms, VM{ID: m.ID, Shim: m.shim().PID, QEMU: m.process(roleQEMU).PID,
			VCPUs: m.VCPUs, MemoryMiB: m.MemoryMiB, Since: m.Since})
	}
	slices.SortFunc(vms, func(a, b VM) int { return strings.Compare(a.ID, b.ID) })
	return vms
}

// IDs returns the ids of all VMs, in no particular order.
func (s *Service) IDs() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.vms))
}

// Recover adopts the VMs of an earlier Service with the same Dir, and removes those whose shim has died. It also adopts
// a VM that lost another process, so that its shim can report the end; Serve then removes that VM. Call Recover once,
// before Serve. If some VMs cannot be removed, Recover still handles all others and returns an error that names them.
func (s *Service) Recover(ctx context.Context) (Recovery, error) {
	found, err := s.marked(func(dir string) bool { return filepath.Dir(dir) == s.cfg.Dir })
	defer process.CloseAll(found)
	if err != nil {
		return Recovery{}, err
	}
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		return Recovery{}, fmt.Errorf("recover VMs: %w", err)
	}
	ids := make(map[string]bool)
	for _, e := range entries {
		if e.IsDir() && validateID(e.Name()) == nil { // other names are not VM directories
			ids[e.Name()] = true
		}
	}
	for _, p := range found { // a VM may have processes but no directory
		_, dir := readMark(p.PID)
		if id := filepath.Base(dir); dir == s.dir(id) && validateID(id) == nil {
			ids[id] = true
		}
	}

	var recovery Recovery
	var errs []error
	for id := range ids {
		m, err := s.adopt(id, found)
		if err == nil {
			s.mu.Lock()
			s.vms[id] = m
			s.mu.Unlock()
			recovery.Adopted = append(recovery.Adopted, id)
			continue
		}
		s.cfg.Log.Warn("removing a VM that cannot be adopted", "sandbox", id, "err", err)
		limited, cancel := context.WithTimeout(ctx, removalTimeout)
		err = s.Remove(limited, id)
		cancel()
		if err != nil {
			errs = append(errs, err)
			s.keep(id)
			continue
		}
		recovery.Removed = append(recovery.Removed, id)
	}
	slices.Sort(recovery.Adopted)
	slices.Sort(recovery.Removed)
	return recovery, errors.Join(errs...)
}

// keep adds VM id, which could not be removed, to the Service, so that nothing else gets its user.
func (s *Service) keep(id string) {
	st, _ := readState(s.dir(id)) // without a valid state file, its user is not known
	st.ID = id
	s.mu.Lock()
	defer s.mu.Unlock()
	s.vms[id] = newMachine(s.dir(id), st)
}

// adopt returns the machine for VM id of an earlier Service. found are the marked processes of all VMs. adopt uses them
// only where the state file records no process. It returns an error unless the VM's shim is alive.
func (s *Service) adopt(id string, found []*process.Process) (*machine, error) {
	st, err := readState(s.dir(id))
	if err != nil {
		return nil, err
	}
	if st.Shim.PID == 0 {
		return nil, errors.New("its start was interrupted")
	}
	shim, err := st.Shim.Open()
	if err != nil {
		return nil, err
	}
	if shim == nil {
		return nil, errors.New("its shim has exited")
	}
	shim.Close()
	m := newMachine(s.dir(id), st)
	m.started = true
	for _, p := range found {
		// virtiofsd has two processes, and if one exits, so does the other. Either can be recorded.
		if r, dir := readMark(p.PID); dir == m.dir && m.process(r) == (process.ID{}) {
			_ = m.record(r, p) // fails if it has ended, and then the VM lacks it
		}
	}
	return m, nil
}

// Remove kills the processes of VM id and removes its directory. It does not touch the VM's shim, which notices that
// the guest is gone. If id is unknown, Remove still looks for processes and a directory with this id, and removes them.
// It returns nil if there are none.
func (s *Service) Remove(ctx context.Context, id string) error {
	err := validateID(id)
	m := s.lookup(id)
	switch {
	case err != nil:
	case m == nil:
		err = s.removeVM(ctx, s.dir(id))
	default:
		err = s.remove(ctx, m)
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

// Cold returns why the VM id, which has started, is not a clone of a template. It is empty if it is one.
func (s *Service) Cold(id string) (why string) {
	m := s.lookup(id)
	if m == nil {
		return "the VM was removed"
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cold
}

// SetHostname changes the hostname of the sandbox in the VM id. It returns errdefs.ErrNotFound if there is no such VM, and
// errdefs.ErrNotImplemented if the VM is one of an earlier version.
func (s *Service) SetHostname(ctx context.Context, id, hostname string) error {
	m := s.lookup(id)
	switch {
	case m == nil:
		return fmt.Errorf("change the hostname of VM %q: %w", id, errdefs.ErrNotFound)
	case m.Disks == nil:
		return fmt.Errorf("change the hostname of VM %q: it is one of an earlier version of msbd: %w", id, errdefs.ErrNotImplemented)
	}
	return s.withControl(ctx, m, func(agent *control.Client) error { return agent.SetHostname(ctx, hostname) })
}

func (s *Service) lookup(id string) *machine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.vms[id]
}

func (s *Service) dir(id string) string { return filepath.Join(s.cfg.Dir, id) }

func validateID(id string) error {
	if len(id) > maxIDLen || !idRE.MatchString(id) {
		return fmt.Errorf("invalid VM id %.80q: it must have at most %d characters of A-Z, a-z, 0-9, _, . and -: %w",
			id, maxIDLen, errdefs.ErrInvalidArgument)
	}
	return nil
}

const (
	// removalTimeout bounds a removal that the Service itself starts.
	removalTimeout = 30 * time.Second
	// drainTimeout bounds how long Serve waits for calls in progress when ctx ends.
	drainTimeout = 10 * time.Second
	// watchRetryDelay is how long Serve waits before it tries again to watch a process, for example if there are no
	// free file descriptors.
	watchRetryDelay = time.Second
)

// Serve serves the shims' calls and watches the VMs until ctx ends. The VMs keep running after it returns.
func (s *Service) Serve(ctx context.Context) error {
	defer s.tasks.Wait()
	defer s.end()
	defer context.AfterFunc(ctx, s.end)()
	listener, err := s.listen()
	if err != nil {
		return err
	}
	if err := s.watchAdopted(); err != nil {
		listener.Close()
		return err
	}
	return s.serveCalls(ctx, listener)
}

// run runs a task in a goroutine. The task's context ends when Serve ends, which waits for the task.
func (s *Service) run(task func(context.Context)) {
	s.tasks.Go(func() { task(s.lifetime) })
}

// watch calls died once p has exited. It closes p. A nil p stands for a process that has already exited.
func (s *Service) watch(p *process.Process, died func(context.Context)) {
	s.run(func(ctx context.Context) {
		if p != nil {
			defer p.Close()
			for err := p.Wait(ctx); err != nil; err = p.Wait(ctx) {
				if ctx.Err() != nil {
					return
				}
				s.cfg.Log.Warn("could not watch a VM's process; trying again", "pid", p.PID, "err", err)
				select {
				case <-time.After(watchRetryDelay):
				case <-ctx.Done():
					return
				}
			}
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removalTimeout)
		defer cancel()
		died(ctx)
	})
}

// followClock keeps the clock of the guest of m that of this host, until the removal of m begins. A guest of an earlier version,
// which has no disks, does that itself.
func (s *Service) followClock(m *machine) {
	if m.Disks == nil {
		return
	}
	s.run(func(stop context.Context) {
		ctx, cancel := context.WithCancel(m.gone)
		defer cancel()
		defer context.AfterFunc(stop, cancel)()
		control.Follow(ctx, filepath.Join(m.dir, controlSocket), s.cfg.Log.With("sandbox", m.ID))
	})
}

// watchAdopted watches the processes of all VMs that Recover adopted.
func (s *Service) watchAdopted() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.vms {
		shim, err := m.Shim.Open()
		if err != nil {
			return fmt.Errorf("watch VM %q: %w", m.ID, err)
		}
		s.watchShim(m, shim)
		s.adoptLogs(m)
		if err := m.emptyJail(); err != nil { // msbd may have been killed before it did that
			s.cfg.Log.Error("removing a VM whose QEMU may see files of the host", "sandbox", m.ID, "err", err)
			s.watch(nil, func(ctx context.Context) {
				if err := s.Remove(ctx, m.ID); err != nil {
					s.cfg.Log.Error("could not remove a VM", "sandbox", m.ID, "err", err)
				}
			})
			continue
		}
		s.followClock(m)
		if err := s.watchProcesses(m); err != nil {
			return fmt.Errorf("watch VM %q: %w", m.ID, err)
		}
	}
	return nil
}

// watchShim removes the VM when its shim exits.
func (s *Service) watchShim(m *machine, shim *process.Process) {
	s.watch(shim, func(ctx context.Context) {
		if m.startRemoval() {
			s.cfg.Log.Warn("removing a VM whose shim has exited", "sandbox", m.ID)
		}
		if err := s.Remove(ctx, m.ID); err != nil {
			s.cfg.Log.Error("could not remove a VM whose shim has exited", "sandbox", m.ID, "err", err)
		}
	})
}

// watchProcesses removes the VM when QEMU exits, or the virtiofsd of a VM of an earlier version, without which the guest
// would hang. The shim notices that the guest is gone, and reports it.
func (s *Service) watchProcesses(m *machine) error {
	for _, role := range m.roles() {
		p, err := m.process(role).Open()
		if err != nil {
			return err
		}
		s.watch(p, func(ctx context.Context) {
			if !m.startRemoval() {
				return // it is already being removed
			}
			words := m.lastWords()
			if outOfMemory(m.ID) {
				words = "QEMU was killed because it reached its memory limit" + words
			}
			s.cfg.Log.Error("removing a VM whose process has exited", "sandbox", m.ID, "process", role,
				"console", s.keepConsole(m), "last_words", words)
			if err := s.Remove(ctx, m.ID); err != nil {
				s.cfg.Log.Error("could not remove a VM whose process has exited", "sandbox", m.ID, "err", err)
			}
		})
	}
	return nil
}
