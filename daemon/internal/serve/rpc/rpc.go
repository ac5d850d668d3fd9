// Package rpc serves JSON-RPC 2.0: one table of methods drives the HTTP paths, the tools of MCP, the scope check and
// rpc.discover. It decodes strictly, authorises each call, calls the sandbox domain, and collects the output of a run
// into one answer. It decides nothing about sandboxes. Package daemon makes the Service.
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
)

// Sandboxes is what the methods ask of the domain; a *sandbox.Manager is one. Errors carry errdefs classes, or are
// sandbox.ErrRunTimeout and sandbox.ErrCommandNotFound.
type Sandboxes interface {
	Start(context.Context, sandbox.Name, sandbox.Request) error
	Stop(context.Context, sandbox.Name) error
	RunCode(context.Context, sandbox.Name, sandbox.Code) (sandbox.Process, error)
	RunCommand(context.Context, sandbox.Name, sandbox.Command) (sandbox.Process, error)
	Metrics(ctx context.Context, namespace, name string) ([]sandbox.Metrics, error)
}

// Service is the table of methods. Make it with New.
type Service struct {
	sandboxes   Sandboxes
	table       []method // in the order of rpc.discover
	methods     map[string]method
	description jsontext.Value
	metrics     *metrics
}

// New makes a Service, which adds its metrics to a registry. It fails if a method has no scope.
func New(sandboxes Sandboxes, registry *prometheus.Registry) (*Service, error) {
	s := &Service{sandboxes: sandboxes}
	s.table = s.declare()
	var err error
	if s.methods, err = index(s.table); err != nil {
		return nil, err
	}
	s.description = describe(s.table)
	if s.metrics, err = newMetrics(registry, s.methods); err != nil {
		return nil, err
	}
	return s, nil
}

// Endpoints are the HTTP paths of JSON-RPC. Each takes every method.
func (s *Service) Endpoints() (all []gateway.Endpoint) {
	for _, path := range []string{rpc.Path, rpc.StartPath, rpc.StopPath, rpc.RunCommandPath} {
		all = append(all, gateway.Endpoint{
			Pattern: "POST " + path, Scope: gateway.PerCall, Body: gateway.JSON(rpc.MaxBody), Deadline: gateway.AnswerDeadline,
			Serve: s.serve,
		})
	}
	return all
}

// errBadBody stands in the log for what a client sent.
var errBadBody = errors.New("the body is not strict JSON, or holds no calls or too many")

// refuseBody refuses a body that holds no calls.
func refuseBody(bad *rpc.Error) error {
	return &gateway.Refusal{Status: rpcerr.HTTPStatus(bad.Code), ClientError: bad, Cause: errBadBody}
}

// serve answers a call, or a batch of some.
func (s *Service) serve(c *gateway.Call, w http.ResponseWriter, r *http.Request) error {
	requests, batch, bad := parseBody(c.Body)
	if bad != nil {
		return refuseBody(bad)
	}
	c.CountCalls(len(requests))
	if !batch {
		req := requests[0]
		result, failed := s.invoke(r.Context(), c, req)
		switch {
		// SDKs omit the id when they start a sandbox, and wait for the answer all the same.
		case req.ID == nil && !strings.HasPrefix(req.Method, "sandbox."):
			w.WriteHeader(http.StatusNoContent)
			return nil
		case failed != nil:
			status := rpcerr.HTTPStatus(failed.Code)
			rpcerr.SetHeaders(w.Header(), status, failed)
			w.WriteHeader(status)
		}
		return rpcerr.WriteResponse(w, result, failed, req.ID)
	}
	// One after the other, in the order of the batch: a client may start a sandbox and use it in one.
	separator := "["
	for _, req := range requests {
		result, failed := s.invoke(r.Context(), c, req)
		if req.ID == nil {
			continue
		}
		if _, err := w.Write([]byte(separator)); err != nil {
			return err
		}
		if err := rpcerr.WriteResponse(w, result, failed, req.ID); err != nil {
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

// Call calls a method with named params for whoever made the request c. It ends when ctx does.
func (s *Service) Call(ctx context.Context, c *gateway.Call, method string, params jsontext.Value) (jsontext.Value, *rpc.Error) {
	req := parsedRequest{Request: rpc.Request{JSONRPC: rpc.Version, Method: method, Params: params}}
	if params != nil && params.Kind() != '{' {
		req.bad = invalidParams("params must be an object")
	}
	return s.invoke(ctx, c, req)
}

// Schemas returns the JSON Schemas of a method's params, as an object, and of its result. They are nil if
// there is no such method.
func (s *Service) Schemas(name string) (params, result jsontext.Value) {
	m, ok := s.methods[name]
	if !ok {
		return nil, nil
	}
	return encode(m.paramsSchema()), encode(schemaOf(m.result))
}

// CountMessages reads a body as strict JSON, and returns how many messages of JSON-RPC it holds. Its error is a
// *gateway.Refusal.
func (s *Service) CountMessages(body []byte) (int, error) {
	n, bad := countMessages(body)
	if bad != nil {
		return 0, refuseBody(bad)
	}
	return n, nil
}

// invoke runs one request, if it is one, and logs and counts the call.
func (s *Service) invoke(ctx context.Context, c *gateway.Call, req parsedRequest) (result jsontext.Value, failed *rpc.Error) {
	began := time.Now()
	call := &call{Call: c, method: unknownMethod}
	result, err := s.run(ctx, call, req)
	took := time.Since(began)
	if err != nil {
		failed = rpcerr.JSONRPC(err, c.ID)
	}
	s.metrics.call(call.method, failed, took)
	c.Log(ctx, call.method, call.namespace, failed, took, err)
	return result, failed
}

// call is one request to a method. Its fields are filled as they become known, for the log.
type call struct {
	*gateway.Call
	method    string
	namespace string
}
