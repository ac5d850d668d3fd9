package sandbox

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
)

const (
	// cleanupLimit bounds work that must be done even when the caller has gone.
	cleanupLimit = time.Minute
	// parallelism bounds how many microVMs are worked on at once by one operation.
	parallelism = 8
)

// Options is what a Manager is made from. Every field is needed.
type Options struct {
	Store   Store
	Runtime Runtime
	// Connect speaks the portal's protocol over a stream from Runtime.Attach, and has had an
	// answer when it returns.
	Connect func(context.Context, io.ReadWriteCloser) (Portal, error)
	// Defaults fills what a Request leaves empty.
	Defaults Config
	// MaxCPUs and MaxMemoryMiB bound one sandbox.
	MaxCPUs, MaxMemoryMiB int
	// Quota bounds a tenant namespace.
	Quota func(namespace string) Quota
	// StartTimeout bounds a start, from the request to the guest's first answer.
	StartTimeout time.Duration
	// MaxRunTime bounds one run, and is the limit of a run that names none.
	MaxRunTime time.Duration
	Log        *slog.Logger
}

// Manager owns the sandboxes of a server: it alone changes their records, and it serialises what
// happens to each name. Call Recover before anything else, and Close at the end.
type Manager struct {
	Options

	// life ends with Close; watchers run under it.
	life     context.Context
	endLife  context.CancelFunc
	watchers sync.WaitGroup

	mu    sync.Mutex
	open  bool
	boxes map[Name]*box
	runs  map[string]int // in progress, by tenant namespace
}

// NewManager makes a Manager that refuses work until Recover has run.
func NewManager(o Options) *Manager {
	life, end := context.WithCancel(context.Background())
	return &Manager{Options: o, life: life, endLife: end, boxes: map[Name]*box{}, runs: map[string]int{}}
}

// Request is what a client asks of a new sandbox. Zero values take the server's defaults.
type Request struct {
	Image     string
	CPUs      int
	MemoryMiB int
	Env       []string
	Workdir   string
}

// Metrics is what is known of a sandbox at one moment. The usages are nil when it does not run.
type Metrics struct {
	Name    Name
	Running bool
	// CPUPercent is of one processor: two busy ones are 200.
	CPUPercent float64
	MemoryMiB  *int64
	DiskBytes  *int64
}

// Start makes the sandbox and returns when it answers. Starting a running sandbox with an equal
// configuration does nothing; with another one it is errdefs.ErrAlreadyExists and says what differs.
// When ctx ends first, or Stop is called meanwhile, whatever was made is removed, and its record with it: nobody
// need know of it.
func (m *Manager) Start(ctx context.Context, name Name, req Request) error {
	cfg, err := m.configure(name, req)
	if err != nil {
		return err
	}
	if err := m.accepting(); err != nil {
		return err
	}
	if err := m.Runtime.ResolveImage(ctx, cfg.Image); errdefs.IsNotFound(err) {
		// To a client, "not found" is a sandbox that does not exist.
		return &badImage{err}
	} else if err != nil {
		return err
	}
	b, err := m.acquire(ctx, name, true)
	if err != nil {
		return err
	}
	defer m.release(b)
	old := b.record()
	if old.State == Running {
		if diff := old.Config.Diff(cfg); diff != "" {
			return fmt.Errorf("sandbox %s is already running with another configuration: %s. Stop it first, or use another name: %w",
				name, diff, errdefs.ErrAlreadyExists)
		}
		return nil
	}
	if err := m.claim(b, cfg); err != nil {
		return err
	}
	defer b.setClaim(nil)

	caller := ctx
	ctx, cancel := context.WithCancelCause(caller)
	defer cancel(nil)
	b.setCancel(cancel)
	defer b.setCancel(nil)
	limited, stop := context.WithTimeoutCause(ctx, m.StartTimeout,
		fmt.Errorf("sandbox %s did not answer within %s: %w", name, m.StartTimeout, errdefs.ErrUnavailable))
	defer stop()

	rec := Record{ID: newID(), Name: name, Config: cfg, State: Starting, CreatedAt: time.Now().UTC()}
	if err := m.replace(b, old, rec); err != nil {
		return err
	}
	began := time.Now()
	link, err := m.boot(limited, rec)
	if err == nil {
		rec.State = Running
		if err = m.Store.PutSandbox(rec); err != nil {
			link.Close()
		}
	}
	if err != nil {
		cause := context.Cause(limited)
		if caller.Err() != nil && errors.Is(cause, context.Cause(caller)) {
			m.Log.Info("sandbox's start given up", "sandbox", name.Name, "namespace", name.Namespace, "id", rec.ID, "cause", cause, "err", err)
			_ = m.erase(limited, b, rec, "its start was given up") // which has recorded the error
		} else {
			m.fail(limited, b, rec, "its start failed", err)
		}
		if cause != nil {
			return cause // stopped, took too long, or the client has gone
		}
		// What broke is the host's affair, and its error may name parts of the host.
		return fmt.Errorf("sandbox %s did not start. Try again; if it fails again, the server's administrator finds the cause with `msb server list`: %w",
			name, errdefs.ErrUnavailable)
	}
	b.set(rec, link)
	m.watch(b, rec)
	m.Log.Info("sandbox started", "sandbox", name.Name, "namespace", name.Namespace, "id", rec.ID,
		"image", cfg.Image, "took", time.Since(began).Round(time.Millisecond))
	return nil
}

