// Package sandbox is the domain of sandboxes. It defines what a sandbox is, its states, the Manager that moves it from one
// state to the next, and the processes that run in it. It does not depend on containerd, HTTP or a database: other packages
// implement the interfaces that it declares.
package sandbox

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/name"
)

// DefaultNamespace is the tenant namespace of requests that name none.
const DefaultNamespace = "default"

// ErrNoSpace is the class of the errors of a start for which the server's disk has too little free space. It is an
// errdefs.ErrResourceExhausted. Trying again does not help until somebody has freed space.
var ErrNoSpace error = noSpace{}

type noSpace struct{}

func (noSpace) Error() string { return "the server's disk is almost full" }
func (noSpace) Unwrap() error { return errdefs.ErrResourceExhausted }

// Name is the name of a sandbox with its tenant namespace.
type Name struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Validate returns errdefs.ErrInvalidArgument if either part is not a valid name.
func (n Name) Validate() error {
	if err := name.Validate("namespace", n.Namespace); err != nil {
		return err
	}
	return name.Validate("sandbox name", n.Name)
}

// Template is the part of a configuration that is fixed when the microVM boots.
type Template struct {
	// Image is the image as the client names it, such as "microsandbox/python".
	Image string `json:"image"`
	// CPUs is the number of virtual processors, at least 1.
	CPUs int `json:"cpus"`
	// MemoryMiB is the guest's memory in MiB.
	MemoryMiB int `json:"memory_mib"`
	// DiskMiB is the size of the writable disk in MiB. 0 means that the size is not limited: a record of an earlier version has
	// 0, and so has a sandbox of a server without Options.Disks.
	DiskMiB int `json:"disk_mib,omitempty"`
}

// Binding is the part of a configuration that is decided when a tenant gets the microVM, which may run already.
type Binding struct {
	// Env holds NAME=value entries, which override those of the image. The record of a failed sandbox has none.
	Env []string `json:"env,omitempty"`
	// Workdir is an absolute path, or empty for the working directory of the image. The start creates it.
	Workdir string `json:"workdir,omitempty"`
	// User is the user of everything for which a request names none, as in RunOptions. Empty means the user of the image.
	User string `json:"user,omitempty"`
	// Hostname is an RFC 1123 label. It is empty in a record of an earlier version, which had only DefaultHostname.
	Hostname string `json:"hostname,omitempty"`
}

// Config is the configuration of a sandbox, after the server's defaults are applied.
type Config struct {
	Template
	Binding
}

// DefaultHostname is the hostname of a sandbox whose start names none.
const DefaultHostname = "sandbox"

// environment returns the part of the configuration that applies to every process.
func (c Config) environment() Environment { return Environment{c.Env, c.Workdir} }

// Diff describes how other differs from c. It returns "" if they are equal. A disk without a limit is equal to every disk, so
// that a sandbox of an earlier version can be started again with the configuration that it was started with.
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
	if c.DiskMiB != other.DiskMiB && c.DiskMiB != 0 && other.DiskMiB != 0 {
		d = append(d, fmt.Sprintf("disk is %d MiB, not %d", c.DiskMiB, other.DiskMiB))
	}
	if !slices.Equal(c.Env, other.Env) {
		d = append(d, "envs differ")
	}
	if c.Workdir != other.Workdir {
		d = append(d, fmt.Sprintf("workdir is %q, not %q", c.Workdir, other.Workdir))
	}
	if c.User != other.User {
		d = append(d, fmt.Sprintf("user is %q, not %q", c.User, other.User))
	}
	if a, b := cmp.Or(c.Hostname, DefaultHostname), cmp.Or(other.Hostname, DefaultHostname); a != b {
		d = append(d, fmt.Sprintf("hostname is %s, not %s", a, b))
	}
	return strings.Join(d, "; ")
}

// State is the state of a sandbox.
//
//	starting → running → stopping → (gone)
//	    └────────┴──────────┴→ failed → starting | (gone)
//
// An entry of the pool has no name: it is starting and then pooled, and becomes running, or starting, when a tenant gets it.
type State string

