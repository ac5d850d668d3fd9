package hypervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/ttrpc"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/msbd/msbd/daemon/internal/backend/disk"
	"github.com/msbd/msbd/daemon/internal/sys/control"
)

// The ids of the container in a template. By them the guest's agent recognizes, in a clone, that the next container takes over
// this one (guest/agent/adopt.go). It has the second one after the rehearsal.
const (
	templateContainerID  = "template-1"
	rehearsedContainerID = "template-2"
)

// Rehearse makes a call of the portal at the other end of conn, and closes conn. program is the path of the portal's program in the
// container.
type Rehearse func(ctx context.Context, conn io.ReadWriteCloser, program string) error

// hangUp is how long a guest has to notice that msbd has disconnected from its agent and its portal, before it is saved. A guest that has not
// noticed it by then drops the connection when it gets its token.
const hangUp = 300 * time.Millisecond

// TemplateBuilt returns when the template for spec was built. It is the zero time if there is no such template.
func (s *Service) TemplateBuilt(spec Spec) (time.Time, error) {
	key, _, err := s.templateKey(spec)
	if err != nil {
		return time.Time{}, err
	}
	return s.templates.built(key), nil
}

// RemoveOldTemplates removes the templates that are too old to be used, and frees their memory.
func (s *Service) RemoveOldTemplates() { s.templates.removeOld() }

// PruneTemplates removes all templates except those of the images keep. An image is identified as in Spec.Image.
func (s *Service) PruneTemplates(keep []string) { s.templates.prune(keep) }

// BuildTemplate builds the template for spec, and replaces an older one. If there is no place for it, BuildTemplate returns
// ErrTemplatesInUse. Before the VM is saved, it does with rehearse and by itself what the start of a sandbox and its first call do.
// So a clone does not need to do what a program does only the first time.
//
// BuildTemplate starts a VM with the id and the disks of spec. No other VM may have this id or these disks. The writable disk must
// be empty. The caller must call Remove for the VM, also after an error, and remove the disks.
func (s *Service) BuildTemplate(ctx context.Context, spec Spec, rehearse Rehearse) (err error) {
	key, host, err := s.templateKey(spec)
	if err != nil {
		return fmt.Errorf("build a template: %w", err)
	}
	place, err := s.templates.reserve(templateMeta{Key: key, Host: host, Image: spec.Image, Keep: spec.KeepTemplate, Built: time.Now()})
	if err != nil {
		return fmt.Errorf("build a template: %w", err)
	}
	defer s.templates.release(place)
	m, err := s.create(spec)
	if err == nil {
		err = s.add(m)
	}
	if err != nil {
		return fmt.Errorf("build a template: %w", err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("build a template: %w%s", err, m.lastWords())
		}
	}()
	if err := s.makeDir(m); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if !m.claimBoot(cancel) {
		return errRemoved
	}
	defer func() { <-m.busy }()
	t := &template{}
	if t.memory, err = newMemFile(memoryFile, int64(m.guestMemoryMiB())<<20); err != nil {
		return err
	}
	if t.state, err = newMemFile(rawState, 0); err != nil {
		t.memory.Close()
		return err
	}
	if err := s.fillTemplate(ctx, m, spec, place, t, rehearse); err != nil {
		t.close()
		return err
	}
	return nil
}

// fillTemplate boots the VM m, prepares it, and saves it to t. Then it calls storeTemplate. On error, t belongs to the caller.
func (s *Service) fillTemplate(ctx context.Context, m *machine, spec Spec, place *knownTemplate, t *template, rehearse Rehearse) error {
	if err := s.boot(ctx, m, memory{file: t.memory}); err != nil {
		return err
	}
	if err := s.prepareTemplate(ctx, m, spec, rehearse); err != nil {
		return err
	}
	select {
	case <-time.After(hangUp):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	monitor, err := dialMonitor(ctx, filepath.Join(m.dir, monitorSocket))
	if err != nil {
		return err
	}
	defer monitor.close()
	if err := monitor.save(t.state); err != nil {
		return err
	}
	if err := m.quit(ctx, monitor); err != nil {
		return err
	}
	return s.storeTemplate(ctx, spec, place, t)
}

// prepareTemplate creates the container of spec in the guest of m, waits until the portal is ready, and rehearses the start of a
// sandbox.
func (s *Service) prepareTemplate(ctx context.Context, m *machine, spec Spec, rehearse Rehearse) error {
	conn, err := net.Dial("unix", filepath.Join(m.dir, agentSocket))
	if err != nil {
		return fmt.Errorf("connect to the guest's agent: %w", err)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	if err := createContainer(ctx, client, templateContainerID, spec.Container); err != nil {
		return err
	}
	if err := s.withControl(ctx, m, func(agent *control.Client) error { return agent.AwaitPortal(ctx) }); err != nil {
		return err
	}
	if err := createContainer(ctx, client, rehearsedContainerID, spec.Container); err != nil {
		return err
	}
	// The shim waits for these two events as long as the sandbox runs.
	agent := pb.NewAgentServiceClient(client)
	go agent.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: rehearsedContainerID, ExecId: rehearsedContainerID})
	go agent.GetOOMEvent(ctx, &pb.GetOOMEventRequest{})
	portal, err := s.dialPortal(ctx, m.ID, "")
	if err != nil {
		return err
	}
	return rehearse(ctx, portal, spec.Container.Process.Args[0])
}

