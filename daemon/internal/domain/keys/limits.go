package keys

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/name"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

var nameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$`)

// checkName returns an error if name is not a valid name of a key. The empty string is valid and means no name.
func checkName(name string) error {
	if name == "" || nameRE.MatchString(name) {
		return nil
	}
	return fmt.Errorf("key name %q: use 1 to 63 characters of A-Z, a-z, 0-9, -, _ and ., and begin with a letter or digit: %w",
		bounded.Short(name), errdefs.ErrInvalidArgument)
}

// cleanNamespaces returns namespaces sorted and without duplicates, or an error if one is not a valid name.
func cleanNamespaces(namespaces []string) ([]string, error) {
	for _, ns := range namespaces {
		if err := name.Validate("namespace", ns); err != nil {
			return nil, err
		}
	}
	return sorted(namespaces), nil
}

// cleanScopes returns scopes sorted and without duplicates, or an error if one is unknown.
func cleanScopes(scopes []Scope) ([]Scope, error) {
	for _, s := range scopes {
		if !slices.Contains(Scopes, s) {
			return nil, fmt.Errorf("unknown scope %q: choose from %s, or give none for a key that may do everything: %w",
				bounded.Short(string(s)), joinScopes(Scopes, ", "), errdefs.ErrInvalidArgument)
		}
	}
	return sorted(scopes), nil
}

// sorted returns a sorted copy of values without duplicates.
func sorted[T ~string](values []T) []T {
	values = slices.Clone(values)
	slices.Sort(values)
	return slices.Compact(values)
}

func joinScopes(scopes []Scope, sep string) string {
	var b strings.Builder
	for n, s := range scopes {
		if n > 0 {
			b.WriteString(sep)
		}
		b.WriteString(string(s))
	}
	return b.String()
}
