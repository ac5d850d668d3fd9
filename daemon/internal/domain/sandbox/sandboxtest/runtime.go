// Package sandboxtest has fakes for the interfaces of the sandbox domain, and a contract test suite for each of them. A
// suite runs against the real implementation and against the fake, which ensures that they behave the same. Only tests
// import this package.
package sandboxtest

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// AbsentImage is the only image that Runtime does not have.
const AbsentImage = "absent"

// Runtime is a sandbox.Runtime without microVMs. If a hook is set, the method of that name calls it and returns its error.
// Set the hooks before using the Runtime.
type Runtime struct {
	// OnStart is called after the microVM was added. List returns the microVM even before OnStart has returned, as it
	// returns a real one that is still starting.
	OnStart  func(ctx context.Context, id string) error
	OnRemove func(ctx context.Context, id string) error
	OnAttach func(ctx context.Context, id string) error
	OnUsage  func(ctx context.Context, id string) error
	// OnSetHostname is called before the hostname changes.
	OnSetHostname func(ctx context.Context, id string) error
	// OnResolveImage gets the name of the image.
	OnResolveImage func(ctx context.Context, image string) error

	mu      sync.Mutex
	vms     map[string]*vm
	digests map[string]string // of images that were replaced
}

// vm is a fake microVM that runs until ended is closed.
type vm struct {
	ended    chan struct{}
	once     sync.Once
	hostname string // guarded by Runtime.mu
}

func (v *vm) end() { v.once.Do(func() { close(v.ended) }) }

func (v *vm) alive() bool {
	select {
	case <-v.ended:
		return false
	default:
		return true
	}
}

// NewRuntime returns a Runtime with running microVMs of these ids.
func NewRuntime(ids ...string) *Runtime {
	r := &Runtime{vms: map[string]*vm{}, digests: map[string]string{}}
	for _, id := range ids {
		r.vms[id] = &vm{ended: make(chan struct{})}
	}
	return r
}

// Start implements sandbox.Runtime.
func (r *Runtime) Start(ctx context.Context, id string, t sandbox.Template, hostname string) (sandbox.Origin, error) {
	if _, err := r.ResolveImage(ctx, t.Image); err != nil {
		return sandbox.Origin{}, err
	}
	r.mu.Lock()
	r.vms[id] = &vm{ended: make(chan struct{}), hostname: hostname}
	r.mu.Unlock()
	if r.OnStart != nil {
		if err := r.OnStart(ctx, id); err != nil {
			return sandbox.Origin{}, err
		}
	}
	return sandbox.Origin{From: sandbox.Cold, Why: "this runtime has no templates"}, nil
}

// SetHostname implements sandbox.Runtime.
func (r *Runtime) SetHostname(ctx context.Context, id, hostname string) error {
	if r.OnSetHostname != nil {
		if err := r.OnSetHostname(ctx, id); err != nil {
			return err
		}
	}
	v := r.vm(id)
	if v == nil || !v.alive() {
		return fmt.Errorf("find the microVM %s: %w", id, errdefs.ErrNotFound)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	v.hostname = hostname
	return nil
}

// Hostname returns the hostname of a microVM.
func (r *Runtime) Hostname(id string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.vms[id].hostname
}

// Remove implements sandbox.Runtime.
func (r *Runtime) Remove(ctx context.Context, id string) error {
	if r.OnRemove != nil {
		if err := r.OnRemove(ctx, id); err != nil {
			return err
		}
	}
	r.Kill(id)
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.vms, id)
	return nil
}

// Kill ends a microVM from outside, like a crash.
func (r *Runtime) Kill(id string) {
	if v := r.vm(id); v != nil {
		v.end()
	}
}

func (r *Runtime) vm(id string) *vm {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.vms[id]
}

// List implements sandbox.Runtime.
func (r *Runtime) List(context.Context) ([]sandbox.Instance, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []sandbox.Instance
	for _, id := range slices.Sorted(maps.Keys(r.vms)) {
		all = append(all, sandbox.Instance{ID: id, Alive: r.vms[id].alive()})
	}
	return all, nil
}

// Len returns the number of microVMs that have not been removed, including dead ones.
func (r *Runtime) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.vms)
}

// Wait implements sandbox.Runtime.
func (r *Runtime) Wait(ctx context.Context, id string) (string, error) {
	v := r.vm(id)
	if v == nil {
		return "its microVM ended unexpectedly", nil
	}
	select {
	case <-v.ended:
		return "its microVM ended", nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// Attach implements sandbox.Runtime. The other end of the stream is neither read nor written, and is closed when the microVM
// ends.
func (r *Runtime) Attach(ctx context.Context, id, _ string) (io.ReadWriteCloser, error) {
	if r.OnAttach != nil {
		if err := r.OnAttach(ctx, id); err != nil {
			return nil, err
		}
	}
	v := r.vm(id)
	if v == nil || !v.alive() {
		return nil, fmt.Errorf("find the microVM %s: %w", id, errdefs.ErrNotFound)
	}
	host, guest := net.Pipe()
	s := &stream{Conn: host, closed: make(chan struct{})}
	go func() {
		select {
		case <-v.ended:
		case <-s.closed:
		}
		guest.Close()
	}()
	return s, nil
}

type stream struct {
	net.Conn
	closed chan struct{}
	once   sync.Once
}

func (s *stream) Close() error {
	s.once.Do(func() { close(s.closed) })
	return s.Conn.Close()
}

// Usage implements sandbox.Runtime. It returns the same usage for every microVM.
func (r *Runtime) Usage(ctx context.Context, id string) (sandbox.Usage, error) {
	if r.OnUsage != nil {
		if err := r.OnUsage(ctx, id); err != nil {
			return sandbox.Usage{}, err
		}
	}
	if v := r.vm(id); v == nil || !v.alive() {
		return sandbox.Usage{}, fmt.Errorf("find the microVM %s: %w", id, errdefs.ErrNotFound)
	}
	return sandbox.Usage{CPUTime: time.Second, MemoryBytes: 5 << 20, DiskBytes: new(uint64(77))}, nil
}

// ResolveImage implements sandbox.Runtime.
func (r *Runtime) ResolveImage(ctx context.Context, image string) (string, error) {
	if r.OnResolveImage != nil {
		if err := r.OnResolveImage(ctx, image); err != nil {
			return "", err
		}
	}
	image = sandbox.ShortImage(image)
	if image == AbsentImage {
		return "", fmt.Errorf("image %q: %w", image, errdefs.ErrNotFound)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return cmp.Or(r.digests[image], "sha256:"+image), nil
}

// ReplaceImage gives an image another digest, like the import of a new version.
func (r *Runtime) ReplaceImage(image, digest string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.digests[image] = digest
}
