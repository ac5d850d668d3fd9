// Package rpc serves JSON-RPC 2.0. One table of methods defines the calls that every HTTP path accepts, the tools of
// MCP, the scope checks and the result of rpc.discover. The package decodes requests strictly, authorizes each call,
// calls the sandbox domain, and collects the output of a run into one response. It contains no sandbox logic itself.
// Package daemon creates the Service.
package rpc

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/serve/wire"
)

// Sandboxes is the part of the sandbox domain that the methods use. *sandbox.Manager implements it. Errors have an
// errdefs class, or are sandbox.ErrRunTimeout, sandbox.ErrCommandNotFound or sandbox.ErrCommandNotExecutable.
type Sandboxes interface {
	Start(context.Context, sandbox.Name, sandbox.Request) error
	Stop(context.Context, sandbox.Name) error
	RunCode(context.Context, sandbox.Name, sandbox.Code) (sandbox.Process, error)
	InterruptCode(n sandbox.Name, id string) error
	RunCommand(context.Context, sandbox.Name, sandbox.Command) (sandbox.Process, error)
	// ListIn returns the sandboxes in the namespaces, or in all namespaces if there are none, sorted by Name.String.
	ListIn(namespaces []string) ([]sandbox.Record, error)
	Get(sandbox.Name) (sandbox.Record, error)
	// Metrics measures the sandboxes in the namespaces, or in all namespaces if there are none. If name is not empty, it
	// measures only those of that name.
	Metrics(ctx context.Context, namespaces []string, name string) ([]sandbox.Metrics, error)
	Contexts
	Processes
	Files
}

// Service serves the JSON-RPC methods. Create it with New.
type Service struct {
	sandboxes   Sandboxes
	table       []method // in the order of rpc.discover
	methods     map[string]method
	description jsontext.Value
	metrics     *metrics
}

// New returns a Service and registers its metrics. version is the version of msbd that rpc.discover reports. New returns
// an error if a method has no scope.
func New(sandboxes Sandboxes, version string, registry *prometheus.Registry) (*Service, error) {
	s := &Service{sandboxes: sandboxes}
	s.table = s.declare()
	var err error
	if s.methods, err = index(s.table); err != nil {
		return nil, err
	}
	s.description = describe(s.table, version)
	if s.metrics, err = newMetrics(registry, s.methods); err != nil {
		return nil, err
	}
	return s, nil
}

// Endpoints returns the gateway's endpoints for JSON-RPC, one for each path. All of them accept every method.
func (s *Service) Endpoints() (all []gateway.Endpoint) {
	for _, path := range []string{rpc.Path, rpc.StartPath, rpc.StopPath, rpc.RunCommandPath} {
		all = append(all, gateway.Endpoint{
			Pattern: "POST " + path, Scope: gateway.PerCall, Body: gateway.JSON(rpc.MaxBody), Deadline: gateway.AnswerDeadline,
			Serve: s.serve,
		})
	}
	return all
}

// errBadBody is logged instead of the exact error, which may quote the request.
var errBadBody = errors.New("the body is not strict JSON, or holds no calls or too many")

// refuseBody returns the error for a body without valid calls.
func refuseBody(rpcErr *rpc.Error) error {
	return &gateway.Refusal{Status: rpcerr.HTTPStatus(rpcErr.Code), ClientError: rpcErr, Cause: errBadBody}
}

