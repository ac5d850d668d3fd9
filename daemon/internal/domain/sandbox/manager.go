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

	"github.com/msbd/msbd/daemon/internal/sys/interrupts"
)

const (
	// cleanupTimeout limits cleanup, which continues even after the caller's context is canceled.
	cleanupTimeout = time.Minute
	// parallelism limits how many microVMs one operation handles at the same time.
	parallelism = 8
)

// Attach is Runtime.Attach for one microVM.
type Attach func(ctx context.Context, transfer string) (io.ReadWriteCloser, error)

// Options are the dependencies and limits of a Manager. All are required.
type Options struct {
	Store   Store
	Runtime Runtime
	// Connect opens a connection to the portal over a stream from Runtime.Attach. It returns after the portal has answered.
	// The connection uses attach for the data of transfers.
	Connect func(ctx context.Context, stream io.ReadWriteCloser, attach Attach) (Portal, error)
	// Defaults are the values of the fields that a Request leaves empty.
	Defaults Config
	// MaxCPUs, MaxMemoryMiB and MaxDiskMiB are the limits of one sandbox.
	MaxCPUs, MaxMemoryMiB, MaxDiskMiB int
	// Disks reports whether the Runtime limits the size of the disks of sandboxes. If it does not, MaxDiskMiB is not used.
	Disks bool
	// Total limits the sandboxes of all tenant namespaces together. Its Runs is not used.
	Total Quota
	// Boots is how many microVMs may boot at a time, at least 1. Further starts wait for their turn, and the tenant namespaces
	// take turns.
	Boots int
	// HostMemory returns the memory that programs on the host, and so sandboxes, can still have, and the memory that they could
	// have if nothing ran. Both are in bytes. It must not block.
	HostMemory func() (available, total uint64, err error)
	// CheckSpace returns an error that wraps ErrNoSpace if the disk that sandboxes write to has no room for another one besides
	// this many bytes.
	CheckSpace func(bytes uint64) error
	// MakeRoom frees disk space from a reserve if that disk is full. It reports whether it did, so that it is worth trying
	// again what has failed.
	MakeRoom func() bool
	// Quota returns the quota of a tenant namespace.
	Quota func(namespace string) Quota
	// StartTimeout limits the wait of a start for its turn and the boot of its microVM together, up to the guest's first answer.
	StartTimeout time.Duration
	// MaxRunTime is the longest time limit of a run, and the time limit of a run that sets none.
	MaxRunTime time.Duration
	// CodeGrace is how long code that reached its time limit has to react to an interrupt, if its run does not say.
	CodeGrace time.Duration
	// Pool says which microVMs are started in advance.
	Pool PoolOptions
	Log  *slog.Logger
}

// Manager owns the sandboxes of a server. It alone changes their records, and it serializes the operations on each name.
// Call Recover before any other method, and Close at the end.
type Manager struct {
	Options

	// lifetime is canceled by Close. The watchers run under it.
	lifetime    context.Context
	endLifetime context.CancelFunc
	watchers    sync.WaitGroup

	admission admission
	pool      pool
	recovered chan struct{} // closed when Recover has returned

	// interrupts has the runs of code in progress that have an id.
	interrupts interrupts.Set[runID]

	mu      sync.Mutex
	open    bool
	entries map[Name]*entry
	runs    map[string]int // runs in progress, by tenant namespace
}

// NewManager returns a Manager that refuses all work until Recover has returned.
func NewManager(o Options) *Manager {
	lifetime, end := context.WithCancel(context.Background())
	m := &Manager{
		Options: o, lifetime: lifetime, endLifetime: end, recovered: make(chan struct{}),
		admission: admission{slots: max(1, o.Boots), memory: o.HostMemory}, entries: map[Name]*entry{}, runs: map[string]int{},
	}
	m.pool.init(m)
	return m
}

// List returns the records of a tenant namespace, or of all namespaces if namespace is empty, sorted by name.
func (m *Manager) List(namespace string) []Record {
	if namespace == "" {
		return m.records(nil)
	}
	return m.records([]string{namespace})
}

// ListIn returns the records of several tenant namespaces, or of all namespaces if namespaces is empty, sorted by the text
// of their names. Its error is errdefs.ErrUnavailable.
func (m *Manager) ListIn(namespaces []string) ([]Record, error) {
	if err := m.checkOpen(); err != nil {
		return nil, err
	}
	return m.records(namespaces), nil
}

// Get returns the record of a sandbox. Its errors are errdefs.ErrInvalidArgument, ErrNotFound and ErrUnavailable.
func (m *Manager) Get(name Name) (Record, error) {
	if err := name.Validate(); err != nil {
		return Record{}, err
	}
	if err := m.checkOpen(); err != nil {
		return Record{}, err
	}
	m.mu.Lock()
	e := m.entries[name]
	m.mu.Unlock()
	if e != nil {
		if rec := e.record(); rec.ID != "" {
			return rec, nil
		}
	}
	return Record{}, notFound(name)
}

func (m *Manager) records(namespaces []string) []Record {
	m.mu.Lock()
	entries := slices.Collect(maps.Values(m.entries))
	m.mu.Unlock()
	var recs []Record
	for _, e := range entries {
		if rec := e.record(); rec.ID != "" && (len(namespaces) == 0 || slices.Contains(namespaces, rec.Name.Namespace)) {
			recs = append(recs, rec)
		}
	}
	slices.SortFunc(recs, func(a, b Record) int { return strings.Compare(a.Name.String(), b.Name.String()) })
	return recs
}

// Close closes the connections to all sandboxes and leaves the sandboxes running. From then on, the Manager refuses all
// work.
func (m *Manager) Close() {
	m.mu.Lock()
	m.open = false
	entries := slices.Collect(maps.Values(m.entries))
	m.mu.Unlock()
	m.endLifetime()
	for _, e := range entries {
		e.set(e.record(), nil)
	}
	m.pool.disconnect()
	m.watchers.Wait()
}

// checkOpen returns errdefs.ErrUnavailable before Recover and after Close.
func (m *Manager) checkOpen() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.open {
		return fmt.Errorf("the server is starting or stopping; try again in a moment: %w", errdefs.ErrUnavailable)
	}
	return nil
}

// runningEntry returns the entry of a running sandbox.
func (m *Manager) runningEntry(name Name) (*entry, error) {
	if err := name.Validate(); err != nil {
		return nil, err
	}
	if err := m.checkOpen(); err != nil {
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
	case Starting:
		return nil, fmt.Errorf("sandbox %s is starting; try again when its state is running: %w", name, errdefs.ErrFailedPrecondition)
	case Stopping:
		return nil, fmt.Errorf("sandbox %s is stopping; start it again when it has stopped: %w", name, errdefs.ErrFailedPrecondition)
	default:
		return nil, notFound(name)
	}
}

func notFound(name Name) error {
	return fmt.Errorf("sandbox %s does not exist: %w", name, errdefs.ErrNotFound)
}
