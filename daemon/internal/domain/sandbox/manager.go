package sandbox

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
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

	mu      sync.Mutex
	open    bool
	entries map[Name]*entry
	runs    map[string]int // in progress, by tenant namespace
}

// NewManager makes a Manager that refuses work until Recover has run.
func NewManager(o Options) *Manager {
	life, end := context.WithCancel(context.Background())
	return &Manager{Options: o, life: life, endLife: end, entries: map[Name]*entry{}, runs: map[string]int{}}
}

// List returns the records of one tenant namespace, or of all when namespace is empty, by name.
func (m *Manager) List(namespace string) []Record {
	m.mu.Lock()
	entries := slices.Collect(maps.Values(m.entries))
	m.mu.Unlock()
	var recs []Record
	for _, e := range entries {
		if rec := e.record(); rec.ID != "" && (namespace == "" || rec.Name.Namespace == namespace) {
			recs = append(recs, rec)
		}
	}
	slices.SortFunc(recs, func(a, b Record) int { return strings.Compare(a.Name.String(), b.Name.String()) })
	return recs
}

// Close detaches from every sandbox and leaves them running. The Manager refuses work from then on.
func (m *Manager) Close() {
	m.mu.Lock()
	m.open = false
	entries := slices.Collect(maps.Values(m.entries))
	m.mu.Unlock()
	m.endLife()
	for _, e := range entries {
		e.set(e.record(), nil)
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

// running returns the entry of a sandbox that can be used.
func (m *Manager) running(name Name) (*entry, error) {
	if err := name.Validate(); err != nil {
		return nil, err
	}
	if err := m.accepting(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	e := m.entries[name]
	m.mu.Unlock()
	if e == nil {
		return nil, notFound(name)
	}
	switch rec := e.record(); rec.State {
	case Running:
		return e, nil
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
