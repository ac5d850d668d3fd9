package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/sys/bounded"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// Linux runs no program and enters no directory with a longer path than maxPath, in bytes. No image has a longer name than
// maxName.
const (
	maxPath = 4096
	maxName = 512
)

// Linux runs no program with an environment entry of maxEnvEntry bytes or more (MAX_ARG_STRLEN in execve(2), which counts the
// NUL byte at the end), nor with more than 2 MiB of environment and arguments, a quarter of the usual limit on the stack.
// maxEnv, also in bytes, leaves half of that to the arguments and to the environment of the image. Each entry costs its text,
// a NUL byte and a pointer: envEntryCost is the last two.
const (
	maxEnvEntry  = 128 << 10
	maxEnv       = 1 << 20
	envEntryCost = 1 + 8
)

// Request is the configuration that a client requests for a new sandbox. Zero values stand for the server's defaults.
type Request struct {
	Image     string
	CPUs      int
	MemoryMiB int
	DiskMiB   int
	Env       []string
	Workdir   string
	User      string
	Hostname  string
}

// Start starts a sandbox and returns when its guest has answered. If there is no room for the sandbox, the error is a Refusal or
// wraps ErrNoSpace. Starting a running sandbox again with the same
// configuration does nothing; with another configuration, Start returns errdefs.ErrAlreadyExists and says what differs. If
// ctx is canceled before the sandbox runs, Start removes the sandbox and its record. If Stop is called meanwhile, it
// cancels the start and then removes both. If the sandbox refuses the user or the workdir, Start removes both too, and returns
// errdefs.ErrInvalidArgument.
func (m *Manager) Start(ctx context.Context, name Name, req Request) error {
	cfg, err := m.configure(name, req)
	if err != nil {
		return err
	}
	if err := m.checkOpen(); err != nil {
		return err
	}
	digest, err := m.Runtime.ResolveImage(ctx, cfg.Image)
	if errdefs.IsNotFound(err) {
		// To a client, "not found" means that a sandbox does not exist, so report a bad argument instead.
		return &badImage{err}
	} else if err != nil {
		return m.hideCause(name, "find the image of the sandbox", err)
	}
	e, err := m.acquire(ctx, name, true)
	if err != nil {
		return err
	}
	defer m.release(e)
	old := e.record()
	if old.State == Running {
		if diff := old.Config.Diff(cfg); diff != "" {
			return fmt.Errorf("sandbox %s is already running with another configuration: %s. Stop it first, or use another name: %w",
				name, diff, errdefs.ErrAlreadyExists)
		}
		return nil
	}
	if err := m.clear(e, old); err != nil {
		return err
	}
	if err := m.checkSpace(name); err != nil {
		return err
	}
	if err := m.reserve(e, cfg); err != nil {
		return err
	}
	defer e.setReserved(nil)
	rec := Record{ID: newID(), Name: name, Config: cfg, State: Starting, CreatedAt: time.Now().UTC()}
	claimed, missed := m.pool.take(cfg.Template, digest)
	start := func(ctx context.Context) (*conn, error) { return m.bind(ctx, claimed, rec) }
	leave := func() {}
	if claimed != nil {
		rec.ID, rec.Origin, rec.CPUNanos = claimed.id, Origin{From: FromPool}, claimed.cpu.Nanoseconds()
		if !cfg.Binding.late() {
			rec.State = Running
		}
	} else {
		p, err := m.admission.enter(name.Namespace, uint64(cfg.MemoryMiB)<<20)
		if err != nil {
			return err
		}
		leave = func() { m.admission.leave(p) }
		defer leave()
		start = func(ctx context.Context) (*conn, error) { return m.boot(ctx, p, &rec, missed) }
	}

	caller := ctx
	ctx, cancel := context.WithCancelCause(caller)
	defer cancel(nil)
	e.setCancel(cancel)
	defer e.setCancel(nil)

	if err := m.replace(e, old, rec, claimed); err != nil {
		return cmp.Or(m.checkSpace(name), err)
	}
	began := time.Now()
	if rec.State == Running {
		m.started(e, rec, began)
		return nil
	}
	portal, cause, err := m.startInTime(ctx, name, start)
	if err != nil {
		defer m.admission.free()() // the microVM is removed below
	}
	leave()
	if err == nil {
		rec.State = Running
		if err = m.Store.PutSandbox(rec); err != nil {
			portal.Close()
		}
	}
	if err != nil {
		if refusal, ok := errors.AsType[*Refusal](err); ok {
			m.Log.Info("sandbox start refused", "sandbox", name.Name, "namespace", name.Namespace, "id", rec.ID, "err", err)
			_ = m.erase(ctx, e, rec, "its start was refused") // on error, erase has recorded the failure
			return refusal
		}
		refused, isRefused := errors.AsType[*refusedConfig](err)
		if isRefused && cause == nil {
			m.Log.Info("sandbox start refused", "sandbox", name.Name, "namespace", name.Namespace, "id", rec.ID, "err", err)
			_ = m.erase(ctx, e, rec, "its start was refused") // on error, erase has recorded the failure
			return fmt.Errorf("sandbox %s was not started: %w", name, refused)
		}
		if caller.Err() != nil && errors.Is(cause, context.Cause(caller)) {
			m.Log.Info("sandbox start canceled", "sandbox", name.Name, "namespace", name.Namespace, "id", rec.ID, "cause", cause, "err", err)
			_ = m.erase(ctx, e, rec, "its start was canceled") // on error, erase has recorded the failure
		} else {
			m.fail(ctx, e, rec, "its start failed", err)
		}
		if cause != nil {
			return cause // stopped, timed out, or canceled by the caller
		}
		if err := m.checkSpace(name); err != nil {
			return err
		}
		// Do not return err to the client: it may name parts of the host. Administrators find it in the record.
		return fmt.Errorf("sandbox %s did not start. Try again; if it fails again, the server's administrator can see the cause with 'msb server list': %w",
			name, errdefs.ErrUnavailable)
	}
	e.set(rec, portal)
	m.started(e, rec, began)
	return nil
}

