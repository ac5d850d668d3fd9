// Package name holds the rule for the names of sandboxes and tenant namespaces. API keys, sandboxes and
// the configuration share it.
package name

import (
	"fmt"
	"regexp"

	"github.com/containerd/errdefs"
)

// Pattern is the regular expression that every name matches.
const Pattern = `^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$`

var nameRE = regexp.MustCompile(Pattern)

// Validate checks the name of a sandbox or of a tenant namespace; what says which ("sandbox name").
// The error is errdefs.ErrInvalidArgument.
func Validate(what, name string) error {
	if nameRE.MatchString(name) {
		return nil
	}
	if len(name) > 80 {
		name = name[:80] + "…"
	}
	return fmt.Errorf("%s %q: use 1 to 63 of A-Z, a-z, 0-9, - and _, beginning with a letter or a digit: %w",
		what, name, errdefs.ErrInvalidArgument)
}
