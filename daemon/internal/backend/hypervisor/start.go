package hypervisor

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/msbd/msbd/daemon/internal/backend/disk"
	"github.com/msbd/msbd/daemon/internal/backend/network"
	"github.com/msbd/msbd/daemon/internal/sys/control"
	"github.com/msbd/msbd/daemon/internal/sys/durable"
	"github.com/msbd/msbd/daemon/internal/sys/portalport"
)

// A Spec describes a VM to start.
type Spec struct {
	ID    string
	VCPUs int
	// MemoryMiB is the sandbox's memory, without the headroom for the guest's kernel and agent.
	MemoryMiB int
	Disks     Disks
	// Image identifies the content of Disks.Image.
	Image string
	// Container is the container that the VM is for. A VM can be a clone of a template if their containers have the same
	// spec, except for the hostname, the annotations and the path of the cgroup.
	Container *specs.Spec
	// KeepTemplate says that the template of this VM takes the place of those for which this is not set.
	KeepTemplate bool
}

// maxDiskData is the maximum number of bytes on the writable disk of a template, and on the empty disk of a VM that can be a
// clone. Holes do not count. The disk of a template is kept in memory, and copied for each clone.
const maxDiskData = 16 << 20

// Start begins to start a VM. It does not wait until the VM has started, so the VM starts while containerd starts the shim.
// The shim then joins the VM with CreateVM and StartVM, and StartVM returns the error of the start. If ctx ends before the VM
// has started, the start fails. The caller must call Remove if the sandbox does not start, also if Start returns an error.
//
// The VM is a clone of a template if there is one for spec. If the template cannot be restored, the VM boots.
func (s *Service) Start(ctx context.Context, spec Spec) error {
	m, err := s.create(spec)
	if err == nil {
		err = s.add(m)
	}
	if err == nil {
		err = s.makeDir(m)
	}
	if err != nil {
		return fmt.Errorf("start VM %q: %w", spec.ID, err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	if !m.claimBoot(cancel) {
		return fmt.Errorf("start VM %q: %w", spec.ID, errRemoved)
	}
	s.run(func(context.Context) {
		defer cancel(nil)
		m.booted <- s.start(ctx, m, spec)
		<-m.busy
	})
	return nil
}

// cloneTimeout bounds the time from the start of a clone's QEMU until its guest has responded. If that takes longer, the VM
// is booted instead.
func (s *Service) cloneTimeout() time.Duration {
	if s.cfg.Accelerator == "tcg" {
		return 15 * time.Second
	}
	return 2 * time.Second
}

// create returns a machine for spec, which has no user id yet. It returns errdefs.ErrInvalidArgument if spec is not valid, and
// errdefs.ErrFailedPrecondition if this server starts no VMs.
func (s *Service) create(spec Spec) (*machine, error) {
	if err := validateID(spec.ID); err != nil {
		return nil, err
	}
	if s.cfg.QEMU == "" {
		return nil, fmt.Errorf("this server is not configured to run VMs for Kata's shims: %w", errdefs.ErrFailedPrecondition)
	}
	if spec.VCPUs < 1 || spec.MemoryMiB < 1 || spec.MemoryMiB > 1<<24 {
		return nil, fmt.Errorf("%d processors and %d MiB: %w", spec.VCPUs, spec.MemoryMiB, errdefs.ErrInvalidArgument)
	}
	return newMachine(s.dir(spec.ID), state{
		ID: spec.ID, Since: time.Now(), Disks: &spec.Disks, VCPUs: spec.VCPUs, MemoryMiB: spec.MemoryMiB,
		Tap: tapFD, Token: portalport.NewToken(),
	}), nil
}

// add adds a machine to the Service, and gives it the first user id that no other machine has. It returns
// errdefs.ErrAlreadyExists if there is a VM with this id, and errdefs.ErrResourceExhausted if all user ids are taken.
func (s *Service) add(m *machine) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, exists := s.vms[m.ID]; exists {
		return errdefs.ErrAlreadyExists
	}
	taken := map[uint32]bool{}
	for _, m := range s.vms {
		taken[m.UID] = true
	}
	for m.UID = s.cfg.UIDs.First; taken[m.UID]; m.UID++ {
	}
	if !s.cfg.UIDs.Contains(m.UID) {
		return fmt.Errorf("all %d users for QEMU are taken: %w", s.cfg.UIDs.Count, errdefs.ErrResourceExhausted)
	}
	s.vms[m.ID] = m
	return nil
}

// makeDir creates the directory of the VM m, and its state file there.
func (s *Service) makeDir(m *machine) error {
	if err := os.Mkdir(m.dir, 0o700); err != nil {
		return err
	}
	if err := durable.SyncDir(s.cfg.Dir); err != nil {
		return err
	}
	return m.save()
}

// start starts the VM m as a clone of its template. Without a template, or if that fails, it boots the VM.
func (s *Service) start(ctx context.Context, m *machine, spec Spec) error {
	key, _, err := s.templateKey(spec)
	if err != nil {
		return err
	}
	t, why := s.templates.find(ctx, key)
	if t == nil {
		m.setCold(why)
		return s.boot(ctx, m, memory{})
	}
	defer t.close()
	upper, err := os.OpenFile(m.Disks.Upper, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer upper.Close()
	empty, err := disk.ReadExtents(upper, maxDiskData)
	if err == nil {
		err = replaceContent(upper, t.upper)
	}
	if err != nil {
		return err
	}
	err = s.clone(ctx, m, t)
	if err == nil {
		s.templates.worked(key)
	}
	if err == nil || ctx.Err() != nil {
		return err
	}
	words, endErr := s.endAttempt(ctx, m)
	s.cfg.Log.Warn("could not restore a template; booting the VM instead", "sandbox", m.ID, "template", key, "err", err, "last_words", words)
	if endErr != nil {
		return endErr
	}
	m.setCold("the template could not be restored")
	if err := replaceContent(upper, empty); err != nil { // not before QEMU has ended
		return err
	}
	err = s.boot(ctx, m, memory{})
	if err == nil { // otherwise the template is not to blame
		s.templates.failed(key)
	}
	return err
}

// replaceContent makes content the content of file. It does not change the size of file.
func replaceContent(file *os.File, content disk.Extents) error {
	info, err := file.Stat()
	if err == nil {
		err = errors.Join(file.Truncate(0), file.Truncate(info.Size()))
	}
	if err != nil {
		return err
	}
	return content.Write(file)
}

// endAttempt removes what a failed attempt to start the VM m has left: its processes, its cgroup, and its files except the
// state file. Then another attempt can begin.
func (s *Service) endAttempt(ctx context.Context, m *machine) (words string, err error) {
	if err := m.reap(ctx); err != nil {
		return "", err
	}
	words = m.lastWords()
	if err := removeCgroup(ctx, m.ID); err != nil {
		return words, err
	}
	entries, err := os.ReadDir(m.dir)
	for _, e := range entries {
		if e.Name() != stateFile {
			err = errors.Join(err, os.RemoveAll(filepath.Join(m.dir, e.Name())))
		}
	}
	return words, err
}

// boot starts QEMU in its jail, waits until the guest's agent has opened its port, and introduces the guest. mem is empty,
// or has the file of a template that is being built. On error, the caller must remove the machine.
func (s *Service) boot(ctx context.Context, m *machine, mem memory) error {
	return s.withQEMU(ctx, m, mem, func(monitor *monitor) error {
		if err := monitor.waitOpen(agentPort); err != nil {
			return err
		}
		return s.introduce(ctx, m)
	})
}

// clone starts QEMU in its jail with the memory and the state of t, and introduces the guest, which makes it differ from all
// other clones. On error, the caller must call endAttempt or remove the machine.
func (s *Service) clone(ctx context.Context, m *machine, t *template) error {
	limited, cancel := context.WithTimeoutCause(ctx, s.cloneTimeout(), errors.New("the restored guest does not respond"))
	defer cancel()
	return s.withQEMU(limited, m, memory{file: t.memory, state: t.state}, func(monitor *monitor) error {
		if err := monitor.restore(stateFD); err != nil {
			return err
		}
		return s.introduce(limited, m)
	})
}

// withQEMU starts QEMU in its jail, empties the jail, and calls do with a connection to QEMU's monitor.
func (s *Service) withQEMU(ctx context.Context, m *machine, mem memory, do func(*monitor) error) error {
	if err := s.launch(m, mem); err != nil {
		return err
	}
	monitor, err := dialMonitor(ctx, filepath.Join(m.dir, monitorSocket))
	if err == nil {
		defer monitor.close()
		err = m.emptyJail() // QEMU answers on its monitor, so it needs no more files
	}
	if err == nil {
		err = do(monitor)
	}
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("wait for the guest's agent: %w", context.Cause(ctx))
	}
	return err
}

// launch creates a network for the VM m, starts its QEMU in a jail and in a cgroup of its own, and records it.
func (s *Service) launch(m *machine, mem memory) error {
	slot, err := network.New()
	if err != nil {
		return err
	}
	defer slot.Close() // the network lives as long as QEMU has the tap
	inherited, err := s.prepareLaunch(m, mem, slot)
	if err != nil {
		return err
	}
	defer inherited.close()
	addToCgroup, err := newCgroup(m.state, s.cfg.Accelerator, mem)
	if err != nil {
		return err
	}
	upper, err := os.Stat(m.Disks.Upper)
	if err != nil {
		return err
	}
	j := jail{UID: m.UID, Dir: filepath.Join(m.dir, jailDir), KVM: s.cfg.Accelerator == "kvm", MaxFile: uint64(upper.Size())}
	if err := os.Mkdir(j.Dir, 0o700); err != nil {
		return err
	}
	child, gate, err := j.start(s.qemuCommand(m.state, mem), markEnv(roleQEMU, m.dir), inherited.output, inherited.files)
	if err != nil {
		return err
	}
	defer gate.Close()
	// Before QEMU executes anything, its limits apply, and a later Service can find it.
	if err := errors.Join(m.adoptChild(roleQEMU, child), addToCgroup(child.Pid)); err != nil {
		return err
	}
	_, err = gate.Write([]byte{1})
	return err
}

// withControl calls do with a connection to the control port of the guest of m.
func (s *Service) withControl(ctx context.Context, m *machine, do func(*control.Client) error) error {
	agent, err := control.Dial(ctx, filepath.Join(m.dir, controlSocket))
	if err != nil {
		return err
	}
	defer agent.Close()
	return do(agent)
}

// introduce gives the guest of m, which has just booted or was just restored, a seed for its random numbers, the token of its
// portal, and the time. It tries again until ctx ends.
func (s *Service) introduce(ctx context.Context, m *machine) error {
	seed := make([]byte, control.SeedSize)
	rand.Read(seed)
	return s.withControl(ctx, m, func(agent *control.Client) error {
		for { // the guest may be slow while many boot
			err := agent.Personalize(ctx, seed, m.Token)
			if err == nil {
				err = agent.SyncClock(ctx)
			}
			if !errors.Is(err, os.ErrDeadlineExceeded) || ctx.Err() != nil {
				return err
			}
		}
	})
}

// DialPortal connects to the portal in the VM id. If transfer is not empty, the connection is for the data of the transfer with
// this id. DialPortal returns errdefs.ErrNotFound if there is no such VM or its QEMU has exited, and errdefs.ErrNotImplemented
// if an earlier version of msbd started the VM without a network.
func (s *Service) DialPortal(ctx context.Context, id, transfer string) (net.Conn, error) {
	conn, err := s.dialPortal(ctx, id, transfer)
	if err != nil {
		return nil, fmt.Errorf("connect to the portal of VM %q: %w", id, err)
	}
	return conn, nil
}

func (s *Service) dialPortal(ctx context.Context, id, transfer string) (net.Conn, error) {
	m := s.lookup(id)
	switch {
	case m == nil:
		return nil, errdefs.ErrNotFound
	case m.Tap == 0:
		return nil, errdefs.ErrNotImplemented
	}
	qemu, err := m.process(roleQEMU).Open()
	if err != nil {
		return nil, err
	}
	if qemu == nil {
		return nil, fmt.Errorf("its QEMU has exited: %w", errdefs.ErrNotFound)
	}
	defer qemu.Close()
	slot, err := network.Find(qemu, m.Tap)
	if err != nil {
		return nil, err
	}
	defer slot.Close()
	conn, err := slot.Dial(ctx, portalport.Port)
	if err != nil {
		return nil, err
	}
	if err := portalport.WriteHello(conn, portalport.Hello{Token: m.Token, Transfer: transfer}); err != nil {
		conn.Close()
		return nil, err
	}
	return &portalConn{conn, context.AfterFunc(m.gone, func() { conn.Close() })}, nil
}

// A portalConn is a connection to the portal. It is closed when the removal of the VM begins. Without that, it would
// end, and give up its network namespace, only minutes after QEMU has exited, because then nothing answers in the namespace.
type portalConn struct {
	net.Conn
	keep func() bool // ends the watch for the removal
}

func (c *portalConn) Close() error {
	c.keep()
	return c.Conn.Close()
}
