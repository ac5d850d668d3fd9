package rpc

import (
	"context"
	"fmt"
	"reflect"
	"runtime/debug"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// encoding is how results and events are written. The output of a program need not be valid UTF-8: each invalid byte becomes
// U+FFFD. Maps are in the order of their keys, so that equal results have equal texts.
var encoding = json.JoinOptions(jsontext.AllowInvalidUTF8(true), json.Deterministic(true))

// method is an entry of the table of JSON-RPC methods. A caller needs a key with the method's scope and can use the
// method only in the namespaces of that key.
type method struct {
	name  string
	scope keys.Scope
	// params are the parameters, in the order in which a request passes them by position.
	params []param
	result reflect.Type
	// prepare decodes params. It returns the namespace that they name, nil if they name none, and a handler that runs
	// the call with them.
	prepare func(raw jsontext.Value) (namespace *string, run handler, err *rpc.Error)
	// allNamespaces reports whether a request may name rpc.AllNamespaces.
	allNamespaces bool
	// events is how the method uses events other than its result.
	events eventUse
}

// eventUse is how a method uses events other than its result.
type eventUse string

const (
	noEvents       eventUse = ""
	optionalEvents eventUse = "optional" // it can also be called without a stream of events
	requiredEvents eventUse = "required"
)

// with returns the method with another use of events.
func (m method) with(events eventUse) method {
	m.events = events
	return m
}

// handler runs one call in namespaces that its caller may use. There is one namespace, unless the request names
// rpc.AllNamespaces: then namespaces are all that the key is limited to, or empty for every existing namespace if the
// key is not limited.
type handler func(ctx context.Context, c *call, namespaces []string) (result any, err error)

// namespaced is the constraint on params types: each has a namespace.
type namespaced[P any] interface {
	*P
	GetNamespace() *string
}

// define returns the table entry of a method that runs in one namespace. run gets the decoded params.
func define[P, R any, PP namespaced[P]](name string, scope keys.Scope, run func(context.Context, *call, string, P) (R, error)) method {
	return methodOf[P, R, PP](name, scope, func(ctx context.Context, c *call, namespaces []string, p P) (R, error) {
		return run(ctx, c, namespaces[0], p)
	})
}

// defineAllNamespaces is like define, but for a method that also accepts rpc.AllNamespaces; run gets the namespaces as
// described at handler.
func defineAllNamespaces[P, R any, PP namespaced[P]](name string, scope keys.Scope, run func(context.Context, *call, []string, P) (R, error)) method {
	m := methodOf[P, R, PP](name, scope, run)
	m.allNamespaces = true
	return m
}

func methodOf[P, R any, PP namespaced[P]](name string, scope keys.Scope, run func(context.Context, *call, []string, P) (R, error)) method {
	params := membersOf(reflect.TypeFor[P]())
	return method{
		name: name, scope: scope, params: params, result: reflect.TypeFor[R](),
		prepare: func(raw jsontext.Value) (*string, handler, *rpc.Error) {
			p := PP(new(P))
			if err := decodeParams(raw, params, p); err != nil {
				return nil, nil, err
			}
			return p.GetNamespace(), func(ctx context.Context, c *call, namespaces []string) (any, error) {
				return run(ctx, c, namespaces, *p)
			}, nil
		},
	}
}

// index returns the methods of a table by name. It is an error if a method has no scope or two have the same name.
func index(table []method) (map[string]method, error) {
	methods := map[string]method{}
	for _, m := range table {
		if m.scope == "" {
			return nil, fmt.Errorf("method %s has no scope: anyone could call it", m.name)
		}
		if _, duplicate := methods[m.name]; duplicate {
			return nil, fmt.Errorf("method %s is declared twice", m.name)
		}
		methods[m.name] = m
	}
	return methods, nil
}

// run authorizes a request and runs it. Handlers are called only from here.
func (s *Service) run(ctx context.Context, c *call, req parsedRequest) (result jsontext.Value, err error) {
	// A panic fails only this call, not the other calls of a batch.
	defer func() {
		if v := recover(); v != nil {
			result, err = nil, fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	if req.rpcErr != nil {
		return nil, req.rpcErr
	}
	// Do not start the remaining calls of a batch after the key was revoked, the client left or the server is stopping.
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if req.Method == rpc.MethodDiscover {
		c.method = rpc.MethodDiscover
		return s.description, nil // needs no scope: every key may read it
	}
	m, ok := s.methods[req.Method]
	if !ok {
		return nil, &rpc.Error{Code: rpc.CodeMethodNotFound, Message: fmt.Sprintf("there is no method %q; %s lists the methods", bounded.Short(req.Method), rpc.MethodDiscover)}
	}
	c.method = m.name
	if !c.Principal.Has(m.scope) {
		return nil, fmt.Errorf("%s needs a key with the scope %s: %w", m.name, m.scope, errdefs.ErrPermissionDenied)
	}
	requested, run, rpcErr := m.prepare(req.Params)
	if rpcErr != nil {
		return nil, rpcErr
	}
	namespaces, err := c.Namespaces(requested, m.allNamespaces)
	if err != nil {
		return nil, err
	}
	if c.namespace = strings.Join(namespaces, ","); len(namespaces) == 0 {
		c.namespace = rpc.AllNamespaces
	}
	switch {
	case c.events != nil:
		if err := c.events.begin(); err != nil {
			return nil, err
		}
		c.outputEvents = m.events != noEvents
	case m.events == requiredEvents:
		return nil, &rpc.Error{Code: rpc.CodeInvalidRequest, Message: fmt.Sprintf("%s responds only with a stream of events; send it alone, with the header Accept: %s",
			m.name, rpc.EventStream)}
	}
	v, err := run(ctx, c, namespaces)
	if ctx.Err() != nil && err == ctx.Err() {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, err
	}
	return json.Marshal(v, encoding)
}
