package stream_test

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/servetest"
	"github.com/msbd/msbd/daemon/internal/serve/stream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// domain is a sandbox domain with one sandbox, which is called box and exists in every namespace. Its files are those of a
// directory of the host, its ports are those of the host, and its programs are functions.
type domain struct {
	root string

	mu         sync.Mutex
	hooks      hooks
	calls      []string
	readLength int64 // the length of the last ReadFile
	announced  int64 // the length of the last WriteFile
	processes  []*process
	ended      sync.WaitGroup // for the processes
}

// hooks change what the sandbox does, unless they are zero.
type hooks struct {
	readFile func(ctx context.Context, offset, length int64) (sandbox.FileInfo, io.ReadCloser, error)
	scripted func(context.Context) (sandbox.Process, error) // the program scripted
	dial     func() (sandbox.Conn, error)
	full     bool // whether the disk is full
}

func (d *domain) set(h hooks) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hooks = h
}

func (d *domain) get() hooks {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.hooks
}

// newSite returns a gateway with the endpoints of this package.
func newSite(t *testing.T, configure ...func(*servetest.Setup)) (*servetest.Site, *domain) {
	t.Helper()
	d := &domain{root: t.TempDir()}
	s := servetest.New(t, append(configure, func(o *servetest.Setup) { o.Endpoints = append(o.Endpoints, stream.Endpoints(d)...) })...)
	t.Cleanup(d.killAll)
	return s, d
}

// killAll ends all processes.
func (d *domain) killAll() {
	d.mu.Lock()
	for _, p := range d.processes {
		p.kill(9)
	}
	d.mu.Unlock()
	d.ended.Wait()
}

// enter records a call and returns an error if the sandbox does not exist.
func (d *domain) enter(what string, name sandbox.Name) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, what+" in "+name.Namespace)
	if name.Name != "box" {
		return fmt.Errorf("sandbox %s does not exist: %w", name, errdefs.ErrNotFound)
	}
	return nil
}

func (d *domain) lastReadLength() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.readLength
}

// takeCalls returns the calls since the last takeCalls.
func (d *domain) takeCalls() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	calls := d.calls
	d.calls = nil
	return calls
}

func (d *domain) host(path sandbox.Path) string { return filepath.Join(d.root, path.Path) }

// fileError converts an error of the host as the portal does.
func fileError(path sandbox.Path, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%q does not exist: %w", path.Path, errdefs.ErrNotFound)
	default:
		return fmt.Errorf("%q: %v: %w", path.Path, errors.Unwrap(err), errdefs.ErrFailedPrecondition)
	}
}

func describe(path sandbox.Path, info fs.FileInfo) sandbox.FileInfo {
	described := sandbox.FileInfo{
		Path: path.Path, Type: sandbox.RegularFile, Size: info.Size(), Mode: uint32(info.Mode().Perm()), UID: 1000, GID: 1000, User: "user",
		ModifiedAt: info.ModTime(),
	}
	if info.IsDir() {
		described.Type = sandbox.Directory
	}
	return described
}

func (d *domain) StatFile(_ context.Context, name sandbox.Name, path sandbox.Path, _ bool) (sandbox.FileInfo, error) {
	if err := d.enter("stat", name); err != nil {
		return sandbox.FileInfo{}, err
	}
	info, err := os.Lstat(d.host(path))
	if err != nil {
		return sandbox.FileInfo{}, fileError(path, err)
	}
	described := describe(path, info)
	if info.Mode()&fs.ModeSymlink != 0 {
		described.Type = sandbox.Symlink
		if info, err := os.Stat(d.host(path)); err == nil {
			described.Target = new(describe(path, info))
		}
	}
	return described, nil
}

func (d *domain) ReadFile(ctx context.Context, name sandbox.Name, path sandbox.Path, offset, length int64) (sandbox.FileInfo, io.ReadCloser, error) {
	d.mu.Lock()
	d.readLength = length
	d.mu.Unlock()
	if err := d.enter("read", name); err != nil {
		return sandbox.FileInfo{}, nil, err
	}
	if read := d.get().readFile; read != nil {
		return read(ctx, offset, length)
	}
	file, err := os.Open(d.host(path))
	if err != nil {
		return sandbox.FileInfo{}, nil, fileError(path, err)
	}
	info, err := file.Stat()
	if err == nil && info.IsDir() {
		err = &fs.PathError{Err: syscall.EISDIR}
	}
	if err != nil {
		file.Close()
		return sandbox.FileInfo{}, nil, fileError(path, err)
	}
	if length < 0 {
		length = info.Size()
	}
	return describe(path, info), &section{io.NewSectionReader(file, offset, length), file}, nil
}