// started watches a sandbox whose start, which began at a time, has succeeded.
func (m *Manager) started(e *entry, rec Record, began time.Time) {
	m.watch(e, rec)
	m.Log.Info("sandbox started", "sandbox", rec.Name.Name, "namespace", rec.Name.Namespace, "id", rec.ID,
		"image", rec.Config.Image, "from", rec.Origin.From, "took", time.Since(began).Round(time.Millisecond))
}

// checkSpace returns an error that wraps ErrNoSpace if the disk has no room for another sandbox.
func (m *Manager) checkSpace(name Name) error {
	if err := m.CheckSpace(0); err != nil {
		return fmt.Errorf("sandbox %s was not started: %w", name, err)
	}
	return nil
}

// badImage is the error for an image that does not exist. Its class is errdefs.ErrInvalidArgument.
type badImage struct{ error }

func (*badImage) Unwrap() error { return errdefs.ErrInvalidArgument }

// refusedConfig is the error for a field of the configuration that the sandbox refuses. Its class is
// errdefs.ErrInvalidArgument. The text of the error in it may come from the sandbox.
type refusedConfig struct {
	field string
	error
}

func (r *refusedConfig) Error() string { return "config." + r.field + ": " + r.error.Error() }
func (*refusedConfig) Unwrap() error   { return errdefs.ErrInvalidArgument }

// clear removes what an earlier start of the name left. If removing the microVM of a failed sandbox has failed as well, it may
// still have resources.
func (m *Manager) clear(e *entry, old Record) error {
	if old.ID == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(m.lifetime, cleanupTimeout)
	defer cancel()
	if err := m.remove(ctx, old.ID); err != nil {
		return m.hideCause(e.name, "remove what an earlier start left of the sandbox", err)
	}
	return nil
}