// storeTemplate stores t in its place and makes it usable, and t belongs to s.templates. On error, t belongs to the caller.
func (s *Service) storeTemplate(ctx context.Context, spec Spec, place *knownTemplate, t *template) error {
	if err := errors.Join(seal(t.memory), seal(t.state)); err != nil {
		return err
	}
	upper, err := os.Open(spec.Disks.Upper)
	if err != nil {
		return err
	}
	defer upper.Close()
	if t.upper, err = disk.ReadExtents(upper, maxDiskData); err != nil {
		return err
	}
	if key, _, err := s.templateKey(spec); err != nil || key != place.Key { // QEMU may not be the one of the key
		return errors.Join(errors.New("QEMU, the guest or the image has changed during the build"), err)
	}
	return s.templates.add(ctx, place, t, upper)
}

// quit ends the QEMU of m and waits until it has exited. Only then can the template's memory be sealed.
func (m *machine) quit(ctx context.Context, monitor *monitor) error {
	qemu, err := m.process(roleQEMU).Open()
	if err != nil || qemu == nil {
		return err
	}
	defer qemu.Close()
	_ = monitor.execute("quit", nil, nil) // QEMU may exit before it answers
	if err := qemu.Wait(ctx); err != nil {
		return fmt.Errorf("wait until QEMU has exited: %w", err)
	}
	return nil
}

// createContainer creates a sandbox and its container with an id, with the same calls of the guest's agent as Kata's shim.
func createContainer(ctx context.Context, client *ttrpc.Client, id string, container *specs.Spec) error {
	spec, err := agentSpec(container)
	if err != nil {
		return err
	}
	agent := pb.NewAgentServiceClient(client)
	if _, err := pb.NewHealthClient(client).Check(ctx, &pb.CheckRequest{}); err != nil {
		return fmt.Errorf("check the guest's agent: %w", err)
	}
	if _, err := agent.CreateSandbox(ctx, &pb.CreateSandboxRequest{SandboxId: id, Hostname: container.Hostname}); err != nil {
		return fmt.Errorf("create the sandbox in the guest: %w", err)
	}
	if _, err := agent.CreateContainer(ctx, &pb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: spec}); err != nil {
		return fmt.Errorf("create the container in the guest: %w", err)
	}
	if _, err := agent.GetGuestDetails(ctx, &pb.GuestDetailsRequest{MemBlockSize: true, MemHotplugProbe: true}); err != nil {
		return fmt.Errorf("ask the guest for its details: %w", err)
	}
	if _, err := agent.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: id}); err != nil {
		return fmt.Errorf("start the container in the guest: %w", err)
	}
	return nil
}

// agentSpec returns the spec that Kata's shim sends to the agent for container. It must be equal in all clones and in the
// template: the agent refuses a clone's container that differs. It follows constrainGRPCSpec and handlePidNamespace of
// kata-containers (src/runtime/virtcontainers/kata_agent.go).
func agentSpec(container *specs.Spec) (*pb.Spec, error) {
	data, err := json.Marshal(container) // the conversion changes its argument
	if err != nil {
		return nil, err
	}
	var own specs.Spec
	if err := json.Unmarshal(data, &own); err != nil {
		return nil, err
	}
	spec, err := pb.OCItoGRPC(&own)
	if err != nil {
		return nil, err
	}
	spec.Hooks = nil
	spec.Linux.Seccomp = nil
	spec.Linux.Namespaces = slices.DeleteFunc(spec.Linux.Namespaces, func(ns *pb.LinuxNamespace) bool {
		return slices.Contains([]specs.LinuxNamespaceType{specs.CgroupNamespace, specs.NetworkNamespace, specs.PIDNamespace}, specs.LinuxNamespaceType(ns.Type))
	})
	if r := spec.Linux.Resources; r != nil {
		r.Devices, r.Pids, r.BlockIO, r.Network = nil, nil, nil, nil
		if r.CPU != nil {
			r.CPU.Cpus, r.CPU.Mems = "", ""
		}
	}
	return spec, nil
}
