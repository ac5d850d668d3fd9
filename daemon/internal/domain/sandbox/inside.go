package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// This file has the operations in a running sandbox other than runs. Each is one call of its portal. If maxCalls operations and
// runs are in progress in the sandbox, the error of another one is errdefs.ErrResourceExhausted.

// StartProcess starts a program. The caller must close the process, which ends the program only with WithCall. With WithCall,
// it is a run like RunCommand.
func (m *Manager) StartProcess(ctx context.Context, name Name, req ProcessRequest) (Process, error) {
	if err := req.validate(); err != nil {
		return nil, err
	}
	// A terminal is open as long as somebody uses it.
	if req.WithCall && (req.Terminal == nil || req.Timeout > 0) {
		return m.run(ctx, name, req.Timeout, req.Grace, queueName{}, nil, func(ctx context.Context, p Portal, cfg Config, limit, _ time.Duration) (Process, error) {
			req.Environment, req.User, req.Timeout = cfg.environment(), cmp.Or(req.User, cfg.User), limit
			return p.StartProcess(ctx, req)
		})
	}
	return m.attach(ctx, name, func(ctx context.Context, p Portal, cfg Config) (Process, error) {
		req.Environment, req.User = cfg.environment(), cmp.Or(req.User, cfg.User)
		return p.StartProcess(ctx, req)
	})
}

// AttachProcess returns the events of a process. The caller must close the Process, which does not end the process.
func (m *Manager) AttachProcess(ctx context.Context, name Name, id ProcessID, o AttachOptions) (Process, error) {
	return m.attach(ctx, name, func(ctx context.Context, p Portal, _ Config) (Process, error) { return p.AttachProcess(ctx, id, o) })
}

// attach returns the process that call starts or attaches to, once its first event has come.
func (m *Manager) attach(ctx context.Context, name Name, call func(context.Context, Portal, Config) (Process, error)) (Process, error) {
	in, err := m.inside(name)
	if err != nil {
		return nil, err
	}
	return begin(ctx, name, func(ctx context.Context) (Process, error) {
		running, err := onPortal(ctx, in, func(portal Portal) (Process, error) { return call(ctx, portal, in.rec.Config) })
		if err != nil {
			return nil, err
		}
		p := &process{Process: running, inside: in, ctx: ctx, end: func() {}}
		if p.first, err = p.Next(); err != nil {
			p.Close()
			return nil, err
		}
		return p, nil
	})
}

// ListProcesses calls each for the processes of a sandbox, as Processes.ListProcesses does.
func (m *Manager) ListProcesses(ctx context.Context, name Name, each func(ProcessInfo) error) error {
	_, err := quick(ctx, m, name, func(ctx context.Context, p Portal, _ Config) (none, error) {
		return none{}, p.ListProcesses(ctx, each)
	})
	return err
}

// WriteInput copies data to the input of a process, and with end closes the input.
func (m *Manager) WriteInput(ctx context.Context, name Name, id ProcessID, data io.Reader, end bool) error {
	_, err := long(ctx, m, name, func(p Portal, _ Config) (none, error) { return none{}, p.WriteInput(ctx, id, data, end) })
	return err
}

// SignalProcess sends a signal to a process, or with all to everything that it started.
func (m *Manager) SignalProcess(ctx context.Context, name Name, id ProcessID, signal int, all bool) error {
	_, err := quick(ctx, m, name, func(ctx context.Context, p Portal, _ Config) (none, error) {
		return none{}, p.SignalProcess(ctx, id, signal, all)
	})
	return err
}

// ResizeTerminal changes the size of a process's terminal.
func (m *Manager) ResizeTerminal(ctx context.Context, name Name, id ProcessID, size TerminalSize) error {
	_, err := quick(ctx, m, name, func(ctx context.Context, p Portal, _ Config) (none, error) {
		return none{}, p.ResizeTerminal(ctx, id, size)
	})
	return err
}

// CreateContext creates a context, as Portal.CreateContext does.
func (m *Manager) CreateContext(ctx context.Context, name Name, req ContextRequest) (Context, error) {
	if err := (Code{Context: req.Name, RunOptions: RunOptions{User: req.User, Cwd: req.Cwd}}).validate(); err != nil {
		return Context{}, err
	}
	return within(ctx, m, name, interpreterStart+responseGrace, func(ctx context.Context, p Portal, cfg Config) (Context, error) {
		req.Environment, req.User = cfg.environment(), cmp.Or(req.User, cfg.User)
		return p.CreateContext(ctx, req)
	})
}

