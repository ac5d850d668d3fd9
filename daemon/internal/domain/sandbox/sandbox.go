// Package sandbox is the domain of sandboxes: what a sandbox is, which states it goes through, the Manager that moves it
// from one to the next, and the processes that run in it. It knows nothing of containerd, HTTP or a database: other
// packages implement the interfaces declared here.
package sandbox

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/msbd/msbd/daemon/internal/domain/name"
)

// DefaultNamespace is the tenant namespace of a caller who names none.
const DefaultNamespace = "default"

// Name is a sandbox's name within its tenant namespace.
type Name struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Validate checks both parts. The error is errdefs.ErrInvalidArgument.
func (n Name) Validate() error {
	if err := name.Validate("namespace", n.Namespace); err != nil {
		return err
	}
	return name.Validate("sandbox name", n.Name)
}

// Config is what a sandbox is made of, after defaults were applied.
type Config struct {
	// Image as the client names it, such as "microsandbox/python".
	Image string `json:"image"`
	// CPUs is the number of virtual processors, at least 1.
	CPUs int `json:"cpus"`
	// MemoryMiB is the guest's memory in MiB.
	MemoryMiB int `json:"memory_mib"`
	// Env holds NAME=value entries, over those of the image.
	Env []string `json:"env,omitempty"`
	// Workdir is absolute, or empty for the image's.
	Workdir string `json:"workdir,omitempty"`
}

// Diff says in words how other differs from c; empty when they are equal.
func (c Config) Diff(other Config) string {
	var d []string
	if c.Image != other.Image {
		d = append(d, fmt.Sprintf("image is %s, not %s", c.Image, other.Image))
	}
	if c.CPUs != other.CPUs {
		d = append(d, fmt.Sprintf("cpus is %d, not %d", c.CPUs, other.CPUs))
	}
	if c.MemoryMiB != other.MemoryMiB {
		d = append(d, fmt.Sprintf("memory is %d MiB, not %d", c.MemoryMiB, other.MemoryMiB))
	}
	if !slices.Equal(c.Env, other.Env) {
		d = append(d, "envs differ")
	}
	if c.Workdir != other.Workdir {
		d = append(d, fmt.Sprintf("workdir is %q, not %q", c.Workdir, other.Workdir))
	}
	return strings.Join(d, "; ")
}

// State is where a sandbox is in its life.
//
//	starting → running → stopping → (gone)
//	    └────────┴──────────┴→ failed → starting | (gone)
type State string

const (
	// Starting: recorded, its microVM may exist in part.
	Starting State = "starting"
	// Running: its guest answered.
	Running State = "running"
	// Stopping: its microVM is being removed.
	Stopping State = "stopping"
	// Failed: nothing of it exists but this record, which says why.
	Failed State = "failed"
)

// Record is what the store keeps of a sandbox.
type Record struct {
	// ID names the microVM: fresh for each start, and containerd's id too.
	ID     string `json:"id"`
	Name   Name   `json:"name"`
	Config Config `json:"config"`
	State  State  `json:"state"`
	// Reason says why it Failed, in words for everyone who may use it.
	Reason string `json:"reason,omitempty"`
	// Cause is what lay behind the Reason, for administrators: it may name parts of the host.
	Cause     string    `json:"cause,omitempty"`
	CreatedAt time.Time `json:"created_at"`
}

// Store keeps records. A method that returned nil has made its change durable.
type Store interface {
	PutSandbox(Record) error
	DeleteSandbox(id string) error
	Sandboxes() ([]Record, error)
}

// Instance is a microVM that a Runtime found.
type Instance struct {
	ID string
	// Alive says that its guest's main process runs.
	Alive bool
}

// Usage is what a running sandbox uses at one moment.
type Usage struct {
	// CPUTime is what the sandbox consumed since its start.
	CPUTime time.Duration
	// MemoryBytes is what its processes and caches occupy in the guest.
	MemoryBytes uint64
	// DiskBytes is what it wrote over its image.
	DiskBytes uint64
}

// Runtime makes and removes microVMs. Its errors carry errdefs classes.
type Runtime interface {
	// Start boots the microVM and its idle main process. After an error parts of it may exist: the
	// caller removes them.
	Start(ctx context.Context, id string, cfg Config) error
	// Remove ends the microVM and removes all that it held on this host. An unknown id is no error.
	Remove(ctx context.Context, id string) error
	// List finds every microVM of this server, dead ones too.
	List(ctx context.Context) ([]Instance, error)
	// Wait blocks until the microVM has ended, and says why.
	Wait(ctx context.Context, id string) (reason string, err error)
	// Attach opens a byte stream to the portal in the microVM.
	Attach(ctx context.Context, id string) (io.ReadWriteCloser, error)
	// Usage measures a running microVM.
	Usage(ctx context.Context, id string) (Usage, error)
	// ResolveImage says whether sandboxes can be started from the image (errdefs.ErrNotFound).
	ResolveImage(ctx context.Context, image string) error
}