// badImage is an image that does not exist, as a bad argument.
type badImage struct{ error }

func (*badImage) Unwrap() error { return errdefs.ErrInvalidArgument }

// replace records a new attempt in the place of whatever the name held before.
func (m *Manager) replace(b *box, old, rec Record) error {
	if old.ID != "" {
		// A failed sandbox whose removal failed too may still hold something.
		ctx, cancel := context.WithTimeout(m.life, cleanupLimit)
		defer cancel()
		if err := m.Runtime.Remove(ctx, old.ID); err != nil {
			return fmt.Errorf("remove what is left of sandbox %s: %w", old.Name, err)
		}
		if err := m.Store.DeleteSandbox(old.ID); err != nil {
			return fmt.Errorf("record the start of sandbox %s: %w", rec.Name, err)
		}
	}
	if err := m.Store.PutSandbox(rec); err != nil {
		b.set(Record{}, nil)
		return fmt.Errorf("record the start of sandbox %s: %w", rec.Name, err)
	}
	b.set(rec, nil)
	return nil
}

// boot makes the microVM and waits for its portal's answer.
func (m *Manager) boot(ctx context.Context, rec Record) (*link, error) {
	if err := m.Runtime.Start(ctx, rec.ID, rec.Config); err != nil {
		return nil, err
	}
	return m.connect(ctx, rec.ID)
}

func (m *Manager) connect(ctx context.Context, id string) (*link, error) {
	conn, err := m.Runtime.Attach(ctx, id)
	if err != nil {
		return nil, err
	}
	l := &link{}
	l.Portal, err = m.Connect(ctx, &watchedStream{conn, &l.broken})
	if err != nil {
		conn.Close()
		return nil, err
	}
	return l, nil
}

// fail removes what rec's microVM held and records why it failed; cause may be nil. It works on when
// ctx has ended.
func (m *Manager) fail(ctx context.Context, b *box, rec Record, reason string, cause error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupLimit)
	defer cancel()
	log := m.Log.With("sandbox", rec.Name.Name, "namespace", rec.Name.Namespace, "id", rec.ID)
	log.Warn("sandbox failed", "reason", reason, "err", cause)
	rec.State, rec.Reason, rec.Cause = Failed, reason, ""
	if cause != nil {
		rec.Cause = cause.Error()
	}
	b.set(rec, nil)
	if err := m.Runtime.Remove(ctx, rec.ID); err != nil {
		log.Error("remove failed sandbox", "err", err)
	}
	if err := m.Store.PutSandbox(rec); err != nil {
		log.Error("record failed sandbox", "err", err)
	}
}

