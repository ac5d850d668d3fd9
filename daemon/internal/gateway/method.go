package gateway

import (
	"context"
	"fmt"
	"reflect"
	"runtime/debug"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/sandbox"
	"github.com/msbd/msbd/daemon/internal/token"
)

// scope is a permission that a key may be limited to.
type scope string

const (
	scopeRead   scope = "sandbox:read"   // measure sandboxes
	scopeRun    scope = "sandbox:run"    // run code and commands in them
	scopeManage scope = "sandbox:manage" // start and stop them
)

// permits says whether a caller has a scope. A key without a list of scopes has all.
func permits(caller token.Principal, s scope) bool {
	return caller.Scopes == nil || slices.Contains(caller.Scopes, string(s))
}

// method is an entry of the table that drives every route. A caller needs its scope and may use it
// in the namespaces of the key.
type method struct {
	name  string
	scope scope
	// params are what it takes, in the order of positional params.
	params []param
	// result is the type of what it answers.
	result reflect.Type
	// prepare decodes params into what is to be run, and returns the namespace that they name.
	prepare func(raw jsontext.Value) (namespace *string, run handler, err *rpc.Error)
	// anywhere says that rpc.AllNamespaces may be named. It reaches the handler as "" unless the
	// key is limited to one namespace: then that one does.
	anywhere bool
}

// handler runs one call in a namespace that its caller may use.
type handler func(ctx context.Context, namespace string) (result any, err error)

// namespaced is what every params type says of itself.
type namespaced[P any] interface {
	*P
	GetNamespace() *string
}

// define makes a table's entry from a handler of decoded params.
func define[P, R any, PP namespaced[P]](name string, scope scope, run func(context.Context, string, P) (R, error)) method {
	params := membersOf(reflect.TypeFor[P]())
	return method{
		name: name, scope: scope, params: params, result: reflect.TypeFor[R](),
		prepare: func(raw jsontext.Value) (*string, handler, *rpc.Error) {
			p := PP(new(P))
			if err := decodeParams(raw, params, p); err != nil {
				return nil, nil, err
			}
			return p.GetNamespace(), func(ctx context.Context, namespace string) (any, error) {
				return run(ctx, namespace, *p)
			}, nil
		},
	}
}

// index checks a table and makes it searchable.
func index(table []method) (map[string]method, error) {
	methods := map[string]method{}
	for _, m := range table {
		if m.scope == "" {
			return nil, fmt.Errorf("method %s has no scope: anyone could call it", m.name)
		}
		if _, twice := methods[m.name]; twice {
			return nil, fmt.Errorf("method %s is declared twice", m.name)
		}
		methods[m.name] = m
	}
	return methods, nil
}

// call is one request to a method. Its last two fields are filled as they become known, for the log.
type call struct {
	caller            token.Principal
	method, namespace string
}

// run authorises a request and runs it. It is the only way to a handler.
func (g *Gateway) run(ctx context.Context, c *call, req rpc.Request) (result jsontext.Value, err error) {
	// A panic costs its own call, not the others of a batch.
	defer func() {
		if v := recover(); v != nil {
			result, err = nil, fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	if req.Method == rpc.MethodDiscover {
		c.method = rpc.MethodDiscover
		return g.description, nil // for every key
	}
	m, ok := g.methods[req.Method]
	if !ok {
		return nil, &rpc.Error{Code: rpc.CodeMethodNotFound, Message: fmt.Sprintf("there is no method %q", shorten(req.Method))}
	}
	c.method = m.name
	if !permits(c.caller, m.scope) {
		return nil, fmt.Errorf("%s needs a key with the scope %s: %w", m.name, m.scope, errdefs.ErrPermissionDenied)
	}
	named, run, bad := m.prepare(req.Params)
	if bad != nil {
		return nil, bad
	}
	if c.namespace, err = resolveNamespace(c.caller, named, m.anywhere); err != nil {
		return nil, err
	}
	v, err := run(ctx, c.namespace)
	if err != nil {
		return nil, err
	}
	// What a program printed need not be UTF-8: what is not becomes U+FFFD.
	return json.Marshal(v, jsontext.AllowInvalidUTF8(true))
}

// resolveNamespace is the namespace in which a call runs; "" is all of them. Its errors are
// errdefs.ErrInvalidArgument and errdefs.ErrPermissionDenied.
func resolveNamespace(caller token.Principal, named *string, anywhere bool) (string, error) {
	switch {
	case anywhere && named != nil && *named == rpc.AllNamespaces:
		return caller.Namespace, nil
	case named == nil && caller.Namespace != "":
		return caller.Namespace, nil
	case named == nil:
		return sandbox.DefaultNamespace, nil
	}
	if err := sandbox.ValidateName("namespace", *named); err != nil {
		return "", err
	}
	if !caller.Allows(*named) {
		return "", fmt.Errorf("this key is limited to namespace %q; the request names namespace %q: %w",
			caller.Namespace, *named, errdefs.ErrPermissionDenied)
	}
	return *named, nil
}