// ListContexts returns the contexts of a sandbox in the order in which they were created.
func (m *Manager) ListContexts(ctx context.Context, name Name) ([]Context, error) {
	return quick(ctx, m, name, func(ctx context.Context, p Portal, _ Config) ([]Context, error) { return p.ListContexts(ctx) })
}

// RestartContext replaces the interpreter of a context, as Portal.RestartContext does.
func (m *Manager) RestartContext(ctx context.Context, name Name, session string) (Context, error) {
	if err := (Code{Context: session}).validate(); err != nil {
		return Context{}, err
	}
	return within(ctx, m, name, interpreterStart+responseGrace, func(ctx context.Context, p Portal, cfg Config) (Context, error) {
		return p.RestartContext(ctx, session, cfg.environment())
	})
}

// RemoveContext removes a context, as Portal.RemoveContext does.
func (m *Manager) RemoveContext(ctx context.Context, name Name, session string) error {
	if err := (Code{Context: session}).validate(); err != nil {
		return err
	}
	_, err := quick(ctx, m, name, func(ctx context.Context, p Portal, _ Config) (none, error) {
		return none{}, p.RemoveContext(ctx, session)
	})
	return err
}

// StatFile describes a file, without following a symbolic link at the end of the path.
func (m *Manager) StatFile(ctx context.Context, name Name, path Path, xattrs bool) (FileInfo, error) {
	return quick(ctx, m, name, func(ctx context.Context, p Portal, cfg Config) (FileInfo, error) {
		return p.StatFile(ctx, path.in(cfg), xattrs)
	})
}

// ListFiles calls each for the entries of a directory, as Files.ListFiles does.
func (m *Manager) ListFiles(ctx context.Context, name Name, path Path, depth int, each func(FileInfo) error) error {
	_, err := long(ctx, m, name, func(p Portal, cfg Config) (none, error) {
		return none{}, p.ListFiles(ctx, path.in(cfg), depth, each)
	})
	return err
}

// ReadFile returns a description of a file and its bytes, as Files.ReadFile does. The caller must close the reader.
func (m *Manager) ReadFile(ctx context.Context, name Name, path Path, offset, length int64) (info FileInfo, data io.ReadCloser, err error) {
	data, err = open(ctx, m, name, newOpenReader, func(p Portal, cfg Config) (data io.ReadCloser, err error) {
		info, data, err = p.ReadFile(ctx, path.in(cfg), offset, length)
		return data, err
	})
	return info, data, err
}

// WriteFile writes a file, as Files.WriteFile does.
func (m *Manager) WriteFile(ctx context.Context, name Name, path Path, o WriteOptions, data io.Reader) (info FileInfo, created bool, err error) {
	info, err = long(ctx, m, name, func(p Portal, cfg Config) (info FileInfo, err error) {
		info, created, err = p.WriteFile(ctx, path.in(cfg), o, data)
		return info, err
	})
	return info, created, err
}

// MakeDirectory creates a directory, as Files.MakeDirectory does.
func (m *Manager) MakeDirectory(ctx context.Context, name Name, path Path, mode *uint32) (info FileInfo, created bool, err error) {
	info, err = quick(ctx, m, name, func(ctx context.Context, p Portal, cfg Config) (info FileInfo, err error) {
		info, created, err = p.MakeDirectory(ctx, path.in(cfg), mode)
		return info, err
	})
	return info, created, err
}

// MoveFile renames a file or directory, as Files.MoveFile does.
func (m *Manager) MoveFile(ctx context.Context, name Name, from, to Path) (FileInfo, error) {
	return long(ctx, m, name, func(p Portal, cfg Config) (FileInfo, error) { return p.MoveFile(ctx, from.in(cfg), to.in(cfg)) })
}

// RemoveFile removes a file or directory, as Files.RemoveFile does.
func (m *Manager) RemoveFile(ctx context.Context, name Name, path Path, recursive bool) error {
	_, err := long(ctx, m, name, func(p Portal, cfg Config) (none, error) { return none{}, p.RemoveFile(ctx, path.in(cfg), recursive) })
	return err
}

// ReadTree returns a file or directory as a tar archive. The caller must close the reader.
func (m *Manager) ReadTree(ctx context.Context, name Name, path Path) (io.ReadCloser, error) {
	return open(ctx, m, name, newOpenReader, func(p Portal, cfg Config) (io.ReadCloser, error) { return p.ReadTree(ctx, path.in(cfg)) })
}