// erase removes what rec's microVM held, and then its record. After an error the sandbox has failed for the reason.
// It works on when ctx has ended.
func (m *Manager) erase(ctx context.Context, b *box, rec Record, reason string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupLimit)
	defer cancel()
	err := m.Runtime.Remove(ctx, rec.ID)
	if err == nil {
		err = m.Store.DeleteSandbox(rec.ID)
	}
	if err != nil {
		m.fail(ctx, b, rec, reason, err)
		return err
	}
	b.set(Record{}, nil)
	return nil
}

// Stop ends the sandbox and removes all that it held, its record too. A start in progress is
// cancelled. errdefs.ErrNotFound when there is none.
func (m *Manager) Stop(ctx context.Context, name Name) error {
	if err := name.Validate(); err != nil {
		return err
	}
	if err := m.accepting(); err != nil {
		return err
	}
	m.mu.Lock()
	b := m.boxes[name]
	m.mu.Unlock()
	if b == nil {
		return notFound(name)
	}
	b.cancelStart(fmt.Errorf("sandbox %s was stopped while it was starting: %w", name, errdefs.ErrFailedPrecondition))
	b, err := m.acquire(ctx, name, false)
	if err != nil {
		return err
	}
	defer m.release(b)
	rec := b.record()
	rec.State = Stopping
	if err := m.Store.PutSandbox(rec); err != nil {
		return fmt.Errorf("record the stop of sandbox %s: %w", name, err)
	}
	b.set(rec, nil)
	// A stop once begun is finished, also when the client goes away.
	if err := m.erase(ctx, b, rec, "its stop failed"); err != nil {
		return fmt.Errorf("sandbox %s was not wholly removed; stop it again: %w", name, errdefs.ErrUnavailable)
	}
	m.Log.Info("sandbox stopped", "sandbox", name.Name, "namespace", name.Namespace, "id", rec.ID)
	return nil
}

// StopAll stops every sandbox and says how many were stopped. It goes on after an error.
func (m *Manager) StopAll(ctx context.Context) (int, error) {
	if err := m.accepting(); err != nil {
		return 0, err
	}
	var (
		mu      sync.Mutex
		stopped int
		errs    []error
		g       errgroup.Group
	)
	g.SetLimit(parallelism)
	for _, rec := range m.List("") {
		g.Go(func() error {
			err := m.Stop(ctx, rec.Name)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				stopped++
			case !errdefs.IsNotFound(err):
				errs = append(errs, err)
			}
			return nil
		})
	}
	g.Wait()
	return stopped, errors.Join(errs...)
}

// List returns the records of one tenant namespace, or of all when namespace is empty, by name.
func (m *Manager) List(namespace string) []Record {
	m.mu.Lock()
	boxes := slices.Collect(maps.Values(m.boxes))
	m.mu.Unlock()
	var recs []Record
	for _, b := range boxes {
		if rec := b.record(); rec.ID != "" && (namespace == "" || rec.Name.Namespace == namespace) {
			recs = append(recs, rec)
		}
	}
	slices.SortFunc(recs, func(a, b Record) int { return strings.Compare(a.Name.String(), b.Name.String()) })
	return recs
}

// RunCode runs code in the sandbox's REPL of that language. Runs of one language take turns, in
// the order in which they came.
func (m *Manager) RunCode(ctx context.Context, name Name, run CodeRun) (CodeResult, error) {
	var res CodeResult
	b, err := m.running(name)
	if err != nil {
		return res, err
	}
	leave, err := m.enterRun(name.Namespace)
	if err != nil {
		return res, err
	}
	defer leave()
	turn := b.turn(run.Language)
	select {
	case turn <- struct{}{}:
		defer func() { <-turn }()
	case <-ctx.Done():
		return res, context.Cause(ctx)
	}
	cfg := b.record().Config
	run.Env, run.Workdir, run.Timeout = cfg.Env, cfg.Workdir, m.limit(run.Timeout)
	err = m.withPortal(ctx, b, run.Timeout, func(ctx context.Context, p Portal) (err error) {
		res, err = p.RunCode(ctx, run)
		return err
	})
	return res, err
}

