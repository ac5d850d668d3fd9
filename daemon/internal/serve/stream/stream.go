// Package stream serves the files of sandboxes as HTTP requests, and their processes and ports as WebSockets. Nothing that it
// transfers is held in memory. Package daemon creates the endpoints.
package stream

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// Sandboxes is the part of the sandbox domain that the endpoints use. *sandbox.Manager implements it.
type Sandboxes interface {
	StatFile(ctx context.Context, name sandbox.Name, path sandbox.Path, xattrs bool) (sandbox.FileInfo, error)
	ReadFile(ctx context.Context, name sandbox.Name, path sandbox.Path, offset, length int64) (sandbox.FileInfo, io.ReadCloser, error)
	WriteFile(ctx context.Context, name sandbox.Name, path sandbox.Path, o sandbox.WriteOptions, data io.Reader) (info sandbox.FileInfo, created bool, err error)
	RemoveFile(ctx context.Context, name sandbox.Name, path sandbox.Path, recursive bool) error
	ReadTree(ctx context.Context, name sandbox.Name, path sandbox.Path) (io.ReadCloser, error)
	WriteTree(ctx context.Context, name sandbox.Name, path sandbox.Path, keepOwners bool, archive io.Reader) (entries uint64, err error)

	StartProcess(ctx context.Context, name sandbox.Name, req sandbox.ProcessRequest) (sandbox.Process, error)
	AttachProcess(ctx context.Context, name sandbox.Name, id sandbox.ProcessID, o sandbox.AttachOptions) (sandbox.Process, error)
	WriteInput(ctx context.Context, name sandbox.Name, id sandbox.ProcessID, data io.Reader, end bool) error
	SignalProcess(ctx context.Context, name sandbox.Name, id sandbox.ProcessID, signal int, all bool) error
	ResizeTerminal(ctx context.Context, name sandbox.Name, id sandbox.ProcessID, size sandbox.TerminalSize) error
	Dial(ctx context.Context, name sandbox.Name, address sandbox.Address) (sandbox.Conn, error)
}

type service struct{ sandboxes Sandboxes }

// maxFile is the limit for the body of a request with a file. The disk of the sandbox is the real limit.
const maxFile = 1<<63 - 1

// Endpoints returns the gateway's endpoints for files and WebSockets.
func Endpoints(sandboxes Sandboxes) []gateway.Endpoint {
	s := &service{sandboxes}
	all := []gateway.Endpoint{
		{Pattern: "GET " + rpc.FilesPath, Scope: keys.ScopeFiles, Serve: s.getFile},
		{Pattern: "PUT " + rpc.FilesPath, Scope: keys.ScopeFiles, Serve: s.putFile, Body: gateway.Stream(maxFile)},
		{Pattern: "DELETE " + rpc.FilesPath, Scope: keys.ScopeFiles, Serve: s.deleteFile},
		{Pattern: "GET " + rpc.ExecPath, Scope: keys.ScopeExec, Serve: s.exec, WebSocket: true},
		{Pattern: "GET " + rpc.PortPath, Scope: keys.ScopeExec, Serve: s.port, WebSocket: true},
	}
	for i := range all {
		all[i].Deadline = gateway.AnswerDeadline
	}
	return all
}

// parameters are the parameters in the query of a request.
type parameters map[string][]string

// target returns the sandbox that a request names, and its parameters other than namespace. allowed are the parameters that
// the request may have.
func target(c *gateway.Call, r *http.Request, allowed ...string) (sandbox.Name, parameters, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return sandbox.Name{}, nil, fmt.Errorf("the query is not valid; encode special characters as %%XX: %w", errdefs.ErrInvalidArgument)
	}
	for _, name := range slices.Sorted(maps.Keys(query)) {
		switch {
		case name != "namespace" && !slices.Contains(allowed, name):
			return sandbox.Name{}, nil, fmt.Errorf("%q is not a parameter of this request: %w", bounded.Short(name), errdefs.ErrInvalidArgument)
		case len(query[name]) > 1:
			return sandbox.Name{}, nil, fmt.Errorf("give the parameter %s only once: %w", name, errdefs.ErrInvalidArgument)
		}
	}
	params := parameters(query)
	var requested *string
	if namespace, ok := params.get("namespace"); ok {
		requested = &namespace
	}
	namespaces, err := c.Namespaces(requested, false)
	if err != nil {
		return sandbox.Name{}, nil, err
	}
	name := sandbox.Name{Namespace: namespaces[0], Name: r.PathValue("name")}
	return name, params, name.Validate()
}

func (p parameters) get(name string) (value string, ok bool) {
	values := p[name]
	if len(values) == 0 {
		return "", false
	}
	return values[0], true
}

// flag returns a parameter that is true or false. If it is absent, it is false.
func (p parameters) flag(name string) (bool, error) {
	switch value, ok := p.get(name); {
	case !ok, value == "false":
		return false, nil
	case value == "true":
		return true, nil
	}
	return false, fmt.Errorf("%s must be true or false: %w", name, errdefs.ErrInvalidArgument)
}
