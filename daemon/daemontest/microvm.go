package daemontest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

// Images that cause failures. Every other image works, except sandboxtest.AbsentImage.
const (
	Unbootable  = "unbootable"  // its microVMs do not boot
	Unstoppable = "unstoppable" // its microVMs cannot be removed
	Unreadable  = "unreadable"  // looking it up fails with an internal error of the server
)

// microVMs is a sandbox.Runtime without real microVMs.
type microVMs struct {
	*sandboxtest.Runtime
	mu    sync.Mutex
	stuck map[string]bool // by id
}

// newMicroVMs returns a Runtime with a microVM for each running sandbox in records.
func newMicroVMs(records []sandbox.Record) *microVMs {
	var ids []string
	for _, rec := range records {
		if rec.State == sandbox.Running {
			ids = append(ids, rec.ID)
		}
	}
	return &microVMs{Runtime: sandboxtest.NewRuntime(ids...), stuck: map[string]bool{}}
}

// Start implements sandbox.Runtime.
func (m *microVMs) Start(ctx context.Context, id string, t sandbox.Template, hostname string) (sandbox.Origin, error) {
	if t.Image == Unbootable {
		return sandbox.Origin{}, errors.New("QEMU ended")
	}
	m.mu.Lock()
	m.stuck[id] = t.Image == Unstoppable
	m.mu.Unlock()
	return m.Runtime.Start(ctx, id, t, hostname)
}

// Remove implements sandbox.Runtime.
func (m *microVMs) Remove(ctx context.Context, id string) error {
	m.mu.Lock()
	stuck := m.stuck[id]
	m.mu.Unlock()
	if stuck {
		return errors.New("QEMU does not end")
	}
	return m.Runtime.Remove(ctx, id)
}

// ResolveImage implements sandbox.Runtime.
func (m *microVMs) ResolveImage(ctx context.Context, image string) (string, error) {
	if image == Unreadable {
		return "", errors.New("read /srv/secret/index.json: input/output error")
	}
	return m.Runtime.ResolveImage(ctx, image)
}

// newGuest returns the Guest of all sandboxes. It sends each run to runs, and discards the previous run if it was not
// received.
func newGuest(runs chan Run) *sandboxtest.Guest {
	guest := sandboxtest.NewGuest()
	guest.OnRun = func(ctx context.Context, run any) error {
		select {
		case <-runs:
		default:
		}
		select {
		case runs <- Run{Asked: inJSON(run), Ended: ctx.Done()}:
		default: // another run has just started and was sent instead
		}
		return nil
	}
	return guest
}

// images is an admin.Images that always lists the same single image.
type images struct{}

// Import implements admin.Images.
func (i images) Import(ctx context.Context, path string, _ func(sandbox.ImportProgress)) ([]sandbox.Image, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return i.List(ctx)
}

// List implements admin.Images.
func (images) List(context.Context) ([]sandbox.Image, error) {
	return []sandbox.Image{{Name: "microsandbox/python", Digest: "sha256:00", Size: 3 << 20, Created: time.Now()}}, nil
}

// Remove implements admin.Images. It removes nothing, and reports the same images as missing as microVMs.
func (images) Remove(_ context.Context, name string, sandboxes []sandbox.Record) error {
	if name == sandboxtest.AbsentImage {
		return fmt.Errorf("no image %s: %w", name, errdefs.ErrNotFound)
	}
	for _, r := range sandboxes {
		if r.Config.Image == name && r.State != sandbox.Failed {
			return fmt.Errorf("image %s is used by the sandbox %s: %w", name, r.Name, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// initialSandboxes returns the records of an earlier server: a running sandbox, and a failed one whose reason contains a
// terminal escape sequence, which clients must not print.
func initialSandboxes() []sandbox.Record {
	now := time.Now().UTC()
	return []sandbox.Record{
		{
			ID: "a1a1a1a1a1a1a1a1a1a1", Name: sandbox.Name{Namespace: "default", Name: "my-env"}, State: sandbox.Running, CreatedAt: now,
			Config: sandbox.Config{Template: sandbox.Template{Image: "microsandbox/python", CPUs: 1, MemoryMiB: 512, DiskMiB: 4096}},
		},
		{
			ID: "b2b2b2b2b2b2b2b2b2b2", Name: sandbox.Name{Namespace: "team", Name: "broken"}, State: sandbox.Failed, CreatedAt: now,
			Config: sandbox.Config{Template: sandbox.Template{Image: "microsandbox/node", CPUs: 2, MemoryMiB: 1024}}, Reason: "its microVM ended \x1b[2Jhere",
		},
	}
}