// serve responds to a single call or a batch.
func (s *Service) serve(c *gateway.Call, w http.ResponseWriter, r *http.Request) error {
	requests, batch, rpcErr := parseBody(c.Body)
	if rpcErr != nil {
		return refuseBody(rpcErr)
	}
	c.CountCalls(len(requests))
	events := acceptsOnlyEvents(r.Header)
	switch {
	case events && batch:
		return refuseBody(&rpc.Error{Code: rpc.CodeInvalidRequest, Message: "a stream of events responds to one request, not to a batch; send the requests of the batch one by one"})
	case events:
		return s.serveEvents(c, w, r, requests[0])
	case !batch:
		req := requests[0]
		result, rpcErr := s.invoke(r.Context(), &call{Call: c, header: w.Header()}, req)
		// A request without an id is a notification and gets no response. The sandbox.* methods are an exception:
		// SDKs omit the id when they start a sandbox, but still wait for the response.
		if req.ID == nil && !strings.HasPrefix(req.Method, "sandbox.") {
			w.WriteHeader(http.StatusNoContent)
			return nil
		}
		return writeResponse(w, result, rpcErr, req.ID)
	}
	c.TakeTurns() // together, the calls may be much work even if each is small
	// Run the calls one after the other, in order: a client may start a sandbox and use it in the same batch.
	separator := "["
	for _, req := range requests {
		result, rpcErr := s.invoke(r.Context(), &call{Call: c}, req)
		if req.ID == nil {
			continue
		}
		if _, err := w.Write([]byte(separator)); err != nil {
			return err
		}
		if err := rpcerr.WriteResponse(w, result, rpcErr, req.ID); err != nil {
			return err
		}
		separator = ","
	}
	if separator == "[" {
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	_, err := w.Write([]byte("]"))
	return err
}

// writeResponse writes the response to a single call.
func writeResponse(w http.ResponseWriter, result jsontext.Value, rpcErr *rpc.Error, id jsontext.Value) error {
	if rpcErr != nil {
		status := rpcerr.HTTPStatus(rpcErr.Code)
		rpcerr.SetHeaders(w.Header(), status, rpcErr)
		w.WriteHeader(status)
	}
	return rpcerr.WriteResponse(w, result, rpcErr, id)
}

// Call calls a method with named params on behalf of the caller of c. It is canceled with ctx. If excerpt is not nil, the
// output of a run is as excerpt says.
func (s *Service) Call(ctx context.Context, c *gateway.Call, method string, params jsontext.Value, excerpt *wire.Excerpt) (jsontext.Value, *rpc.Error) {
	req := parsedRequest{Request: rpc.Request{JSONRPC: rpc.Version, Method: method, Params: params}}
	if params != nil && params.Kind() != '{' {
		req.rpcErr = invalidParams("params must be an object")
	}
	return s.invoke(ctx, &call{Call: c, excerpt: excerpt}, req)
}

// Schemas returns the JSON Schemas of a method's params (given by name) and of its result. Both are nil if there is no
// such method.
func (s *Service) Schemas(name string) (params, result jsontext.Value) {
	m, ok := s.methods[name]
	if !ok {
		return nil, nil
	}
	return encode(m.paramsSchema()), encode(schemaOf(m.result))
}

// CountMessages checks that body is strict JSON and returns how many JSON-RPC messages it holds. Its error is a
// *gateway.Refusal.
func (s *Service) CountMessages(body []byte) (int, error) {
	n, rpcErr := countMessages(body)
	if rpcErr != nil {
		return 0, refuseBody(rpcErr)
	}
	return n, nil
}

// invoke runs one request, or returns why it is not valid, and logs and counts the call.
func (s *Service) invoke(ctx context.Context, c *call, req parsedRequest) (result jsontext.Value, rpcErr *rpc.Error) {
	start := time.Now()
	c.method = unknownMethod
	result, err := s.run(ctx, c, req)
	took := time.Since(start)
	if err != nil {
		rpcErr = rpcerr.JSONRPC(err, c.ID)
	}
	s.metrics.observe(c.method, rpcErr, took)
	c.Log(ctx, c.method, c.namespace, rpcErr, took, err)
	return result, rpcErr
}

// call is one call of a method. run sets method and namespace as soon as they are known, for the log and the metrics.
type call struct {
	*gateway.Call
	method    string
	namespace string
	header    http.Header   // of the response, or nil if it is not that of this call alone
	excerpt   *wire.Excerpt // how much of a run's output is wanted, or nil for all
	// newOutputFile creates a file for the output of a run. It is nil if none is wanted.
	newOutputFile func() *outputFile
	events        *events // nil if the response is not a stream of events
	// outputEvents says that output is sent as events. Otherwise it is part of the result.
	outputEvents bool
}