// WriteTree extracts a tar archive into a directory, as Files.WriteTree does.
func (m *Manager) WriteTree(ctx context.Context, name Name, path Path, keepOwners bool, archive io.Reader) (entries uint64, err error) {
	return long(ctx, m, name, func(p Portal, cfg Config) (uint64, error) { return p.WriteTree(ctx, path.in(cfg), keepOwners, archive) })
}

// WatchFiles reports changes of files, as Files.WatchFiles does. The caller must close the Watch.
func (m *Manager) WatchFiles(ctx context.Context, name Name, path Path, o WatchOptions) (Watch, error) {
	return open(ctx, m, name, newOpenWatch, func(p Portal, cfg Config) (Watch, error) { return p.WatchFiles(ctx, path.in(cfg), o) })
}

// Dial connects to an address in a sandbox. The caller must close the Conn. The connection ends when ctx does.
func (m *Manager) Dial(ctx context.Context, name Name, address Address) (Conn, error) {
	return begin(ctx, name, func(ctx context.Context) (Conn, error) {
		return open(ctx, m, name, newOpenConn, func(p Portal, _ Config) (Conn, error) { return p.Dial(ctx, address) })
	})
}

// in returns the path with the workdir of a sandbox and, if it names no user, the user of the sandbox.
func (p Path) in(cfg Config) Path {
	p.Workdir, p.User = cfg.Workdir, cmp.Or(p.User, cfg.User)
	return p
}

// none is the result of an operation without one.
type none struct{}

// quick makes a call that depends on no program in the sandbox, so that it fails if the guest does not respond in time.
func quick[T any](ctx context.Context, m *Manager, name Name, call func(context.Context, Portal, Config) (T, error)) (T, error) {
	return within(ctx, m, name, responseGrace, call)
}

// within makes a call that fails if the guest does not respond within limit.
func within[T any](ctx context.Context, m *Manager, name Name, limit time.Duration, call func(context.Context, Portal, Config) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, notResponding(name))
	defer cancel()
	return long(ctx, m, name, func(p Portal, cfg Config) (T, error) { return call(ctx, p, cfg) })
}

// begin makes a call that depends on no program in the sandbox, so that it fails if the guest does not respond in time. Its
// result may be used until ctx ends.
func begin[T any](ctx context.Context, name Name, call func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	limit := time.AfterFunc(responseGrace, func() { cancel(notResponding(name)) })
	defer limit.Stop()
	result, err := call(ctx)
	if err != nil {
		cancel(err)
	}
	return result, err
}

// long makes a call that may take any time. It ends when ctx does, which call gets from its caller.
func long[T any](ctx context.Context, m *Manager, name Name, call func(Portal, Config) (T, error)) (none T, err error) {
	in, err := m.inside(name)
	if err != nil {
		return none, err
	}
	defer in.end()
	result, err := onPortal(ctx, in, func(p Portal) (T, error) { return call(p, in.rec.Config) })
	return result, in.explainLoss(ctx, err)
}

// open is like long, but the operation lasts until its result is closed. The caller gets the result as wrap returns it.
func open[T io.Closer](ctx context.Context, m *Manager, name Name, wrap func(opened, T) T, call func(Portal, Config) (T, error)) (none T, err error) {
	in, err := m.inside(name)
	if err != nil {
		return none, err
	}
	result, err := onPortal(ctx, in, func(p Portal) (T, error) { return call(p, in.rec.Config) })
	if err != nil {
		return none, in.explainLoss(ctx, err)
	}
	return wrap(opened{in, ctx, result}, result), nil
}

// opened is an operation that lasts until its result is closed.
type opened struct {
	inside
	ctx    context.Context // of the call
	result io.Closer
}

// Close closes the result and ends the operation.
func (o opened) Close() error {
	defer o.end()
	return o.result.Close()
}

// openReader is an operation whose result is a reader.
type openReader struct {
	opened
	data io.Reader
}

func newOpenReader(o opened, data io.ReadCloser) io.ReadCloser { return openReader{o, data} }

func (r openReader) Read(p []byte) (int, error) {
	n, err := r.data.Read(p)
	return n, r.explainLoss(r.ctx, err)
}

// openWatch is an operation whose result is a Watch.
type openWatch struct {
	opened
	changes Watch
}

func newOpenWatch(o opened, changes Watch) Watch { return openWatch{o, changes} }

func (w openWatch) Next() (FileChange, error) {
	change, err := w.changes.Next()
	return change, w.explainLoss(w.ctx, err)
}

