package daemontest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/guest/portal"
	"github.com/msbd/msbd/daemon/internal/guest/portalclient"
)

// portalName is the name of a child process in which a portal runs.
const portalName = "msb-portal-for-tests"

// servePortalIfChild runs the portal if this process is a child of portals.
func servePortalIfChild() {
	if os.Args[0] != portalName {
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // it ends with the parent
		stop()
	}()
	if err := portal.Serve(ctx, os.Args[1], version); err != nil {
		fmt.Fprintln(os.Stderr, portalName+":", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// portals is a sandbox.Runtime whose sandboxes are directories of this host. The real portal runs in each of them, as a process
// of this host, with all of its rights.
type portals struct {
	*microVMs
	dir string

	mu       sync.Mutex
	children map[string]*exec.Cmd // by id
}

func newPortals(dir string) *portals {
	return &portals{microVMs: newMicroVMs(nil), dir: dir, children: map[string]*exec.Cmd{}}
}

// home returns the directory of a sandbox, in which its programs start.
func (p *portals) home(id string) string { return filepath.Join(p.dir, "sandboxes", id) }

// socket returns the portal's socket, whose name is abstract.
func (p *portals) socket(id string) string {
	return "@" + strings.ReplaceAll(strings.TrimPrefix(p.home(id), "/"), "/", "-")
}

// Start implements sandbox.Runtime.
func (p *portals) Start(ctx context.Context, id string, t sandbox.Template, hostname string) (sandbox.Origin, error) {
	origin, err := p.microVMs.Start(ctx, id, t, hostname)
	if err != nil {
		return origin, err
	}
	return origin, p.startPortal(id)
}

func (p *portals) startPortal(id string) error {
	home := p.home(id)
	if err := os.MkdirAll(home, 0o700); err != nil {
		return err
	}
	child := exec.Command("/proc/self/exe")
	child.Args = []string{portalName, p.socket(id)}
	child.Dir, child.Stderr = home, os.Stderr
	child.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home}
	if _, err := child.StdinPipe(); err != nil {
		return err
	}
	if err := child.Start(); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.children[id] = child
	return nil
}

// Remove implements sandbox.Runtime.
func (p *portals) Remove(ctx context.Context, id string) error {
	p.mu.Lock()
	child := p.children[id]
	delete(p.children, id)
	p.mu.Unlock()
	if child == nil {
		return fmt.Errorf("find the sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	_ = child.Process.Signal(syscall.SIGTERM) // it ends its programs
	return errors.Join(child.Wait(), p.microVMs.Remove(ctx, id))
}

// Attach implements sandbox.Runtime.
func (p *portals) Attach(_ context.Context, id, transfer string) (io.ReadWriteCloser, error) {
	toPortal, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	out, fromPortal, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, toPortal.Close(), in.Close())
	}
	go func() {
		_ = portal.Connect(context.Background(), p.socket(id), transfer, toPortal, fromPortal)
		toPortal.Close()
		fromPortal.Close()
	}()
	return pipes{out, in}, nil
}

// pipes is a stream that consists of two pipes.
type pipes struct {
	*os.File // to read from
	in       *os.File
}

func (p pipes) Write(data []byte) (int, error) { return p.in.Write(data) }
func (p pipes) Close() error                   { return errors.Join(p.File.Close(), p.in.Close()) }

// connect is sandbox.Options.Connect.
func (p *portals) connect(ctx context.Context, stream io.ReadWriteCloser, attach sandbox.Attach) (sandbox.Portal, error) {
	return portalclient.New(ctx, stream, attach)
}

// close removes all sandboxes.
func (p *portals) close() error {
	p.mu.Lock()
	var ids []string
	for id := range p.children {
		ids = append(ids, id)
	}
	p.mu.Unlock()
	var err error
	for _, id := range ids {
		err = errors.Join(err, p.Remove(context.Background(), id))
	}
	return err
}