// replace records rec, a new start attempt, in place of old, the previous record of the name. If claimed is not nil, rec is the
// record of this entry of the pool, which replace discards if it fails.
func (m *Manager) replace(e *entry, old, rec Record, claimed *pooled) error {
	if old.ID != "" {
		if err := m.Store.DeleteSandbox(old.ID); err != nil {
			m.pool.doom(claimed)
			return m.hideCause(rec.Name, "record the start of the sandbox", err)
		}
	}
	if err := m.Store.PutSandbox(rec); err != nil {
		e.set(Record{}, nil)
		m.pool.doom(claimed)
		return m.hideCause(rec.Name, "record the start of the sandbox", err)
	}
	if rec.State == Running {
		e.set(rec, claimed.conn)
	} else {
		e.set(rec, nil)
	}
	return nil
}

// hideCause returns an error for clients without the cause, which may name parts of the host. If trying again may help, the
// cause is logged and the error is errdefs.ErrUnavailable. Otherwise it has no class, and the gateway logs its text instead of
// sending it. The end of the caller's context is returned unchanged.
func (m *Manager) hideCause(name Name, what string, cause error) error {
	switch {
	case errors.Is(cause, context.Canceled):
		return cause
	case errdefs.IsUnavailable(cause), errors.Is(cause, context.DeadlineExceeded):
		m.Log.Error("could not "+what, "sandbox", name.Name, "namespace", name.Namespace, "err", cause)
		return fmt.Errorf("sandbox %s: the server could not %s. Try again; if it fails again, the server's log has the cause: %w",
			name, what, errdefs.ErrUnavailable)
	default:
		return fmt.Errorf("%s %s: %v", what, name, cause)
	}
}

// startInTime calls start, which waits until the start is admitted and until the sandbox is ready, with a context that ends at the
// time limit of a start. If it was interrupted, cause says why: ctx was canceled, or the guest did not answer in time.
func (m *Manager) startInTime(ctx context.Context, name Name, start func(context.Context) (*conn, error)) (_ *conn, cause, err error) {
	ctx, stop := context.WithTimeoutCause(ctx, m.StartTimeout, &slowStart{name, m.StartTimeout})
	defer stop()
	c, err := start(ctx)
	if _, refused := errors.AsType[*Refusal](err); refused {
		return nil, nil, err
	}
	return c, context.Cause(ctx), err
}

// slowStart is why the context of a start ends if the guest does not answer in time.
type slowStart struct {
	name  Name
	limit time.Duration
}

func (s *slowStart) Error() string {
	return fmt.Sprintf("sandbox %s did not answer within %s: %v", s.name, s.limit, errdefs.ErrUnavailable)
}
func (*slowStart) Unwrap() error { return errdefs.ErrUnavailable }