const (
	// Starting means that the sandbox is recorded and that parts of its microVM may exist.
	Starting State = "starting"
	// Running means that the guest has answered.
	Running State = "running"
	// Stopping means that the microVM is being removed.
	Stopping State = "stopping"
	// Failed means that the sandbox has no microVM. Its record says why.
	Failed State = "failed"
	// Pooled means that the microVM waits for a tenant. No sandbox has this state.
	Pooled State = "pooled"
)

// Record is the stored state of a sandbox.
type Record struct {
	// ID is the id of the microVM, also in containerd. Each start creates a new one, for which IsID is true.
	ID     string `json:"id"`
	Name   Name   `json:"name"`
	Config Config `json:"config"`
	State  State  `json:"state"`
	// Reason says why the sandbox failed. Everyone who may use the sandbox may read it.
	Reason string `json:"reason,omitempty"`
	// Cause is the error behind Reason. It is only for administrators, because it may name parts of the host.
	Cause     string    `json:"cause,omitempty"`
	CreatedAt time.Time `json:"created_at"`
	// Origin says how the sandbox was started, once it runs.
	Origin Origin `json:"origin,omitzero"`
	// CPUNanos is the processor time, in nanoseconds, that the microVM had used when the tenant got it.
	CPUNanos int64 `json:"cpu_nanos,omitzero"`
	// Digest is that of the image. Only an entry of the pool has it.
	Digest string `json:"digest,omitempty"`
}

// Source says where the microVM of a sandbox came from.
type Source string

const (
	// FromPool means that a started microVM of the pool was taken.
	FromPool Source = "pool"
	// FromTemplate means that the microVM is a copy of one that was booted before.
	FromTemplate Source = "template"
	// Cold means that the microVM was booted.
	Cold Source = "cold"
)

// Origin says how a sandbox was started. It is zero in a record of an earlier version.
type Origin struct {
	From Source `json:"from"`
	// Why says why the start was not faster. It is empty for FromPool. Everyone who may use the sandbox may read it.
	Why string `json:"why,omitempty"`
}

// Store stores records. When a method returns nil, its change is durable.
type Store interface {
	PutSandbox(Record) error
	DeleteSandbox(id string) error
	Sandboxes() ([]Record, error)

	// PutPool stores the size of the pool of a template, and DeletePool removes it.
	PutPool(PoolSize) error
	DeletePool(Template) error
	Pools() ([]PoolSize, error)
}

// Instance is a microVM that a Runtime found.
type Instance struct {
	ID string
	// Alive reports whether the main process in its guest is running.
	Alive bool
}

// Usage is the current resource usage of a running sandbox.
type Usage struct {
	// CPUTime is the processor time used since the start.
	CPUTime time.Duration
	// MemoryBytes is the memory that processes and caches occupy in the guest.
	MemoryBytes uint64
	// DiskBytes is the size of the data that the sandbox has written on top of its image. It is nil if it is not known,
	// for example because the sandbox has so many files that they are still being counted.
	DiskBytes *uint64
}

// Runtime manages microVMs. Its errors have an errdefs class.
type Runtime interface {
	// Start starts a microVM with an idle main process. t is fixed; hostname may be changed later with SetHostname. It returns
	// how the microVM was started. If it returns an error, parts of the microVM may exist; the caller must call Remove.
	Start(ctx context.Context, id string, t Template, hostname string) (Origin, error)
	// SetHostname changes the hostname of a running microVM.
	SetHostname(ctx context.Context, id, hostname string) error
	// Remove ends a microVM and removes all its resources on this host. It is not an error if id is unknown.
	Remove(ctx context.Context, id string) error
	// List returns every microVM of this server, including dead ones.
	List(ctx context.Context) ([]Instance, error)
	// Wait blocks until a microVM has ended, and returns why it ended.
	Wait(ctx context.Context, id string) (reason string, err error)
	// Attach opens a byte stream to the portal in a microVM. If transfer is not empty, the stream is for the data of the
	// transfer with this id, which the portal has offered.
	Attach(ctx context.Context, id, transfer string) (io.ReadWriteCloser, error)
	// Usage returns the resource usage of a running microVM.
	Usage(ctx context.Context, id string) (Usage, error)
	// ResolveImage returns the digest of an image from which sandboxes can be started, and errdefs.ErrNotFound if there is no
	// such image.
	ResolveImage(ctx context.Context, image string) (digest string, err error)
}