// openConn is an operation whose result is a Conn.
type openConn struct {
	openReader
	conn Conn
}

func newOpenConn(o opened, conn Conn) Conn { return openConn{openReader{o, conn}, conn} }

func (c openConn) Write(p []byte) (int, error) { return c.conn.Write(p) }
func (c openConn) CloseWrite() error           { return c.conn.CloseWrite() }

// inside is a running sandbox during one operation in it.
type inside struct {
	m     *Manager
	entry *entry
	rec   Record // at the beginning
	end   func() // ends the operation; it may be called again
}

// inside begins an operation in a running sandbox. It returns errdefs.ErrResourceExhausted if too many are in progress. The
// caller must end the operation.
func (m *Manager) inside(name Name) (inside, error) {
	e, err := m.runningEntry(name)
	if err != nil {
		return inside{}, err
	}
	select {
	case e.calls <- struct{}{}:
		return inside{m, e, e.record(), sync.OnceFunc(func() { <-e.calls })}, nil
	default:
		return inside{}, fmt.Errorf("sandbox %s has %d calls in progress, and allows no more. Try again later, or close streams, transfers "+
			"and connections that are no longer needed: %w", name, maxCalls, errdefs.ErrResourceExhausted)
	}
}

// onPortal makes a call on the portal of a sandbox. If the connection does not work, so that nothing was sent, it tries once
// more over a new one. If the call does not succeed, onPortal ends the operation.
func onPortal[T any](ctx context.Context, in inside, call func(Portal) (T, error)) (none T, err error) {
	succeeded := false
	defer func() {
		if !succeeded { // also after a panic
			in.end()
		}
	}()
	if err := in.notRunning(); err != nil { // the sandbox may have been stopped meanwhile
		return none, err
	}
	for range 2 {
		var c *conn
		if c, err = in.entry.connection(ctx, in.rec.ID, in.m.connect); err != nil {
			break
		}
		var result T
		if result, err = call(c.Portal); err == nil {
			succeeded = true
			return result, nil
		}
		if ctx.Err() != nil {
			break
		}
		if !errdefs.IsUnavailable(err) {
			return none, err
		}
		c.broken.Store(true)
	}
	if ctx.Err() != nil {
		return none, context.Cause(ctx)
	}
	if notRunning := in.notRunning(); notRunning != nil {
		return none, notRunning
	}
	name := in.entry.name
	in.m.Log.Warn("could not connect to the sandbox", "sandbox", name.Name, "namespace", name.Namespace, "err", err)
	return none, fmt.Errorf("sandbox %s is not responding. Try again; if that persists, stop it and start it again: %w", name, errdefs.ErrUnavailable)
}

// notRunning returns why the sandbox no longer runs, or nil if it does.
func (in inside) notRunning() error {
	if rec := in.entry.record(); rec.ID == in.rec.ID && rec.State == Running {
		return nil
	}
	if _, err := in.m.runningEntry(in.entry.name); err != nil {
		return err
	}
	return fmt.Errorf("sandbox %s was stopped, and has been started again since: %w", in.entry.name, errdefs.ErrNotFound)
}

// explainLoss returns what explain does if err, which may be nil, is an ErrRunFailed, and err otherwise.
func (in inside) explainLoss(ctx context.Context, err error) error {
	if errors.Is(err, ErrRunFailed) {
		return in.explain(ctx, err)
	}
	return err
}

// explain returns the reason for err, the error of an operation that had begun. ctx is its context. If the sandbox stopped,
// the guest no longer responds or the request was canceled, explain returns an error that says so, because err is then only a
// consequence, such as a closed connection. None of its errors invites the client to try again.
func (in inside) explain(ctx context.Context, err error) error {
	switch rec := in.entry.record(); {
	case rec.ID != in.rec.ID || rec.State == Stopping:
		return &failure{fmt.Sprintf("the request was interrupted, because sandbox %s was stopped", in.entry.name), nil}
	case rec.State == Failed:
		return &failure{fmt.Sprintf("the request was interrupted, because sandbox %s failed: %s", in.entry.name, rec.Reason), nil}
	}
	cause := context.Cause(ctx)
	switch {
	case cause == nil:
		return err
	case errdefs.IsUnauthorized(cause), errors.Is(cause, ErrRunFailed): // the key was revoked, or the guest no longer responds
		return cause
	case cause == context.Canceled:
		return &failure{"the request was interrupted, because the client ended it", cause}
	default:
		return &failure{fmt.Sprintf("the request was interrupted: %v", cause), cause}
	}
}