// boot waits until the start is admitted, starts the microVM, waits for the portal to answer and prepares the sandbox. It sets
// rec.Origin; missed says why the sandbox did not come from the pool. The error is a Refusal if the start was not admitted in time.
func (m *Manager) boot(ctx context.Context, p *place, rec *Record, missed string) (*conn, error) {
	if err := m.admission.wait(ctx, p); err != nil {
		if _, slow := errors.AsType[*slowStart](err); slow {
			return nil, &Refusal{fmt.Sprintf("the start of sandbox %s waited %s for other starts, which is its time limit; try again later",
				rec.Name, m.StartTimeout), retryStart}
		}
		return nil, err
	}
	origin, err := m.Runtime.Start(ctx, rec.ID, rec.Config.Template, rec.Config.Hostname)
	if err != nil {
		return nil, err
	}
	rec.Origin = origin
	if missed != "" {
		rec.Origin.Why = strings.TrimSuffix(missed+"; "+origin.Why, "; ")
	}
	c, err := m.connect(ctx, rec.ID)
	if err != nil {
		return nil, err
	}
	if err := prepare(ctx, c, rec.Config); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// prepare checks the user and creates the workdir of a new sandbox, if its configuration has any. If the sandbox refuses one of
// them, the error is a refusedConfig.
func prepare(ctx context.Context, p Portal, cfg Config) error {
	create := func(field, path string) error {
		_, _, err := p.MakeDirectory(ctx, Path{Path: path, User: cfg.User}, nil)
		if errdefs.IsInvalidArgument(err) || errdefs.IsFailedPrecondition(err) || errdefs.IsNotFound(err) || errors.Is(err, ErrSandboxFull) {
			return &refusedConfig{field, err}
		}
		return err
	}
	if cfg.User != "" {
		// This directory exists, so the portal only checks whether it can give it to the user.
		if err := create("user", "/"); err != nil {
			return err
		}
	}
	if cfg.Workdir == "" {
		return nil
	}
	return create("workdir", cfg.Workdir)
}

func (m *Manager) connect(ctx context.Context, id string) (*conn, error) {
	attach := func(ctx context.Context, transfer string) (io.ReadWriteCloser, error) {
		return m.Runtime.Attach(ctx, id, transfer)
	}
	stream, err := attach(ctx, "")
	if err != nil {
		return nil, err
	}
	c := &conn{}
	c.Portal, err = m.Connect(ctx, &watchedStream{stream, &c.broken}, attach)
	if err != nil {
		stream.Close()
		return nil, err
	}
	return c, nil
}

// fail removes rec's microVM and records that the sandbox failed, with reason and cause; cause may be nil. It continues even
// if ctx is canceled. The caller must hold e's lock.
func (m *Manager) fail(ctx context.Context, e *entry, rec Record, reason string, cause error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	log := m.Log.With("sandbox", rec.Name.Name, "namespace", rec.Name.Namespace, "id", rec.ID)
	log.Warn("sandbox failed", "reason", reason, "err", cause)
	rec = failed(rec, reason, cause)
	e.set(rec, nil)
	if err := m.remove(ctx, rec.ID); err != nil {
		log.Error("could not remove the microVM of the failed sandbox", "err", err)
	}
	if err := m.Store.PutSandbox(rec); err != nil {
		log.Error("could not record that the sandbox failed", "err", err)
	}
	m.limitFailed(ctx, rec.Name.Namespace)
}

// erase removes rec's microVM and then its record. If the microVM cannot be removed, it records that the sandbox failed,
// with reason. If only the record cannot be removed, the sandbox remains as failed, without a microVM, until it is stopped
// or started again. erase continues even if ctx is canceled.
func (m *Manager) erase(ctx context.Context, e *entry, rec Record, reason string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	if err := m.remove(ctx, rec.ID); err != nil {
		m.fail(ctx, e, rec, reason, err)
		return err
	}
	if err := m.Store.DeleteSandbox(rec.ID); err != nil {
		m.Log.Error("could not remove the record of a sandbox that was stopped; it remains as failed",
			"sandbox", rec.Name.Name, "namespace", rec.Name.Namespace, "id", rec.ID, "err", err)
		e.set(failed(rec, "it was stopped, but its record could not be removed", err), nil)
		return nil
	}
	e.set(Record{}, nil)
	return nil
}

// remove removes a microVM, with disk space from the reserve if the disk is full.
func (m *Manager) remove(ctx context.Context, id string) error {
	defer m.admission.free()()
	for {
		err := m.Runtime.Remove(ctx, id)
		if err == nil || ctx.Err() != nil || !m.MakeRoom() {
			return err
		}
	}
}

// configure returns the configuration for a request: it applies the server's defaults and checks its limits.
func (m *Manager) configure(name Name, req Request) (Config, error) {
	var zero Config
	if err := name.Validate(); err != nil {
		return zero, err
	}
	if len(req.Workdir) > maxPath || len(req.User) > maxName {
		return zero, fmt.Errorf("the name of a user has at most %d bytes, and a workdir at most %d: %w", maxName, maxPath, errdefs.ErrInvalidArgument)
	}
	t, err := m.template(req)
	if err != nil {
		return zero, err
	}
	cfg := Config{Template: t}
	cfg.Env, cfg.Workdir, cfg.User = slices.Clone(req.Env), req.Workdir, req.User
	cfg.Hostname = cmp.Or(req.Hostname, DefaultHostname)
	if !hostnamePattern.MatchString(cfg.Hostname) {
		return zero, fmt.Errorf("hostname %q: give 1 to 63 of A-Z a-z 0-9 -, beginning and ending with a letter or a digit: %w",
			bounded.Short(cfg.Hostname), errdefs.ErrInvalidArgument)
	}
	if err := validateEnv(cfg.Env); err != nil {
		return zero, err
	}
	if cfg.Workdir != "" && (!path.IsAbs(cfg.Workdir) || strings.ContainsRune(cfg.Workdir, 0)) {
		return zero, fmt.Errorf("workdir %q must be an absolute path: %w", cfg.Workdir, errdefs.ErrInvalidArgument)
	}
	return cfg, nil
}

// template returns the template for a request: it applies the server's defaults and checks its limits.
func (m *Manager) template(req Request) (Template, error) {
	t := m.Defaults.Template
	if len(req.Image) > maxName {
		return t, fmt.Errorf("the name of an image has at most %d bytes: %w", maxName, errdefs.ErrInvalidArgument)
	}
	if req.Image != "" {
		t.Image = req.Image
	}
	if req.CPUs != 0 {
		t.CPUs = req.CPUs
	}
	if req.MemoryMiB != 0 {
		t.MemoryMiB = req.MemoryMiB
	}
	if t.CPUs < 1 || t.CPUs > m.MaxCPUs {
		return t, fmt.Errorf("cpus %d: this server allows 1 to %d: %w", t.CPUs, m.MaxCPUs, errdefs.ErrInvalidArgument)
	}
	if t.MemoryMiB < config.MinMemoryMiB || t.MemoryMiB > m.MaxMemoryMiB {
		return t, fmt.Errorf("memory %d MiB: this server allows %d to %d: %w", t.MemoryMiB, config.MinMemoryMiB, m.MaxMemoryMiB, errdefs.ErrInvalidArgument)
	}
	switch {
	case m.Disks:
		t.DiskMiB = cmp.Or(req.DiskMiB, t.DiskMiB)
		if t.DiskMiB < config.MinDiskMiB || t.DiskMiB > m.MaxDiskMiB {
			return t, fmt.Errorf("disk %d MiB: this server allows %d to %d: %w", t.DiskMiB, config.MinDiskMiB, m.MaxDiskMiB, errdefs.ErrInvalidArgument)
		}
	case req.DiskMiB != 0:
		return t, fmt.Errorf("this server runs sandboxes with Kata's own driver, which cannot limit the disk of a sandbox; leave out config.disk: %w",
			errdefs.ErrInvalidArgument)
	default:
		t.DiskMiB = 0
	}
	return t, nil
}

// hostnamePattern matches a label of RFC 1123.
var hostnamePattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$`)

// validateEnv returns errdefs.ErrInvalidArgument if Linux can run no program with entries as a part of its environment.
func validateEnv(entries []string) error {
	env := 0
	for _, e := range entries {
		k, _, ok := strings.Cut(e, "=")
		if !ok || k == "" || strings.ContainsRune(e, 0) {
			return fmt.Errorf("environment entry %q must have the form NAME=value: %w", bounded.Short(k), errdefs.ErrInvalidArgument)
		}
		// Any other name is used somewhere, but no shell can set or read these, so they are mistakes.
		if strings.ContainsFunc(k, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }) {
			return fmt.Errorf("environment variable %q: a name has no white space and no control characters: %w", bounded.Short(k), errdefs.ErrInvalidArgument)
		}
		if len(e) >= maxEnvEntry {
			return fmt.Errorf("environment variable %q: with its name, it has %d bytes, but Linux allows at most %d. Write long values to "+
				"a file in the sandbox instead: %w", bounded.Short(k), len(e), maxEnvEntry-1, errdefs.ErrInvalidArgument)
		}
		env += len(e) + envEntryCost
	}
	if env > maxEnv {
		return fmt.Errorf("the environment has %d bytes, with %d for each variable, but at most %d are allowed. Write long values to "+
			"a file in the sandbox instead: %w", env, envEntryCost, maxEnv, errdefs.ErrInvalidArgument)
	}
	return nil
}
