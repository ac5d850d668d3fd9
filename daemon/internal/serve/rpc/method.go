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
	"github.com/msbd/msbd/daemon/internal/domain/name"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
)

// method is an entry of the table that drives every route. A caller needs its scope and may use it
// in the namespaces of the key.
type method struct {
	name  string
	scope keys.Scope
	// params are what it takes, in the order of positional params.
	params []param
	// result is the type of what it answers.
	result reflect.Type
	// prepare decodes params into what is to be run, and returns the namespace that they name.
	prepare func(raw jsontext.Value) (namespace *string, run handler, err *rpc.Error)
	// anywhere says that rpc.AllNamespaces may be named.
	anywhere bool
}

// handler runs one call in namespaces that its caller may use: one, or, for rpc.AllNamespaces, all to
// which the key is limited, or none for every one that there is.
type handler func(ctx context.Context, c *gateway.Call, namespaces []string) (result any, err error)

// namespaced is what every params type says of itself.
type namespaced[P any] interface {
	*P
	GetNamespace() *string
}

// define makes a table's entry from a handler of decoded params that runs in one namespace.
func define[P, R any, PP namespaced[P]](name string, scope keys.Scope, run func(context.Context, *gateway.Call, string, P) (R, error)) method {
	return methodOf[P, R, PP](name, scope, func(ctx context.Context, c *gateway.Call, namespaces []string, p P) (R, error) {
		return run(ctx, c, namespaces[0], p)
	})
}

// defineAnywhere is define for a handler of any number of namespaces.
func defineAnywhere[P, R any, PP namespaced[P]](name string, scope keys.Scope, run func(context.Context, *gateway.Call, []string, P) (R, error)) method {
	m := methodOf[P, R, PP](name, scope, run)
	m.anywhere = true
	return m
}

func methodOf[P, R any, PP namespaced[P]](name string, scope keys.Scope, run func(context.Context, *gateway.Call, []string, P) (R, error)) method {
	params := membersOf(reflect.TypeFor[P]())
	return method{
		name: name, scope: scope, params: params, result: reflect.TypeFor[R](),
		prepare: func(raw jsontext.Value) (*string, handler, *rpc.Error) {
			p := PP(new(P))
			if err := decodeParams(raw, params, p); err != nil {
				return nil, nil, err
			}
			return p.GetNamespace(), func(ctx context.Context, c *gateway.Call, namespaces []string) (any, error) {
				return run(ctx, c, namespaces, *p)
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

// run authorises a request and runs it. It is the only way to a handler.
func (s *Service) run(ctx context.Context, c *call, req parsedRequest) (result jsontext.Value, err error) {
	// A panic costs its own call, not the others of a batch.
	defer func() {
		if v := recover(); v != nil {
			result, err = nil, fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	if req.bad != nil {
		return nil, req.bad
	}
	// The others of a batch are not begun once the key or the server has ended.
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if req.Method == rpc.MethodDiscover {
		c.method = rpc.MethodDiscover
		return s.description, nil // for every key
	}
	m, ok := s.methods[req.Method]
	if !ok {
		return nil, &rpc.Error{Code: rpc.CodeMethodNotFound, Message: fmt.Sprintf("there is no method %q", rpcerr.Shorten(req.Method))}
	}
	c.method = m.name
	if !c.Principal.Has(m.scope) {
		return nil, fmt.Errorf("%s needs a key with the scope %s: %w", m.name, m.scope, errdefs.ErrPermissionDenied)
	}
	named, run, bad := m.prepare(req.Params)
	if bad != nil {
		return nil, bad
	}
	namespaces, err := resolveNamespaces(c.Principal, named, m.anywhere)
	if err != nil {
		return nil, err
	}
	if c.namespace = strings.Join(namespaces, ","); len(namespaces) == 0 {
		c.namespace = rpc.AllNamespaces
	}
	v, err := run(ctx, c.Call, namespaces)
	if err != nil {
		return nil, err
	}
	// What a program printed need not be UTF-8: what is not becomes U+FFFD.
	return json.Marshal(v, jsontext.AllowInvalidUTF8(true))
}

// resolveNamespaces is where a call runs, as a handler takes it. No other place decides that. Its
// errors are errdefs.ErrInvalidArgument and errdefs.ErrPermissionDenied.
func resolveNamespaces(caller keys.Principal, named *string, anywhere bool) ([]string, error) {
	var namespace string
	switch {
	case anywhere && named != nil && *named == rpc.AllNamespaces,
		named == nil && len(caller.Namespaces) == 1:
		return caller.Namespaces, nil
	case named == nil:
		namespace = sandbox.DefaultNamespace
	default:
		namespace = *named
		if err := name.Validate("namespace", namespace); err != nil {
			return nil, err
		}
	}
	if caller.Allows(namespace) {
		return []string{namespace}, nil
	}
	limits := fmt.Sprintf("namespace %q", caller.Namespaces[0])
	if len(caller.Namespaces) > 1 {
		limits = fmt.Sprintf("the namespaces %q", caller.Namespaces)
	}
	if named == nil {
		return nil, fmt.Errorf("this key is limited to %s; the request names none, which means %q: name one of them: %w",
			limits, namespace, errdefs.ErrPermissionDenied)
	}
	return nil, fmt.Errorf("this key is limited to %s; the request names namespace %q: %w", limits, namespace, errdefs.ErrPermissionDenied)
}