// RunCommand runs a program in the sandbox, without a shell.
func (m *Manager) RunCommand(ctx context.Context, name Name, run CommandRun) (CommandResult, error) {
	var res CommandResult
	b, err := m.running(name)
	if err != nil {
		return res, err
	}
	leave, err := m.enterRun(name.Namespace)
	if err != nil {
		return res, err
	}
	defer leave()
	cfg := b.record().Config
	run.Env, run.Workdir, run.Timeout = cfg.Env, cfg.Workdir, m.limit(run.Timeout)
	err = m.withPortal(ctx, b, run.Timeout, func(ctx context.Context, p Portal) (err error) {
		res, err = p.RunCommand(ctx, run)
		return err
	})
	return res, err
}

func (m *Manager) limit(timeout time.Duration) time.Duration {
	if timeout <= 0 || timeout > m.MaxRunTime {
		return m.MaxRunTime
	}
	return timeout
}

// withPortal calls f with the sandbox's portal, attaching first when there is no connection. The
// portal keeps the limit itself; the deadline here is for a guest that no longer answers.
func (m *Manager) withPortal(ctx context.Context, b *box, limit time.Duration, f func(context.Context, Portal) error) error {
	const grace = 30 * time.Second
	ctx, cancel := context.WithTimeoutCause(ctx, limit+grace, fmt.Errorf("sandbox %s no longer answers; stop it and start it: %w", b.name, errdefs.ErrUnavailable))
	defer cancel()
	l, err := b.connected(ctx, m.connect)
	if err != nil {
		m.Log.Warn("reach sandbox", "sandbox", b.name.Name, "namespace", b.name.Namespace, "err", err)
		return fmt.Errorf("sandbox %s does not answer. Try again; if it goes on so, stop it and start it: %w", b.name, errdefs.ErrUnavailable)
	}
	err = f(ctx, l.Portal)
	if err != nil && b.record().State != Running {
		// Say what happened to the sandbox rather than what its connection felt of it.
		if _, gone := m.running(b.name); gone != nil {
			return gone
		}
	}
	// The guest no longer answers, or the caller's key was revoked.
	if cause := context.Cause(ctx); err != nil && (errdefs.IsUnavailable(cause) || errdefs.IsUnauthorized(cause)) {
		return cause
	}
	return err
}

// Metrics measures one sandbox, or all of a tenant namespace when name is empty, or all of the
// server when both are. errdefs.ErrNotFound when the named one does not exist.
func (m *Manager) Metrics(ctx context.Context, namespace, name string) ([]Metrics, error) {
	if err := m.accepting(); err != nil {
		return nil, err
	}
	recs := m.List(namespace)
	if name != "" {
		recs = slices.DeleteFunc(recs, func(r Record) bool { return r.Name.Name != name })
		if len(recs) == 0 {
			return nil, notFound(Name{namespace, name})
		}
	}
	all := make([]Metrics, len(recs))
	var g errgroup.Group
	g.SetLimit(parallelism)
	for i, rec := range recs {
		all[i] = Metrics{Name: rec.Name, Running: rec.State == Running}
		if all[i].Running {
			g.Go(func() error {
				m.measure(ctx, rec, &all[i])
				return nil
			})
		}
	}
	g.Wait()
	return all, nil
}