// section is a part of a file.
type section struct {
	io.Reader
	io.Closer
}

func (d *domain) WriteFile(_ context.Context, name sandbox.Name, path sandbox.Path, o sandbox.WriteOptions, data io.Reader) (sandbox.FileInfo, bool, error) {
	none := sandbox.FileInfo{}
	if err := d.enter("write", name); err != nil {
		return none, false, err
	}
	d.mu.Lock()
	d.announced = o.Length
	d.mu.Unlock()
	if path.User != "" && path.User != "user" {
		return none, false, fmt.Errorf("user %q does not exist in the sandbox: %w", path.User, errdefs.ErrInvalidArgument)
	}
	target := d.host(path)
	old, statErr := os.Stat(target)
	if statErr == nil && old.IsDir() {
		return none, false, fileError(path, &fs.PathError{Err: syscall.EISDIR})
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return none, false, fileError(path, err)
	}
	var file *os.File
	var err error
	if o.Offset != nil {
		if file, err = os.OpenFile(target, os.O_WRONLY|os.O_CREATE, 0o644); err == nil {
			_, err = file.Seek(*o.Offset, io.SeekStart)
		}
	} else {
		file, err = os.CreateTemp(d.root, ".upload")
	}
	if err != nil {
		return none, false, fileError(path, err)
	}
	defer file.Close()
	if d.get().full {
		_, err := io.CopyN(file, data, 1)
		return none, false, cmp.Or(err, sandbox.ErrSandboxFull)
	}
	if _, err := io.Copy(file, data); err != nil {
		if o.Offset == nil {
			os.Remove(file.Name())
		}
		return none, false, fmt.Errorf("the data ended: %w", sandbox.ErrRunFailed)
	}
	if o.Offset == nil {
		err = os.Rename(file.Name(), target)
	}
	if err := cmp.Or(err, os.Chmod(target, fs.FileMode(*cmp.Or(o.Mode, new(uint32(0o644)))))); err != nil {
		return none, false, fileError(path, err)
	}
	info, err := os.Stat(target)
	if err != nil {
		return none, false, fileError(path, err)
	}
	return describe(path, info), statErr != nil, nil
}

func (d *domain) RemoveFile(_ context.Context, name sandbox.Name, path sandbox.Path, recursive bool) error {
	if err := d.enter("remove", name); err != nil {
		return err
	}
	if _, err := os.Lstat(d.host(path)); err != nil {
		return fileError(path, err)
	}
	if recursive {
		return fileError(path, os.RemoveAll(d.host(path)))
	}
	return fileError(path, os.Remove(d.host(path)))
}

func (d *domain) ReadTree(_ context.Context, name sandbox.Name, path sandbox.Path) (io.ReadCloser, error) {
	if err := d.enter("read tree", name); err != nil {
		return nil, err
	}
	r, w := io.Pipe()
	go func() {
		if _, err := os.Stat(d.host(path)); err != nil { // the portal also reports this with the first read
			w.CloseWithError(fileError(path, err))
			return
		}
		archive := tar.NewWriter(w)
		err := archive.AddFS(os.DirFS(d.host(path)))
		w.CloseWithError(cmp.Or(err, archive.Close()))
	}()
	return r, nil
}

func (d *domain) WriteTree(_ context.Context, name sandbox.Name, path sandbox.Path, keepOwners bool, archive io.Reader) (entries uint64, err error) {
	if err := d.enter(fmt.Sprintf("write tree %t", keepOwners), name); err != nil {
		return 0, err
	}
	for in := tar.NewReader(archive); ; entries++ {
		header, err := in.Next()
		if err == io.EOF {
			return entries, nil
		}
		if err != nil {
			return entries, fmt.Errorf("the archive is not valid: %w", errdefs.ErrInvalidArgument)
		}
		target := filepath.Join(d.host(path), header.Name)
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return entries, err
		}
		text, err := io.ReadAll(in)
		if err == nil {
			err = os.WriteFile(target, text, 0o644)
		}
		if err != nil {
			return entries, err
		}
	}
}

