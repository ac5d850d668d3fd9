package http

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/name"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// Namespaces returns the tenant namespaces that a request runs in. requested is the namespace that it names, nil if it names
// none. There is one namespace, unless allNamespaces is set and the request names rpc.AllNamespaces: then the namespaces are
// all that the key is limited to, or none if the key is not limited. No other function decides this. The errors are
// errdefs.ErrInvalidArgument and errdefs.ErrPermissionDenied.
func (c *Call) Namespaces(requested *string, allNamespaces bool) ([]string, error) {
	namespaces, err := resolveNamespaces(c.Principal, requested, allNamespaces)
	c.namespaces = strings.Join(namespaces, ",")
	return namespaces, err
}

func resolveNamespaces(caller keys.Principal, requested *string, allNamespaces bool) ([]string, error) {
	var namespace string
	switch {
	case allNamespaces && requested != nil && *requested == rpc.AllNamespaces,
		requested == nil && len(caller.Namespaces) == 1:
		return caller.Namespaces, nil
	case requested == nil:
		namespace = sandbox.DefaultNamespace
	default:
		namespace = *requested
		if err := name.Validate("namespace", namespace); err != nil {
			return nil, err
		}
	}
	if caller.Allows(namespace) {
		return []string{namespace}, nil
	}
	limits := fmt.Sprintf("namespace %q", caller.Namespaces[0])
	if len(caller.Namespaces) > 1 {
		limits = "the namespaces " + quoteAll(caller.Namespaces)
	}
	if requested == nil {
		return nil, fmt.Errorf("this key is limited to %s; the request names no namespace, which means %q; name one of the key's namespaces: %w",
			limits, namespace, errdefs.ErrPermissionDenied)
	}
	return nil, fmt.Errorf("this key is limited to %s; the request names namespace %q: %w", limits, namespace, errdefs.ErrPermissionDenied)
}

// quoteAll returns the quoted names, separated by commas.
func quoteAll(names []string) string {
	quoted := make([]string, len(names))
	for i, name := range names {
		quoted[i] = strconv.Quote(name)
	}
	return strings.Join(quoted, ", ")
}