func (m *Manager) measure(ctx context.Context, rec Record, out *Metrics) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	u, err := m.Runtime.Usage(ctx, rec.ID)
	if err != nil {
		// It may have ended this moment; its watcher records that. The usages stay unknown.
		m.Log.Warn("measure sandbox", "sandbox", rec.Name.Name, "namespace", rec.Name.Namespace, "err", err)
		return
	}
	m.mu.Lock()
	b := m.boxes[rec.Name]
	m.mu.Unlock()
	if b != nil {
		out.CPUPercent = b.cpuPercent(rec, u.CPUTime, time.Now())
	}
	mem, disk := int64(u.MemoryBytes>>20), int64(u.DiskBytes)
	out.MemoryMiB, out.DiskBytes = &mem, &disk
}

// Close detaches from every sandbox and leaves them running. The Manager refuses work from then on.
func (m *Manager) Close() {
	m.mu.Lock()
	m.open = false
	boxes := slices.Collect(maps.Values(m.boxes))
	m.mu.Unlock()
	m.endLife()
	for _, b := range boxes {
		b.set(b.record(), nil)
	}
	m.watchers.Wait()
}

func (m *Manager) accepting() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.open {
		return fmt.Errorf("the server is starting or stopping; try again in a moment: %w", errdefs.ErrUnavailable)
	}
	return nil
}

// running returns the box of a sandbox that can be used.
func (m *Manager) running(name Name) (*box, error) {
	if err := name.Validate(); err != nil {
		return nil, err
	}
	if err := m.accepting(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	b := m.boxes[name]
	m.mu.Unlock()
	if b == nil {
		return nil, notFound(name)
	}
	switch rec := b.record(); rec.State {
	case Running:
		return b, nil
	case Failed:
		return nil, fmt.Errorf("sandbox %s is not running: %s. Start it again: %w", name, rec.Reason, errdefs.ErrFailedPrecondition)
	case Starting, Stopping:
		return nil, fmt.Errorf("sandbox %s is %s: %w", name, rec.State, errdefs.ErrFailedPrecondition)
	default:
		return nil, notFound(name)
	}
}

func notFound(name Name) error {
	return fmt.Errorf("sandbox %s does not exist: %w", name, errdefs.ErrNotFound)
}

// configure applies the server's defaults and limits to a request.
func (m *Manager) configure(name Name, req Request) (Config, error) {
	var zero Config
	if err := name.Validate(); err != nil {
		return zero, err
	}
	cfg := m.Defaults
	cfg.Env, cfg.Workdir = slices.Clone(req.Env), req.Workdir
	if req.Image != "" {
		cfg.Image = req.Image
	}
	if req.CPUs != 0 {
		cfg.CPUs = req.CPUs
	}
	if req.MemoryMiB != 0 {
		cfg.MemoryMiB = req.MemoryMiB
	}
	if cfg.CPUs < 1 || cfg.CPUs > m.MaxCPUs {
		return zero, fmt.Errorf("cpus %d: this server allows 1 to %d: %w", cfg.CPUs, m.MaxCPUs, errdefs.ErrInvalidArgument)
	}
	if cfg.MemoryMiB < MinMemoryMiB || cfg.MemoryMiB > m.MaxMemoryMiB {
		return zero, fmt.Errorf("memory %d MiB: this server allows %d to %d: %w", cfg.MemoryMiB, MinMemoryMiB, m.MaxMemoryMiB, errdefs.ErrInvalidArgument)
	}
	for _, e := range cfg.Env {
		if k, _, ok := strings.Cut(e, "="); !ok || k == "" || strings.ContainsRune(e, 0) {
			return zero, fmt.Errorf("environment entry %q: write NAME=value: %w", k, errdefs.ErrInvalidArgument)
		}
	}
	if cfg.Workdir != "" && (!path.IsAbs(cfg.Workdir) || strings.ContainsRune(cfg.Workdir, 0)) {
		return zero, fmt.Errorf("workdir %q: give an absolute path: %w", cfg.Workdir, errdefs.ErrInvalidArgument)
	}
	return cfg, nil
}

// MinMemoryMiB is the least memory with which a guest and an interpreter start.
const MinMemoryMiB = 128

func newID() string {
	var b [8]byte
	rand.Read(b[:])
	return "sb-" + hex.EncodeToString(b[:])
}