func (d *domain) Dial(ctx context.Context, name sandbox.Name, address sandbox.Address) (sandbox.Conn, error) {
	if err := d.enter("dial", name); err != nil {
		return nil, err
	}
	if dial := d.get().dial; dial != nil {
		return dial()
	}
	conn, err := net.DialTCP("tcp", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(address.Port)})
	if err != nil {
		return nil, fmt.Errorf("nothing listens on port %d in the sandbox: %w", address.Port, errdefs.ErrNotFound)
	}
	context.AfterFunc(ctx, func() { conn.Close() })
	return conn, nil
}

// process is a running function. The functions are in programs.
type process struct {
	pid  uint32
	req  sandbox.ProcessRequest
	in   chan []byte   // the pieces of the input
	sigs chan int      // the signals
	done chan struct{} // closed at the exit

	mu      sync.Mutex
	events  []sandbox.Event
	changed chan struct{} // closed when there are more events
	size    sandbox.TerminalSize
	inEnded bool
}

// programs are the programs of the sandbox. They return the exit.
var programs = map[string]func(p *process) sandbox.Exit{
	// echo prints its arguments.
	"echo": func(p *process) sandbox.Exit {
		p.print(sandbox.Stdout, strings.Join(p.req.Args, " ")+"\n")
		return sandbox.Exit{}
	},
	// cat copies its input until it ends or a signal comes.
	"cat": func(p *process) sandbox.Exit {
		for {
			select {
			case data, ok := <-p.in:
				if !ok {
					return sandbox.Exit{}
				}
				p.print(sandbox.Stdout, string(data))
			case signal := <-p.sigs:
				return sandbox.Exit{Code: 128 + signal, Signal: signal}
			}
		}
	},
	// wait prints on both streams and then ignores its input until a signal comes.
	"wait": func(p *process) sandbox.Exit {
		p.print(sandbox.Stdout, "out")
		p.print(sandbox.Stderr, "err")
		signal := <-p.sigs
		return sandbox.Exit{Code: 128 + signal, Signal: signal}
	},
	// fail ends as if it had reached its time limit and run out of memory.
	"fail": func(*process) sandbox.Exit {
		return sandbox.Exit{Code: 137, Signal: 9, TimedOut: true, Reason: "out of memory \x1b[1m"}
	},
	// size prints the size of its terminal at each signal 28.
	"size": func(p *process) sandbox.Exit {
		for signal := range p.sigs {
			if signal != 28 {
				break
			}
			p.mu.Lock()
			size := p.size
			p.mu.Unlock()
			p.print(sandbox.Terminal, fmt.Sprint(size.Columns, "x", size.Rows))
		}
		return sandbox.Exit{Code: 3}
	},
}

func (p *process) print(to sandbox.Stream, text string) {
	p.add(sandbox.Output{Stream: to, Data: []byte(text)})
}

func (p *process) add(event sandbox.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.events = append(p.events, event)
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *process) kill(signal int) {
	select {
	case p.sigs <- signal:
	case <-p.done:
	}
}

func (d *domain) StartProcess(ctx context.Context, name sandbox.Name, req sandbox.ProcessRequest) (sandbox.Process, error) {
	if err := d.enter("start", name); err != nil {
		return nil, err
	}
	if req.Program == "scripted" {
		return d.get().scripted(ctx)
	}
	run := programs[req.Program]
	if run == nil {
		return &view{err: fmt.Errorf("%q not found: %w", req.Program, sandbox.ErrCommandNotFound)}, nil
	}
	d.mu.Lock()
	p := &process{
		pid: uint32(len(d.processes) + 100), req: req, in: make(chan []byte), sigs: make(chan int), done: make(chan struct{}),
		changed: make(chan struct{}),
	}
	if req.Terminal != nil {
		p.size = *req.Terminal
	}
	d.processes = append(d.processes, p)
	d.mu.Unlock()
	d.ended.Go(func() {
		exit := run(p)
		close(p.done)
		p.add(exit)
	})
	v := &view{ctx: ctx, p: p}
	if req.WithCall {
		v.onClose = func() { p.kill(9) }
	}
	return v, nil
}

// view is a sandbox.Process.
type view struct {
	ctx     context.Context
	p       *process
	err     error // of Next
	started bool
	next    int
	onClose func()
}

func (v *view) Next() (sandbox.Event, error) {
	if v.err != nil {
		return nil, v.err
	}
	if !v.started {
		v.started = true
		skipped := 0
		v.p.mu.Lock()
		defer v.p.mu.Unlock()
		for _, event := range v.p.events[:v.next] {
			if output, ok := event.(sandbox.Output); ok {
				skipped += len(output.Data)
			}
		}
		return sandbox.Started{PID: v.p.pid, SkippedBytes: uint64(skipped)}, nil
	}
	for {
		v.p.mu.Lock()
		events, changed := v.p.events, v.p.changed
		v.p.mu.Unlock()
		if v.next < len(events) {
			v.next++
			return events[v.next-1], nil
		}
		if len(events) > 0 {
			if _, ended := events[len(events)-1].(sandbox.Exit); ended {
				return nil, io.EOF
			}
		}
		select {
		case <-changed:
		case <-v.ctx.Done():
			return nil, context.Cause(v.ctx)
		}
	}
}

func (v *view) Close() error {
	if v.onClose != nil {
		v.onClose()
	}
	return nil
}

// process returns the process with an id.
func (d *domain) process(id sandbox.ProcessID) (*process, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := len(d.processes) - 1; i >= 0; i-- {
		if p := d.processes[i]; p.pid == id.PID || id.PID == 0 && p.req.Tag == id.Tag {
			return p, nil
		}
	}
	return nil, fmt.Errorf("there is no such process: %w", errdefs.ErrNotFound)
}

func (d *domain) AttachProcess(ctx context.Context, name sandbox.Name, id sandbox.ProcessID, o sandbox.AttachOptions) (sandbox.Process, error) {
	if err := d.enter("attach", name); err != nil {
		return nil, err
	}
	p, err := d.process(id)
	if err != nil {
		return &view{err: err}, nil // the portal also reports this with the first event
	}
	v := &view{ctx: ctx, p: p}
	if !o.Replay {
		p.mu.Lock()
		v.next = len(p.events)
		p.mu.Unlock()
	}
	return v, nil
}

var errEnded = fmt.Errorf("the process has ended: %w", errdefs.ErrFailedPrecondition)

func (d *domain) WriteInput(ctx context.Context, name sandbox.Name, id sandbox.ProcessID, data io.Reader, end bool) error {
	if err := d.enter("input", name); err != nil {
		return err
	}
	p, err := d.process(id)
	if err != nil {
		return err
	}
	p.mu.Lock()
	closed := p.inEnded || !p.req.OpenInput && p.req.Terminal == nil
	p.mu.Unlock()
	if closed {
		return fmt.Errorf("the process has no input: %w", errdefs.ErrFailedPrecondition)
	}
	for {
		piece := make([]byte, 4096)
		n, err := data.Read(piece)
		if n > 0 {
			select {
			case p.in <- piece[:n]:
			case <-p.done:
				return errEnded
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("the data ended: %w", sandbox.ErrRunFailed)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if end && !p.inEnded {
		p.inEnded = true
		close(p.in)
	}
	return nil
}

func (d *domain) SignalProcess(ctx context.Context, name sandbox.Name, id sandbox.ProcessID, signal int, all bool) error {
	if err := d.enter(fmt.Sprintf("signal %d %t", signal, all), name); err != nil {
		return err
	}
	p, err := d.process(id)
	if err != nil {
		return err
	}
	select {
	case p.sigs <- signal:
		return nil
	case <-p.done:
		return errEnded
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (d *domain) ResizeTerminal(_ context.Context, name sandbox.Name, id sandbox.ProcessID, size sandbox.TerminalSize) error {
	if err := d.enter("resize", name); err != nil {
		return err
	}
	p, err := d.process(id)
	if err != nil {
		return err
	}
	if p.req.Terminal == nil {
		return fmt.Errorf("the process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.size = size
	return nil
}
